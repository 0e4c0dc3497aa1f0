"""Images in, batches on the device out: CIFAR-10, Imagenette, a folder of class folders, or a set drawn here.

    dataset = open_dataset("cifar10", "data")    # found or downloaded, checked, prepared once as FFCV files
    train = make_loader(dataset, "train", batch_size=128, device=device, dtype=dtype, rng=rng, augment=True)
    for images, labels in train.epoch(0): ...

A source is read once, into <data_dir>/beton/. Later starts recognise it by the names, sizes and times of its
files, and map the prepared pixels without importing FFCV, whose import and compilation take many seconds.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
from rich import progress as bars

import sources
from sources import DataError

PAD = 4  # pixels of black around an image before a random crop (He et al. 2016, section 4.2)


@dataclass(frozen=True)
class Split:
    images: np.ndarray  # uint8 [N, H, W, 3], mapped from the .beton, or in memory where FFCV is not installed
    labels: np.ndarray  # int64 [N]
    beton: Path | None


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
    kept; these go to the user's cache where it cannot be written to.
    `image_size` is in pixels; by default 32 for CIFAR-10 and synthetic, 128 for Imagenette, and for a folder
    its images' own size if they are squares of one size, else 128.
    Raises DataError.
    """
    data_dir = Path(data_dir).expanduser()
    home = store = data_dir.parent if data_dir.is_file() else data_dir
    if not _writable(home):
        store = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "batchnorm-only"
    places = list(dict.fromkeys((data_dir, store)))
    try:
        found = sources.locate(name, places, image_size, say)
        dataset = found and (_load(home / "beton", found) or _load(store / "beton", found))
        if not found and not download:
            raise DataError(sources.missing(name, places, "is not there"))
        if not dataset:
            if store != home:
                say(f"{home} cannot be written to, so prepared data goes to {store}")
            with _locked(store / "beton", say) as folder:
                if not found:  # unless another process has fetched it by now
                    found = sources.locate(name, places, image_size, say)
                if not found:
                    sources.download(name, places, say)
                    found = sources.locate(name, [store], image_size, say)
                dataset = _load(folder, found) or _prepare(folder, found, say)
    except OSError as error:  # no permission, say, or a disk that fails
        why = sources.brief(error)
        raise DataError(f"--data {name}: {why}; mend that or give another --data-dir") from error
    if name in sources.URLS and "(" in dataset.title:
        say(f"{found.path}: {dataset.title}")
    return dataset


def class_subset(labels: np.ndarray, count: int, rng: np.random.RandomState) -> np.ndarray:
    """Sorted positions, int64 [count], of images chosen at random, the same number of every class.

    Raises DataError if `count` is not a multiple of the number of classes, or more than the smallest allows.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    each, rest = divmod(count, len(classes))
    if rest or not 1 <= each <= sizes.min():
        most = sizes.min() * len(classes)
        raise DataError(f"--train-subset {count}: give a multiple of {len(classes)} (classes), up to {most}")
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]))


# ---- batches on the device ----


def augment(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Crop each image out of its zero-padded self and flip it left to right, or not.

    `images` uint8 [N, H, W, 3]; `draws` int64 [N, 3]: row and column of the crop in the image padded by 4
    pixels on every side (0..8), and 1 for a flip. Returns uint8 [N, H, W, 3]. No shape depends on a value and
    nothing waits for the device, so it can be captured in a CUDA graph.
    """
    count, height, width, _ = images.shape
    padded = torch.nn.functional.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    first_rows = torch.arange(count, device=images.device)[:, None] * (height + 2 * PAD) + draws[:, :1]
    rows = first_rows + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(draws[:, 2:] > 0, width - 1 - columns, columns) + draws[:, 1:2]
    pixels = rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]
    return padded.view(-1, 3).index_select(0, pixels.view(-1)).view(images.shape)


