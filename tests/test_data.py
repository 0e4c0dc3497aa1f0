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
import sources

pytestmark = pytest.mark.usefixtures("small_and_offline")


def in_memory(images: np.ndarray, labels: np.ndarray, test: int = 0) -> data.Dataset:
    """A data set around arrays, its last `test` images the test split."""
    cut = len(images) - test
    splits = data.Split(images[:cut], labels[:cut], None), data.Split(images[cut:], labels[cut:], None)
    classes = tuple(map(str, range(10)))
    scale = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    return data.Dataset("made", "made", "0" * 16, classes, images.shape[1], *scale, *splits)


def numbered(count: int, size: int = 8) -> data.Dataset:
    """Images that are told apart by their labels 0, 1, 2, ..., in both splits."""
    images = np.random.RandomState(1).randint(0, 256, (2 * count, size, size, 3), dtype=np.uint8)
    return in_memory(images, np.arange(2 * count) % count, test=count)


def loader_of(dataset, split="train", **options):
    options = {"batch_size": 16, "device": "cpu", "dtype": torch.float32, "rng": stream(0), **options}
    return data.make_loader(dataset, split, **options)


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
    monkeypatch.setattr(data, "_import_ffcv", lambda: pytest.fail("ffcv was imported"))
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
        np.diag = die  # called for every block of training pixels
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
    assert len(list(loader_of(dataset, augment=True).epoch(0))) == 5 * ROWS // 16
    with pytest.raises(data.DataError, match="pip install ffcv"):
        loader_of(dataset, kind="ffcv")
    monkeypatch.delitem(sys.modules, "ffcv")
    assert data.open_dataset("cifar10", cifar10, say=silent).fingerprint == dataset.fingerprint


def test_importing_ffcv_leaves_torch_its_threads(tmp_path, monkeypatch):
    (tmp_path / "ffcv.py").write_text("import torch; torch.set_num_threads(1)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert data._import_ffcv() and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("ffcv")


# ---- batches ----


def same_batches(first, second) -> bool:
    first, second = list(first), list(second)
    equal = [torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)]
    return bool(equal) and all(equal)


def check_that_both_kinds_agree(cifar10, device: str) -> None:
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    subset = data.class_subset(dataset.train.labels, 70, stream(3)("subset"))
    threads = torch.get_num_threads()
    options = {"batch_size": 4, "device": device, "dtype": torch.bfloat16, "augment": True}
    for split, part in (("train", subset), ("test", None)):
        resident, ffcv = (
            loader_of(dataset, split, kind=kind, subset=part, **options) for kind in ("resident", "ffcv")
        )
        assert len(resident) == len(ffcv) and resident.num_images == ffcv.num_images
        for epoch in range(3):
            held = list(ffcv.epoch(epoch))  # all at once: a buffer filled anew would show
            assert len(held) == len(ffcv)
            assert same_batches(resident.epoch(epoch), held)
            for images, labels in held:
                assert images.is_contiguous(memory_format=torch.channels_last)
                assert images.device.type == labels.device.type == device and labels.dtype == torch.int64
        next(ffcv.epoch(7))  # an epoch that is left early disturbs no later one
        assert same_batches(resident.epoch(1), ffcv.epoch(1))
    assert torch.get_num_threads() == threads


def test_both_kinds_of_loader_give_the_same_batches_bit_for_bit(cifar10):
    check_that_both_kinds_agree(cifar10, "cpu")


@pytest.mark.gpu
def test_on_the_gpu_too_and_as_on_the_cpu(cifar10):
    check_that_both_kinds_agree(cifar10, "cuda")
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    cpu, gpu = (list(loader_of(dataset, augment=True, device=device).epoch(0)) for device in ("cpu", "cuda"))
    for (here, _), (there, _) in zip(cpu, gpu, strict=True):
        torch.testing.assert_close(here, there.cpu(), rtol=1e-6, atol=1e-6)


def naive_augment(image: np.ndarray, dy: int, dx: int, flip: int) -> np.ndarray:
    """torchvision's RandomCrop(32, padding=4), then RandomHorizontalFlip, with given draws."""
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    height, width, _ = image.shape
    crop = padded[dy : dy + height, dx : dx + width]
    return crop[:, ::-1] if flip else crop


def test_crops_and_flips_equal_a_plain_reference():
    rng = np.random.RandomState(0)
    images = rng.randint(1, 256, (200, 12, 16, 3), dtype=np.uint8)
    draws = np.concatenate([rng.randint(0, 9, (200, 2)), rng.randint(0, 2, (200, 1))], axis=1)
    draws[:4] = [(0, 0, 0), (8, 8, 1), (0, 8, 0), (4, 4, 0)]
    out = data.augment(torch.from_numpy(images), torch.from_numpy(draws)).numpy()
    np.testing.assert_array_equal(out, [naive_augment(i, *d) for i, d in zip(images, draws, strict=True)])
    np.testing.assert_array_equal(out[3], images[3])


