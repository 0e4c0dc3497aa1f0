"""Run folders as train.py and analysis.py leave them, without training, for the tests of the report."""

import json
import re
import zlib
from pathlib import Path

import numpy as np

import runs
from reporting import reading as finished


def write_run(root: Path, arch="resnet14", mode="bn_only", seed=0, epochs=4, analysis=True, **more) -> Path:
    """A run folder as train.py and analysis.py leave it, of plausible numbers drawn from its options.

    `more` are options, or anything of config.json's top level or of summary.json.
    """
    options = json.loads(json.dumps(finished.DEFAULTS)) | {"arch": arch, "mode": mode, "seed": seed}
    options |= {"epochs": epochs, "milestones": [epochs // 2, 3 * epochs // 4]}
    # config.json has an option `recipe`, a text, and an object `recipe`
    differing = {key: value for key, value in more.items() if key in options and not isinstance(value, dict)}
    options |= differing
    epochs_named = {} if epochs == 4 else {"epochs": epochs}
    folder = root / runs.run_name(options["data"], arch, mode, seed, epochs_named | differing)
    folder.mkdir(parents=True)
    rng = np.random.RandomState(zlib.crc32(folder.name.encode()))
    depth, width = (int(n or 1) for n in re.match(r"[a-z]+(\d+)(?:_w(\d+))?", arch).groups())
    total, bn = 13_000 * depth * width**2, 76 * depth * width
    trained = {"all": total, "none": 0, "output": 650}.get(mode, bn + 650 * ("output" in mode))
    top = {"all": 91, "random": 24, "none": 11, "output": 30}.get(mode, 40 + 5 * np.log2(depth * width / 8))
    top = min(top + 3 * ("+" in mode) + rng.normal(), 99)
    rows = []
    for epoch in range(1, epochs + 1):
        share = (1 - np.exp(-12 * epoch / epochs)) * (0.93 if epoch <= epochs // 2 else 1)
        accs = [
            max(10.0, top * share + rng.normal() * (1 if epoch <= epochs // 2 else 0.2)) for _ in range(2)
        ]
        losses = [2.3 - 2.1 * acc / 100 for acc in accs]
        row = {"epoch": epoch, "lr": 0.1, "train_loss": losses[0], "train_acc": min(accs[0], 100.0)}
        row |= {"epoch_s": 3 + rng.rand(), "images_per_s": 9000 + 100 * rng.rand()}
        rows.append(row | {"test_loss": losses[1], "test_acc": round(min(accs[1], 100.0), 2)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        **{"options": options, "recipe": {"fingerprint": "21d441f3", "dtype": "bf16"}},
        **{"data_title": "CIFAR-10", "device": "cuda", "device_name": "NVIDIA H200", "git_commit": "ab12"},
        "versions": {"python": "3.11.7", "cuda": "13.0", "torch": "2.13.0"},
    }
    config["recipe"]["image_size"] = options["image_size"] or 32
    config["started_from"] = None
    summary = {
        **{"status": "done", "why": None, "params_total": total, "params_trained": trained},
        **{"final_test_acc": rows[-1]["test_acc"], "best_test_acc": max(row["test_acc"] for row in rows)},
        **{"epochs_done": epochs, "train_s": sum(row["epoch_s"] for row in rows), "startup_s": 12.5},
        **{"peak_memory_bytes": 2**30 + depth * 2**20, "checkpoint_bytes": 4 * trained + 8 * bn + 2000},
        "full_bytes": 4 * total + 8 * bn,
    }
    for part in (config, summary):
        part |= {key: value for key, value in more.items() if key in part and key not in differing}
    summary |= {"data_title": config["data_title"], "frozen_sha256": "0" * 64} | options
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    if analysis:
        gammas, silent = (
            rng.laplace(0.0, {"all": 0.5, "random": 0.2}.get(mode, 0.05 + 0.01 * min(depth, 30)), 1200),
            rng.beta(3, 3, 700) * (rng.rand(700) > 0.03),
        )
        histograms = {"gamma": np.histogram(gammas, 60, (-2, 2)), "relu": np.histogram(silent, 20, (0, 1))}
        found = {}
        for part, (counts, edges) in histograms.items():
            found[part] = {"counts": counts.tolist(), "edges": edges.tolist(), "count": int(counts.sum())}
        found["gamma"]["count"] = 1200
        found["gamma"]["share_under_0.01"] = float(np.mean(abs(gammas) < 0.01))
        found["relu"] |= {"silent": float(np.mean(silent == 0)), "silent_99": 0.05}
        thresholds = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
        accs = [
            max(10.0, summary["final_test_acc"] * (1 - 2 * t)) if summary["final_test_acc"] else 10.0
            for t in thresholds
        ]
        shares = [float(np.mean(abs(gammas) < t)) for t in thresholds]
        zip_ = zip(thresholds, shares, accs, strict=True)
        found["pruned"] = [{"threshold": t, "zeroed": share, "test_acc": acc} for t, share, acc in zip_]
        (folder / "analysis.json").write_text(json.dumps(found | {"images": 10000}))
    return folder
