"""Write run folders with invented numbers, without training, for tests that read the folders of runs."""

import dataclasses
import json
import re
import zlib
from pathlib import Path

import numpy as np

import config
import records
import runs
from config import Options


def write_run(root: Path, arch="resnet14", mode="bn_only", seed=0, epochs=4, analysis=True, **more) -> Path:
    """Write a run folder as train.py and analysis.py would, without a checkpoint, and return its path.

    Its numbers are plausible and drawn at random, with the options as the seed. `more` may give options and
    fields of the network's spec, of config.json and of summary.json.
    """
    milestones = more.pop("milestones", (epochs // 2, 3 * epochs // 4))
    options = Options(arch=arch, mode=mode, seed=seed, epochs=epochs, milestones=tuple(milestones))
    options = dataclasses.replace(options, **{k: v for k, v in more.items() if k in config.FIELDS})
    folder = root / runs.run_name(options, options.data)
    folder.mkdir(parents=True)
    rng = np.random.RandomState(zlib.crc32(f"{arch}-{mode}-{seed}-{options}".encode()))
    depth, width = (int(n or 1) for n in re.match(r"[a-z]+(\d+)(?:_w(\d+))?", arch).groups())
    total, bn = 13_000 * depth * width**2, 76 * depth * width
    trained = {"all": total, "none": 0, "output": 650}.get(mode, bn + 650 * ("output" in mode))
    top = {"all": 91, "random": 24, "none": 11, "output": 30}.get(mode, 40 + 5 * np.log2(depth * width / 8))
    rows = list(make_epochs(min(top + 3 * ("+" in mode) + rng.normal(), 99), options.epochs, rng))
    described = make_config(options, more)
    summary = {
        "status": "done",
        "why": None,
        "data": described.spec.data,
        "data_title": described.data_title,
        "arch": options.arch,
        "mode": options.mode,
        "seed": options.seed,
        "variant": dict(described.variant),
        "params_total": total,
        "params_trained": trained,
        "final_test_acc": rows[-1].test_acc,
        "best_test_acc": max(row.test_acc for row in rows),
        "epochs_done": options.epochs,
        "train_s": sum(row.epoch_s for row in rows),
        "startup_s": 12.5,
        "peak_memory_bytes": 2**30 + depth * 2**20,
        "checkpoint_bytes": 4 * trained + 8 * bn + 2000,
        "full_bytes": 4 * total + 8 * bn,
        "frozen_sha256": "0" * 64,
    }
    own = {k: v for k, v in more.items() if k in records.Summary.model_fields and k not in config.FIELDS}
    summary = records.Summary(**(summary | own))
    (folder / "config.json").write_text(described.to_json())
    (folder / "metrics.jsonl").write_text("".join(row.to_json(None) for row in rows))
    (folder / "summary.json").write_text(summary.to_json())
    if analysis:
        made = make_analysis(mode, depth, summary.final_test_acc, rng)
        (folder / "analysis.json").write_text(made.to_json())
    return folder


def make_config(options: Options, more: dict) -> records.Config:
    """Return the Config of a run with these options; `more` overrides its fields and those of its spec."""
    shared = [name for name in records.NetworkSpec.model_fields if name in config.FIELDS]
    spec = {
        **{name: getattr(options, name) for name in shared},
        "image_size": options.image_size or 32,
        "fingerprint": "21d441f3",
        "classes": ("cat", "dog"),
        "mean": (125.0, 123.0, 114.0),
        "std": (63.0, 62.0, 67.0),
        "train_images": options.train_subset or 50000,
        "val_images": options.val_split or 0,
        "dtype": options.dtype or "bf16",
        "device": "cuda",
        "compiled": True,
        "processes": 1,
    }
    described = {
        "options": options,
        "spec": spec | {k: v for k, v in more.items() if k in spec and k not in shared},
        "parent": None,
        "data_title": "CIFAR-10",
        "frozen_sha256": "0" * 64,
        "initial_sha256": None,
        "device_name": "NVIDIA H200",
        "versions": {"python": "3.11.7", "cuda": "13.0", "torch": "2.13.0"},
        "git_commit": "ab12",
    }
    described |= {k: v for k, v in more.items() if k in records.Config.model_fields}
    return records.Config(**(described | {"spec": records.NetworkSpec(**described["spec"])}))


def make_epochs(top: float, epochs: int, rng: np.random.RandomState):
    """Yield epochs whose accuracies rise to about `top` percent, with less noise in the second half."""
    for epoch in range(1, epochs + 1):
        late = epoch > epochs // 2
        share = (1 - np.exp(-12 * epoch / epochs)) * (1 if late else 0.93)
        accs = [min(max(10.0, top * share + rng.normal() * (0.2 if late else 1)), 100.0) for _ in range(2)]
        yield records.Epoch(
            epoch=epoch,
            lr=0.1,
            train_loss=2.3 - 2.1 * accs[0] / 100,
            train_acc=accs[0],
            test_loss=2.3 - 2.1 * accs[1] / 100,
            test_acc=round(accs[1], 2),
            epoch_s=3 + rng.rand(),
            images_per_s=9000 + 100 * rng.rand(),
        )


def make_analysis(mode: str, depth: int, acc: float | None, rng: np.random.RandomState) -> records.Analysis:
    """Return an Analysis with random contents; its test accuracy is `acc` percent, or 10 for None."""
    spread = {"all": 0.5, "random": 0.2}.get(mode, 0.05 + 0.01 * min(depth, 30))
    gammas, silent = rng.laplace(0.0, spread, 1200), rng.beta(3, 3, 700) * (rng.rand(700) > 0.03)

    def histogram(values: np.ndarray, bins: int, span: tuple) -> dict:
        counts, edges = np.histogram(values, bins, span)
        return {"count": len(values), "edges": tuple(edges.tolist()), "counts": tuple(counts.tolist())}

    def under(threshold: float) -> float:
        return float(np.mean(abs(gammas) < threshold))

    pruned = [
        records.Pruned(threshold=t, zeroed=under(t), test_acc=max(10.0, (acc or 0) * (1 - 2 * t)))
        for t in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    ]
    return records.Analysis(
        gamma=records.Gammas(**histogram(gammas, 60, (-2, 2)), share_near_zero=under(0.01)),
        pruned=tuple(pruned),
        relu=records.Silence(
            **histogram(silent, 20, (0, 1)), silent=float(np.mean(silent == 0)), silent_99=0.05
        ),
        test_acc=acc or 10.0,
        images=10000,
        frozen_sha256="0" * 64,
    )


def change(name: str, **values):
    """Return a function that sets fields of a JSON file in a run folder; `a__b` means the field b of a."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            *path, last = key.split("__")
            of = content
            for part in path:
                of = of[part]
            of[last] = value
        (folder / name).write_text(json.dumps(content))

    return apply
