"""Tests of datasets/prepare.py: a source is prepared once, completely or not at all, and anew if changed."""

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
    tiny_cifar10,
    write_binary,
    write_python,
)
from PIL import Image

import data
import progress
from datasets import prepare, sources

pytestmark = pytest.mark.usefixtures("small_and_offline")


def files_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "beton").iterdir() if path.name != ".lock"}


def test_prepared_files_are_named_by_fingerprint_and_readable_by_ffcv(cifar10):
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    stem = f"cifar10-32px-{dataset.fingerprint}"
    assert files_in(cifar10) == {f"{stem}-train.beton", f"{stem}-test.beton", "index.json"}
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.reader import Reader

    reader = Reader(str(dataset.train.beton))
    image, label = reader.metadata.dtype.names
    assert reader.field_names == ["image", "label"] and reader.num_samples == 5 * ROWS
    np.testing.assert_array_equal(reader.metadata[label], dataset.train.labels)
    assert (reader.alloc_table["ptr"] == reader.metadata[image]["data_ptr"]).all()
    assert (reader.metadata[image]["mode"] == IMAGE_MODES["raw"]).all()
    raw = dataset.train.beton.read_bytes()
    for row, pixels in zip(reader.metadata[image], dataset.train.images, strict=True):
        assert raw[row["data_ptr"] :][:3072] == pixels.tobytes()


def test_fingerprint_mean_and_std_are_those_of_the_pixels(cifar10):
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    digest = hashlib.sha256(json.dumps([32, CIFAR10_CLASSES, [5 * ROWS, ROWS]]).encode())
    for split in (dataset.train, dataset.test):
        digest.update(split.images.tobytes() + split.labels.astype("<i8").tobytes())
    assert dataset.fingerprint == digest.hexdigest()[:16]
    pixels = dataset.train.images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-9)


def test_a_changed_pixel_or_swapped_labels_change_the_fingerprint(tmp_path):
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
    monkeypatch.setattr(prepare, "import_ffcv", lambda: pytest.fail("ffcv was imported"))
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


def set_in(entry: dict, place: str, value) -> None:
    """Set the value at `place`: `a.b` is the key b of a, and `a.1` is the second item of a."""
    *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
    for key in path:
        entry = entry[key]
    entry[last] = value


MISFITS = [
    ("train", None),
    ("test.file", 5),
    ("test.file", "../other.beton"),
    ("train.bytes", "many"),
    ("train.count", -1),
    ("train.count", 1.5),
    ("train.count", 2**62),
    ("test.images_at", -5),
    ("train.labels_at", 1),
    ("train.label_stride", 2**60),
    ("facts", []),
    ("facts", ["cifar10"]),
    ("facts.1", 7),
    ("facts.1", "CIFAR-10\x1b[2J"),
    ("facts.2", None),
    ("facts.3", CIFAR10_CLASSES[:5]),
    ("facts.3", "abcdefghij"),
    ("facts.3", [1] * 10),
    ("facts.4", "32"),
    ("facts.4", 0),
    ("facts.5", [1.0, 2.0]),
    ("facts.6", ["a", "b", "c"]),
    ("facts.6", [float("nan")] * 3),
]


@pytest.mark.parametrize("place, value", MISFITS, ids=str)
def test_an_invalid_index_entry_is_made_again(cifar10, place, value):
    before = data.open_dataset("cifar10", cifar10, say=silent)
    file = cifar10 / "beton" / "index.json"
    whole = file.read_text()
    index = json.loads(whole)
    (key,) = index
    set_in(index[key], place, value)
    file.write_text(json.dumps(index))
    again = data.open_dataset("cifar10", cifar10, say=silent)
    assert file.read_text() == whole
    np.testing.assert_array_equal(again.train.labels, before.train.labels)
    assert replace(again, train=None, test=None) == replace(before, train=None, test=None)


@pytest.mark.parametrize(
    "rubbish", ["[" * 10**5, '{"a":' * 10**5, "[]", "3", '{"other": 3}', '{"other": {"train": {}}}']
)
def test_an_invalid_index_is_made_again_without_invalid_entries(cifar10, rubbish):
    data.open_dataset("cifar10", cifar10, say=silent)
    file = cifar10 / "beton" / "index.json"
    whole = file.read_text()
    file.write_text(rubbish)
    data.open_dataset("cifar10", cifar10, say=silent)
    assert file.read_text() == whole


