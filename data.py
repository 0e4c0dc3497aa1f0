"""Open a data set by name, and load batches of it onto the device.

    python data.py cifar10 [--data-dir data]     # download and prepare it ahead, for jobs without network

From Python:

    dataset = open_dataset("cifar10", "data")
    train = make_loader(dataset, "train", batch_size=128, device="cuda", dtype=torch.bfloat16, rng=rng)
    for images, labels in train.epoch(0): ...
"""

import progress  # isort: split

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import torch

import kernels
from datasets import DataError, Say, augment, prepare, sources
from datasets import download as downloading
from datasets.prepare import Dataset
from kernels.device import user_cache
from kernels.reference import TorchPasses


def open_dataset(
    name: str, data_dir: str | Path, *, image_size: int | None = None, download: bool = True, say: Say = print
) -> Dataset:
    """Find, check and, the first time, prepare a data set; `say` receives one-line notes.

    `name` is one of sources.SETS, or a folder with train/<class>/* and test/<class>/* or val/<class>/*.
    Named sets are looked for in `data_dir` (it may also be an archive), and downloaded there if `download`.
    Prepared files are kept in its folder beton. If `data_dir` is not writable, new files go to the user's
    cache. Later starts recognise a source by the names, sizes and times of its files, and map the prepared
    pixels without FFCV. `image_size` is in pixels; the default is that of the named set, and for a folder the
    size of its images if all are squares of one size, else 128. Raises DataError if it cannot be opened.
    """
    data_dir = sources.expanded(data_dir)
    home = store = data_dir.parent if data_dir.is_file() else data_dir
    there = next(path for path in (home, *home.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        store = user_cache()
    places = list(dict.fromkeys((data_dir, store)))
    try:
        found = sources.locate(name, places, image_size, say)
        dataset = found and (prepare.load(home / "beton", found) or prepare.load(store / "beton", found))
        if not found and not download:
            raise DataError(downloading.missing(name, places, "is not there"))
        if not dataset:
            if store != home:
                say(f"{home} cannot be written to, so prepared data goes to {store}")
            folder = store / "beton"
            with prepare.locked(folder, say):
                if not found:
                    downloading.fetch(name, places, say)
                    found = sources.locate(name, places, image_size, say)
                dataset = prepare.load(folder, found) or prepare.prepare(folder, found, say)
    except OSError as error:  # such as no permission, or a failing disk
        mend = "mend that or give another --data-dir"
        raise DataError(f"--data {name}: {sources.brief(error)}; {mend}") from error
    if name in sources.SETS and dataset.title != sources.SETS[name].title:  # its bytes are not verified
        say(f"{found.path}: {dataset.title}")
    return dataset


def share_out(
    labels: np.ndarray, rng: augment.Stream, validation: int | None = None, training: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return two sorted, disjoint sets of positions, int64: images to train on, and images to validate on.

    `labels` are those of the training split. `validation` images (None: none) are drawn first, so they do not
    depend on `training`; `training` images (None: all) are drawn from the rest. Each draw takes the same
    number from every class. `rng(stream, 0)` returns the generators. Raises DataError as `class_subset` does.
    """
    every, held_out = np.arange(len(labels)), np.empty(0, np.int64)
    if validation:
        held_out = class_subset(labels, validation, rng("validation", 0), validates=True)
        every = np.setdiff1d(every, held_out)
    if training:
        every = every[class_subset(labels[every], training, rng("subset", 0), set_apart=len(held_out))]
    return every, held_out


def tenth(labels: np.ndarray) -> int:
    """Return the size of a validation set with a tenth of the smallest class (or one image) of each class."""
    sizes = np.unique(labels, return_counts=True)[1]
    return len(sizes) * max(1, int(sizes.min()) // 10)


def class_subset(
    labels: np.ndarray, count: int, rng: np.random.RandomState, validates: bool = False, set_apart: int = 0
) -> np.ndarray:
    """Return sorted positions, int64 [count], of images drawn at random, the same number from every class.

    Raises DataError unless `count` is a positive multiple of the number of classes and every class has enough
    images: one more if `validates`, so that one is left to train on. `set_apart`, the number of validation
    images that `labels` no longer includes, is only for the message.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    (each, rest), most = divmod(count, len(classes)), sizes.min() - validates
    if rest or not 1 <= each <= most:
        option = "--val-split" if validates else "--train-subset"
        others = f" ({set_apart} are set aside for validation)" if set_apart else ""
        mend = f"give a multiple of the {len(classes)} classes, up to {most * len(classes)}{others}"
        if most < 1:
            mend = "a class has too few images; add some, or remove the class"
        raise DataError(f"{option} {count}: {mend}")
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]))


