"""What BatchNorm has learned: its gammas, the accuracy without the small ones, which ReLUs are silent.

    python analysis.py runs                             # every finished run in a folder
    python analysis.py runs/RUN runs/RUN --overwrite    # these, also where it was done before
    python analysis.py copied_runs --data-dir data      # of other machines: where the images lie on this one

Writes RUN/analysis.json: what section 5 of Frankle et al. 2020 looks at, for every run in the same bins.
Exit status 0: done, 1: some could not be analysed, 2: unusable options, or no run found.
"""

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
import progress
import runs
from datasets import sources
from evaluation import Evaluation, Scores
from kernels import device as devices

GAMMA_EDGES = [i / 20 for i in range(-60, 61)]
SILENCE_EDGES = [i / 20 for i in range(21)]
THRESHOLDS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class AnalysisError(ValueError):
    """A run that cannot be analysed; the message says what would do."""

    exit_status = 2


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def gammas(model: nn.Module) -> np.ndarray:
    """Every BatchNorm's gamma, one after the other: float64 [N], which holds them and 0.01 as they are."""
    return torch.cat([bn.weight.detach().double().cpu() for bn in batchnorms(model)]).numpy()


def histogram(values: np.ndarray, edges: list[float]) -> dict[str, object]:
    """How many lie between an edge (included) and the next; what is outside counts in the outermost bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {"count": len(values), "edges": tuple(edges), "counts": tuple(counts.tolist())}


@torch.no_grad()
def prune(model: nn.Module, evaluate: Callable[[], Scores]) -> list[runs.Pruned]:
    """For each of THRESHOLDS, the test accuracy (percent) with every gamma of a smaller magnitude set to 0.

    Beta and BatchNorm's statistics stay. `evaluate` gives the scores of `model`, whose gammas are changed in
    place, where a captured evaluation reads them, and are afterwards what they were.
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
                test_acc = evaluate().acc
            rows.append(runs.Pruned(threshold=threshold, zeroed=zeroed / len(size), test_acc=test_acc))
            zeroed_before = zeroed
    finally:
        for bn, gamma in zip(norms, learned, strict=True):
            bn.weight.copy_(gamma)
    return rows


class CountZeros(TorchFunctionMode):
    """While it is entered, once per batch, it counts in each channel how often F.relu returns exactly 0.

    It tells one ReLU from another by its turn in the forward pass. For each, `zeros` holds an int64 [C] on
    the device, and `positions` the number of (image, position) pairs. Nothing waits for the device.
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


def relu_zeros(model: nn.Module, loader, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """How often each channel of each ReLU is 0 over `loader`'s images, and of how many times: int64 [N] both.

    N are the channels of all ReLUs, inside blocks and at their ends, in the order of the forward pass.
    PyTorch's own modules compute it, in `dtype`, because our kernels never give most ReLUs' outputs; they do
    so in evaluation where gradients are enabled, of which `model` is left with none.
    """
    model.eval().requires_grad_(False)
    counting, device_type = CountZeros(), loader.device.type
    for images, _ in loader.epoch(0):
        autocast = torch.autocast(device_type, dtype, enabled=dtype != torch.float32)
        with torch.enable_grad(), autocast, counting:
            model.features(images)
    of = [np.full(len(zeros), count) for zeros, count in zip(counting.zeros, counting.positions, strict=True)]
    return torch.cat(counting.zeros).cpu().numpy(), np.concatenate(of)


def analyse(model: nn.Module, loader, spec: runs.NetworkSpec) -> runs.Analysis:
    """The analysis of `model`, which is on the device of the test images' `loader`. AnalysisError."""
    gamma, dtype = gammas(model), devices.DTYPES[spec.dtype]
    frozen_sha256 = freeze.frozen_sha256(model)  # before relu_zeros freezes everything
    if not np.isfinite(gamma).all():
        raise AnalysisError("its gammas are not all finite; train it again")
    kernels.configure(model, compiled=spec.compiled)
    pruned = prune(model, Evaluation(model, loader, dtype, spec.compiled))
    zeros, of = relu_zeros(model, loader, dtype)
    near_zero, silent = np.mean(np.abs(gamma) < 0.01), np.mean(zeros == of)
    silent_99 = np.mean(100 * zeros > 99 * of)
    return runs.Analysis(
        gamma=runs.Gammas(**histogram(gamma, GAMMA_EDGES), share_near_zero=float(near_zero)),
        pruned=tuple(pruned),
        relu=runs.Silence(
            **histogram(zeros / of, SILENCE_EDGES), silent=float(silent), silent_99=float(silent_99)
        ),
        test_acc=pruned[0].test_acc,
        images=loader.num_images,
        frozen_sha256=frozen_sha256,
    )


