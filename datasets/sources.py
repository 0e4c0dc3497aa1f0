"""Find and read images: official releases, folders of class folders, and the synthetic set.

`locate` finds a source without reading it, and `read` opens it: labels at once, images in blocks. Files are
untrusted: nothing in them is executed, and an error names the damaged file. To add a named set, add a table
to named_sets.toml.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import DataError, Say, synthetic, untrusted

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by content; EPS would run Ghostscript
SMALLEST, LARGEST = 8, 65535  # side lengths of images, in pixels
BLOCK = 1000  # most images in a block while preparing; fewer if they exceed BLOCK_BYTES
BLOCK_BYTES = 1 << 28
FORMAT = 1  # part of every key in index.json; raise it when reading, drawing or writing changes


# ---- named sets ----


@dataclass(frozen=True)
class NamedSet:
    """A set whose official files are class folders or, if it has `files`, in CIFAR's own formats.

    CIFAR's files hold 32x32 images as rows of 3,072 bytes (cs.toronto.edu/~kriz/cifar.html), the same number
    in each file of a split. The python version pickles rows and labels. In the binary version, whose names
    end in .bin, each row follows its label; no MD5 of its files is published.
    """

    title: str  # its display name
    classes: list[str]  # in label order
    counts: dict[str, int]  # images in each split
    image_size: int = 32  # default side length, in pixels
    url: str | None = None  # of the archive to download
    archives: dict[str, str] = field(default_factory=dict)  # MD5 of each official one, by name
    folders: Sequence[str] = ()  # what the archives unpack to
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # by split: MD5 by name (python version)
    mean: Sequence[float] = (np.nan,) * 3  # of the official training pixels, if published
    label_key: str = "labels"  # of the labels in the python version
    label_bytes: int = 1  # before each row of the binary version; the last one is the label
    # Files that must name the classes if they exist: the key in a pickle, or "" for lines of text.
    class_files: dict[str, str] = field(default_factory=dict)

    @property
    def checksums(self) -> dict[str, str]:
        return {name: md5 for files in self.files.values() for name, md5 in files.items()}

    @property
    def file_names(self) -> list[str]:
        return [name + suffix for name in self.checksums for suffix in ("", ".bin")] + list(self.class_files)


with open(Path(__file__).with_name("named_sets.toml"), "rb") as _file:
    SETS = {name: NamedSet(**fields) for name, fields in tomllib.load(_file).items()}


def short_name(name: str) -> str:
    """Return the data set's name in run folders: `name` itself, or the last part of a folder's path."""
    return name if name in SETS else re.sub(r"[^\w.-]", "_", Path(name).resolve().name)


# ---- finding ----


@dataclass(frozen=True)
class Found:
    """A source that was found and not read."""

    name: str
    kind: str  # "batches" (the row files of a named set), "images" (of a named set), "folder" or "synthetic"
    path: Path
    image_size: int | None
    stamps: dict[str, str]  # size and modification time of each file

    @property
    def key(self) -> str:
        """The key of the prepared data in index.json; it changes when a file of the source is replaced."""
        facts = [FORMAT, self.name, self.kind, str(self.path.resolve()), self.image_size, self.stamps]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def locate(name: str, places: list[Path], image_size: int | None, say: Say) -> Found | None:
    """Return the first source in `places`, or None; each is searched for row files, archives, class folders.

    `say` receives a note if files are ignored. Raises DataError if a folder does not exist or lacks those of
    the two splits, and if the image size is out of range.
    """
    if image_size is not None and not SMALLEST <= image_size <= LARGEST:
        raise DataError(f"--image-size {image_size}: must be from {SMALLEST} to {LARGEST}")
    if name not in SETS:
        if not Path(name).is_dir():
            raise DataError(f"--data {name}: no such folder; give a folder, or one of {', '.join(SETS)}")
        return Found(short_name(name), "folder", Path(name), image_size, _class_folders(Path(name), say))
    if name == "synthetic":
        return Found(name, name, Path("/"), image_size, {})
    known = SETS[name]
    for place in places:
        folders = [place, *(place / folder for folder in known.folders)]
        for folder in folders:
            files = [folder / file for file in known.file_names if (folder / file).is_file()]
            if {file.name for file in files} - known.class_files.keys():
                return Found(name, "batches", folder, image_size, {file.name: _stamp(file) for file in files})
        for archive in [place] if place.is_file() else [place / file for file in known.archives]:
            if archive.is_file():
                kind = "batches" if known.files else "images"
                return Found(name, kind, archive, image_size, {archive.name: _stamp(archive)})
        for folder in folders:
            if (folder / "train").is_dir() and _classes(folder / "train") == known.classes:
                return Found(name, "images", folder, image_size, _class_folders(folder, say))
    return None


def expanded(data_dir: str | Path) -> Path:
    """Return the folder that --data-dir names, with ~ and ~user expanded. DataError if it cannot exist."""
    try:
        path = Path(data_dir).expanduser()
        path.exists()
        return path
    except (RuntimeError, OSError) as error:
        raise DataError(f"--data-dir {data_dir}: {brief(error)}; name another folder") from None


def empty_folders(name: str, places: list[Path]) -> list[Path]:
    """Return the folders in `places` that should hold the named set but are empty."""
    folders = [place / folder for place in places for folder in SETS[name].folders]
    return [folder for folder in folders if folder.is_dir() and not any(folder.iterdir())]


def _stamp(file: Path | os.DirEntry) -> str:
    stat = file.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _class_folders(folder: Path, say: Say) -> dict[str, str]:
    """Return the stamps of all images in train/<class>/* and test/<class>/* or val/<class>/*, sorted by path.

    Raises DataError if a split has no folder.
    """
    test = "test" if (folder / "test").is_dir() else "val"
    if not (folder / "train").is_dir() or not (folder / test).is_dir():
        raise DataError(f"{folder}: needs folders train/<class>/ and test/<class>/ or val/<class>/")
    stamps, ignored = {}, 0
    for path in (folder / split / label for split in ("train", test) for label in _classes(folder / split)):
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if _is_image(entry.name) and entry.is_file():
                stamps[f"{path.parent.name}/{path.name}/{entry.name}"] = _stamp(entry)
            else:
                ignored += 1
    if ignored:
        say(f"{folder}: ignored {ignored} files that are hidden or not images")
    return stamps


def _is_image(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES


# ---- reading ----


@dataclass(frozen=True)
class Source:
    title: str
    image_size: int
    classes: list[str]
    images: dict[str, Sequence]  # by split: uint8 [N, 32, 32, 3], or the name and file of every image
    labels: dict[str, np.ndarray]  # by split: int64 [N]

    @property
    def block_size(self) -> int:
        return max(1, min(BLOCK, BLOCK_BYTES // (3 * self.image_size**2)))

    def block(self, split: str, first: int) -> np.ndarray:
        """Return up to `block_size` images of a split, from `first` on: uint8 [n, H, W, 3].

        Raises DataError if one of them cannot be read.
        """
        block = self.images[split][first : first + self.block_size]
        if isinstance(block, np.ndarray) and block.shape[1] == self.image_size:
            return block
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL while it decodes
            return np.stack(list(pool.map(self._decoded, block)))

    def _decoded(self, image: np.ndarray | tuple[str, Path | bytes]) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return _fit(Image.fromarray(image), self.image_size)
        return _opened(*image, lambda opened: _fit(opened, self.image_size))


def read(found: Found) -> Source:
    """Open a source and check all that can be checked before its images are decoded.

    Raises DataError if the source does not pass.
    """
    files = _files(found)
    if found.kind == "folder":
        content = _read_images(found, files)
        title = f"{found.name} (a folder of images)"
        if (size := found.image_size or _own_size(files)) < SMALLEST:
            raise DataError(
                f"{found.path}: its images have {size} pixels a side; give --image-size {SMALLEST}"
            )
        return Source(title, size, *content)
    known = SETS[found.name]
    size = found.image_size or known.image_size
    if found.kind == "synthetic":
        return Source(known.title, size, known.classes, *synthetic.draw(known.counts))
    content = _read_rows(found, files) if found.kind == "batches" else _read_images(found, files)
    return Source(known.title + _doubt(found, files, content[1]["train"]), size, *content)


def _files(found: Found) -> dict[str, Path | bytes]:
    """Return row files by name, or image files by <split>/<class>/<name>.

    Values are bytes, or paths for images in a folder; an archive is not unpacked to disk. Raises DataError.
    """
    rows, path = found.kind == "batches", found.path
    if path.is_dir():
        files = {name: path / name for name in found.stamps}
        small = (item for item in files.items() if item[1].stat().st_size < untrusted.MOST_BYTES)
        return {name: file.read_bytes() for name, file in small} if rows else files
    wanted, depth = (SETS[found.name].file_names.__contains__, 1) if rows else (_is_image, 3)
    try:
        members = untrusted.members(path, lambda name: wanted(name.split("/")[-1]))
        files = {"/".join(name.split("/")[-depth:]): content for name, content in members}
        return dict(sorted(files.items()))
    except Exception as error:  # tarfile, too, can raise anything
        what = f"{path} is truncated or not an archive ({brief(error)})"
        raise DataError(f"{what}; remove it and fetch it again") from error


def _read_images(found: Found, files: dict[str, Path | bytes]) -> tuple[list[str], dict, dict]:
    """Return the classes and, by split, the images' names and files and the labels.

    `files` has images by <split>/<class>/<name>. Raises DataError if the two splits do not fit.
    """
    warnings.filterwarnings("ignore", module="PIL")  # a damaged image is an error, and any other is read
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # for all threads that will decode
    images, classes, labels = {}, {}, {}
    for split in ("train", "test"):
        images[split] = [item for item in files.items() if item[0].startswith("train/") == (split == "train")]
        owners = [os.path.basename(os.path.dirname(name)) for name, _ in images[split]]
        classes[split], labels[split] = np.unique(owners, return_inverse=True)
    odd = set(classes["train"]) ^ set(classes["test"])
    if odd or not files:
        what = f"only one split has images of the class {min(odd)}" if odd else "it contains no images"
        raise DataError(f"{found.path}: {what}; both splits need the same class folders with images in them")
    counts = {split: len(part) for split, part in images.items()}
    if found.kind == "images" and counts != SETS[found.name].counts:
        have, want = (f"{each['train']} + {each['test']}" for each in (counts, SETS[found.name].counts))
        raise DataError(
            f"{found.path} is incomplete: {have} training and test images, not {want}\n"
            f"copy or unpack it again, or give --data {found.path} to use what is there"
        )
    # Bytes of a folder's name that the locale could not decode are decoded as UTF-8, or replaced.
    names = [name.encode("utf-8", "surrogateescape") for name in classes["train"].tolist()]
    return [name.decode("utf-8", "replace") for name in names], images, labels


def _own_size(files: dict[str, Path]) -> int:
    """Return the images' side if, by their headers, all are squares of one size, else 128."""
    sides = (side for item in files.items() for side in _opened(*item, lambda image: image.size))
    first = next(sides)
    return first if all(side == first for side in sides) else 128


def _opened(name: str, file: Path | bytes, use: Callable[[Image.Image], object]):
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            return use(image)
    except Exception as error:  # a damaged file can raise anything
        where = name if isinstance(file, bytes) else file
        raise DataError(f"{where} is not a readable image ({brief(error)}); replace or remove it") from error


def _fit(image: Image.Image, size: int) -> np.ndarray:
    """Return an image as RGB uint8 [size, size, 3]: shorter side resized to `size`, centre cropped."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are not whole numbers")
    image, short = image.convert("RGB"), min(image.size)
    if short != size:
        sides = [max(size, round(side * size / short)) for side in image.size]
        if sides[0] * sides[1] > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"it is too long and thin to be resized to {size} pixels")
        image = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _read_rows(found: Found, files: dict[str, bytes]) -> tuple[list[str], dict, dict]:
    """Return the classes and, by split, images (uint8 [N, 32, 32, 3]) and labels (int64 [N]) of row files.

    Raises DataError if a file is damaged.
    """
    known = SETS[found.name]
    suffix = "" if any(name in files for name in known.checksums) else ".bin"
    images, labels = {}, {}
    for name in sorted(known.class_files.keys() & files):
        with _blamed(found, name):
            _check_classes(files[name], known.class_files[name], known.classes)
    for split, parts in known.files.items():
        read_parts = []
        for name in [part + suffix for part in parts]:
            with _blamed(found, name):
                read_parts.append(_rows(files[name], bool(suffix), known, known.counts[split] // len(parts)))
        pixels, numbers = map(np.concatenate, zip(*read_parts, strict=True))
        images[split] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[split] = numbers.astype(np.int64)
    return known.classes, images, labels


@contextlib.contextmanager
def _blamed(found: Found, name: str) -> Iterator[None]:
    """Turn every exception into a DataError that names this file; a damaged file can raise anything."""
    try:
        yield
    except Exception as error:
        what = f"{name} is missing, truncated or not {SETS[found.name].title}'s ({brief(error)})"
        mend = f"copy or unpack it again, or remove {found.path} to download it"
        raise DataError(f"{found.path}: {what}\n{mend}") from error


def _doubt(found: Found, files: dict[str, Path | bytes], images: Sequence) -> str:
    """Return a suffix for the title of a named set if its bytes are not known to be official, else ""."""
    known = SETS[found.name]
    digests = {name: hashlib.md5(files[name]).hexdigest() for name in known.checksums if name in files}
    if digests and digests == known.checksums:
        return ""
    if found.path.is_file():
        with open(found.path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() in known.archives.values():
                return ""
    # Unpacked binary files have no published checksums. With the published mean, they may be official.
    binary = found.kind == "batches" and not digests
    if not known.files or (binary and np.allclose(images.mean((0, 1, 2)), known.mean, rtol=0, atol=1e-3)):
        return " (bytes not verified)"
    return " (not the official bytes)"


def _rows(data: bytes, binary: bool, known: NamedSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels, uint8 [count, 3072], and labels, [count], of one file. ValueError if they do not fit."""
    if binary:
        head = known.label_bytes
        rows = np.frombuffer(data, np.uint8).reshape(count, head + 3072)
        pixels, labels = rows[:, head:], rows[:, head - 1].astype(np.int64)
    else:
        batch = untrusted.unpickled(data)
        pixels, labels = getattr(batch["data"], "pixels", None), batch[known.label_key]
        if type(labels) is not list or len(labels) != count or set(map(type, labels)) != {int}:
            labels = ()
        labels = np.array(labels)
    if not isinstance(pixels, np.ndarray) or pixels.shape != (count, 3072):
        raise ValueError(f"its pixels are not {count} rows of 3072 bytes")
    most = len(known.classes) - 1
    if labels.shape != (count,) or labels.dtype.kind != "i" or labels.min() < 0 or labels.max() > most:
        raise ValueError(f"its labels are not {count} numbers from 0 to {most}")
    return pixels, labels


def _check_classes(data: bytes, key: str, classes: list[str]) -> None:
    """Raise ValueError if a file names other classes than `classes`, or in another order."""
    names = untrusted.unpickled(data)[key] if key else data.split()
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    if names != classes:
        raise ValueError(f"it does not name the {len(classes)} classes in label order")


def brief(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
