"""Tiny data sets in every official layout, for the tests of datasets/ and data.py."""

import multiprocessing
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import sources

ROWS = 20  # images in each of the six tiny CIFAR-10 files
ROWS_100 = {"train": 300, "test": 100}  # images in the two tiny CIFAR-100 files
OFFICIAL_CIFAR10 = sources.SETS["cifar10"]
CIFAR10_CLASSES = list(OFFICIAL_CIFAR10.classes)
OFFICIAL_CIFAR100 = sources.SETS["cifar100"]
CIFAR100_CLASSES = list(OFFICIAL_CIFAR100.classes)
FORK = multiprocessing.get_context("fork")


def change_set(monkeypatch, name: str, **fields) -> None:
    """Change fields of a named set in sources.SETS for one test."""
    monkeypatch.setitem(sources.SETS, name, replace(sources.SETS[name], **fields))


def silent(note: str) -> None:
    pass


def stream(seed: int):
    """Return the random stream of a seed for loaders: a function that makes a generator by name and epoch."""
    return lambda name, index=0: np.random.RandomState([seed, index, *name.encode()])


def naive_crop_and_flip(image: np.ndarray, dy: int, dx: int, flip: int) -> np.ndarray:
    """Return an image [H, W, 3] after torchvision's RandomCrop and RandomHorizontalFlip with these draws.

    The crop has the size of the image, and is taken from the image padded by 4 black pixels on each side.
    """
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    height, width, _ = image.shape
    crop = padded[dy : dy + height, dx : dx + width]
    return crop[:, ::-1] if flip else crop


def tiny_cifar10(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return pixels, planar uint8 [ROWS, 3072], and labels [ROWS], equally many per class, of each file."""
    rng = np.random.RandomState(seed)
    return {
        name: (rng.randint(0, 256, (ROWS, 3072), dtype=np.uint8), rng.permutation(ROWS) % 10)
        for name in OFFICIAL_CIFAR10.checksums
    }


def python_file(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return pickle.dumps(
        {b"data": pixels, b"labels": labels.tolist(), b"filenames": [b"x.png"] * ROWS}, protocol=2
    )


def write_python(folder: Path, batches: dict) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches.items():
        (folder / name).write_bytes(python_file(pixels, labels))
    return folder


def write_binary(folder: Path, batches: dict) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches.items():
        rows = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return folder


def tiny_cifar100() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return pixels, planar uint8 [N, 3072], and labels [N, 2] of both files.

    Labels are coarse and fine ones. Each fine label occurs equally often.
    """
    rng = np.random.RandomState(3)
    return {
        name: (
            rng.randint(0, 256, (rows, 3072), dtype=np.uint8),
            np.stack([rng.randint(0, 20, rows), rng.permutation(rows) % 100], axis=1),
        )
        for name, rows in ROWS_100.items()
    }


def write_python100(folder: Path, files: dict, classes: list[str] = CIFAR100_CLASSES) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in files.items():
        coarse, fine = labels.T.tolist()
        content = {b"data": pixels, b"coarse_labels": coarse, b"fine_labels": fine, b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"fine_label_names": [name.encode() for name in classes], b"coarse_label_names": [b"fish"] * 20}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def write_binary100(folder: Path, files: dict, classes: list[str] = CIFAR100_CLASSES) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in files.items():
        rows = np.concatenate([labels.astype(np.uint8), pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(classes) + "\n")
    return folder


def pack(archive: Path, folder: Path) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return archive


def expected_images(batches: dict) -> np.ndarray:
    """Return the training images, uint8 [5 ROWS, 32, 32, 3], as the format's description defines them.

    A row has 1024 red values, then 1024 green and 1024 blue ones, each row by row.
    """
    images = [batches[f"data_batch_{i}"][0].reshape(ROWS, 3, 32, 32) for i in range(1, 6)]
    return np.stack([np.concatenate(images)[:, channel] for channel in range(3)], axis=-1)


def write_images(
    folder: Path, splits=("train", "test"), classes=("cat", "dog"), each=3, size=(40, 40)
) -> Path:
    rng = np.random.RandomState(5)
    for split in splits:
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for index in range(each):
                pixels = rng.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


class Attack:
    """An object whose pickle makes a careless reader call `function`."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def fill_with_rubbish(file: Path) -> None:
    file.write_bytes(b"<html>404</html>")


def official_places(root: Path, name: str, python: Path, binary: Path) -> list[Path]:
    """Pack a set's two folders, and return every path at which it can be opened.

    These are the folders, the folders that contain them or an archive, and an archive with another name.
    """
    archives = [
        pack(root / "c" / f"{name}-python.tar.gz", python).parent,
        pack(root / "d" / f"{name}-binary.tar.gz", binary).parent,
        pack(root / "e" / "renamed.tar.gz", binary),
    ]
    return [python.parent, python, binary.parent, binary, *archives]
