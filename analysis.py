"""What BatchNorm has learned: its gammas, the accuracy without the small ones, which ReLUs are silent.

    python analysis.py runs                             # every finished run in a folder
    python analysis.py runs/RUN runs/RUN --overwrite    # these, also where it was done before
    python analysis.py copied_runs --data-dir data      # of other machines: where the images lie on this one

Writes RUN/analysis.json: what section 5 of Frankle et al. 2020 looks at, for every run in the same bins.
Exit status 0: done, 1: some could not be analysed, 2: unusable options, or no run found.
"""

import argparse
import dataclasses
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import data
import freeze
import kernels
import loaders
import models
import progress as display
import runs
import step as steps
from datasets import sources

GAMMA_EDGES = [i / 20 for i in range(-60, 61)]
SHARE_EDGES = [i / 20 for i in range(21)]
THRESHOLDS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class AnalysisError(ValueError):
    """A run that cannot be analysed; the message says what would do."""


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def gammas(model: nn.Module) -> np.ndarray:
    """Every BatchNorm's gamma, one after the other: float64 [N], which holds them and 0.01 as they are."""
    return torch.cat([bn.weight.detach().double().cpu() for bn in batchnorms(model)]).numpy()


def histogram(values: np.ndarray, edges: list[float]) -> dict[str, object]:
    """How many lie between an edge (included) and the next; what is outside counts in the outermost bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {"count": len(values), "edges": edges, "counts": counts.tolist()}


@torch.no_grad()
def prune(model: nn.Module, evaluate: Callable[[], tuple[float, float]]) -> list[dict[str, float]]:
    """For each of THRESHOLDS, the test accuracy (percent) with every gamma below it in size set to 0.

    Beta and BatchNorm's statistics stay. `evaluate` gives loss and accuracy of `model`, whose gammas are
    changed in place, where a captured evaluation reads them, and are afterwards what they were.
    """
    size, norms = np.abs(gammas(model)), batchnorms(model)
    learned = [bn.weight.clone() for bn in norms]
    rows, zeroed_before, test_acc = [], None, None
    try:
        for threshold in THRESHOLDS:
            zeroed = int((size < threshold).sum())
            if zeroed != zeroed_before:  # else it is the same network again
                for bn, gamma in zip(norms, learned, strict=True):
                    bn.weight.copy_(gamma.masked_fill(gamma.double().abs() < threshold, 0.0))
                _, test_acc = evaluate()
            rows.append({"threshold": threshold, "zeroed": zeroed / len(size), "test_acc": test_acc})
            zeroed_before = zeroed
    finally:
        for bn, gamma in zip(norms, learned, strict=True):
            bn.weight.copy_(gamma)
    return rows


class CountZeros(TorchFunctionMode):
    """While it is entered, once per batch, counts in each channel how often F.relu returns exactly 0.

    One ReLU is told from another by its turn in the forward pass. `zeros` has an int64 [C] on the device for
    each, `positions` the number of (image, position) pairs. Nothing waits for the device.
    """

    def __init__(self):
        super().__init__()
        self.zeros: list[torch.Tensor] = []
        self.positions: list[int] = []

    def __enter__(self) -> "CountZeros":
        self.turn = 0
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        if function is F.relu:
            if self.turn == len(self.zeros):
                self.zeros.append(torch.zeros(y.shape[1], dtype=torch.int64, device=y.device))
                self.positions.append(0)
            self.zeros[self.turn] += (y == 0).sum((0, 2, 3))
            self.positions[self.turn] += y.numel() // y.shape[1]
            self.turn += 1
        return y


@torch.no_grad()
def relu_zeros(model: nn.Module, loader, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """How often each channel of each ReLU is 0 over `loader`'s images, and of how many times: int64 [N] both.

    N channels of all ReLUs in the order of the forward pass, inside blocks and at their ends, in `dtype`. By
    PyTorch's own modules: in our kernels most of them are never seen.
    """
    model.eval()
    counting, device_type = CountZeros(), loader.device.type
    for images, _ in loader.epoch(0):
        autocast = torch.autocast(device_type, dtype, enabled=dtype != torch.float32)
        with kernels.using(memory="stock"), autocast, counting:
            model.features(images)
    of = [np.full(len(zeros), count) for zeros, count in zip(counting.zeros, counting.positions, strict=True)]
    return torch.cat(counting.zeros).cpu().numpy(), np.concatenate(of)


def analyse(model: nn.Module, loader, dtype: torch.dtype, compiled: bool) -> dict[str, object]:
    """What analysis.json holds of `model`, on the device of the test images' `loader`; see the README."""
    gamma = gammas(model)
    if not np.isfinite(gamma).all():
        raise AnalysisError("its gammas are not all finite; train it again")
    pruned = prune(model, steps.Evaluation(model, loader, dtype, compiled))
    zeros, of = relu_zeros(model, loader, dtype)
    silent = {"silent": np.mean(zeros == of), "silent_99": np.mean(100 * zeros > 99 * of)}
    return {
        "gamma": histogram(gamma, GAMMA_EDGES) | {"share_under_0.01": float(np.mean(np.abs(gamma) < 0.01))},
        "pruned": pruned,
        "relu": histogram(zeros / of, SHARE_EDGES) | {name: float(share) for name, share in silent.items()},
        "test_acc": pruned[0]["test_acc"],
        "images": loader.num_images,
        "frozen_sha256": freeze.frozen_sha256(model),
    }