def open_and_tell(folder: Path, results) -> None:
    notes = []
    made = []
    real = prepare.prepare

    def slow(*options):
        made.append(1)
        time.sleep(1.5)
        return real(*options)

    prepare.prepare = slow
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
        Image.Image.histogram = lambda *_, **__: die()  # called for every block of training pixels
    elif when == "between the two files":
        os.replace = lambda a, b: replace_file(a, b) if "train" in str(a) else die()
    else:
        os.replace = lambda a, b: replace_file(a, b) if "beton.part" in str(a) else die()
    data.open_dataset("cifar10", folder, say=silent)


@pytest.mark.parametrize(
    "when", ["while the pixels are written", "between the two files", "before the index"]
)
def test_leftovers_of_a_killed_preparation_are_not_used_and_other_files_are_kept(cifar10, when):
    others = {"imagenet-train.beton", "notes-32px.beton.part", "my-train.beton"}
    (cifar10 / "beton").mkdir()
    for name in others:
        (cifar10 / "beton" / name).write_text("")
    process = FORK.Process(target=open_and_die, args=(cifar10, when))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = files_in(cifar10) - others
    assert "index.json" not in left and any(name.endswith(".part") for name in left)
    (cifar10 / "cifar-10-batches-py" / "test_batch").write_bytes(python_file(*tiny_cifar10(1)["test_batch"]))
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    np.testing.assert_array_equal(dataset.train.images, expected_images(tiny_cifar10()))
    stem = f"cifar10-32px-{dataset.fingerprint}"
    assert files_in(cifar10) == {f"{stem}-train.beton", f"{stem}-test.beton", "index.json"} | others


def test_a_full_disk_is_reported_and_leaves_no_files(cifar10, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(data.DataError, match=r"bytes") as error:
        data.open_dataset("cifar10", cifar10, say=silent)
    assert str(cifar10 / "beton") in str(error.value)
    assert files_in(cifar10) == set()


def test_importing_ffcv_keeps_torchs_number_of_threads(tmp_path, monkeypatch):
    (tmp_path / "ffcv.py").write_text("import torch; torch.set_num_threads(1)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert prepare.import_ffcv() and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("ffcv")


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_data_py_can_be_interrupted_while_it_imports_ffcv(cifar10, tmp_path, monkeypatch, capfd, number):
    """The signal comes in a callback from C, as LLVM makes them for numba; Python drops exceptions there."""
    module = f"import ctypes, signal\nctypes.CFUNCTYPE(None)(lambda: signal.raise_signal({number:d}))()\n"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "ffcv.py").write_text(module)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    command = ["cifar10", "--data-dir", str(cifar10)]
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path / "modules")
        patched.delitem(sys.modules, "ffcv", raising=False)
        try:
            assert progress.run("data.py", lambda: data.main(command)) == 1
        finally:
            sys.modules.pop("ffcv", None)
            for number, handler in before.items():
                signal.signal(number, handler)
    assert capfd.readouterr().err.splitlines()[-1:] == ["data.py: interrupted"]
    assert not files_in(cifar10)
    assert data.main(command) == 0 and "index.json" in files_in(cifar10)


def test_preparing_does_not_look_up_ffcvs_image_modes(cifar10, monkeypatch):
    """For a look-up, numba would compile a function, and its callbacks from C drop interruptions."""
    monkeypatch.setattr("ffcv.fields.rgb_image.IMAGE_MODES", {})
    assert data.open_dataset("cifar10", cifar10, say=silent).train.beton


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_RDWR), 2**40)]
)
def test_an_index_that_is_a_fifo_or_huge_is_made_again(cifar10, make):
    data.open_dataset("cifar10", cifar10, say=silent)
    file = cifar10 / "beton" / "index.json"
    whole = file.read_text()
    file.unlink()
    make(file)
    data.open_dataset("cifar10", cifar10, say=silent)
    assert file.read_text() == whole
