"""Where images come from: official releases, folders of class folders, and a set that is drawn.

`locate` finds a source without reading it, and `read` opens it: labels at once, images in blocks. Files are
untrusted: nothing in them is executed, and an error names the file that is damaged. To add a named set, add
an entry to SETS.
"""

import hashlib
import io
import json
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import DataError, synthetic

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
BLOCK = 1000  # images handled together while preparing
FORMAT = 1  # part of every key in index.json: raised when data is read, drawn or written another way

Say = Callable[[str], None]  # receives notes of one line


# ---- known by name ----


@dataclass(frozen=True)
class NamedSet:
    """A set whose official files are class folders or, if it has `files`, in CIFAR's own formats.

    These hold 32x32 images as rows of 3,072 bytes (cs.toronto.edu/~kriz/cifar.html), the same number in each
    file of a split. The python version pickles rows and labels; in the binary version, whose names end in
    .bin, each row follows its label, and no MD5 of a file is published.
    """

    title: str  # for people: says what it is
    classes: tuple[str, ...]  # in the order of their labels
    counts: dict[str, int]  # images in each split
    image_size: int = 32  # pixels, unless another size is asked for
    url: str | None = None  # of the archive to download
    archives: dict[str, str] = field(default_factory=dict)  # name and MD5 of each official one
    folders: tuple[str, ...] = ()  # what the archives unpack to
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # by split: name and MD5 (python version)
    mean: tuple[float, float, float] = (np.nan,) * 3  # of the official training pixels, where it is published
    label_key: str = "labels"  # in the python version
    label_bytes: int = 1  # before each row of the binary version; the last one is the label
    draw: Callable[[], tuple[dict, dict]] | None = None  # makes images and labels of a set without files

    @property
    def checksums(self) -> dict[str, str]:
        return {name: md5 for files in self.files.values() for name, md5 in files.items()}


