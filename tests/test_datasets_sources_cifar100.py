"""Tests of CIFAR-100 in datasets/sources.py: fine labels are read, and damaged files refused by name."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    CIFAR100_CLASSES,
    OFFICIAL_CIFAR100,
    ROWS_100,
    Attack,
    change_set,
    official_places,
    pack,
    shorten,
    silent,
    tiny_cifar100,
    write_binary100,
    write_images,
    write_python,
    write_python100,
)

import data
from datasets import sources

pytestmark = pytest.mark.usefixtures("small_and_offline")


def test_every_official_layout_gives_the_same_pixels_and_fine_labels(tmp_path):
    files = tiny_cifar100()
    python = write_python100(tmp_path / "a" / "cifar-100-python", files)
    binary = write_binary100(tmp_path / "b" / "cifar-100-binary", files)
    places = official_places(tmp_path, "cifar-100", python, binary)
    opened = [data.open_dataset("cifar100", place, say=silent) for place in places]
    for dataset in opened:
        assert dataset.fingerprint == opened[0].fingerprint
        assert dataset.classes == tuple(CIFAR100_CLASSES) and dataset.image_size == 32
        for split, read in (("train", dataset.train), ("test", dataset.test)):
            pixels, labels = files[split]
            np.testing.assert_array_equal(read.images.transpose(0, 3, 1, 2).reshape(-1, 3072), pixels)
            np.testing.assert_array_equal(read.labels, labels[:, 1])


def test_the_classes_are_the_100_fine_ones_in_label_order():
    assert len(set(CIFAR100_CLASSES)) == 100 and sorted(CIFAR100_CLASSES) == CIFAR100_CLASSES
    known = {
        0: "apple",
        1: "aquarium_fish",
        41: "lawn_mower",
        58: "pickup_truck",
        83: "sweet_pepper",
        99: "worm",
    }
    assert {label: CIFAR100_CLASSES[label] for label in known} == known
    assert OFFICIAL_CIFAR100.counts == {"train": 50_000, "test": 10_000}


def title_of(place: Path) -> str:
    return sources.read(sources.locate("cifar100", [place], None, silent)).title


def test_the_title_tells_whether_the_bytes_are_official(tmp_path, monkeypatch):
    files = tiny_cifar100()
    python = write_python100(tmp_path / "cifar-100-python", files)
    binary = write_binary100(tmp_path / "cifar-100-binary", files)
    assert title_of(python) == title_of(binary) == "CIFAR-100 (not the official bytes)"
    official = {split: {split: hashlib.md5((python / split).read_bytes()).hexdigest()} for split in ROWS_100}
    mean = files["train"][0].reshape(-1, 3, 1024).mean((0, 2))
    change_set(monkeypatch, "cifar100", files=official, mean=mean)
    assert title_of(python) == "CIFAR-100" and title_of(binary) == "CIFAR-100 (bytes not verified)"


@pytest.mark.parametrize(
    "layout, file", [(write_python100, "meta"), (write_binary100, "fine_label_names.txt")]
)
def test_files_that_name_other_classes_are_refused(tmp_path, layout, file):
    swapped = [*CIFAR100_CLASSES[1::-1], *CIFAR100_CLASSES[2:]]
    folder = layout(tmp_path / "cifar-100-python", tiny_cifar100(), swapped)
    for place in (tmp_path, pack(tmp_path / "packed" / "x.tar.gz", folder)):
        with pytest.raises(data.DataError, match=f"{file} is missing, truncated or not CIFAR-100's"):
            data.open_dataset("cifar100", place, say=silent)
    (folder / file).unlink()  # the rows suffice
    assert data.open_dataset("cifar100", tmp_path, say=silent).classes == tuple(CIFAR100_CLASSES)


def test_a_file_of_class_names_alone_does_not_hide_an_archive(tmp_path):
    folder = write_python100(tmp_path / "x" / "cifar-100-python", tiny_cifar100())
    pack(tmp_path / "cifar-100-python.tar.gz", folder)
    (tmp_path / "meta").write_text("of something else")
    assert len(data.open_dataset("cifar100", tmp_path, say=silent).train.labels) == ROWS_100["train"]


def test_wrong_archives_and_files_are_named(tmp_path):
    files = tiny_cifar100()
    ten = {"data_batch_1": (files["test"][0][:20], files["test"][1][:20, 1] % 10)}
    archive = pack(tmp_path / "ten" / "cifar-100-python.tar.gz", write_python(tmp_path / "cifar-10", ten))
    with pytest.raises(data.DataError, match=r"train\.bin is missing"):
        data.open_dataset("cifar100", archive, say=silent)
    shorten(archive)
    with pytest.raises(data.DataError, match=r"cifar-100-python\.tar\.gz is truncated or not an archive"):
        data.open_dataset("cifar100", archive, say=silent)
    files["train"][1][7, 1] = 100
    binary = write_binary100(tmp_path / "b", files)
    with pytest.raises(
        data.DataError, match=r"train\.bin .*its labels are not 300 numbers from 0 to 99"
    ) as error:
        data.open_dataset("cifar100", binary, say=silent)
    assert len(str(error.value).splitlines()) == 2
    shorten(write_python100(tmp_path / "p", tiny_cifar100()) / "test")
    with pytest.raises(data.DataError, match="test is missing, truncated"):
        data.open_dataset("cifar100", tmp_path / "p", say=silent)


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_a_hostile_pickle_runs_no_code(tmp_path, file):
    folder, mark = write_python100(tmp_path / "cifar-100-python", tiny_cifar100()), tmp_path / "ran"
    (folder / file).write_bytes(pickle.dumps({b"data": Attack(os.system, f"touch {mark}")}, protocol=2))
    with pytest.raises(data.DataError, match=f"{file} .*no CIFAR file does"):
        data.open_dataset("cifar100", tmp_path, say=silent)
    assert not mark.exists()


def test_class_folders_are_read(tmp_path):
    for split, rows in ROWS_100.items():
        write_images(tmp_path, [split], CIFAR100_CLASSES, each=rows // 100, size=(32, 32))
    dataset = data.open_dataset("cifar100", tmp_path, say=silent)
    assert dataset.title == "CIFAR-100 (not the official bytes)"
    assert dataset.train.labels.tolist() == [label for label in range(100) for _ in range(3)]
