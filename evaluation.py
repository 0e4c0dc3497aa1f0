"""Measure the loss and accuracy of a network on one split; as a command, on the test images.

    python evaluation.py runs/RUN                          # the test accuracy of a finished run
    python evaluation.py full.safetensors --data cifar10   # that of a file from checkpoint.py rebuild

It computes as the run did, on the run's images or on those that --data names.
"""

import progress  # isort: split

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import kernels
import records
import runs
from kernels import device as devices
from kernels.device import DTYPES, Captured

note = functools.partial(progress.note, "evaluation.py")


class Scores(NamedTuple):
    """Loss and accuracy of a network on one split."""

    loss: float  # mean cross-entropy
    acc: float  # percent
    top5_acc: float | None  # percent with the class among the five likeliest; None for ten classes or fewer


class Evaluation:
    """A callable that returns the Scores of `model` over all images of `loader`, each counted once.

    It sets eval mode, and waits for the device. `compiles` says whether the next call compiles (on a GPU).
    """

    def __init__(self, model: nn.Module, loader, dtype: torch.dtype = torch.float32, compiled: bool = True):
        self.model, self.loader, self.dtype = model, loader, dtype
        self.device = next(model.parameters()).device
        self.has_top5 = model.fc.out_features > 10
        self.captured, self.compiles = None, self.device.type == "cuda"  # only the first call
        if compiled and self.device.type == "cuda" and loader.resident:
            self.captured = Captured(self._next_batch)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.loss_sum, self.correct, self.among_five = self.sums  # views of `sums`
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def __call__(self) -> Scores:
        self.model.eval()
        if self.captured and self.compiles:
            kernels.compile_ahead(self.model, self.loader.batch_shape, self.dtype)
        self.compiles = False
        self.sums.zero_()
        self.position.zero_()
        if self.captured:
            self.loader.start(0)
            for _ in range(len(self.loader)):
                self.captured()
        else:
            for images, labels in self.loader.epoch(0):
                self._batch(images, labels)
        count, (loss, correct, among_five) = self.loader.num_images, self.sums.tolist()
        return Scores(
            loss / count, 100 * correct / count, 100 * among_five / count if self.has_top5 else None
        )

    def _next_batch(self) -> None:
        """Evaluate the batch at `position`, a tensor on the device."""
        self._batch(*self.loader.batch(self.position))

    def _batch(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images).float()
        left = self.loader.num_images - self.position * self.loader.batch_size
        counted = torch.arange(len(labels), device=self.device) < left  # the last batch may be padded
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.loss_sum += torch.where(counted, losses, 0).double().sum()
        self.correct += (counted & (logits.argmax(1) == labels)).sum()
        if self.has_top5:
            likeliest = logits.topk(5).indices == labels[:, None]
            self.among_five += (counted & likeliest.any(1)).sum()
        self.position += 1


def evaluation_batch_size(batch_size: int, image_size: int, device: torch.device) -> int:
    """Return `batch_size`, or at least 1000 for small images on a GPU, which fewer would not fill."""
    return max(batch_size, 1000) if device.type == "cuda" and image_size <= 64 else batch_size


def image_place(path: str | Path, spec: records.NetworkSpec, data_dir: str | None) -> tuple[str, str]:
    """Return the name and folder of the images on which a run, or the network in a file, was trained.

    The folder is `data_dir` if given, else the run's own, or "data" for a file that is in no run's folder.
    """
    path = Path(path)
    folder = path.parent if path.name == records.CHECKPOINT and runs.is_run(path.parent) else path
    config = runs.Run(folder).config if folder.is_dir() else None
    name = config.options.data if config else spec.data
    return name, data_dir or (config.options.data_dir if config else "data")


def test_loader(dataset: data.Dataset, spec: records.NetworkSpec, device: torch.device):
    """Return a loader of the test images, normalised and typed as in the run that `spec` describes."""
    dataset = dataclasses.replace(dataset, mean=spec.mean, std=spec.std)
    settings = {"device": device, "dtype": DTYPES[spec.dtype], "compiled": spec.compiled}
    images = max(len(dataset.train.labels), len(dataset.test.labels))  # no run has larger batches
    batch_size = evaluation_batch_size(min(spec.batch_size, images), spec.image_size, device)
    return data.make_loader(dataset, "test", batch_size=batch_size, **settings)


def main(argv: list[str] | None = None) -> None:
    parser = progress.Parser("evaluation.py", __doc__)
    parser.add_argument("run", help="a run folder, its model.safetensors, or a rebuilt network")
    parser.add_argument("--data", help="a data set or folder; default: the run's")
    parser.add_argument("--data-dir", help="folder of the data set; default: the run's")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to evaluate")
    parser.add_argument("--init-from", help="current path of the weights that the run's --init-from named")
    options = parser.parse_args(argv)
    device = devices.choose(options.device)
    model, spec = checkpoint.restore(options.run, options.init_from)
    name, folder = image_place(options.run, spec, options.data_dir)
    dataset = data.open_dataset(options.data or name, folder, image_size=spec.image_size, say=note)
    if tuple(map(progress.printable, dataset.classes)) != spec.classes:
        raise data.DataError(f"--data {dataset.name}: its classes are not those of {options.run}")
    if dataset.fingerprint != spec.fingerprint:
        note(f"these are not the images of the run ({dataset.fingerprint}, not {spec.fingerprint})")
    if device.type != spec.device:
        note(f"the run was on {spec.device}, this is {device.type}: the last digits may differ")
    model.to(device, memory_format=torch.channels_last)
    kernels.configure(model, compiled=spec.compiled)
    loader = test_loader(dataset, spec, device)
    scores = Evaluation(model, loader, DTYPES[spec.dtype], spec.compiled)()
    if not math.isfinite(scores.loss):
        what = f"its loss on {dataset.title} is {scores.loss}, so its accuracy means nothing; train it again"
        raise checkpoint.CheckpointError(f"{options.run}: {what}")
    images = f"{loader.num_images:,} images of {dataset.title}"
    top5 = "" if scores.top5_acc is None else f", top 5 {scores.top5_acc:.2f} %"
    print(f"{scores.acc:.2f} % test accuracy{top5}, loss {scores.loss:.4f}, {images}")


if __name__ == "__main__":
    sys.exit(progress.run("evaluation.py", main))