SETS = {
    "cifar10": NamedSet(
        "CIFAR-10",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        {"train": 50_000, "test": 10_000},
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archives={
            "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
            "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        },
        folders=("cifar-10-batches-py", "cifar-10-batches-bin"),
        files={
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        mean=(125.3069, 122.9504, 113.8654),
    ),
    "imagenette": NamedSet(
        "Imagenette",
        (
            *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
            *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
        ),
        {"train": 9_469, "test": 3_925},
        image_size=128,
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        archives={"imagenette2-160.tgz": "e793b78cc4c9e9a4ccc0c1155377a412"},
        folders=("imagenette2-160",),
    ),
    "synthetic": NamedSet(synthetic.TITLE, synthetic.CLASSES, synthetic.COUNTS, draw=synthetic.draw),
}
NAMES = tuple(SETS)


def short_name(name: str) -> str:
    """What run folders call the data set `name`: itself, or the last part of a folder's path."""
    return name if name in SETS else re.sub(r"[^\w.-]", "_", Path(name).resolve().name)


# ---- found ----


@dataclass(frozen=True)
class Found:
    """A source of which nothing has been read."""

    name: str
    kind: str  # "batches" (the row files of a named set), "images" (of a named set), "folder" or "synthetic"
    path: Path
    image_size: int | None
    stamps: dict[str, str]  # size and time of each of its files

    @property
    def key(self) -> str:
        """Names the prepared data in index.json; another one as soon as a file of the source is replaced."""
        facts = [FORMAT, self.name, self.kind, str(self.path.resolve()), self.image_size, self.stamps]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def locate(name: str, places: list[Path], image_size: int | None, say: Say) -> Found | None:
    """The first source in the places, official files before an archive before class folders, or None.

    Raises DataError for a folder that does not exist or has other folders than those of two splits.
    """
    if name not in SETS:
        if not Path(name).is_dir():
            raise DataError(f"--data {name}: no such folder; give a folder, or one of {', '.join(SETS)}")
        return Found(short_name(name), "folder", Path(name), image_size, _class_folders(Path(name), say))
    known = SETS[name]
    if known.draw:
        return Found(name, "synthetic", Path("/"), image_size, {})
    official = [batch + suffix for batch in known.checksums for suffix in ("", ".bin")]
    for place in places:
        folders = [place, *(place / folder for folder in known.folders)]
        for folder in folders:
            if files := [folder / file for file in official if (folder / file).is_file()]:
                return Found(name, "batches", folder, image_size, {file.name: _stamp(file) for file in files})
        for archive in [place] if place.is_file() else [place / file for file in known.archives]:
            if archive.is_file():
                kind = "batches" if known.files else "images"
                return Found(name, kind, archive, image_size, {archive.name: _stamp(archive)})
        for folder in folders:
            if (folder / "train").is_dir() and _classes(folder / "train") == list(known.classes):
                return Found(name, "images", folder, image_size, _class_folders(folder, say))
    return None


def _stamp(file: Path | os.DirEntry) -> str:
    stat = file.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _class_folders(folder: Path, say: Say) -> dict[str, str]:
    """The images of train/<class>/* and test/<class>/* or val/<class>/*, sorted, with their stamps."""
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
        say(f"{folder}: ignored {ignored} hidden files or files that are no images")
    return stamps


def _is_image(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES


# ---- read ----


@dataclass(frozen=True)
class Source:
    title: str
    classes: tuple[str, ...]
    image_size: int
    labels: dict[str, np.ndarray]  # of each split, int64 [N]
    blocks: Callable[[str], Iterator[np.ndarray]]  # the images of a split: uint8 [n, H, W, 3], N in all


def read(found: Found) -> Source:
    """Open a source; what can be checked before its images are decoded is checked here. Raises DataError."""
    if found.kind in ("images", "folder"):
        return _read_images(found)
    known = SETS[found.name]
    images, labels, title = (*known.draw(), known.title) if known.draw else _read_rows(found.path, known)
    size = found.image_size or known.image_size

    def blocks(split: str) -> Iterator[np.ndarray]:
        for start in range(0, len(images[split]), BLOCK):
            block = images[split][start : start + BLOCK]
            same = block.shape[1] == size
            yield block if same else np.stack([_fit(Image.fromarray(image), size) for image in block])

    return Source(title, known.classes, size, labels, blocks)


def _read_images(found: Found) -> Source:
    """Class folders, or an archive of them: files <split>/<class>/<name>, to be decoded block by block."""
    files = {name: found.path / name for name in found.stamps}
    if found.path.is_file():
        members = _untar(found.path, _is_image)
        files = {"/".join(name.split("/")[-3:]): io.BytesIO(data) for name, data in sorted(members.items())}
    parts = {"train": {}, "test": {}}
    for name, file in files.items():
        parts["train" if name.startswith("train/") else "test"][name] = file
    owners = {split: [name.split("/")[-2] for name in part] for split, part in parts.items()}
    classes, odd = sorted(set(owners["train"])), set(owners["train"]) ^ set(owners["test"])
    if odd or not classes:
        what = f"only one split has images of the class {min(odd)}" if odd else "it holds no images"
        raise DataError(f"{found.path}: {what}; both splits need the same class folders with images in them")
    if found.kind == "folder":
        title, size = f"{found.name} (a folder of images)", found.image_size or _own_size(files)
    else:
        known, counts = SETS[found.name], {split: len(part) for split, part in parts.items()}
        verified = not known.files and found.path.is_file() and _md5(found.path) in known.archives.values()
        doubt = "" if verified else " (not the official bytes)" if known.files else " (bytes not verified)"
        title, size = f"{known.title}{doubt}", found.image_size or known.image_size
        if counts != known.counts:
            have, want = (f"{each['train']} + {each['test']}" for each in (counts, known.counts))
            raise DataError(
                f"{found.path} is incomplete: {have} training and test images, not {want}\n"
                f"copy or unpack it again, or give --data {found.path} to use what is there"
            )

    def decode(item: tuple[str, Path | io.BytesIO]) -> np.ndarray:
        return _opened(*item, lambda image: _fit(image, size))

    def blocks(split: str) -> Iterator[np.ndarray]:
        items = list(parts[split].items())
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets other threads run while it decodes
            for start in range(0, len(items), BLOCK):
                yield np.stack(list(pool.map(decode, items[start : start + BLOCK])))

    number = {label: index for index, label in enumerate(classes)}
    labels = {split: np.array([number[label] for label in owners[split]], np.int64) for split in parts}
    return Source(title, tuple(classes), size, labels, blocks)


def _own_size(files: dict[str, Path]) -> int:
    """The side of the images if their headers say that all are squares of one size, else 128."""
    sizes = set()
    for name, file in files.items():
        sizes.add(_opened(name, file, lambda image: image.size))
        if len(sizes) > 1 or len(set(*sizes)) > 1:
            return 128
    return sizes.pop()[0]


def _opened(name: str, file: Path | io.BytesIO, use: Callable[[Image.Image], object]):
    try:
        with Image.open(file) as image:
            return use(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        where = file if isinstance(file, Path) else name
        raise DataError(f"{where} is no readable image ({brief(error)}); replace or remove it") from error


def _fit(image: Image.Image, size: int) -> np.ndarray:
    """Any image as RGB uint8 [size, size, 3]: shorter side resized to `size` if it differs, centre square."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image, short = image.convert("RGB"), min(image.size)
    if short != size:
        sides = [max(size, round(side * size / short)) for side in image.size]
        image = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _read_rows(path: Path, known: NamedSet) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """The row files of a named set, python or binary, in a folder or an archive.

    Returns images uint8 [N, 32, 32, 3] and labels int64 [N] by split, and a title that tells official or not.
    """
    checksums = known.checksums
    names = {name + suffix for name in checksums for suffix in ("", ".bin")}
    if path.is_dir():
        files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    else:
        files = {name.split("/")[-1]: data for name, data in _untar(path, names.__contains__).items()}
    binary = not any(name in files for name in checksums)
    mend = f"copy or unpack it again, or remove {path} to download it"
    images, labels = {}, {}
    for split, parts in known.files.items():
        read_parts, count = [], known.counts[split] // len(parts)
        for name in [part + ".bin" if binary else part for part in parts]:
            if name not in files:
                raise DataError(f"{path}: {name} is missing\n{mend}")
            try:
                read_parts.append(_rows(files[name], binary, known, count))
            except Exception as error:
                what = f"{name} is truncated or not {known.title}'s ({brief(error)})"
                raise DataError(f"{path}: {what}\n{mend}") from error
        pixels, numbers = map(np.concatenate, zip(*read_parts, strict=True))
        images[split] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[split] = numbers.astype(np.int64)
    if binary:
        official = path.is_file() and _md5(path) in known.archives.values()
    else:
        official = all(hashlib.md5(files[name]).hexdigest() == md5 for name, md5 in checksums.items())
    # Unpacked binary files have no checksums to go by. With the published mean their pixels may be official.
    likely = binary and np.allclose(images["train"].mean((0, 1, 2)), known.mean, rtol=0, atol=1e-3)
    doubt = "" if official else " (bytes not verified)" if likely else " (not the official bytes)"
    return images, labels, f"{known.title}{doubt}"


def _rows(data: bytes, binary: bool, known: NamedSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [count, 3072] and labels [count] of one file; a damaged one can raise nearly anything."""
    if binary:
        head = known.label_bytes
        rows = np.frombuffer(data, np.uint8).reshape(count, head + 3072)
        pixels, labels = rows[:, head:], rows[:, head - 1].astype(np.int64)
    else:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = batch["data"], np.array(batch[known.label_key])
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (count, 3072):
        raise ValueError(f"its pixels are not {count} rows of 3072 bytes")
    most = len(known.classes) - 1
    if labels.shape != (count,) or labels.dtype.kind != "i" or labels.min() < 0 or labels.max() > most:
        raise ValueError(f"its labels are not {count} numbers from 0 to {most}")
    return pixels, labels


class _Unpickler(pickle.Unpickler):
    """Admits arrays and the containers around them, all that CIFAR-10's files hold, and runs nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # wherever this NumPy keeps it
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 file does")


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}, which no CIFAR-10 file does")
    return text.encode("latin1")


def _untar(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of an archive whose last name is wanted; nothing is unpacked to the disk."""
    try:
        with tarfile.open(path) as tar:
            members = (m for m in tar if m.isfile() and m.size < 1 << 28 and wanted(m.name.split("/")[-1]))
            return {member.name: tar.extractfile(member).read() for member in members}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        what = f"{path} is truncated or no archive ({brief(error)})"
        raise DataError(f"{what}; remove it and fetch it again") from error


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def brief(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
