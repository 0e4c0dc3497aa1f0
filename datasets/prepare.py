"""Images written once, as FFCV files that later starts map without reading the source again.

A folder holds a file per split of each prepared source and index.json, which tells by a source's key which
files are its own, what lies where in them, and the facts that data.Dataset begins with.
"""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

import filelock
import numpy as np
import torch
from rich.progress import MofNCompleteColumn

from datasets import DataError, sources
from datasets.download import Bar

# Name, title, fingerprint, classes, image size, mean and std; and images, labels and file of both splits.
Prepared = tuple[list, list[tuple[np.ndarray, np.ndarray, Path | None]]]


def locked(folder: Path, say: sources.Say) -> contextlib.AbstractContextManager:
    """Let one process at a time prepare data in a folder, so that the others find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=1)
    except filelock.Timeout:
        say(f"waiting for another process that prepares data in {folder}")
        return lock.acquire()


def load(folder: Path, found: sources.Found) -> Prepared | None:
    """What was prepared from this very source, without reading it; None if nothing was, or it is damaged."""
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
            splits.append((images, labels.astype(np.int64), path))
        return entry["facts"], splits
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare(folder: Path, found: sources.Found, say: sources.Say) -> Prepared:
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
                        histogram += _histogram(block)
                    done += len(block)
                    bar.update(len(block))
                digest.update(labels.astype("<i8"))
        fingerprint = digest.hexdigest()[:16]
        facts = [found.name, source.title, fingerprint, source.classes, size, *_mean_and_std(histogram)]
        if not with_ffcv:
            return facts, [(images[split], source.labels[split], None) for split in images]
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


def _histogram(block: np.ndarray) -> np.ndarray:
    """How many pixels of images uint8 [n, H, W, 3] have each value, per channel: int64 [3, 256]."""
    pixels, counts = block.reshape(-1, 3), np.zeros((3, 256), np.int64)
    for first in range(0, len(pixels), 65536):  # so many fit a processor's cache
        counts += [np.bincount(channel, minlength=256) for channel in pixels[first : first + 65536].T]
    return counts


def _mean_and_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Of each channel's pixels, on the scale from 0 to 255."""
    mean, square = (histogram @ np.arange(256.0) ** power / histogram[0].sum() for power in (1, 2))
    std = np.maximum(np.sqrt(square - mean**2), 1.0)  # a channel without contrast is not blown up
    return mean.tolist(), std.tolist()


def _index(folder: Path) -> dict[str, dict]:
    try:
        index = json.loads((folder / "index.json").read_text())
        return {key: entry for key, entry in index.items() if {"facts", "train", "test"} <= entry.keys()}
    except (OSError, ValueError, AttributeError):
        return {}


def _new_beton(path: Path, labels: np.ndarray, size: int) -> dict[str, object]:
    """Write an FFCV file that lacks only its pixels, for which space is reserved; return what lies where.

    FFCV writes the head and the tables. The pixels are left to the caller, because FFCV's writer waits for
    ever if one of its processes fails, as on a full disk, and leaves gaps, so that no array covers them all.
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
    """Import FFCV and leave torch's number of threads as it was; False if FFCV cannot be imported."""
    threads = torch.get_num_threads()
    try:
        import ffcv  # noqa: F401
    except (ImportError, OSError):  # not installed, or without its system libraries
        return False
    finally:
        torch.set_num_threads(threads)  # the import sets it to 1
    return True
