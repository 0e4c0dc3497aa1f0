"""Accuracy and loss of a network on a split.

    python evaluation.py runs/RUN                          # the test accuracy of a finished run
    python evaluation.py full.safetensors --data cifar10   # of a file that checkpoint.py rebuilt

It is computed as the run did, on the run's images or on those that --data names.
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import kernels
import progress
import runs
from kernels import device as devices
from kernels.device import DTYPES, EAGER_CALLS, Captured


class EvaluationError(ValueError):
    """Images on which a network cannot be evaluated; the message says what would do."""

    exit_status = 2


class Scores(NamedTuple):
    """Mean cross-entropy, accuracy, and how often the class is among the five likeliest; both in percent.

    `top5_acc` is None for ten classes or fewer.
    """

    loss: float
    acc: float
    top5_acc: float | None


class Evaluation:
    """Call it: the Scores of `model` over every image of `loader`, each counted once."""

    def __init__(self, model: nn.Module, loader, dtype: torch.dtype = torch.float32, compiled: bool = True):
        self.model, self.loader, self.dtype = model, loader, dtype
        self.device = next(model.parameters()).device
        self.has_top5 = model.fc.out_features > 10
        self.captured, self.compiles = None, self.device.type == "cuda"  # the first call does
        if compiled and self.device.type == "cuda" and loader.resident:
            self.captured = Captured(self._batch_from_tensors, EAGER_CALLS)
        zero = {"dtype": torch.int64, "device": self.device}
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct, self.among_five = torch.zeros((), **zero), torch.zeros((), **zero)
        self.position = torch.zeros(1, **zero)

    @torch.no_grad()
    def __call__(self) -> Scores:
        self.model.eval()
        self.compiles = False
        for metric in (self.loss_sum, self.correct, self.among_five, self.position):
            metric.zero_()
        if self.captured:
            self.loader.start(0)
            for _ in range(len(self.loader)):
                self.captured()
        else:
            for images, labels in self.loader.epoch(0):
                self._batch(images, labels, torch.ones_like(labels, dtype=torch.bool))
        count = self.loader.num_images
        top5_acc = 100 * int(self.among_five) / count if self.has_top5 else None
        return Scores(float(self.loss_sum) / count, 100 * int(self.correct) / count, top5_acc)

    def _batch_from_tensors(self) -> None:
        """A batch that lies on the device, where `position` says; the last one may be filled up."""
        images, labels = self.loader.batch(self.position)
        left = self.loader.num_images - self.position * self.loader.batch_size
        self._batch(images, labels, torch.arange(len(labels), device=self.device) < left)

    def _batch(self, images: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.loss_sum += torch.where(counted, losses, 0).double().sum()
        self.correct += (counted & (logits.argmax(1) == labels)).sum()
        if self.has_top5:
            likeliest = logits.topk(5).indices == labels[:, None]
            self.among_five += (counted & likeliest.any(1)).sum()
        self.position += 1


def evaluation_batch_size(batch_size: int, image_size: int, device: torch.device) -> int:
    """Images to evaluate at once: a GPU is not filled by a training batch of small ones."""
    return max(batch_size, 1000) if device.type == "cuda" and image_size <= 64 else batch_size


def image_place(path: str | Path, spec: runs.NetworkSpec, data_dir: str | None) -> tuple[str, str]:
    """Name and folder of the images that a run, or a file, was trained on."""
    config = runs.Run(Path(path)).config if Path(path).is_dir() else None
    name = config.options.data if config else spec.data
    return name, data_dir or (config.options.data_dir if config else "data")


def test_loader(dataset: data.Dataset, spec: runs.NetworkSpec, device: torch.device):
    """The test images in batches, normalised as in the run that `spec` is of."""
    dataset = dataclasses.replace(dataset, mean=spec.mean, std=spec.std)
    batch_size = evaluation_batch_size(spec.batch_size, spec.image_size, device)
    dtype = DTYPES[spec.dtype]
    settings = {"batch_size": batch_size, "device": device, "dtype": dtype, "compiled": spec.compiled}
    return data.make_loader(dataset, "test", **settings)


def evaluate(
    path: str | Path,
    data_name: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    init_from: str | None = None,
) -> str:
    """Test accuracy and loss of a run or file, computed as the run did, as a line of text.

    Without `data_name` the images are the run's, looked for where the run found them. Raises EvaluationError,
    CheckpointError, DataError or DeviceError.
    """
    on = devices.choose(device)
    model, spec = checkpoint.restore(path, init_from)
    name, folder = image_place(path, spec, data_dir)
    dataset = data.open_dataset(data_name or name, folder, image_size=spec.image_size, say=note)
    if dataset.classes != spec.classes:
        raise EvaluationError(f"--data {dataset.name}: its classes are not those of {path}")
    if dataset.fingerprint != spec.fingerprint:
        note(f"these are not the images of the run ({dataset.fingerprint}, not {spec.fingerprint})")
    if on.type != spec.device:
        note(f"the run was on {spec.device}, this is {on.type}: the last digits may differ")
    model.to(on, memory_format=torch.channels_last)
    kernels.configure(model, compiled=spec.compiled)
    loader = test_loader(dataset, spec, on)
    scores = Evaluation(model, loader, DTYPES[spec.dtype], spec.compiled)()
    images = f"{loader.num_images:,} images of {dataset.title}"
    return f"{scores.acc:.2f} % test accuracy, loss {scores.loss:.4f}, {images}"


def note(text: str) -> None:
    progress.note("evaluation.py", text)


def main(argv: list[str] | None = None) -> None:
    parser = progress.Parser("evaluation.py", __doc__)
    parser.add_argument(
        "run", help="a run folder, its model.safetensors, or a file that checkpoint.py rebuilt"
    )
    parser.add_argument("--data", help="a data set or folder; default: the run's")
    parser.add_argument("--data-dir", help="where the data set lies; default: where the run found it")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to evaluate")
    parser.add_argument("--init-from", help="where the file of the run's --init-from lies now")
    options = parser.parse_args(argv)
    print(evaluate(options.run, options.data, options.data_dir, options.device, options.init_from))


if __name__ == "__main__":
    sys.exit(progress.run("evaluation.py", main))
