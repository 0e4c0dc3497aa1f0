"""Write images once, as FFCV files that later starts map without reading the source again.

A folder holds one file per split of each prepared source, and index.json. For each source, by its key,
index.json has the names of its files, their layout, and the first fields of its Dataset.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import filelock
import numpy as np
import pydantic
import torch
from PIL import Image
from tqdm import tqdm

from datasets import DataError, Say, sources


@dataclass(frozen=True)
class Split:
    images: np.ndarray  # uint8 [N, H, W, 3], mapped from the .beton, or in memory if FFCV is not installed
    labels: np.ndarray  # int64 [N]
    beton: Path | None
    resident: dict = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all images and labels on `device`, which all loaders share."""
        if device not in self.resident:
            # Copy a mapped file even to the CPU, because its pages may be dropped and read from disk again.
            images = torch.from_numpy(self.images).to(device, copy=self.beton is not None)
            self.resident[device] = images, torch.from_numpy(self.labels).to(device)
        return self.resident[device]


@dataclass(frozen=True)
class Dataset:
    name: str
    title: str  # its display name
    fingerprint: str  # 16 hex digits of SHA-256 over pixels, labels, class names and size of both splits
    classes: tuple[str, ...]
    image_size: int  # pixels
    mean: tuple[float, float, float]  # per channel of the training pixels, on the 0..255 scale; so is std
    std: tuple[float, float, float]
    train: Split
    test: Split


_PREPARED = re.compile(r".+-\d+px-[0-9a-f]{16}-(train|test)\.beton")
_HALF_WRITTEN = ("train.beton.part", "test.beton.part", "index.json.part")


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it would steer a terminal")
    return text


Text = Annotated[str, pydantic.AfterValidator(_printable)]
Count = Annotated[int, pydantic.Field(ge=1, le=2**62)]
Number = Annotated[float, pydantic.Field(ge=0, le=255)]


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)


class _Part(_Record):
    """The layout of a split's file; sizes and offsets are in bytes."""

    file: Annotated[str, pydantic.Field(pattern=r"^[^/]+\.beton$")]
    bytes: Count
    count: Count
    images_at: Count
    labels_at: Count
    label_stride: Count


class _Entry(_Record):
    """A source's entry in index.json; `facts` are the first fields of its Dataset, in order."""

    train: _Part
    test: _Part
    facts: tuple[
        Text,
        Text,
        Text,
        Annotated[tuple[str, ...], pydantic.Field(min_length=1)],
        Annotated[int, pydantic.Field(ge=sources.SMALLEST, le=sources.LARGEST)],
        tuple[Number, Number, Number],
        tuple[Number, Number, Number],
    ]


