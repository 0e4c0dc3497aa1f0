"""Analyse what BatchNorm has learned: its gammas, the accuracy without small ones, and silent ReLU channels.

    python analysis.py runs                             # every finished run in a folder
    python analysis.py runs/RUN runs/RUN --overwrite    # these runs, even if they have an analysis
    python analysis.py copied_runs --data-dir data      # runs of another machine, with the images in data

Writes RUN/analysis.json: the quantities of section 5 of Frankle et al. 2020, in the same bins for every run.
Exit status 0: done, 1: some runs could not be analysed, 2: unusable options, or no run found.
"""

import progress  # isort: split

import argparse
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import checkpoint
import data
import evaluation
import freeze
import kernels
import records
import runs
from datasets import sources
from kernels import device as devices

GAMMA_EDGES = [i / 20 for i in range(-60, 61)]
SILENCE_EDGES = [i / 20 for i in range(21)]
THRESHOLDS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
note = functools.partial(progress.note, "analysis.py")


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def gammas(model: nn.Module) -> np.ndarray:
    """Return all BatchNorms' gammas, concatenated: float64 [N], so that thresholds such as 0.01 are exact."""
    return torch.cat([bn.weight.detach().double().cpu() for bn in batchnorms(model)]).numpy()


def histogram(values: np.ndarray, edges: list[float]) -> dict[str, object]:
    """Count the values from each edge up to the next; values outside count in the outermost bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {"count": len(values), "edges": tuple(edges), "counts": tuple(counts.tolist())}


@torch.no_grad()
def prune(model: nn.Module, evaluate: Callable[[], evaluation.Scores]) -> list[records.Pruned]:
    """Return the test accuracy (percent) for each of THRESHOLDS, with gammas of smaller magnitude set to 0.

    Beta and BatchNorm's statistics stay. `evaluate` returns the scores of `model`. Gammas are changed in
    place, where a captured evaluation reads them, and restored at the end.
    """
    size, norms = np.abs(gammas(model)), batchnorms(model)
    learned = [bn.weight.clone() for bn in norms]
    rows, accuracies = [], {}  # accuracies by the number of gammas zeroed, which identifies the network
    try:
        for threshold in THRESHOLDS:
            zeroed = int((size < threshold).sum())
            if zeroed not in accuracies:
                for bn, gamma in zip(norms, learned, strict=True):
                    bn.weight.copy_(gamma.masked_fill(gamma.double().abs() < threshold, 0.0))
                accuracies[zeroed] = evaluate().acc
            share, test_acc = zeroed / len(size), accuracies[zeroed]
            rows.append(records.Pruned(threshold=threshold, zeroed=share, test_acc=test_acc))
    finally:
        for bn, gamma in zip(norms, learned, strict=True):
            bn.weight.copy_(gamma)
    return rows


class CountZeros(TorchFunctionMode):
    """A context manager in which every call of F.relu appends an int64 tensor [2, C] to `counts`.

    Row 0 is how often each channel is exactly 0, and row 1 the number of (image, position) pairs. The tensors
    stay on the device, and nothing waits for it.
    """

    def __init__(self):
        super().__init__()
        self.counts: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        if function is F.relu:
            zeros = (y == 0).sum((0, 2, 3))
            self.counts.append(torch.stack([zeros, torch.full_like(zeros, y[:, 0].numel())]))
        return y


def relu_zeros(model: nn.Module, loader, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each ReLU channel is exactly 0 over all images, and out of how many: int64 [N] both.

    N is the number of channels of all ReLUs, inside blocks and at their ends, in the order of the forward
    pass. PyTorch's own modules compute them, in `dtype`, because our kernels do not expose most ReLU outputs;
    enabling gradients in eval mode selects these modules. `model` is left in eval mode, entirely frozen.
    """
    model.eval().requires_grad_(False)
    total = 0
    for images, _ in loader.epoch(0):
        autocast = torch.autocast(loader.device.type, dtype, enabled=dtype != torch.float32)
        with torch.enable_grad(), autocast, CountZeros() as counted:
            model.features(images)
        total = total + torch.cat(counted.counts, dim=1)
    return tuple(total.cpu().numpy())


