"""A data set by name, and batches of it on the device.

python data.py cifar10 [--data-dir data]     # downloads and prepares it, for jobs that have no network

dataset = open_dataset("cifar10", "data")
train = make_loader(dataset, "train", batch_size=128, device="cuda", dtype=torch.bfloat16, rng=rng)
for images, labels in train.epoch(0): ...
"""

import argparse
import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import progress
from datasets import DataError, augment, prepare, sources
from datasets import download as downloading

SPLITS = {"train": "train", "validation": "train", "test": "test"}  # where each one's images lie


@dataclass(frozen=True)
class Split:
    images: np.ndarray  # uint8 [N, H, W, 3], mapped from the .beton, or in memory where FFCV is not installed
    labels: np.ndarray  # int64 [N]
    beton: Path | None
    resident: dict = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All images and labels on `device`, once for all loaders."""
        if device not in self.resident:
            # A mapped file is copied even to the CPU: its pages may be dropped and read from disk again.
            images = torch.from_numpy(self.images).to(device, copy=self.beton is not None)
            self.resident[device] = images, torch.from_numpy(self.labels).to(device)
        return self.resident[device]


@dataclass(frozen=True)
class Dataset:
    name: str
    title: str  # for people: says what it is
    fingerprint: str  # 16 hex digits of SHA-256 over pixels, labels, class names and size of both splits
    classes: tuple[str, ...]
    image_size: int  # pixels
    mean: tuple[float, float, float]  # of the training pixels per channel, on the 0..255 scale, like std
    std: tuple[float, float, float]
    train: Split
    test: Split


def open_dataset(
    name: str,
    data_dir: str | Path = "data",
    *,
    image_size: int | None = None,
    download: bool = True,
    say: sources.Say = print,
) -> Dataset:
    """Find, check and, the first time, prepare a data set; `say` receives notes of one line.

    `name` is one of sources.NAMES, or a folder with train/<class>/* and test/<class>/* or val/<class>/*.
    `data_dir` is where the named sets are looked for (it may also be an archive) and where prepared files are
    kept, in its folder beton; where it cannot be written to, the user's cache takes its place. Later starts
    recognise a source by the names, sizes and times of its files, and map the prepared pixels without FFCV.
    `image_size` is in pixels; by default that of the named set, and for a folder the size of its images if
    they are squares of one size, else 128. Raises DataError.
    """
    data_dir = Path(data_dir).expanduser()
    home = store = data_dir.parent if data_dir.is_file() else data_dir
    if not _writable(home):
        store = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "batchnorm-only"
    places = list(dict.fromkeys((data_dir, store)))
    try:
        found = sources.locate(name, places, image_size, say)
        prepared = found and (prepare.load(home / "beton", found) or prepare.load(store / "beton", found))
        if not found and not download:
            raise DataError(downloading.missing(name, places, "is not there"))
        if not prepared:
            if store != home:
                say(f"{home} cannot be written to, so prepared data goes to {store}")
            folder = store / "beton"
            with prepare.locked(folder, say):
                if not found:  # unless another process has fetched it by now
                    found = sources.locate(name, places, image_size, say)
                if not found:
                    downloading.fetch(name, places, say)
                    found = sources.locate(name, [store], image_size, say)
                prepared = prepare.load(folder, found) or prepare.prepare(folder, found, say)
    except OSError as error:  # no permission, say, or a disk that fails
        why = sources.brief(error)
        raise DataError(f"--data {name}: {why}; mend that or give another --data-dir") from error
    facts = [tuple(fact) if isinstance(fact, list) else fact for fact in prepared[0]]
    dataset = Dataset(*facts, *(Split(*split) for split in prepared[1]))
    if name in sources.SETS and dataset.title != sources.SETS[name].title:  # whose bytes are not verified
        say(f"{found.path}: {dataset.title}")
    return dataset


def share_out(
    labels: np.ndarray,
    rng: Callable[[str, int], np.random.RandomState],
    validation: int | None = None,
    training: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions, int64, of the images to train on and of other images to validate on.

    `labels` are those of the training split. `validation` images (None: none) are drawn first, so they do not
    depend on `training`; of the rest, `training` images are drawn (None: all). Each draw takes as many of
    every class. `rng(stream, 0)` gives the generators. Raises DataError as `class_subset` does.
    """
    every, held_out = np.arange(len(labels)), np.empty(0, np.int64)
    if validation:
        held_out = class_subset(labels, validation, rng("validation", 0), "--val-split", spare=1)
        every = np.setdiff1d(every, held_out)
    if training:
        left = f" ({len(held_out)} are set apart to validate on)" if validation else ""
        every = every[class_subset(labels[every], training, rng("subset", 0), note=left)]
    return every, held_out


def tenth(labels: np.ndarray) -> int:
    """A number of images: for every class a tenth of the size of the smallest class, and at least one."""
    sizes = np.unique(labels, return_counts=True)[1]
    return len(sizes) * max(1, int(sizes.min()) // 10)


def class_subset(
    labels: np.ndarray,
    count: int,
    rng: np.random.RandomState,
    option: str = "--train-subset",
    spare: int = 0,
    note: str = "",
) -> np.ndarray:
    """Sorted positions, int64 [count], of images chosen at random, the same number of every class.

    Raises DataError, which names `option`, if `count` is not a multiple of the number of classes, or leaves
    fewer than `spare` of one.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    each, rest = divmod(count, len(classes))
    if rest or not 1 <= each <= sizes.min() - spare:
        most = (sizes.min() - spare) * len(classes)
        if most < len(classes):
            raise DataError(f"{option} {count}: a class has too few images; give it more, or leave it out")
        raise DataError(f"{option} {count}: give a multiple of {len(classes)} (classes), up to {most}{note}")
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]))


class Loader:
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

    def transform(self, images: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Images uint8 [n, H, W, 3] augmented, normalised, and as `dtype` [n, 3, H, W], channels_last."""
        if draws is not None:
            images = augment.augment(images, draws, self.parts)
        # In place, because fresh memory costs more than arithmetic. The permuted view is channels_last.
        images = images.float().sub_(self.mean).div_(self.std)
        return images.to(self.dtype).permute(0, 3, 1, 2)


class _ResidentLoader(Loader):
    """All images lie on the device as uint8; in an epoch, a batch is a few kernels and nothing else."""

    resident = True

    def __init__(self, *options, compiled: bool):
        super().__init__(*options)
        self.images, self.labels = self.source.on(self.device)
        self.order = self.draws = None
        if compiled and self.device.type == "cuda":  # one kernel in the place of a dozen
            self.transform = torch.compile(self.transform, dynamic=False)

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

    def __init__(self, *options, compiled: bool):
        super().__init__(*options)
        if not prepare.import_ffcv():
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
                yield self.transform(self.copied(images), next(draws)), self.copied(labels).view(-1)
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
) -> Loader:
    """A loader of "train" (shuffled, augmented, last partial batch dropped), or of "test" or "validation"
    (training images, of which `subset` says which): in file order, as they are, every image once.

    `loader.epoch(e)` yields `len(loader)` batches. `rng(stream, epoch)` gives the generators of order and
    augmentation, `augmented` is its name in augment.py. `subset`: positions in the split. `kind`: "resident",
    "ffcv", or None for resident if both splits take at most half of the device's free memory. `compiled`: on
    a GPU, augment and normalise by torch.compile. `share`: (r, n) for the r-th of n equal parts of every
    training batch; together they are the batches of (0, 1). Raises DataError: too few images, or no FFCV.
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


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", help=f"{', '.join(sources.NAMES)}, or a folder")
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