def locked(folder: Path, say: Say) -> contextlib.AbstractContextManager:
    """Lock a folder, made if need be, so that one process prepares data and the others find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=1)
    except filelock.Timeout:
        say(f"waiting for another process to prepare data in {folder}")
        return lock.acquire()


def load(folder: Path, found: sources.Found) -> Dataset | None:
    """Return the prepared data of exactly this source, without reading it; None if missing or damaged."""
    try:
        entry, splits = _index(folder)[found.key], []
        classes, size = entry.facts[3:5]
        for part in (entry.train, entry.test):
            path, count = folder / part.file, part.count
            if path.stat().st_size != part.bytes:
                return None
            raw = np.memmap(path, np.uint8, "c")  # never written to, but torch warns of read-only arrays
            images = raw[part.images_at :][: count * size * size * 3].reshape(count, size, size, 3)
            labels = np.ndarray(count, "<i8", raw, part.labels_at, (part.label_stride,)).astype(np.int64)
            if labels.min() < 0 or labels.max() >= len(classes):
                return None
            splits.append(Split(images, labels, path))
        return Dataset(*entry.facts, *splits)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare(folder: Path, found: sources.Found, say: Say) -> Dataset:
    """Write a source's files and, last, its entry in index.json, and return its Dataset.

    The caller holds the lock on the folder. Without FFCV, nothing is written and the images stay in memory.
    Raises DataError if the source is damaged or disk space is missing, and OSError if the disk fails.
    """
    source, index = sources.read(found), _index(folder)
    size, counts = source.image_size, {split: len(labels) for split, labels in source.labels.items()}
    listed = {part.file for entry in index.values() for part in (entry.train, entry.test)}
    for path in folder.iterdir():
        # Left behind by a preparation that was killed; the user's own files have other names.
        if (_PREPARED.fullmatch(path.name) or path.name in _HALF_WRITTEN) and path.name not in listed:
            path.unlink()
    with_ffcv = import_ffcv()
    if not with_ffcv:
        say("ffcv is not installed: the images are kept in memory and read again at the next start")
    digest = hashlib.sha256(json.dumps([size, source.classes, list(counts.values())]).encode())
    entry, images, histogram = {}, {}, np.zeros((3, 256), np.int64)
    try:
        shown = {"unit": " images", "leave": False, "disable": None}  # None: only in a terminal
        with tqdm(total=sum(counts.values()), desc=f"preparing {found.name}", **shown) as bar:
            for split, labels in source.labels.items():
                shape, part = (counts[split], size, size, 3), folder / f"{split}.beton.part"
                if with_ffcv:
                    entry[split] = _new_beton(part, labels, size)
                    images[split] = np.memmap(part, np.uint8, "r+", entry[split]["images_at"], shape)
                else:
                    images[split] = np.empty(shape, np.uint8)
                for first in range(0, counts[split], source.block_size):
                    block = source.block(split, first)
                    images[split][first : first + len(block)] = block
                    digest.update(np.ascontiguousarray(block))
                    if split == "train":
                        pixels = Image.fromarray(block.reshape(-1, size, 3))
                        histogram += np.reshape(pixels.histogram(), (3, 256))
                    bar.update(len(block))
                digest.update(labels.astype("<i8"))
        mean, square = (histogram @ np.arange(256.0) ** power / histogram[0].sum() for power in (1, 2))
        std = np.maximum(np.sqrt(square - mean**2), 1.0)  # do not blow up a channel without contrast
        fingerprint, scale = digest.hexdigest()[:16], (tuple(mean.tolist()), tuple(std.tolist()))
        facts = [found.name, source.title, fingerprint, tuple(source.classes), size, *scale]
        if not with_ffcv:
            return Dataset(*facts, *(Split(images[split], source.labels[split], None) for split in counts))
        for split in counts:
            entry[split]["file"] = f"{found.name}-{size}px-{fingerprint}-{split}.beton"
            images[split].flush()
            _rename_whole(folder / f"{split}.beton.part", folder / entry[split]["file"])
        part = folder / "index.json.part"
        told = {key: known.model_dump() for key, known in index.items()}
        part.write_text(json.dumps(told | {found.key: {**entry, "facts": facts}}, indent=1) + "\n")
        _rename_whole(part, folder / "index.json")
    finally:
        for name in _HALF_WRITTEN:
            (folder / name).unlink(missing_ok=True)
    return load(folder, found)


def _rename_whole(part: Path, file: Path) -> None:
    """Give a file its final name after all of it is on the disk, in case the power fails."""
    with open(part, "rb") as written:
        os.fsync(written.fileno())
    os.replace(part, file)


def _index(folder: Path) -> dict[str, _Entry]:
    """Return the valid entries of index.json by source key; the others will be prepared anew."""
    try:
        file = folder / "index.json"
        told = json.loads(file.read_text("utf-8")) if file.is_file() and file.stat().st_size < 2**26 else {}
    except (OSError, ValueError, RecursionError):
        return {}
    kept = {}
    for key, entry in told.items() if isinstance(told, dict) else ():
        with contextlib.suppress(ValueError, RecursionError):
            kept[key] = _Entry.model_validate_json(json.dumps(entry))
    return kept


def _new_beton(path: Path, labels: np.ndarray, size: int) -> dict[str, object]:
    """Write an FFCV file without its pixels, reserve all its space, and return its layout (see _Part).

    FFCV's own writer hangs if one of its processes fails, as on a full disk, and leaves gaps, so that no
    single array covers all images. Raises DataError if there is not enough space.
    """
    from ffcv import types

    count, each = len(labels), size * size * 3
    rows = np.zeros(count, types.get_metadata_type([types.RGBImageField(), types.IntField()]))
    fields, table = np.zeros(2, types.FieldDescType), np.zeros(count, types.ALLOC_TABLE_TYPE)
    fields["type_id"], fields["name"][:, :5] = (2, 1), (list(b"image"), list(b"label"))
    rows_at = types.HeaderType.itemsize + fields.nbytes
    images_at = -(-(rows_at + rows.nbytes) // 4096) * 4096
    end = images_at + count * each
    image, label = rows.dtype.names
    raw = 1  # as in FFCV's IMAGE_MODES; numba would compile a function to look it up
    rows[image]["mode"], rows[image]["height"], rows[image]["width"] = raw, size, size
    rows[image]["data_ptr"] = table["ptr"] = images_at + np.arange(count) * each
    rows[label], table["sample_id"], table["size"] = labels, np.arange(count), each
    page = 1 << min(31, max(21, (count * (each + 64)).bit_length()))  # up to 2 GiB, one page holds all images
    header = np.array((types.CURRENT_VERSION, len(fields), page, count, end), types.HeaderType)
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, end + table.nbytes)
        except OSError as error:
            raise DataError(
                f"{path.parent}: {end:,} bytes for prepared data are not available ({sources.brief(error)})\n"
                "free as much, or name a folder on another disk with --data-dir"
            ) from error
        file.write(header.tobytes() + fields.tobytes() + rows.tobytes())
        file.seek(end)
        file.write(table.tobytes())
    where = {"images_at": images_at, "labels_at": rows_at + rows.dtype.fields[label][1]}
    return {"bytes": end + table.nbytes, "count": count, **where, "label_stride": rows.itemsize}


def import_ffcv() -> bool:
    """Import FFCV and return whether that worked; torch's number of threads stays as it was.

    Ctrl-C and SIGTERM wait until the import ends: numba compiles during it, and LLVM's callbacks would
    swallow them.
    """
    os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")  # with TBB, a forked process may hang
    threads = torch.get_num_threads()
    try:
        with _interrupted_later():
            import ffcv  # noqa: F401

        return True
    except (ImportError, OSError):  # not installed, or without its system libraries
        return False
    finally:
        torch.set_num_threads(threads)  # the import sets it to 1


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block ends; in other threads, which do not get them, do nothing."""
    came, before = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in came[:1]:
            signal.raise_signal(number)