def analyse(model: nn.Module, loader, spec: records.NetworkSpec) -> records.Analysis:
    """Return the analysis of `model` on `loader`, the test images on the same device.

    It leaves every parameter frozen. Raises CheckpointError if a gamma is not finite.
    """
    gamma, dtype = gammas(model), devices.DTYPES[spec.dtype]
    if not np.isfinite(gamma).all():
        raise checkpoint.CheckpointError("its gammas are not all finite; train it again")
    kernels.configure(model, compiled=spec.compiled)
    frozen_sha256 = freeze.frozen_sha256(model)  # before relu_zeros freezes everything
    pruned = prune(model, evaluation.Evaluation(model, loader, dtype, spec.compiled))
    zeros, of = relu_zeros(model, loader, dtype)
    near_zero = float(np.mean(np.abs(gamma) < 0.01))
    silent, silent_99 = float(np.mean(zeros == of)), float(np.mean(100 * zeros > 99 * of))
    return records.Analysis(
        gamma=records.Gammas(**histogram(gamma, GAMMA_EDGES), share_near_zero=near_zero),
        pruned=tuple(pruned),
        relu=records.Silence(**histogram(zeros / of, SILENCE_EDGES), silent=silent, silent_99=silent_99),
        test_acc=pruned[0].test_acc,
        images=loader.num_images,
        frozen_sha256=frozen_sha256,
    )


def look_at(run: runs.Run, options: argparse.Namespace, device: torch.device, opened: dict) -> str:
    """Write a finished run's analysis.json, if missing or to be overwritten; return the outcome in one line.

    The run's other files are only read. `opened` keeps its data set and loader for other runs. Raises
    DataError if the images are not available, and whatever `checkpoint.restore` and `analyse` raise.
    """
    if (status := run.status) != "done":
        return f"skipped, {status or 'not finished'}"
    if (run.path / "analysis.json").exists() and not options.overwrite:
        return "already has analysis.json; --overwrite recomputes it"
    model, spec = checkpoint.restore(run.path)
    name, folder = evaluation.image_place(run.path, spec, options.data_dir)
    if name not in sources.SETS and not Path(name).is_dir():
        raise data.DataError(f"{name}, its image folder, is not here; start this where the run was started")
    place = name, folder, spec.image_size
    if place not in opened:
        opened[place] = data.open_dataset(name, folder, image_size=spec.image_size, download=False, say=note)
    dataset = opened[place]
    if dataset.fingerprint != spec.fingerprint:  # which depends on the classes, too
        what = f"are not the run's ({dataset.fingerprint}, not {spec.fingerprint})"
        raise data.DataError(f"these images of {name} {what}; give the --data-dir that has the run's")
    batches = place, spec.mean, spec.std, spec.batch_size, spec.dtype, spec.compiled
    if batches not in opened:  # on a GPU, each loader compiles its own code
        opened[batches] = evaluation.test_loader(dataset, spec, device)
    model.to(device, memory_format=torch.channels_last)
    found = analyse(model, opened[batches], spec)
    run.write("analysis.json", found.to_json())
    before = run.summary.final_test_acc
    if found.test_acc != before:  # another device may change the last digits
        note(f"{run.path}: {found.test_acc} % on this {device.type}, {before} % in the run")
    near_zero, silent = 100 * found.gamma.share_near_zero, 100 * found.relu.silent
    shares = f"{near_zero:.1f} % of gammas under 0.01, {silent:.1f} % of channels silent"
    return f"{found.test_acc:.2f} % test accuracy, {shares}"


def main(argv: list[str] | None = None) -> int:
    parser = progress.Parser("analysis.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders that hold them")
    parser.add_argument("--data-dir", help="folder of the data sets; default: each run's own")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    parser.add_argument("--overwrite", action="store_true", help="also runs that have an analysis.json")
    options = parser.parse_args(argv)
    device = devices.choose(options.device)
    if device.type == "cpu":
        devices.keep_freed_memory()
    found, failed = {}, 0
    for top in map(Path, options.runs):
        folders = [folder for folder, _ in runs.run_folders([top], note)] if top.is_dir() else []
        found |= {folder.resolve(): folder for folder in folders}
        if not folders:
            note(f"{top}: neither a run's folder nor one that holds any; give what train.py --out made")
            failed = 1
    if not found:
        return 2
    opened, bars = {}, progress.Bars()
    with bars:
        bar = bars.add_task("runs", total=len(found), text="")
        for path in found.values():
            bars.update(bar, text=path.name)
            try:
                bars.console.say(f"{path}: {look_at(runs.Run(path), options, device, opened)}")
            except (ValueError, OSError, RuntimeError) as error:
                why = " ".join(str(error).split())
                if progress.out_of_memory(error):
                    why = "out of memory; try --device cpu"
                elif not hasattr(error, "exit_status") and not isinstance(error, OSError):
                    raise
                note(f"{path}: {why}")
                failed = 1
            bars.advance(bar)
            gc.collect()  # an evaluation and its captured graph are a cycle that holds GPU memory
    return failed


if __name__ == "__main__":
    sys.exit(progress.run("analysis.py", main))
