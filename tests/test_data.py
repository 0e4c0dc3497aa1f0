"""data.py: sources are prepared once, and batches depend on seed and epoch alone."""

import errno
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import (
    CIFAR10_CLASSES,
    FORK,
    ROWS,
    expected_images,
    python_file,
    shorten,
    silent,
    stream,
    tiny_cifar10,
    write_binary,
    write_python,
)

import data
import loaders
from datasets import sources

pytestmark = pytest.mark.usefixtures("small_and_offline")


# ---- preparing ----


@pytest.fixture
def cifar10(tmp_path):
    write_python(tmp_path / "cifar-10-batches-py", tiny_cifar10())
    return tmp_path


def files_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "beton").iterdir() if path.name != ".lock"}


def test_prepared_files_are_named_by_fingerprint_and_readable_by_ffcv(cifar10):
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    stem = f"cifar10-32px-{dataset.fingerprint}"
    assert files_in(cifar10) == {f"{stem}-train.beton", f"{stem}-test.beton", "index.json"}
    from ffcv.reader import Reader

    reader = Reader(str(dataset.train.beton))
    image, label = reader.metadata.dtype.names
    assert reader.field_names == ["image", "label"] and reader.num_samples == 5 * ROWS
    np.testing.assert_array_equal(reader.metadata[label], dataset.train.labels)
    assert (reader.alloc_table["ptr"] == reader.metadata[image]["data_ptr"]).all()
    raw = dataset.train.beton.read_bytes()
    for row, pixels in zip(reader.metadata[image], dataset.train.images, strict=True):
        assert raw[row["data_ptr"] :][:3072] == pixels.tobytes()


def test_fingerprint_mean_and_std_are_what_they_say(cifar10):
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    digest = hashlib.sha256(json.dumps([32, CIFAR10_CLASSES, [5 * ROWS, ROWS]]).encode())
    for split in (dataset.train, dataset.test):
        digest.update(split.images.tobytes() + split.labels.astype("<i8").tobytes())
    assert dataset.fingerprint == digest.hexdigest()[:16]
    pixels = dataset.train.images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-9)


def test_one_pixel_or_one_label_changes_the_fingerprint(tmp_path):
    fingerprints = set()
    for change in range(3):
        batches = tiny_cifar10()
        batches["test_batch"][0][7, 100] ^= change == 1
        batches["data_batch_2"][1][:2] = batches["data_batch_2"][1][:2][:: -1 if change == 2 else 1]
        write_python(tmp_path / str(change) / "cifar-10-batches-py", batches)
        fingerprints.add(data.open_dataset("cifar10", tmp_path / str(change), say=silent).fingerprint)
    assert len(fingerprints) == 3


def test_a_warm_start_reads_no_source_and_imports_no_ffcv(cifar10, monkeypatch):
    cold = data.open_dataset("cifar10", cifar10, say=silent)
    monkeypatch.setattr(sources, "read", lambda found: pytest.fail("the source was read again"))
    monkeypatch.setattr(data, "import_ffcv", lambda: pytest.fail("ffcv was imported"))
    warm = data.open_dataset("cifar10", cifar10, say=silent)
    np.testing.assert_array_equal(warm.train.images, cold.train.images)
    assert replace(warm, train=None, test=None) == replace(cold, train=None, test=None)


def test_a_source_changed_in_place_is_prepared_anew(tmp_path):
    folder = write_binary(tmp_path / "cifar-10-batches-bin", tiny_cifar10())
    before = data.open_dataset("cifar10", tmp_path, say=silent)
    file = folder / "test_batch.bin"
    pixels = bytearray(file.read_bytes())
    pixels[-1] ^= 1
    file.write_bytes(pixels)
    after = data.open_dataset("cifar10", tmp_path, say=silent)
    assert after.fingerprint != before.fingerprint
    assert after.test.images[-1, -1, -1, 2] == before.test.images[-1, -1, -1, 2] ^ 1


@pytest.mark.parametrize("harm", [shorten, Path.unlink])
@pytest.mark.parametrize("which", ["*-train.beton", "*-test.beton", "index.json"])
def test_damaged_prepared_files_are_made_again(cifar10, which, harm):
    before = data.open_dataset("cifar10", cifar10, say=silent)
    file = next((cifar10 / "beton").glob(which))
    whole = file.read_bytes()
    harm(file)
    after = data.open_dataset("cifar10", cifar10, say=silent)
    assert after.fingerprint == before.fingerprint and len(files_in(cifar10)) == 3
    assert file.read_bytes() == whole


def open_and_tell(folder: Path, results) -> None:
    notes = []
    made = []
    real = data._prepare

    def slow(*options):
        made.append(1)
        time.sleep(1.5)
        return real(*options)

    data._prepare = slow
    results.put((data.open_dataset("cifar10", folder, say=notes.append).fingerprint, len(made), notes))


