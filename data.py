"""A data set by name, and batches of it on the device.

python data.py cifar10 [--data-dir data]     # downloads and prepares it, for jobs that have no network

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


def open_dataset(
    name: str, data_dir: str | Path, *, image_size: int | None = None, download: bool = True, say: Say = print
) -> Dataset:
    """Find, check and, the first time, prepare a data set; `say` receives notes of one line.

    `name` is one of sources.SETS, or a folder with train/<class>/* and test/<class>/* or val/<class>/*.
    `data_dir` is where the named sets are looked for (it may also be an archive) and where prepared files are
    kept, in its folder beton; where it cannot be written to, the user's cache takes its place. Later starts
    recognise a source by the names, sizes and times of its files, and map the prepared pixels without FFCV.
    `image_size` is in pixels; by default that of the named set, and for a folder the size of its images if
    they are squares of one size, else 128. Raises DataError.
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
    except OSError as error:  # no permission, say, or a disk that fails
        mend = "mend that or give another --data-dir"
        raise DataError(f"--data {name}: {sources.brief(error)}; {mend}") from error
    if name in sources.SETS and dataset.title != sources.SETS[name].title:  # whose bytes are not verified
        say(f"{found.path}: {dataset.title}")
    return dataset


def share_out(
    labels: np.ndarray, rng: augment.Stream, validation: int | None = None, training: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions, int64, of the images to train on and of those to validate on, which are other ones.

    `labels` are the training split's. `validation` images (None: none) are drawn first, and do not depend on
    `training`; of the others, `training` are drawn (None: all). Of either there are as many of every class.
    `rng(stream, 0)` gives the generators. Raises DataError as `class_subset` does.
    """
    every, held_out = np.arange(len(labels)), np.empty(0, np.int64)
    if validation:
        held_out = class_subset(labels, validation, rng("validation", 0), validates=True)
        every = np.setdiff1d(every, held_out)
    if training:
        every = every[class_subset(labels[every], training, rng("subset", 0), set_apart=len(held_out))]
    return every, held_out


def tenth(labels: np.ndarray) -> int:
    """As many images as a tenth of the smallest class, and at least one, of every class."""
    sizes = np.unique(labels, return_counts=True)[1]
    return len(sizes) * max(1, int(sizes.min()) // 10)


def class_subset(
    labels: np.ndarray, count: int, rng: np.random.RandomState, validates: bool = False, set_apart: int = 0
) -> np.ndarray:
    """Sorted positions, int64 [count], of images chosen at random, the same number of every class.

    DataError if `count` is no multiple of the number of classes, or more than there are; where they are to
    validate on (`validates`), one of each class must be left. `set_apart` are left out of `labels` already.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    (each, rest), most = divmod(count, len(classes)), sizes.min() - validates
    if rest or not 1 <= each <= most:
        option = "--val-split" if validates else "--train-subset"
        others = f" ({set_apart} are set apart to validate on)" if set_apart else ""
        mend = f"give a multiple of {len(classes)} (classes), up to {most * len(classes)}{others}"
        if most < 1:
            mend = "a class has too few images; give it more, or leave it out"
        raise DataError(f"{option} {count}: {mend}")
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]))


@dataclass(eq=False)
class Loader:
    """What both loaders share: which image comes when, how it is changed, and what a batch looks like.

    "train" is shuffled, augmented, and its last partial batch dropped; "test", and "validation" (training
    images, of which `subset` says which) come in file order, as they are, every image once.
    """

    dataset: Dataset
    split: str  # "train", "validation" or "test"
    batch_size: int  # of all processes; once made, this one's part
    device: torch.device | str
    dtype: torch.dtype
    rng: augment.Stream | None = None  # for order and augmentation, by epoch
    augmented: str = "none"  # a name in augment.py
    subset: np.ndarray | None = None  # positions in the split
    compiled: bool = False  # on a GPU, resident images are augmented and normalised by torch.compile
    share: tuple[int, int] = (0, 1)  # (r, n): train on the r-th of n equal parts of every batch of (0, 1)

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

    def drawn(self, epoch: int) -> tuple[np.ndarray, torch.Tensor]:
        """Positions in the split, int64 [n], in the epoch's order; and augmentation's draws for them [n, k].

        All are drawn at once, so they depend on the seed and the epoch alone; of each batch, a process then
        takes its own part.
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
        """Images uint8 [n, H, W, 3] augmented, normalised, and as `dtype` [n, 3, H, W], channels_last."""
        if self.parts:
            images = augment.augment(images, draws, self.parts)
        # In place, because fresh memory costs more than arithmetic. The permuted view is channels_last.
        images = images.float().sub_(self.mean).div_(self.std)
        return images.to(self.dtype).permute(0, 3, 1, 2)


class _ResidentLoader(Loader):
    """All images lie on the device as uint8; in an epoch, a batch is a few kernels and nothing else."""

    resident = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.images, self.labels = self.source.on(self.device)
        self.ahead = None  # epoch, and what is drawn for it
        shape = len(self), self.batch_size
        self.order = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.draws = torch.zeros(*shape, augment.DRAWS if self.parts else 0, device=self.device)
        cropped = self.parts <= {"crop", "flip"}
        self.passes = kernels.passes_for(self.device.type, self.compiled and cropped)
        if self.compiled and self.device.type == "cuda":  # one kernel in the place of a dozen
            self.transform = torch.compile(self.transform, dynamic=False)

    def start(self, epoch: int) -> None:
        """Put the order and the draws of an epoch where `batch` finds them: always in the same memory.

        Those of the next epoch are drawn meanwhile. Without training there is but one epoch.
        """
        if not self.train and self.ahead:
            return
        if self.ahead is None or self.ahead[0] != epoch:
            self.ahead = epoch, self.drawing(epoch)
        order, draws = self.ahead[1].result()
        self.ahead = epoch + 1, self.drawing(epoch + 1) if self.train else None
        # A last batch that is not full ends in zeros: image 0 stands in.
        self.order.view(-1)[: len(order)] = torch.from_numpy(order)
        self.draws.flatten(0, 1)[: len(order)] = draws

    def drawing(self, epoch: int) -> Future:
        """What `drawn` returns, by a thread that ends; a pool's, interrupted as it begins, never does."""
        future = Future()

        def draw() -> None:
            try:
                future.set_result(self.drawn(epoch))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

        Thread(target=draw).start()
        return future

    def batch(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of the epoch started last at `position`, int64 [1]; nothing waits for the device."""
        given = self.images, self.labels, self.order, self.draws, position, self.mean, self.std, self.dtype
        made = self.passes.batch(*given, augment.PAD)
        if made is not None:
            return made
        index, draws = (drawn.index_select(0, position)[0] for drawn in (self.order, self.draws))
        # Not index_select, which shares out every image among the threads, and waits for them each time.
        return self.transform(self.images[index], draws), self.labels[index]

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.start(epoch)
        for position in range(len(self)):
            images, labels = self.batch(torch.full((1,), position, device=self.device))  # a copy would wait
            left = self.num_images - position * self.batch_size  # fewer than a batch only in the last one
            yield images[:left], labels[:left]


class _FfcvLoader(Loader):
    """FFCV streams the images from the file, in our order; the batches are the resident ones, bit for bit."""

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
            # FFCV sets torch's number of threads to that of its workers, so that must stay what it is.
            num_workers=min(torch.get_num_threads(), config.NUMBA_NUM_THREADS),
            os_cache=True,  # the file is mapped, whatever FFCV_DEFAULT_CACHE_PROCESS says (see _new_beton)
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
        """A finished copy on the device: FFCV fills the buffer anew once the next batch is asked for."""
        if self.copying is None:
            return buffer.to(self.device, copy=True)
        with torch.cuda.stream(self.copying):  # its own stream: waiting for it does not wait for training
            copy = buffer.to(self.device, non_blocking=True)
        self.copying.synchronize()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy


def make_loader(dataset: Dataset, split: str, *, kind: str | None = None, **options) -> Loader:
    """A loader whose `epoch(e)` yields `len(loader)` batches; `options` are the fields of Loader.

    `kind`: "resident", "ffcv", or None for resident if both splits take at most half of the device's free
    memory. Raises DataError: too few images for a batch, or no FFCV.
    """
    if kind is None:
        size = dataset.train.images.nbytes + dataset.test.images.nbytes
        fits = dataset.train.beton is None or size <= _free_bytes(torch.device(options["device"])) // 2
        kind = "resident" if fits else "ffcv"
    return {"resident": _ResidentLoader, "ffcv": _FfcvLoader}[kind](dataset, split, **options)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def main(argv: list[str] | None = None) -> int:
    parser = progress.Parser("data.py", __doc__)
    parser.add_argument("name", help=f"{', '.join(sources.SETS)}, or a folder")
    parser.add_argument("--data-dir", default="data", help="where archives are looked for and kept [data]")
    parser.add_argument("--image-size", type=int, help="pixels a side")
    options = parser.parse_args(argv)
    say = functools.partial(progress.note, "data.py")
    dataset = open_dataset(options.name, options.data_dir, image_size=options.image_size, say=say)
    counts = f"{len(dataset.train.labels):,} + {len(dataset.test.labels):,}"
    say(f"{dataset.title}, {counts} images of {dataset.image_size} pixels: ready")
    return 0


if __name__ == "__main__":
    sys.exit(progress.run("data.py", main))
