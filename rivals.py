"""The training steps that bench.py compares, from what most scripts do to what train.py does.

stock      eager fp32 (on a GPU TF32, torch's default), NCHW, DataLoader, transforms image by image
amp        eager autocast, channels_last, images resident on the device
compiled   amp with torch.compile of the whole network
plain      train.py's step with its own kernels off, differentiated by autograd
lean       train.py's step: a frozen network keeps each convolution's output once, and no more
recompute  lean, but keeping each block's input instead
"""

import functools
import itertools
import os
import warnings
from collections.abc import Iterator

# FFCV's threads, by numba. With its first choice, TBB, a process that has forked never ends on a single core.
os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F

import data
import freeze
import kernels
import loaders
import models
import step as steps
from datasets import augment

STEPS = ("stock", "amp", "compiled", "plain", "lean", "recompute")
OURS = {
    "plain": ("stock", False),
    "lean": ("lean", True),
    "recompute": ("recompute", True),
}  # memory, compiled
RECIPE = {"shortcut": "projection", "conv_init": "kaiming_normal", "bn_init": "uniform"}
RECIPE |= {"seed": 0, "per_channel": 2, "init_from": None, "reset_bn": False}
LR = 0.1
WORKERS, PREFETCH = 2, 2  # of torch's DataLoader: processes, and batches that each prepares ahead


class PerImage(torch.utils.data.Dataset):
    """torchvision's RandomCrop(padding=4), RandomHorizontalFlip, ToTensor and Normalize, call for call."""

    def __init__(self, dataset: data.Dataset):
        self.images, self.labels, self.size = dataset.train.images, dataset.train.labels, dataset.image_size
        self.mean, self.std = ([value / 255 for value in values] for values in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.images[index]), border=augment.PAD, fill=0)
        top, left = (torch.randint(0, 2 * augment.PAD + 1, size=(1,)).item() for _ in range(2))
        image = image.crop((left, top, left + self.size, top + self.size))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        pixels = pixels.to(torch.get_default_dtype()).div(255)
        mean, std = (torch.as_tensor(x, dtype=pixels.dtype).view(-1, 1, 1) for x in (self.mean, self.std))
        return pixels.clone().sub_(mean).div_(std), int(self.labels[index])


def stock_batches(dataset: data.Dataset, batch_size: int, device: torch.device) -> Iterator[tuple]:
    shuffled = {"shuffle": True, "drop_last": True, "pin_memory": device.type == "cuda"}
    processes = {"num_workers": WORKERS, "prefetch_factor": PREFETCH, "persistent_workers": True}
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more processes than cores
    loader = torch.utils.data.DataLoader(PerImage(dataset), batch_size, **shuffled, **processes)
    while True:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def our_loader(dataset: data.Dataset, *, compiled: bool, kind: str = "resident", **settings):
    """`settings`: batch_size, device and dtype."""
    rng = functools.partial(models.stream, 0)
    chosen = {"kind": kind, "compiled": compiled, "rng": rng, "augmented": "paper"}
    return loaders.make_loader(dataset, "train", **chosen, **settings)


def our_batches(loader) -> Iterator[tuple]:
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def loss_of(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype,
    memory: str = "stock",
    compiled: bool = False,
) -> torch.Tensor:
    """The training loss, under autocast unless `dtype` is float32; for the rest see kernels.using."""
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
    with kernels.using(memory, compiled), autocast:
        return F.cross_entropy(model(images).float(), labels)


def common_steps(
    model: nn.Module, batches: Iterator[tuple], dtype: torch.dtype, benchmark: bool
) -> Iterator[None]:
    """A training loop as most scripts have it; each `next` is one step. `benchmark` is cuDNN's search."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(trained[0].device.type, enabled=dtype == torch.float16)
    for images, labels in batches:
        # TF32, which step.py turns off
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, images, labels, dtype)).backward()
            scaler.step(optimizer)
            scaler.update()
        yield


def our_steps(model: nn.Module, loader, memory: str, compiled: bool) -> Iterator[None]:
    """What train.py does in its epochs; each `next` is one step."""
    step = steps.Step(model, dtype=loader.dtype, memory=memory, compiled=compiled)
    for epoch in itertools.count():
        yield from step.epoch(loader, epoch, [LR] * len(loader))


def network(impl: str, arch: str, mode: str, classes: tuple[str, ...], device: torch.device) -> nn.Module:
    model = freeze.create(RECIPE | {"arch": arch, "mode": mode, "classes": classes}).train()
    model.to(device, memory_format=torch.contiguous_format if impl == "stock" else torch.channels_last)
    if impl == "compiled":
        model.compile(dynamic=False)
    return model


def start(
    impl: str,
    arch: str,
    mode: str,
    dataset: data.Dataset,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[None]:
    """An implementation, ready to go: each `next` is one optimisation step."""
    model = network(impl, arch, mode, dataset.classes, device)
    if impl == "stock":
        batches = stock_batches(dataset, batch_size, device)
        return common_steps(model, batches, torch.float32, benchmark=False)  # torch's default
    settings = {"batch_size": batch_size, "device": device, "dtype": dtype}
    loader = our_loader(dataset, compiled=impl in ("compiled", "lean", "recompute"), **settings)
    if impl in OURS:
        return our_steps(model, loader, *OURS[impl])
    return common_steps(model, our_batches(loader), dtype, benchmark=True)