def open_images(recipe: dict, options: dict, data_dir: str | None, device: torch.device, opened: dict):
    """The loader of the test images of a run with this recipe and options, kept in `opened` for other runs.

    Raises AnalysisError or DataError where they are not at hand, or are others.
    """
    name, size = options.get("data") or recipe["data"], recipe["image_size"]
    place = name, data_dir or options.get("data_dir") or "data", size
    if not all(isinstance(part, str) for part in place[:2]):
        raise AnalysisError("its config.json is damaged; delete it, and give --data-dir")
    if name not in sources.NAMES and not Path(name).is_dir():
        raise AnalysisError(f"there is no folder {name}, its images; start this where the run was started")
    if place not in opened:
        opened[place] = data.open_dataset(*place[:2], image_size=size, download=False, say=note)
    dataset = opened[place]
    if (dataset.fingerprint, dataset.classes) != (recipe["fingerprint"], tuple(recipe["classes"])):
        what = f"are not the run's ({dataset.fingerprint}, not {recipe['fingerprint']})"
        raise AnalysisError(f"these images of {name} {what}; give the --data-dir of those")
    dataset = dataclasses.replace(dataset, mean=tuple(recipe["mean"]), std=tuple(recipe["std"]))
    batch_size = steps.evaluation_batch_size(recipe["batch_size"], size, device)
    dtype, compiled = steps.DTYPES[recipe["dtype"]], recipe["compile"]
    settings = {"batch_size": batch_size, "dtype": dtype, "compiled": compiled}
    key = (place, dataset.mean, dataset.std, *settings.values())
    if key not in opened:
        opened[key] = loaders.make_loader(dataset, "test", device=device, **settings)
    return opened[key]


def analyse_run(run: runs.Run, data_dir: str | None, device: torch.device, opened: dict) -> dict[str, object]:
    """Write analysis.json of a finished run and return its content; the run's own files are only read."""
    model, recipe = freeze.restore(run.path)
    options = (run.config or {}).get("options")
    loader = open_images(recipe, options if isinstance(options, dict) else {}, data_dir, device, opened)
    model.to(device, memory_format=torch.channels_last)
    content = analyse(model, loader, steps.DTYPES[recipe["dtype"]], recipe["compile"])
    run.write_json("analysis.json", content)
    before = (run.summary or {}).get("final_test_acc")
    if content["test_acc"] != before:  # as on another device, where the last digits may differ
        note(f"{run.path}: {content['test_acc']} % on this {device.type}, {before} % in the run")
    return content


def in_a_line(content: dict) -> str:
    gamma, silent = content["gamma"]["share_under_0.01"], content["relu"]["silent"]
    shares = f"{100 * gamma:.1f} % of gammas under 0.01, {100 * silent:.1f} % of channels silent"
    return f"{content['test_acc']:.2f} % test accuracy, {shares}"


def note(line: str) -> None:
    print(f"analysis.py: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders that hold them")
    parser.add_argument("--data-dir", help="where the data sets lie; default: where each run found its own")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--overwrite", action="store_true", help="also runs that have an analysis.json")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        note("--device cuda: torch finds no CUDA GPU here; leave it out, or use --device cpu")
        return 2
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        steps.keep_freed_memory()
    found, failed = {}, 0
    for path in options.runs:
        folders = [folder for folder, _ in runs.run_folders([path], note)] if Path(path).is_dir() else []
        found |= {folder.resolve(): folder for folder in folders}
        if not folders:
            note(f"{path}: neither a run's folder nor one that holds any; name what train.py --out made")
            failed += 1
    if not found:
        return 2
    opened, bars = {}, display.Bars()
    usual = AnalysisError, freeze.FreezeError, models.ModelError, data.DataError, runs.RunError, OSError
    try:
        with bars.bars:
            bar = bars.bars.add_task("runs", total=len(found), text="")
            for path in found.values():
                bars.bars.update(bar, text=path.name)
                try:
                    run = runs.Run(path)
                    if (status := run.status) != "done":
                        line = f"skipped, {status or 'not finished'}"
                    elif (path / "analysis.json").exists() and not options.overwrite:
                        line = "has analysis.json; --overwrite makes it again"
                    else:
                        line = in_a_line(analyse_run(run, options.data_dir, device, opened))
                    bars.bars.console.print(f"{path}: {line}", soft_wrap=True, highlight=False, markup=False)
                except (*usual, RuntimeError) as error:
                    if not isinstance(error, usual) and not steps.out_of_memory(error):
                        raise
                    why = str(error) if isinstance(error, usual) else "out of memory; try --device cpu"
                    note(f"{path}: {' '.join(why.split())}")
                    failed += 1
                bars.bars.advance(bar)
                gc.collect()  # an evaluation and its captured graph hold each other, and memory of the GPU
    except KeyboardInterrupt:
        note("interrupted; the runs above are done")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
