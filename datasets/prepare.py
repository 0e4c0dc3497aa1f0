"""Images written once, as FFCV files that later starts map without reading the source again.

A folder holds a file per split of each prepared source and index.json, which tells by a source's key which
files are its own, what lies where in them, and the facts that Dataset begins with.
"""

import contextlib
import errno
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image
from rich.progress import MofNCompleteColumn

from datasets import DataError, sources
from datasets.download import Bar


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


def locked(folder: Path, say: sources.Say) -> contextlib.AbstractContextManager:
    """Let one process at a time prepare data in a folder, so that the others find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=1)
    except filelock.Timeout:
        say(f"waiting for another process that prepares data in {folder}")
        return lock.acquire()


def load(folder: Path, found: sources.Found) -> Dataset | None:
    """What was prepared of this very source, the source unread; None if nothing was, or it is damaged."""
    try:
        entry, splits = _index(folder)[found.key], []
        *names, classes, size, mean, std = entry["facts"]
        for part in (entry["train"], entry["test"]):
            path, count = folder / part["file"], part["count"]
            if path.stat().st_size != part["bytes"]:
                return None
            raw = np.memmap(path, np.uint8, "c")  # never written to; torch warns of arrays that cannot be
            images = raw[part["images_at"] :][: count * size * size * 3].reshape(count, size, size, 3)
            labels = np.ndarray(count, "<i8", raw, part["labels_at"], (part["label_stride"],))
            splits.append(Split(images, labels.astype(np.int64), path))
        return Dataset(*names, tuple(classes), size, tuple(mean), tuple(std), *splits)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare(folder: Path, found: sources.Found, say: sources.Say) -> Dataset:
    """Write a source's files and, last, its entry in index.json; the lock on the folder is held.

    Without FFCV nothing is written, and the images stay in memory. Raises DataError or OSError.
    """
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
        bar = Bar(f"preparing {found.name}", MofNCompleteColumn(), sum(counts.values()))
        with contextlib.closing(bar):
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
                    if split == "train":
                        histogram += np.reshape(
                            Image.fromarray(block.reshape(-1, size, 3)).histogram(), (3, 256)
                        )
                    done += len(block)
                    bar.update(len(block))
                digest.update(labels.astype("<i8"))
        fingerprint = digest.hexdigest()[:16]
        classes, scale = tuple(source.classes), _mean_and_std(histogram)
        facts = [found.name, source.title, fingerprint, classes, size, *scale]
        if not with_ffcv:
            return Dataset(*facts, *(Split(images[split], source.labels[split], None) for split in counts))
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
    return load(folder, found)


def _mean_and_std(histogram: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel's pixels, on the scale from 0 to 255; `histogram` [3, 256] counts their values."""
    mean, square = (histogram @ np.arange(256.0) ** power / histogram[0].sum() for power in (1, 2))
    std = np.maximum(np.sqrt(square - mean**2), 1.0)  # a channel without contrast is not blown up
    return tuple(mean.tolist()), tuple(std.tolist())


def _index(folder: Path) -> dict[str, dict]:
    try:
        return json.loads((folder / "index.json").read_text())
    except (OSError, ValueError):
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
