"""A data set by name, prepared once: CIFAR-10, Imagenette, a folder of class folders, or a set drawn here.

    dataset = open_dataset("cifar10", "data")    # found or downloaded, checked, prepared as FFCV files
    python data.py cifar10 [--data-dir data]     # the same, say before jobs that have no network

A source is read once, into <data_dir>/beton/. Later starts recognise it by the names, sizes and times of its
files, and map the prepared pixels without importing FFCV, whose import and compilation take many seconds.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import numpy as np
import torch
from rich import progress as bars

from datasets import sources
from datasets.sources import DataError


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


def share_out(
    labels: np.ndarray,
    rng: Callable[[str, int], np.random.RandomState],
    validation: int | None = None,
    training: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions, int64, of the images to train on and of those to validate on, which are other ones.

    `labels` are the training split's. `validation` images (None: none) are drawn first, and do not depend on
    `training`; of the others, `training` are drawn (None: all). Of either there are as many of every class.
    `rng(stream, 0)` gives the generators. Raises DataError as `class_subset` does.
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
    """As many images as a tenth of the smallest class, and at least one, of every class."""
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


def _prepare(folder: Path, found: sources.Found, say: sources.Say) -> Dataset:
    """Write a source's .beton files and, last, its entry in index.json; the lock on the folder is held."""
    source, index = sources.read(found), _index(folder)
    size, counts = source.image_size, {split: len(labels) for split, labels in source.labels.items()}
    listed = {entry[split]["file"] for entry in index.values() for split in counts}
    for path in folder.glob("*.beton*"):
        if path.name not in listed:  # left behind by a preparation that was killed
            path.unlink()
    with_ffcv = import_ffcv()
    if not with_ffcv:
        say("ffcv is not installed: the images are kept in memory and read again at the next start")
    digest = hashlib.sha256(json.dumps([size, source.classes, list(counts.values())]).encode())
    entry, images, histogram = {}, {}, np.zeros((3, 256), np.int64)
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
                    pixels = block.reshape(-1, 3) if split == "train" else block[:0].reshape(-1, 3)
                    for start in range(0, len(pixels), 65536):  # which fit a processor's cache
                        channels = pixels[start : start + 65536].T
                        histogram += [np.bincount(channel, minlength=256) for channel in channels]
                    done += len(block)
                    advance(len(block))
                digest.update(labels.astype("<i8"))
        values = np.arange(256.0)
        mean, square = (histogram @ values**power / histogram[0].sum() for power in (1, 2))
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


def import_ffcv() -> bool:
    """Whether FFCV is there; imported, with torch's number of threads left as it was."""
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", help=f"{', '.join(sources.NAMES)}, or a folder")
    parser.add_argument("--data-dir", default="data", help="where archives are looked for and kept [data]")
    parser.add_argument("--image-size", type=int, help="pixels a side")
    options = parser.parse_args(argv)
    try:
        dataset = open_dataset(options.name, options.data_dir, image_size=options.image_size, say=_note)
    except DataError as error:
        _note(str(error))
        return 2
    counts = f"{len(dataset.train.labels):,} + {len(dataset.test.labels):,}"
    _note(f"{dataset.title}, {counts} images of {dataset.image_size} pixels: ready")
    return 0


def _note(line: str) -> None:
    print(f"data.py: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