def test_a_batch_is_normalised_augmented_and_channels_last():
    dataset = numbered(64)
    [(images, labels), *_] = loader_of(dataset, batch_size=64, augment=True, dtype=torch.float64).epoch(5)
    order = stream(0)("order", 5).permutation(64)
    np.testing.assert_array_equal(labels, order)
    rng = stream(0)("augment", 5)
    offsets, flips = rng.randint(0, 9, (64, 2), dtype=np.int64), rng.randint(0, 2, (64, 1), dtype=np.int64)
    crops = np.stack(
        [
            naive_augment(dataset.train.images[i], *o, f[0])
            for i, o, f in zip(order, offsets, flips, strict=True)
        ]
    )
    expected = (crops.astype(np.float64) - dataset.mean) / dataset.std
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)
    assert images.shape == (64, 3, 8, 8) and images.is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        [(images, _), *_] = loader_of(dataset, dtype=dtype).epoch(0)
        assert images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)


def test_every_image_has_its_own_crop_and_flip():
    images = np.zeros((4096, 16, 16, 3), np.uint8)
    images[:, 8, 6], images[:, 8, 9] = 100, 200  # two points tell offset and flip
    dataset = in_memory(images, np.zeros(4096, np.int64))
    dataset = replace(dataset, mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = []
    for batch, _ in loader_of(dataset, batch_size=1024, augment=True).epoch(0):
        points = batch[:, 0].flatten(1)
        low, high = (points == 100).int().argmax(1), (points == 200).int().argmax(1)
        flip = (low > high).int()
        dy, dx = 8 + 4 - low // 16, torch.where(flip > 0, 15 - low % 16, low % 16)
        seen.append(torch.stack([dy, torch.where(flip > 0, dx, 6 + 4 - dx), flip], 1))
        assert len(seen[-1].unique(dim=0)) > 150, "crops and flips vary within a batch"
    draws = torch.cat(seen)
    offsets = draws[draws[:, 2] == 0][:, :2].unique(dim=0)
    assert len(offsets) == 81 and offsets.min() == 0 and offsets.max() == 8
    assert abs(draws[:, 2].float().mean() - 0.5) < 0.03


def test_order_and_crops_depend_on_seed_and_epoch_alone():
    dataset = numbered(100)
    one, two = (loader_of(dataset, augment=True) for _ in range(2))
    for epoch in (0, 1, 2):
        list(one.epoch(epoch))
    assert same_batches(one.epoch(3), two.epoch(3)), "a resumed run sees the same batches"
    assert not same_batches(one.epoch(3), one.epoch(4))
    assert not same_batches(one.epoch(3), loader_of(dataset, augment=True, rng=stream(1)).epoch(3))
    labels = [torch.cat([labels for _, labels in loader.epoch(2)]) for loader in (one, loader_of(dataset))]
    assert torch.equal(*labels), "augmentation shifts no draw of the order"
    wide = torch.cat([images for images, _ in loader_of(dataset, augment=True, batch_size=48).epoch(3)])
    narrow = torch.cat([images for images, _ in one.epoch(3)])
    assert torch.equal(wide, narrow[: len(wide)]), "the batch size shifts no draw"


def test_training_drops_the_last_partial_batch_and_repeats_no_image():
    loader = loader_of(numbered(100))
    for epoch in range(2):
        sizes = [len(labels) for _, labels in loader.epoch(epoch)]
        assert sizes == [16] * 6 and len(loader) == 6
        assert len(torch.cat([labels for _, labels in loader.epoch(epoch)]).unique()) == 96


def test_every_test_image_counts_once_in_file_order_and_is_left_as_it_is():
    dataset = numbered(100)
    loader = loader_of(dataset, "test", augment=True, rng=None)
    batches = list(loader.epoch(0))
    assert [len(labels) for _, labels in batches] == [16] * 6 + [4] and len(loader) == 7
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(100))
    images = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).numpy()
    expected = (dataset.test.images - np.array(dataset.mean)) / dataset.std
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_a_subset_is_all_that_is_trained_on():
    subset = np.array([3, 5, 8, 13, 21, 34, 55, 89])
    loader = loader_of(numbered(100), subset=subset, batch_size=4)
    assert loader.num_images == 8 and len(loader) == 2
    assert sorted(torch.cat([labels for _, labels in loader.epoch(0)]).tolist()) == subset.tolist()


def test_too_few_images_for_a_batch_is_an_error():
    with pytest.raises(data.DataError, match="--batch-size 101"):
        loader_of(numbered(100), batch_size=101)
    assert len(loader_of(numbered(100), "test", batch_size=101)) == 1


def test_resident_is_the_default_where_the_set_fits(cifar10, monkeypatch):
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    size = dataset.train.images.nbytes + dataset.test.images.nbytes
    monkeypatch.setattr(data, "_FfcvLoader", lambda *_: "ffcv")
    monkeypatch.setattr(data, "_free_bytes", lambda device: 2 * size)
    assert isinstance(loader_of(dataset), data._ResidentLoader)
    monkeypatch.setattr(data, "_free_bytes", lambda device: 2 * size - 2)
    assert loader_of(dataset) == "ffcv"


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