def normalise(
    pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(pixels - mean) / std, uint8 [N, H, W, 3] to `dtype` [N, 3, H, W], channels_last; mean, std [3]."""
    normal = pixels.float().sub_(mean).div_(std)  # in place, because fresh memory costs more than arithmetic
    return normal.to(dtype).permute(0, 3, 1, 2)  # which is channels_last without a copy


class _Loader:
    """What both loaders share: which image comes when, how it is cropped, and what a batch looks like."""

    def __init__(self, dataset, split, batch_size, device, dtype, rng, augmented, subset):
        self.source, self.train = getattr(dataset, split), split == "train"
        every = np.arange(len(self.source.labels))
        self.positions = every if subset is None else np.asarray(subset, np.int64)
        self.num_images, self.image_size = len(self.positions), dataset.image_size
        self.batch_size, self.rng, self.augmented = batch_size, rng, augmented and self.train
        self.device, self.dtype = torch.device(device), dtype
        self.mean, self.std = (torch.tensor(x, device=self.device) for x in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole if self.train else whole + (rest > 0)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches: images `dtype` [n, 3, H, W], channels_last, and labels int64 [n], on the device.

        Order and crops are drawn for all images at once, so they depend on the seed and the epoch alone.
        """
        order, draws = np.arange(self.num_images), None
        if self.train:
            order = self.rng("order", epoch).permutation(self.num_images)[: len(self) * self.batch_size]
        if self.augmented:
            rng = self.rng("augment", epoch)
            offsets = rng.randint(0, 2 * PAD + 1, (self.num_images, 2), dtype=np.int64)
            flips = rng.randint(0, 2, (self.num_images, 1), dtype=np.int64)
            draws = torch.from_numpy(np.concatenate([offsets, flips], 1)).to(self.device)
        for index, (images, labels) in enumerate(self.fetch(order)):
            if self.augmented:
                images = augment(images, draws[index * self.batch_size :][: self.batch_size])
            yield normalise(images, self.mean, self.std, self.dtype), labels


class _ResidentLoader(_Loader):
    """All images lie on the device as uint8; in an epoch, a batch is a few kernels and nothing else."""

    def __init__(self, *options):
        super().__init__(*options)
        images = self.source.images
        if self.num_images < len(images):
            images = images[self.positions]
        # A mapped file is copied even to the CPU: its pages may be dropped and read from disk again.
        self.images = torch.from_numpy(images).to(self.device, copy=self.source.beton is not None)
        self.labels = torch.from_numpy(self.source.labels[self.positions]).to(self.device)

    def fetch(self, order: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in torch.from_numpy(order).to(self.device).split(self.batch_size):
            # Not index_select, which shares out every image among the threads, and waits for them each time.
            yield self.images[batch], self.labels[batch]


class _FfcvLoader(_Loader):
    """FFCV streams the images from the file, in our order; the batches are the resident ones, bit for bit."""

    def __init__(self, *options):
        super().__init__(*options)
        if not _import_ffcv():
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

    def fetch(self, order: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.loader.traversal_order.indices = self.positions[order].astype(np.uint64)
        batches = iter(self.loader)
        try:
            for images, labels in batches:
                yield self.copied(images), self.copied(labels).view(-1)
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
    augment: bool = False,
    subset: np.ndarray | None = None,
) -> _Loader:
    """A loader of "train" (shuffled, last partial batch dropped) or "test" (in file order, every image once).

    `loader.epoch(e)` yields `len(loader)` batches. `rng(stream, epoch)` gives the generators of order and
    augmentation. `subset`: positions in the split. `kind`: "resident", "ffcv", or None for resident if both
    splits take at most half of the device's free memory. Raises DataError: too few images, or no FFCV.
    """
    if split not in ("train", "test") or kind not in ("resident", "ffcv", None):
        raise ValueError(f"split {split!r}, kind {kind!r}: give train or test, and resident, ffcv or None")
    count = len(getattr(dataset, split).labels) if subset is None else len(subset)
    if batch_size < 1 or (split == "train" and count < batch_size):
        raise DataError(f"--batch-size {batch_size}: give 1 to {count}, the number of images to train on")
    if kind is None:
        size = dataset.train.images.nbytes + dataset.test.images.nbytes
        fits = dataset.train.beton is None or size <= _free_bytes(torch.device(device)) // 2
        kind = "resident" if fits else "ffcv"
    make = _ResidentLoader if kind == "resident" else _FfcvLoader
    return make(dataset, split, batch_size, device, dtype, rng, augment, subset)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


# ---- prepared once ----


def _prepare(folder: Path, found: sources.Found, say: sources.Say) -> Dataset:
    """Write a source's .beton files and, last, its entry in index.json; the lock on the folder is held."""
    source, index = sources.read(found), _index(folder)
    size, counts = source.image_size, {split: len(labels) for split, labels in source.labels.items()}
    listed = {entry[split]["file"] for entry in index.values() for split in counts}
    for path in folder.glob("*.beton*"):
        if path.name not in listed:  # left behind by a preparation that was killed
            path.unlink()
    with_ffcv = _import_ffcv()
    if not with_ffcv:
        say("ffcv is not installed: the images are kept in memory and read again at the next start")
    digest = hashlib.sha256(json.dumps([size, source.classes, list(counts.values())]).encode())
    entry, images, sums = {}, {}, np.zeros((2, 3))
    try:
        images_total = sum(counts.values())
        with sources.progress(f"preparing {found.name}", images_total, bars.MofNCompleteColumn()) as advance:
            for split, labels in source.labels.items():
                shape, part = (counts[split], size, size, 3), folder / f"{split}.beton.part"
                if with_ffcv:
                    entry[split] = _new_beton(part, labels, size)
                    images[split] = np.memmap(part, np.uint8, "r+", entry[split]["images_at"], shape)
                else:
                    images[split] = np.empty(shape, np.uint8)
                done = 0
                for block in source.blocks(split):
                    images[split][done : done + len(block)] = block
                    digest.update(np.ascontiguousarray(block))
                    if split == "train":  # float64 holds these sums exactly, in whatever order they are added
                        pixels = block.reshape(-1, 3).astype(np.float64)
                        sums += np.ones(len(pixels)) @ pixels, np.diag(pixels.T @ pixels)
                    done += len(block)
                    advance(len(block))
                digest.update(labels.astype("<i8"))
        mean, square = sums / (counts["train"] * size * size)
        std = np.maximum(np.sqrt(square - mean**2), 1.0)  # a channel without contrast is not blown up
        fingerprint, scale = digest.hexdigest()[:16], (mean.tolist(), std.tolist())
        facts = [found.name, source.title, fingerprint, source.classes, size, *scale]
        if not with_ffcv:
            return _dataset(facts, *(Split(images[split], source.labels[split], None) for split in images))
        images.clear()
        for split in counts:
            entry[split]["file"] = f"{found.name}-{size}px-{fingerprint}-{split}.beton"
            os.replace(folder / f"{split}.beton.part", folder / entry[split]["file"])
        part = folder / "index.json.part"
        part.write_text(json.dumps({**index, found.key: {**entry, "facts": facts}}, indent=1) + "\n")
        os.replace(part, folder / "index.json")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        needed = sum(counts.values()) * (size * size * 3 + 64)
        what = f"{folder}: no space left for the prepared data, about {needed:,} bytes"
        raise DataError(f"{what}\nfree as much, or name a folder on another disk with --data-dir") from error
    finally:
        for path in folder.glob("*.part"):
            path.unlink()
    return _load(folder, found)


def _load(folder: Path, found: sources.Found) -> Dataset | None:
    """What was prepared of this very source, the source unread; None if nothing was, or it is damaged."""
    try:
        entry, splits = _index(folder)[found.key], []
        size = entry["facts"][4]
        for part in (entry["train"], entry["test"]):
            path, count = folder / part["file"], part["count"]
            if path.stat().st_size != part["bytes"]:
                return None
            raw = np.memmap(path, np.uint8, "c")  # never written to; torch warns of arrays that cannot be
            images = raw[part["images_at"] :][: count * size * size * 3].reshape(count, size, size, 3)
            labels = np.ndarray(count, "<i8", raw, part["labels_at"], (part["label_stride"],))
            splits.append(Split(images, labels.astype(np.int64), path))
        return _dataset(entry["facts"], *splits)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dataset(facts: list, *splits: Split) -> Dataset:
    return Dataset(*(tuple(fact) if isinstance(fact, list) else fact for fact in facts), *splits)


def _index(folder: Path) -> dict[str, dict]:
    try:
        index = json.loads((folder / "index.json").read_text())
        return {key: entry for key, entry in index.items() if {"facts", "train", "test"} <= entry.keys()}
    except (OSError, ValueError, AttributeError):
        return {}


def _new_beton(path: Path, labels: np.ndarray, size: int) -> dict[str, object]:
    """An FFCV file whole but for its pixels, with all its space reserved; returns what lies where in it.

    Head and tables are FFCV's work. Its pixels are left to the caller, because FFCV's writer waits for ever
    if one of its processes fails, as on a full disk, and leaves gaps, so that no one array covers all images.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.types import ALLOC_TABLE_TYPE
    from ffcv.writer import DatasetWriter

    count, each = len(labels), size * size * 3
    page = 1 << min(31, max(21, (count * (each + 64)).bit_length()))  # up to 2 GiB all images lie on one page
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    writer = DatasetWriter(str(path), fields, page, num_workers=1)
    writer.num_samples = count
    writer.prepare()
    try:  # it holds shared memory from here on
        images_at = -(-writer.data_region_start // 4096) * 4096
        rows, table = np.zeros(count, writer.metadata_type), np.zeros(count, ALLOC_TABLE_TYPE)
        image, label = rows.dtype.names
        rows[image]["mode"], rows[image]["height"], rows[image]["width"] = IMAGE_MODES["raw"], size, size
        rows[image]["data_ptr"] = table["ptr"] = images_at + np.arange(count) * each
        rows[label], table["sample_id"], table["size"] = labels, np.arange(count), each
        writer.metadata_sm.buf[: rows.nbytes] = rows.tobytes()
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, images_at + count * each)
        writer.finalize([table])
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    labels_at = writer.metadata_start + rows.dtype.fields[label][1]
    where = {"images_at": images_at, "labels_at": labels_at, "label_stride": rows.itemsize}
    return {"bytes": path.stat().st_size, "count": count, **where}


def _import_ffcv() -> bool:
    threads = torch.get_num_threads()
    try:
        import ffcv  # noqa: F401
    except (ImportError, OSError):  # not installed, or without its system libraries
        return False
    finally:
        torch.set_num_threads(threads)  # the import sets it to 1
    return True


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def _locked(folder: Path, say: sources.Say) -> Iterator[Path]:
    """Let one process at a time prepare data in a folder, so that the others find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        say(f"waiting for another process that prepares data in {folder}")
        lock.acquire()
    try:
        yield folder
    finally:
        lock.release()
