"""Where images come from: official releases found or downloaded, class folders, and a set drawn here.

`locate` finds a source without reading it, `download` fetches one, `read` opens it: labels at once, images in
blocks. Files are untrusted: nothing in them runs, and damage is named by file.
"""

import contextlib
import hashlib
import http.client
import io
import json
import os
import pickle
import queue
import re
import tarfile
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich import progress as bars
from rich.console import Console

from datasets import synthetic

NAMES = ("cifar10", "imagenette", "synthetic")
URLS = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "imagenette": "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
}
ARCHIVE_MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "imagenette2-160.tgz": "e793b78cc4c9e9a4ccc0c1155377a412",
}
BATCH_MD5 = {  # of the files in the python archive; for those in the binary one none are published
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
BATCH_ROWS = 10_000  # images in each of these six
CIFAR10_MEAN = (125.3069, 122.9504, 113.8654)  # of the official training pixels, as widely published
COUNTS = {  # training and test images of the sets as class folders
    "cifar10": (5 * BATCH_ROWS, BATCH_ROWS),
    "imagenette": (9_469, 3_925),
}
SIZES = {"cifar10": 32, "imagenette": 128, "synthetic": 32}  # default image size in pixels
CLASSES = {  # in the order of their labels
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 "
    "n03888257",
    "synthetic": "disc striped_disc square striped_square triangle striped_triangle cross striped_cross ring "
    "striped_ring",
}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
ANSWER_S = 8.0  # a site that has not answered by then is given up
STALL_S = 8.0  # and so is a connection on which nothing arrives for so long
BLOCK = 1000  # images handled together while preparing
FORMAT = 1  # part of every key in index.json: raised when data is read, drawn or written another way

Say = Callable[[str], None]


class DataError(ValueError):
    """Data that is missing, damaged or unsuitable; one or two lines that say what would do."""


@contextlib.contextmanager
def progress(what: str, total: int | None, column: bars.ProgressColumn) -> Iterator[Callable[[int], None]]:
    """A progress bar where a person is watching; yields what moves it on."""
    console = Console(stderr=True)
    columns = bars.TextColumn("{task.description}"), bars.BarColumn(), column, bars.TimeRemainingColumn()
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda step: bar.advance(task, step)


# ---- found ----


@dataclass(frozen=True)
class Found:
    """A source of which nothing has been read."""

    name: str
    kind: str  # "batches" (CIFAR-10's six files), "images" (of a named set), "folder" or "synthetic"
    path: Path
    image_size: int | None
    stamps: dict[str, str]  # size and time of each of its files

    @property
    def key(self) -> str:
        """Names the prepared data in index.json; another one as soon as a file of the source is replaced."""
        facts = [FORMAT, self.name, self.kind, str(self.path.resolve()), self.image_size, self.stamps]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def short_name(name: str) -> str:
    """What run folders call the data set `name`: itself, or the last part of a folder's path."""
    return name if name in NAMES else re.sub(r"[^\w.-]", "_", Path(name).resolve().name)


def locate(name: str, places: list[Path], image_size: int | None, say: Say) -> Found | None:
    """The first source in the places, official files before an archive before class folders, or None."""
    if name == "synthetic":
        return Found(name, name, Path("/"), image_size, {})
    if name not in NAMES:
        if not Path(name).is_dir():
            raise DataError(f"--data {name}: no such folder; give a folder, or one of {', '.join(NAMES)}")
        return Found(short_name(name), "folder", Path(name), image_size, _class_folders(Path(name), say))
    cifar10 = name == "cifar10"
    kind = "batches" if cifar10 else "images"
    for place in places:
        inside = ("cifar-10-batches-py", "cifar-10-batches-bin") if cifar10 else ("imagenette2-160",)
        folders = [place, *(place / folder for folder in inside)]
        for folder in folders if cifar10 else ():
            files = [folder / (batch + suffix) for batch in BATCH_MD5 for suffix in ("", ".bin")]
            if files := [file for file in files if file.is_file()]:
                return Found(name, kind, folder, image_size, {file.name: _stamp(file) for file in files})
        archives = [place / file for file in ARCHIVE_MD5 if file.startswith("cifar") == cifar10]
        for archive in [place] if place.is_file() else archives:
            if archive.is_file():
                return Found(name, kind, archive, image_size, {archive.name: _stamp(archive)})
        for folder in folders:
            if (folder / "train").is_dir() and _classes(folder / "train") == CLASSES[name].split():
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
    """Open a source; what can be checked before its images are decoded is checked here."""
    if found.kind in ("images", "folder"):
        return _read_images(found)
    title = "synthetic (drawn by the program)"
    images, labels = synthetic.draw() if found.kind == "synthetic" else ({}, {})
    if found.kind == "batches":
        images, labels, title = _read_batches(found.path)
    size = found.image_size or SIZES[found.name]

    def blocks(split: str) -> Iterator[np.ndarray]:
        for start in range(0, len(images[split]), BLOCK):
            block = images[split][start : start + BLOCK]
            yield block if size == 32 else np.stack([_fit(Image.fromarray(image), size) for image in block])

    return Source(title, tuple(CLASSES[found.name].split()), size, labels, blocks)


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
        official = found.path.is_file() and _md5(found.path) == ARCHIVE_MD5["imagenette2-160.tgz"]
        title = "Imagenette" if official else "Imagenette (bytes not verified)"
        title = title if found.name == "imagenette" else "CIFAR-10 (not the official bytes)"
        size = found.image_size or SIZES[found.name]
        counts = tuple(len(part) for part in parts.values())
        if counts != COUNTS[found.name]:
            raise DataError(
                f"{found.path} is incomplete: {counts} training and test images, not {COUNTS[found.name]}\n"
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


def _read_batches(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """CIFAR-10's six files, python or binary, in a folder or an archive (cs.toronto.edu/~kriz/cifar.html).

    Returns images uint8 [N, 32, 32, 3] and labels int64 [N] by split, and a title that tells official or not.
    """
    names = {batch + suffix for batch in BATCH_MD5 for suffix in ("", ".bin")}
    if path.is_dir():
        files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    else:
        files = {name.split("/")[-1]: data for name, data in _untar(path, names.__contains__).items()}
    suffix = "" if any(batch in files for batch in BATCH_MD5) else ".bin"
    images, labels = {"train": [], "test": []}, {"train": [], "test": []}
    for batch in BATCH_MD5:
        name, mend = batch + suffix, f"copy or unpack it again, or remove {path} to download it"
        if name not in files:
            raise DataError(f"{path}: {name} is missing\n{mend}")
        try:
            pixels, numbers = (_binary_batch if suffix else _python_batch)(files[name])
        except Exception as error:  # a damaged pickle can raise nearly anything
            what = f"{name} is truncated or not CIFAR-10's ({brief(error)})"
            raise DataError(f"{path}: {what}\n{mend}") from error
        split = "test" if batch == "test_batch" else "train"
        images[split].append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels[split].append(numbers.astype(np.int64))
    images, labels = ({split: np.concatenate(parts[split]) for split in parts} for parts in (images, labels))
    if suffix:
        official = path.is_file() and _md5(path) == ARCHIVE_MD5["cifar-10-binary.tar.gz"]
    else:
        official = all(hashlib.md5(files[batch]).hexdigest() == md5 for batch, md5 in BATCH_MD5.items())
    # No checksums to go by: pixels with the published mean may be official, with another they are not.
    likely = suffix and np.allclose(images["train"].mean((0, 1, 2)), CIFAR10_MEAN, rtol=0, atol=1e-3)
    doubt = "" if official else " (bytes not verified)" if likely else " (not the official bytes)"
    return images, labels, f"CIFAR-10{doubt}"


def _binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if len(data) != BATCH_ROWS * 3073:
        raise ValueError(f"{len(data):,} bytes, not {BATCH_ROWS * 3073:,}")
    rows = np.frombuffer(data, np.uint8).reshape(BATCH_ROWS, 3073)
    if rows[:, 0].max() > 9:
        raise ValueError(f"a label {rows[:, 0].max()}, over 9")
    return rows[:, 1:], rows[:, 0]


def _python_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    pixels, labels = batch["data"], np.array(batch["labels"])
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (BATCH_ROWS, 3072):
        raise ValueError(f"its pixels are not {BATCH_ROWS} rows of 3072 bytes")
    if labels.shape != (BATCH_ROWS,) or labels.dtype.kind != "i" or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"its labels are not {BATCH_ROWS} numbers from 0 to 9")
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
            members = (m for m in tar if m.isfile() and m.size < 1 << 26 and wanted(m.name.split("/")[-1]))
            return {member.name: tar.extractfile(member).read() for member in members}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        what = f"{path} is truncated or no archive ({brief(error)})"
        raise DataError(f"{what}; remove it and fetch it again") from error


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def brief(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


# ---- downloaded ----


def missing(name: str, places: list[Path], why: str) -> str:
    archive, looked = URLS[name].rpartition("/")[2], ", ".join(map(str, places))
    return (
        f"{name} {why}; looked in {looked}. Put {archive} or what it unpacks to in a folder\n"
        "and give --data-dir FOLDER, or --data FOLDER (train/<class>/*, test/<class>/*), or --data synthetic"
    )


def download(name: str, places: list[Path], say: Say) -> None:
    """Fetch a set's archive into the last place, from where an earlier try broke off; the lock is held."""
    file = places[-1] / URLS[name].rpartition("/")[2]
    part = file.with_name(f"{file.name}.part")
    say(f"downloading {URLS[name]} to {file}")
    for fresh in (not part.exists(), True):  # what was left of an earlier try may be rubbish
        try:
            whole = False
            while not whole:
                have = part.stat().st_size if part.exists() else 0
                whole = _transfer(URLS[name], part, have)
                if not whole and part.stat().st_size <= have:
                    raise OSError("the connection breaks off")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(missing(name, places, f"cannot be downloaded ({brief(error)})")) from error
        if _md5(part) == ARCHIVE_MD5[file.name]:
            os.replace(part, file)
            return
        part.unlink()
        if fresh:
            break
    raise DataError(missing(name, places, f"came from {URLS[name]} with a wrong checksum and was removed"))


def _transfer(url: str, part: Path, have: int) -> bool:
    """Add to `part`, `have` bytes long, what the site sends; True if that was all, False if it broke off."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = _within(ANSWER_S, lambda: urllib.request.urlopen(request, timeout=STALL_S))
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the checksum will tell
            return True
        raise
    with response, open(part, "ab") as file:
        if response.status != 206:  # the site sends all of it once more
            have = file.truncate(0)
        total = have + int(response.headers["Content-Length"] or 0)
        with progress(part.stem, total, bars.DownloadColumn()) as advance:
            advance(have)
            with contextlib.suppress(TimeoutError, ConnectionError):
                while chunk := response.read1(1 << 16):
                    have += file.write(chunk)
                    advance(len(chunk))
    return have >= total


def _within(seconds: float, work: Callable[[], object]) -> object:
    """The result of work that may hang where no timeout reaches (looking up a name), or TimeoutError."""
    answers = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()  # left behind if it hangs
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error:
        raise error
    return result
