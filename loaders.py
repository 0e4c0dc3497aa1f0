"""Batches on the device: which image comes when, how it is normalised, and how it gets there.

train = make_loader(dataset, "train", batch_size=128, device=device, dtype=dtype, rng=rng, augmented="paper")
for images, labels in train.epoch(0): ...
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data import DataError, Dataset, import_ffcv
from datasets import augment

SPLITS = {"train": "train", "validation": "train", "test": "test"}  # where each one's images lie


def normalise(
    pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(pixels - mean) / std: [N, H, W, 3], uint8 or written to, as `dtype` [N, 3, H, W]; mean, std [3]."""
    normal = pixels.float().sub_(mean).div_(std)  # in place, because fresh memory costs more than arithmetic
    return normal.to(dtype).permute(0, 3, 1, 2)  # which is channels_last without a copy


class _Loader:
    """What both loaders share: which image comes when, how it is changed, and what a batch looks like."""

    def __init__(self, dataset, split, batch_size, device, dtype, rng, augmented, subset, share):
        self.source, self.train = getattr(dataset, SPLITS[split]), split == "train"
        every = np.arange(len(self.source.labels))
        self.positions = every if subset is None else np.asarray(subset, np.int64)
        self.num_images, self.image_size = len(self.positions), dataset.image_size
        self.rank, self.processes = share
        self.batch_size = batch_size // self.processes  # this process's part
        self.rng, self.parts = rng, augment.parts_of(augmented) if self.train else set()
        self.device, self.dtype = torch.device(device), dtype
        self.mean, self.std = (torch.tensor(x, device=self.device) for x in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        whole, rest = divmod(self.num_images, self.batch_size * self.processes)
        return whole if self.train else whole + (rest > 0)

    def drawn(self, epoch: int) -> tuple[np.ndarray, torch.Tensor | None]:
        """Positions in the split, int64, in the epoch's order; and augmentation's draws for them.

        All are drawn at once, so they depend on the seed and the epoch alone; of each batch, a process then
        takes its own part.
        """
        order, draws = self.positions, None
        if self.train:
            shuffled = self.rng("order", epoch).permutation(self.num_images)
            order = order[shuffled[: len(self) * self.batch_size * self.processes]]
        if self.parts:
            drawn = augment.draw(self.parts, self.rng, epoch, self.num_images)
            draws = torch.from_numpy(self.part(drawn[: len(order)]))
        return self.part(order), draws

    def part(self, drawn: np.ndarray) -> np.ndarray:
        """This process's part, of one batch after another."""
        if self.processes == 1:
            return drawn
        parts = drawn.reshape(len(self), self.processes, self.batch_size, *drawn.shape[1:])
        return parts[:, self.rank].reshape(-1, *drawn.shape[1:])

    def prepare(self, images: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        if draws is not None:
            images = augment.augment(images, draws, self.parts)
        return normalise(images, self.mean, self.std, self.dtype)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches, on the device: images `dtype` [n, 3, H, W], channels_last, labels int64 [n]."""
        raise NotImplementedError


class _ResidentLoader(_Loader):
    """All images lie on the device as uint8; in an epoch, a batch is a few kernels and nothing else."""

    resident = True

    def __init__(self, *options, compiled: bool):
        super().__init__(*options)
        self.images, self.labels = self.source.on(self.device)
        self.order = self.draws = None
        if compiled and self.device.type == "cuda":  # one kernel in the place of a dozen
            self.prepare = torch.compile(self.prepare, dynamic=False)

    def start(self, epoch: int) -> None:
        """Put the order and the draws of an epoch where `batch` finds them: always in the same memory."""
        order, draws = self.drawn(epoch)
        missing = len(self) * self.batch_size - len(order)  # of the last batch: image 0 stands in
        order = torch.from_numpy(np.pad(order, (0, missing))).view(len(self), -1)
        if self.order is None:
            self.order = torch.empty_like(order, device=self.device)
            self.draws = None if draws is None else torch.empty_like(draws, device=self.device)
        self.order.copy_(order)
        if draws is not None:
            self.draws.copy_(draws)

    def batch(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of the epoch started last at `position`, int64 [1]; nothing waits for the device."""
        index = self.order.index_select(0, position)[0]
        draws = self.draws
        if draws is not None:
            draws = draws.view(len(self), -1, augment.DRAWS).index_select(0, position)[0]
        # Not index_select, which shares out every image among the threads, and waits for them each time.
        return self.prepare(self.images[index], draws), self.labels[index]

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.start(epoch)
        for position, count in enumerate(self.counts()):
            images, labels = self.batch(torch.full((1,), position, device=self.device))  # a copy would wait
            yield images[:count], labels[:count]

    def counts(self) -> list[int]:
        """Images in each batch."""
        rest = self.num_images - (len(self) - 1) * self.batch_size
        return [self.batch_size] * (len(self) - 1) + [min(rest, self.batch_size)]


class _FfcvLoader(_Loader):
    """FFCV streams the images from the file, in our order; the batches are the resident ones, bit for bit."""

    resident = False

    def __init__(self, *options, compiled: bool):
        super().__init__(*options)
        if not import_ffcv():
            raise DataError(
                "--loader ffcv: ffcv cannot be imported; give --loader resident, or install it with\n"
                "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev && pip install ffcv==1.0.2"
            )
        if self.source.beton is None:
            raise DataError("--loader ffcv: this data was opened before ffcv was installed; open it again")
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader
        from ffcv.transforms import ToTensor
        from ffcv.traversal_order.base import TraversalOrder
        from numba import config

        class Given(TraversalOrder):
            def sample_order(self, epoch: int) -> np.ndarray:
                return self.indices

        self.loader = Loader(
            str(self.source.beton),
            self.batch_size,
            # FFCV sets torch's number of threads to that of its workers, so that must stay what it is.
            num_workers=min(torch.get_num_threads(), config.NUMBA_NUM_THREADS),
            os_cache=True,  # the file is mapped, whatever FFCV_DEFAULT_CACHE_PROCESS says (see _new_beton)
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
        )
        self.loader.traversal_order = Given(self.loader)
        self.copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order, draws = self.drawn(epoch)
        draws = iter([None] * len(self) if draws is None else draws.to(self.device).split(self.batch_size))
        self.loader.traversal_order.indices = order.astype(np.uint64)
        batches = iter(self.loader)
        try:
            for images, labels in batches:
                yield self.prepare(self.copied(images), next(draws)), self.copied(labels).view(-1)
        finally:
            batches.close()

    def copied(self, buffer: torch.Tensor) -> torch.Tensor:
        """A finished copy on the device: FFCV fills the buffer anew once the next batch is asked for."""
        if self.copying is None:
            return buffer.to(self.device, copy=True)
        with torch.cuda.stream(self.copying):  # its own stream: waiting for it does not wait for training
            copy = buffer.to(self.device, non_blocking=True)
        self.copying.synchronize()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy


def make_loader(
    dataset: Dataset,
    split: str,
    *,
    kind: str | None = None,
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    rng: Callable[[str, int], np.random.RandomState] | None = None,
    augmented: str = "none",
    subset: np.ndarray | None = None,
    compiled: bool = False,
    share: tuple[int, int] = (0, 1),
) -> _Loader:
    """A loader of "train" (shuffled, augmented, last partial batch dropped), or of "test" or "validation"
    (training images, of which `subset` says which): in file order, as they are, every image once.

    `loader.epoch(e)` yields `len(loader)` batches. `rng(stream, epoch)` gives the generators of order and
    augmentation, `augmented` is its name in augment.py. `subset`: positions in the split. `kind`: "resident",
    "ffcv", or None for resident if both splits take at most half of the device's free memory. `compiled`: on
    a GPU, prepare batches by torch.compile. `share`: (r, n) for the r-th of n equal parts of every batch, to
    train on; the batches are those of (0, 1), cut. Raises DataError: too few images, or no FFCV.
    """
    if split not in SPLITS or kind not in ("resident", "ffcv", None):
        known = "train, validation or test, and resident, ffcv or None"
        raise ValueError(f"split {split!r}, kind {kind!r}: give {known}")
    count = len(getattr(dataset, SPLITS[split]).labels) if subset is None else len(subset)
    if batch_size < 1 or (split == "train" and count < batch_size):
        raise DataError(f"--batch-size {batch_size}: give 1 to {count}, the number of images to train on")
    if kind is None:
        size = dataset.train.images.nbytes + dataset.test.images.nbytes
        fits = dataset.train.beton is None or size <= _free_bytes(torch.device(device)) // 2
        kind = "resident" if fits else "ffcv"
    make = _ResidentLoader if kind == "resident" else _FfcvLoader
    return make(dataset, split, batch_size, device, dtype, rng, augmented, subset, share, compiled=compiled)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