def open_images(path: Path, spec: runs.NetworkSpec, data_dir: str | None, device: torch.device, opened: dict):
    """The loader of a run's test images, kept in `opened` for other runs.

    Raises AnalysisError or DataError where they are not at hand, or are others.
    """
    name, folder = evaluation.image_place(path, spec, data_dir)
    if name not in sources.NAMES and not Path(name).is_dir():
        raise AnalysisError(f"there is no folder {name}, its images; start this where the run was started")
    place = name, folder, spec.image_size
    if place not in opened:
        opened[place] = data.open_dataset(name, folder, image_size=spec.image_size, download=False, say=note)
    dataset = opened[place]
    if (dataset.fingerprint, dataset.classes) != (spec.fingerprint, spec.classes):
        what = f"are not the run's ({dataset.fingerprint}, not {spec.fingerprint})"
        raise AnalysisError(f"these images of {name} {what}; give the --data-dir of those")
    key = place, spec.mean, spec.std, spec.batch_size, spec.dtype, spec.compiled
    if key not in opened:
        opened[key] = evaluation.test_loader(dataset, spec, device)
    return opened[key]


def analyse_run(run: runs.Run, data_dir: str | None, device: torch.device, opened: dict) -> runs.Analysis:
    """Write analysis.json of a finished run and return its content; the run's own files are only read."""
    model, spec = checkpoint.restore(run.path)
    loader = open_images(run.path, spec, data_dir, device, opened)
    model.to(device, memory_format=torch.channels_last)
    content = analyse(model, loader, spec)
    run.write("analysis.json", content.to_json())
    before = run.summary.final_test_acc
    if content.test_acc != before:  # as on another device, where the last digits may differ
        note(f"{run.path}: {content.test_acc} % on this {device.type}, {before} % in the run")
    return content


def look_at(path: Path, options, device: torch.device, opened: dict) -> str:
    """Analyse the run in a folder, if it is to be; what came of it, in a line."""
    run = runs.Run(path)
    if (status := run.status) != "done":
        return f"skipped, {status or 'not finished'}"
    if (path / "analysis.json").exists() and not options.overwrite:
        return "has analysis.json; --overwrite makes it again"
    found = analyse_run(run, options.data_dir, device, opened)
    near_zero, silent = 100 * found.gamma.share_near_zero, 100 * found.relu.silent
    shares = f"{near_zero:.1f} % of gammas under 0.01, {silent:.1f} % of channels silent"
    return f"{found.test_acc:.2f} % test accuracy, {shares}"


def note(text: str) -> None:
    progress.note("analysis.py", text)


def main(argv: list[str] | None = None) -> int:
    parser = progress.Parser("analysis.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders that hold them")
    parser.add_argument("--data-dir", help="where the data sets lie; default: where each run found its own")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    parser.add_argument("--overwrite", action="store_true", help="also runs that have an analysis.json")
    options = parser.parse_args(argv)
    device = devices.choose(options.device)
    if device.type == "cpu":
        devices.keep_freed_memory()
    found, failed = {}, 0
    for path in options.runs:
        folders = [folder for folder, _ in runs.run_folders([path], note)] if Path(path).is_dir() else []
        found |= {folder.resolve(): folder for folder in folders}
        if not folders:
            note(f"{path}: neither a run's folder nor one that holds any; name what train.py --out made")
            failed += 1
    if not found:
        return 2
    opened, bars = {}, progress.Bars()
    with bars:
        bar = bars.add_task("runs", total=len(found), text="")
        for path in found.values():
            bars.update(bar, text=path.name)
            try:
                bars.console.say(f"{path}: {look_at(path, options, device, opened)}")
            except (ValueError, OSError, RuntimeError) as error:
                out_of_memory = progress.out_of_memory(error)
                if not (hasattr(error, "exit_status") or isinstance(error, OSError) or out_of_memory):
                    raise
                why = "out of memory; try --device cpu" if out_of_memory else " ".join(str(error).split())
                note(f"{path}: {why}")
                failed += 1
            bars.advance(bar)
            gc.collect()  # an evaluation and its captured graph hold each other, and memory of the GPU
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(progress.run("analysis.py", main))
