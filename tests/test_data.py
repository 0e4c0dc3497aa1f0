"""Tests of data.py: opening data sets by name, splitting them by class, and messages on unusable ones."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import (
    OFFICIAL_CIFAR10,
    ROWS,
    expected_images,
    silent,
    stream,
    tiny_cifar10,
)
from PIL import Image

import data
import progress
from datasets import sources

pytestmark = pytest.mark.usefixtures("small_and_offline")


def test_an_unreadable_file_is_reported(cifar10, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(data.DataError, match=r"Permission denied.*cifar-10-batches-py"):
        data.open_dataset("cifar10", cifar10, say=silent)


def test_the_cache_is_used_if_the_data_folder_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    notes = []
    for start in range(2):
        dataset = data.open_dataset("synthetic", tmp_path / "file" / "data", say=notes.append)
        assert dataset.train.beton.is_relative_to(tmp_path / "cache")
        assert len(notes) == 1, f"one note at the first start, none later (start {start})"


@pytest.mark.parametrize(
    "options, said",
    [
        (["synthetic", "--data-dir", "a" * 5000], "--data-dir aaa"),
        (["synthetic", "--data-dir", "~no_such_user/data"], "--data-dir ~no_such_user/data: "),
        (["synthetic", "--image-size", "7"], "--image-size 7: must be from 8 to 65535"),
        (["synthetic", "--image-size", "65536"], "--image-size 65536: must be from 8 to 65535"),
        (["synthetic", "--image-size", "9" * 5000], "--image-size"),
        (["a" * 5000], "File name too long"),
    ],
)
def test_an_impossible_folder_or_size_is_refused_in_one_line(capsys, options, said):
    assert progress.run("data.py", lambda: data.main(options)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and len(error) < 600


def test_an_empty_folder_is_reported_as_empty(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for download in (False, True):
        with pytest.raises(data.DataError, match=r"cifar-10-batches-py is there and empty\)"):
            data.open_dataset("cifar10", tmp_path, download=download, say=silent)
    (tmp_path / "cifar-10-batches-py" / "batches.meta").touch()
    with pytest.raises(data.DataError) as refused:
        data.open_dataset("cifar10", tmp_path, download=False, say=silent)
    assert "there and empty" not in str(refused.value)


def test_a_folder_of_images_under_8_pixels_is_refused(tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "dots" / split / label).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "dots" / split / label / "0.png")
    with pytest.raises(data.DataError, match=r"dots: its images have 4 pixels a side; give --image-size 8"):
        data.open_dataset(str(tmp_path / "dots"), tmp_path, say=silent)
    assert data.open_dataset(str(tmp_path / "dots"), tmp_path, image_size=8, say=silent).image_size == 8


def test_without_ffcv_the_images_stay_in_memory(cifar10, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    notes = []
    dataset = data.open_dataset("cifar10", cifar10, say=notes.append)
    assert dataset.train.beton is None and sum("ffcv is not installed" in note for note in notes) == 1
    assert not list(cifar10.glob("beton/[!.]*"))
    np.testing.assert_array_equal(dataset.train.images, expected_images(tiny_cifar10()))
    options = {"batch_size": 16, "device": "cpu", "dtype": torch.float32, "rng": stream(0)}
    assert len(list(data.make_loader(dataset, "train", **options).epoch(0))) == 5 * ROWS // 16
    with pytest.raises(data.DataError, match="pip install ffcv"):
        data.make_loader(dataset, "train", kind="ffcv", **options)
    monkeypatch.delitem(sys.modules, "ffcv")
    assert data.open_dataset("cifar10", cifar10, say=silent).fingerprint == dataset.fingerprint


def test_class_subset_takes_the_same_number_from_every_class():
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 50))
    chosen = data.class_subset(labels, 200, stream(0)("subset"))
    assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() == [20] * 10
    np.testing.assert_array_equal(chosen, data.class_subset(labels, 200, stream(0)("subset")))
    assert (chosen != data.class_subset(labels, 200, stream(1)("subset"))).any()
    for count in (0, 5, 205, 510):
        with pytest.raises(data.DataError, match=f"--train-subset {count}: "):
            data.class_subset(labels, count, stream(0)("subset"))


def test_the_command_prepares_a_set_or_says_why_not(tiny_folder, tmp_path, capsys):
    assert data.main([str(tiny_folder), "--data-dir", str(tmp_path)]) == 0
    assert "96 + 20 images of 16 pixels: ready" in capsys.readouterr().err
    assert list(tmp_path.glob("beton/*.beton"))
    assert progress.run("data.py", lambda: data.main([str(tmp_path / "nowhere")])) == 2
    assert "no such folder" in capsys.readouterr().err


def test_validation_images_do_not_depend_on_the_training_subset():
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(4), (30, 40, 50, 60)))
    train_on, validate_on = data.share_out(labels, stream(1), 20)
    assert np.unique(labels[validate_on], return_counts=True)[1].tolist() == [5] * 4
    assert sorted([*train_on, *validate_on]) == list(range(180))
    some, same = data.share_out(labels, stream(1), 20, 40)
    np.testing.assert_array_equal(validate_on, same)
    assert set(some) < set(train_on) and np.unique(labels[some], return_counts=True)[1].tolist() == [10] * 4
    assert not np.array_equal(validate_on, data.share_out(labels, stream(2), 20)[1]), "the seed chooses"
    alone, none = data.share_out(labels, stream(1), None, 40)
    np.testing.assert_array_equal(alone, data.class_subset(labels, 40, stream(1)("subset", 0)))
    assert len(none) == 0 and data.tenth(labels) == 4 * 3
    with pytest.raises(data.DataError, match=r"up to 100 \(20 are set aside for validation\)"):
        data.share_out(labels, stream(1), 20, 104)
    with pytest.raises(data.DataError, match="--val-split 4: a class has too few images"):
        data.share_out(np.arange(4), stream(1), data.tenth(np.arange(4)))


@pytest.mark.skipif(
    not os.environ.get("CIFAR10_FOLDER"), reason="CIFAR10_FOLDER names no folder with CIFAR-10"
)
def test_real_cifar10_has_its_counts_and_statistics(monkeypatch):
    monkeypatch.setitem(sources.SETS, "cifar10", OFFICIAL_CIFAR10)
    dataset = data.open_dataset("cifar10", os.environ["CIFAR10_FOLDER"], download=False, say=silent)
    assert dataset.train.images.shape == (50_000, 32, 32, 3) and len(dataset.test.labels) == 10_000
    assert np.bincount(dataset.train.labels).tolist() == [5_000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1_000] * 10
    # Re-encoded copies differ from the official values by at most 1.
    np.testing.assert_allclose(dataset.mean, OFFICIAL_CIFAR10.mean, atol=1)
    np.testing.assert_allclose(dataset.std, (62.99, 62.09, 66.70), atol=1)