def test_two_processes_that_start_together_prepare_once(cifar10):
    results = FORK.Queue()
    processes = [FORK.Process(target=open_and_tell, args=(cifar10, results)) for _ in range(2)]
    for process in processes:
        process.start()
    told = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert told[0][0] == told[1][0] and sorted(made for _, made, _ in told) == [0, 1]
    assert sum(any("waiting" in note for note in notes) for *_, notes in told) == 1


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def open_and_die(folder: Path, when: str) -> None:
    replace_file = os.replace
    if when == "while the pixels are written":
        np.bincount = lambda *_, **__: die()  # called for every block of training pixels
    elif when == "between the two files":
        os.replace = lambda a, b: replace_file(a, b) if "train" in str(a) else die()
    else:
        os.replace = lambda a, b: replace_file(a, b) if "beton.part" in str(a) else die()
    data.open_dataset("cifar10", folder, say=silent)


@pytest.mark.parametrize(
    "when", ["while the pixels are written", "between the two files", "before the index"]
)
def test_a_killed_preparation_leaves_nothing_that_is_used(cifar10, when):
    process = FORK.Process(target=open_and_die, args=(cifar10, when))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert "index.json" not in files_in(cifar10) and any(name.endswith(".part") for name in files_in(cifar10))
    (cifar10 / "cifar-10-batches-py" / "test_batch").write_bytes(python_file(*tiny_cifar10(1)["test_batch"]))
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    np.testing.assert_array_equal(dataset.train.images, expected_images(tiny_cifar10()))
    stem = f"cifar10-32px-{dataset.fingerprint}"
    assert files_in(cifar10) == {f"{stem}-train.beton", f"{stem}-test.beton", "index.json"}


def test_a_full_disk_is_told_and_leaves_nothing(cifar10, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(data.DataError, match=r"bytes") as error:
        data.open_dataset("cifar10", cifar10, say=silent)
    assert str(cifar10 / "beton") in str(error.value)
    assert files_in(cifar10) == set()


def test_a_file_that_cannot_be_read_is_told(cifar10, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(data.DataError, match=r"Permission denied.*cifar-10-batches-py"):
        data.open_dataset("cifar10", cifar10, say=silent)


def test_where_nothing_can_be_written_the_cache_is_used(tmp_path):
    (tmp_path / "file").write_text("")
    notes = []
    for start in range(2):
        dataset = data.open_dataset("synthetic", tmp_path / "file" / "data", say=notes.append)
        assert dataset.train.beton.is_relative_to(tmp_path / "cache")
        assert len(notes) == 1, f"one note at the first start, none later (start {start})"


def test_without_ffcv_the_images_stay_in_memory(cifar10, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    notes = []
    dataset = data.open_dataset("cifar10", cifar10, say=notes.append)
    assert dataset.train.beton is None and sum("ffcv is not installed" in note for note in notes) == 1
    assert files_in(cifar10) == set()
    np.testing.assert_array_equal(dataset.train.images, expected_images(tiny_cifar10()))
    options = {"batch_size": 16, "device": "cpu", "dtype": torch.float32, "rng": stream(0)}
    assert len(list(loaders.make_loader(dataset, "train", **options).epoch(0))) == 5 * ROWS // 16
    with pytest.raises(data.DataError, match="pip install ffcv"):
        loaders.make_loader(dataset, "train", kind="ffcv", **options)
    monkeypatch.delitem(sys.modules, "ffcv")
    assert data.open_dataset("cifar10", cifar10, say=silent).fingerprint == dataset.fingerprint


def test_importing_ffcv_leaves_torch_its_threads(tmp_path, monkeypatch):
    (tmp_path / "ffcv.py").write_text("import torch; torch.set_num_threads(1)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert data.import_ffcv() and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("ffcv")


def test_class_subset_takes_as_many_of_every_class():
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
    assert data.main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


# ---- real images ----


@pytest.mark.skipif(
    not os.environ.get("CIFAR10_FOLDER"), reason="CIFAR10_FOLDER names no folder with CIFAR-10"
)
def test_real_cifar10_has_its_counts_and_statistics(monkeypatch):
    monkeypatch.setattr(sources, "BATCH_ROWS", 10_000)
    monkeypatch.setitem(sources.COUNTS, "cifar10", (50_000, 10_000))
    dataset = data.open_dataset("cifar10", os.environ["CIFAR10_FOLDER"], download=False, say=silent)
    assert dataset.train.images.shape == (50_000, 32, 32, 3) and len(dataset.test.labels) == 10_000
    assert np.bincount(dataset.train.labels).tolist() == [5_000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1_000] * 10
    # Re-encoded copies come within 1 of the official values.
    np.testing.assert_allclose(dataset.mean, sources.CIFAR10_MEAN, atol=1)
    np.testing.assert_allclose(dataset.std, (62.99, 62.09, 66.70), atol=1)


def test_images_to_validate_on_are_set_apart_whatever_is_trained_on():
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
    with pytest.raises(data.DataError, match=r"up to 100 \(20 are set apart to validate on\)"):
        data.share_out(labels, stream(1), 20, 104)
    with pytest.raises(data.DataError, match="--val-split 4: a class has too few images"):
        data.share_out(np.arange(4), stream(1), data.tenth(np.arange(4)))