@dataclass(eq=False)
class Loader:
    """Base class of both loaders: the order of images, their augmentation, and the format of a batch.

    The split "train" is shuffled and augmented, and its last partial batch is dropped. "test" and
    "validation" (those training images that `subset` lists) come in file order, unaugmented, every image
    once. Raises DataError for a batch size below 1, or above the number of images to train on.
    """

    dataset: Dataset
    split: str  # "train", "validation" or "test"
    batch_size: int  # of all processes; after __post_init__, of this one
    device: torch.device | str
    dtype: torch.dtype
    rng: augment.Stream | None = None  # returns the generators of order and augmentation
    augmented: str = "none"  # a name in augment.py
    subset: np.ndarray | None = None  # positions in the split
    compiled: bool = False  # on a GPU, resident images are augmented and normalised by torch.compile
    share: tuple[int, int] = (0, 1)  # (r, n): train on part r, from 0, of n equal parts of every batch

    def __post_init__(self) -> None:
        dataset, self.train = self.dataset, self.split == "train"
        self.source = {"train": dataset.train, "validation": dataset.train, "test": dataset.test}[self.split]
        self.positions = np.arange(len(self.source.labels)) if self.subset is None else self.subset
        self.num_images = len(self.positions)
        if self.batch_size < 1 or (self.train and self.num_images < self.batch_size):
            what = f"give 1 to {self.num_images}, the number of images to train on"
            raise DataError(f"--batch-size {self.batch_size}: {what}")
        self.rank, self.processes = self.share
        self.batch_size //= self.processes
        self.parts = augment.parts_of(self.augmented) if self.train else set()
        self.device = torch.device(self.device)
        self.mean, self.std = (torch.tensor(x, device=self.device) for x in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        whole, rest = divmod(self.num_images, self.batch_size * self.processes)
        return whole if self.train else whole + (rest > 0)

    @property
    def batch_shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, 3, self.dataset.image_size, self.dataset.image_size

    def drawn(self, epoch: int) -> tuple[np.ndarray, torch.Tensor]:
        """Return an epoch's positions in the split, int64 [n], in order, and their augmentation draws [n, k].

        The draws of all processes are made at once, so they depend on the seed and the epoch alone. Each
        process then takes its own part of every batch.
        """
        order, draws = self.positions, np.empty((self.num_images, 0), np.float32)
        if self.parts:
            draws = augment.draw(self.parts, self.rng, epoch, self.num_images)
        if self.train:
            shuffled = self.rng("order", epoch).permutation(self.num_images)
            order = order[shuffled[: len(self) * self.batch_size * self.processes]]
        mine = np.arange(len(order)) // self.batch_size % self.processes == self.rank
        return order[mine], torch.from_numpy(draws[: len(order)][mine])

    def transform(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Augment and normalise uint8 images [n, H, W, 3]; return `dtype` [n, 3, H, W], channels_last."""
        if self.parts:
            images = augment.augment(images, draws, self.parts)
        # In place, because new memory costs more than the arithmetic. The permuted view is channels_last.
        images = images.float().sub_(self.mean).div_(self.std)
        return images.to(self.dtype).permute(0, 3, 1, 2)


class _ResidentLoader(Loader):
    """A loader that keeps all images on the device as uint8, so that a batch costs only a few kernels."""

    resident = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.images, self.labels = self.source.on(self.device)
        self.ahead = None  # the next epoch, and the future of its draws
        shape = len(self), self.batch_size
        self.order = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.draws = torch.zeros(*shape, augment.DRAWS if self.parts else 0, device=self.device)
        cropped = self.parts <= {"crop", "flip"}
        self.passes = kernels.passes_for(self.device.type, self.compiled and cropped)
        self.checked = False  # whether the passes' batch equals `transform`'s
        if self.compiled and self.device.type == "cuda":  # one kernel instead of a dozen
            self.transform = torch.compile(self.transform, dynamic=False)

    def start(self, epoch: int) -> None:
        """Write an epoch's order and draws to where `batch` reads them, always the same memory.

        A thread draws the next epoch's meanwhile. Splits other than "train" are the same in every epoch.
        """
        if not self.train and self.ahead:
            return
        if self.ahead is None or self.ahead[0] != epoch:
            self.ahead = epoch, self.drawing(epoch)
        order, draws = self.ahead[1].result()
        self.ahead = epoch + 1, self.drawing(epoch + 1) if self.train else None
        # A partial last batch ends in zeros, so that image 0 fills it up.
        self.order.view(-1)[: len(order)] = torch.from_numpy(order)
        self.draws.flatten(0, 1)[: len(order)] = draws

    def drawing(self, epoch: int) -> Future:
        """Return a future of `drawn`, run in a new thread: a pool's, interrupted as it begins, never ends."""
        future = Future()

        def draw() -> None:
            try:
                future.set_result(self.drawn(epoch))
            except BaseException as error:  # raised again by future.result()
                future.set_exception(error)

        Thread(target=draw).start()
        return future

    def batch(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return batch `position`, int64 [1], of the epoch last started; do not wait for the device."""
        given = self.images, self.labels, self.order, self.draws, position, self.mean, self.std, self.dtype
        made = self.passes.batch(*given, augment.PAD)
        if made is not None and self.checked:
            return made
        index, draws = (drawn.index_select(0, position)[0] for drawn in (self.order, self.draws))
        # Not index_select, which splits every single image among the threads and waits for them.
        images, labels = self.images[index], self.labels[index]
        if made is None:
            return self.transform(images, draws), labels
        # The GPU's kernel repeats `transform`. It is not used if somebody has changed that.
        images, self.checked = type(self).transform(self, images, draws), True
        if made[0].equal(images) and made[1].equal(labels):
            return made
        what = "the GPU's kernel for batches differs from Loader.transform, which takes its place"
        warnings.warn(what, stacklevel=2)
        self.passes = TorchPasses()
        return images, labels

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.start(epoch)
        for position in range(len(self)):
            images, labels = self.batch(torch.full((1,), position, device=self.device))  # a copy would wait
            left = self.num_images - position * self.batch_size  # less than a batch only in the last one
            yield images[:left], labels[:left]


class _FfcvLoader(Loader):
    """A loader that streams the images from a file with FFCV; its batches equal resident ones bit for bit."""

    resident = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not prepare.import_ffcv() or self.source.beton is None:
            raise DataError(
                "--loader ffcv: ffcv cannot be imported; give --loader resident, or install it with\n"
                "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev && pip install ffcv==1.0.2"
            )
        import ffcv.loader
        from numba import config

        self.loader = ffcv.loader.Loader(
            str(self.source.beton),
            self.batch_size,
            # FFCV sets torch's number of threads to its number of workers, so keep torch's number.
            num_workers=min(torch.get_num_threads(), config.NUMBA_NUM_THREADS),
            os_cache=True,  # map the file, even if FFCV_DEFAULT_CACHE_PROCESS says otherwise (see _new_beton)
            drop_last=False,
        )
        self.copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order, draws = self.drawn(epoch)
        draws = iter(draws.to(self.device).split(self.batch_size))
        self.loader.traversal_order.indices = order.astype(np.uint64)
        with contextlib.closing(iter(self.loader)) as batches:
            for images, labels in batches:
                yield self.transform(self.copied(images), next(draws)), self.copied(labels).view(-1)

    def copied(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return a completed copy on the device, because FFCV reuses the buffer for the next batch."""
        if self.copying is None:
            return buffer.to(self.device, copy=True)
        with torch.cuda.stream(self.copying):  # waiting for this stream does not wait for training
            copy = buffer.to(self.device, non_blocking=True)
        self.copying.synchronize()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy


def make_loader(dataset: Dataset, split: str, *, kind: str | None = None, **options) -> Loader:
    """Return a loader whose `epoch(e)` yields `len(loader)` batches; `options` are the fields of Loader.

    `kind` is "resident", "ffcv", or None: resident if the splits that are not there yet take at most half of
    the device's free memory, or if there is no FFCV file, else ffcv. Raises DataError if there are too few
    images for a batch, or if the loader needs FFCV and cannot import it.
    """
    if kind is None:
        device, splits = torch.device(options["device"]), (dataset.train, dataset.test)
        size = sum(split.images.nbytes for split in splits if device not in split.resident)
        fits = dataset.train.beton is None or size <= _free_bytes(device) // 2
        kind = "resident" if fits else "ffcv"
    return {"resident": _ResidentLoader, "ffcv": _FfcvLoader}[kind](dataset, split, **options)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def main(argv: list[str] | None = None) -> int:
    parser = progress.Parser("data.py", __doc__)
    parser.add_argument("name", help=f"{', '.join(sources.SETS)}, or a folder")
    parser.add_argument("--data-dir", default="data", help="folder in which archives are kept [data]")
    parser.add_argument("--image-size", type=int, help="pixels a side")
    options = parser.parse_args(argv)
    say = functools.partial(progress.note, "data.py")
    dataset = open_dataset(options.name, options.data_dir, image_size=options.image_size, say=say)
    counts = f"{len(dataset.train.labels):,} + {len(dataset.test.labels):,}"
    say(f"{dataset.title}, {counts} images of {dataset.image_size} pixels: ready")
    return 0


if __name__ == "__main__":
    sys.exit(progress.run("data.py", main))
