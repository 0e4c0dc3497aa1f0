"""Tests of data.py's loaders: batches depend only on seed and epoch, and both loaders give the same."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from layouts import naive_crop_and_flip, silent, stream

import data
from datasets import prepare

pytestmark = pytest.mark.usefixtures("small_and_offline")


def in_memory(images: np.ndarray, labels: np.ndarray, test: int = 0) -> data.Dataset:
    """Return a data set made of these arrays; the last `test` images are its test split."""
    cut = len(images) - test
    splits = prepare.Split(images[:cut], labels[:cut], None), prepare.Split(images[cut:], labels[cut:], None)
    classes = tuple(map(str, range(10)))
    scale = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    return data.Dataset("made", "made", "0" * 16, classes, images.shape[1], *scale, *splits)


def numbered(count: int, size: int = 8) -> data.Dataset:
    """Return a data set with `count` images per split; each has a label of its own: 0, 1, 2, ..."""
    images = np.random.RandomState(1).randint(0, 256, (2 * count, size, size, 3), dtype=np.uint8)
    return in_memory(images, np.arange(2 * count) % count, test=count)


def loader_of(dataset, split="train", **options):
    options = {"batch_size": 16, "device": "cpu", "dtype": torch.float32, "rng": stream(0), **options}
    return data.make_loader(dataset, split, **options)


def same_batches(first, second) -> bool:
    first, second = list(first), list(second)
    equal = [torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)]
    return bool(equal) and all(equal)


def check_that_both_kinds_agree(cifar10, device: str, augmented: str = "paper") -> None:
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    subset = data.class_subset(dataset.train.labels, 70, stream(3)("subset"))
    threads = torch.get_num_threads()
    options = {"batch_size": 4, "device": device, "dtype": torch.bfloat16, "augmented": augmented}
    for split, part in (("train", subset), ("validation", subset), ("test", None)):
        resident, ffcv = (
            loader_of(dataset, split, kind=kind, subset=part, **options) for kind in ("resident", "ffcv")
        )
        assert len(resident) == len(ffcv) and resident.num_images == ffcv.num_images
        for epoch in range(3):
            held = list(ffcv.epoch(epoch))  # all at once, so that a reused buffer would show
            assert len(held) == len(ffcv)
            assert same_batches(resident.epoch(epoch), held)
            for images, labels in held:
                assert images.is_contiguous(memory_format=torch.channels_last)
                assert images.device.type == labels.device.type == device and labels.dtype == torch.int64
        next(ffcv.epoch(7))  # leaving an epoch early must not affect later ones
        assert same_batches(resident.epoch(1), ffcv.epoch(1))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("augmented", ["paper", "photo", "none"])
def test_both_kinds_of_loader_give_the_same_batches_bit_for_bit(cifar10, augmented):
    check_that_both_kinds_agree(cifar10, "cpu", augmented)


@pytest.mark.gpu
def test_both_kinds_of_loader_agree_on_the_gpu_and_with_the_cpu(cifar10):
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    for augmented, tolerance in (("paper", 1e-6), ("photo", 1e-3)):
        options = {"augmented": augmented, "batch_size": 16}
        cpu, gpu = (list(loader_of(dataset, device=on, **options).epoch(0)) for on in ("cpu", "cuda"))
        for (here, _), (there, _) in zip(cpu, gpu, strict=True):
            torch.testing.assert_close(here, there.cpu(), rtol=tolerance, atol=tolerance)
    if not prepare.import_ffcv():
        pytest.skip("FFCV is not installed, so only the resident loader was compared")
    check_that_both_kinds_agree(cifar10, "cuda")


def test_a_batch_is_normalised_augmented_and_channels_last():
    dataset = numbered(64)
    [(images, labels), *_] = loader_of(dataset, batch_size=64, augmented="paper", dtype=torch.float64).epoch(
        5
    )
    order = stream(0)("order", 5).permutation(64)
    np.testing.assert_array_equal(labels, order)
    rng = stream(0)("augment", 5)
    offsets, flips = rng.randint(0, 9, (64, 2), dtype=np.int64), rng.randint(0, 2, (64, 1), dtype=np.int64)
    crops = np.stack(
        [
            naive_crop_and_flip(dataset.train.images[i], *o, f[0])
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
    images[:, 8, 6], images[:, 8, 9] = 100, 200  # two points show offset and flip
    dataset = in_memory(images, np.zeros(4096, np.int64))
    dataset = replace(dataset, mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = []
    for batch, _ in loader_of(dataset, batch_size=1024, augmented="paper").epoch(0):
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
    one, two = (loader_of(dataset, augmented="paper") for _ in range(2))
    for epoch in (0, 1, 2):
        list(one.epoch(epoch))
    assert same_batches(one.epoch(3), two.epoch(3)), "a resumed run sees the same batches"
    assert not same_batches(one.epoch(3), one.epoch(4))
    assert not same_batches(one.epoch(3), loader_of(dataset, augmented="paper", rng=stream(1)).epoch(3))
    labels = [torch.cat([labels for _, labels in loader.epoch(2)]) for loader in (one, loader_of(dataset))]
    assert torch.equal(*labels), "augmentation shifts no draw of the order"
    wide = torch.cat([images for images, _ in loader_of(dataset, augmented="paper", batch_size=48).epoch(3)])
    narrow = torch.cat([images for images, _ in one.epoch(3)])
    assert torch.equal(wide, narrow[: len(wide)]), "the batch size shifts no draw"


def test_training_drops_the_last_partial_batch_and_repeats_no_image():
    loader = loader_of(numbered(100))
    for epoch in range(2):
        sizes = [len(labels) for _, labels in loader.epoch(epoch)]
        assert sizes == [16] * 6 and len(loader) == 6
        assert len(torch.cat([labels for _, labels in loader.epoch(epoch)]).unique()) == 96


def test_every_test_image_comes_once_in_file_order_unaugmented():
    dataset = numbered(100)
    loader = loader_of(dataset, "test", augmented="paper", rng=None)
    batches = list(loader.epoch(0))
    assert [len(labels) for _, labels in batches] == [16] * 6 + [4] and len(loader) == 7
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(100))
    images = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).numpy()
    expected = (dataset.test.images - np.array(dataset.mean)) / dataset.std
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_validation_images_are_unaugmented_training_images():
    dataset, chosen = numbered(100), np.array([7, 2, 50])
    loader = loader_of(dataset, "validation", subset=chosen, augmented="photo", batch_size=2)
    [(images, labels), (_, last)] = loader.epoch(0)
    assert [*labels.tolist(), *last.tolist()] == [7, 2, 50]
    expected = (dataset.train.images[[7, 2]] - np.array(dataset.mean)) / dataset.std
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_training_uses_only_the_subset():
    subset = np.array([3, 5, 8, 13, 21, 34, 55, 89])
    loader = loader_of(numbered(100), subset=subset, batch_size=4)
    assert loader.num_images == 8 and len(loader) == 2
    assert sorted(torch.cat([labels for _, labels in loader.epoch(0)]).tolist()) == subset.tolist()


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_the_parts_of_a_batch_join_to_the_whole_bit_for_bit(cifar10, kind):
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    subset = data.class_subset(dataset.train.labels, 70, stream(3)("subset"))
    options = {"kind": kind, "subset": subset, "batch_size": 12, "augmented": "paper"}
    whole = loader_of(dataset, **options)
    for count in (2, 3):
        parts = [loader_of(dataset, **options, share=(rank, count)) for rank in range(count)]
        for epoch in (0, 1):
            batches = [list(part.epoch(epoch)) for part in parts]
            joined = [
                [torch.cat(tensors) for tensors in zip(*of, strict=True)] for of in zip(*batches, strict=True)
            ]
            assert len(joined) == len(whole) == len(parts[0]) == 5 and len(batches[0][0][1]) == 12 // count
            assert same_batches(whole.epoch(epoch), joined)


def test_too_few_images_for_a_batch_is_an_error():
    with pytest.raises(data.DataError, match="--batch-size 101"):
        loader_of(numbered(100), batch_size=101)
    assert len(loader_of(numbered(100), "test", batch_size=101)) == 1


def test_resident_is_the_default_if_the_set_fits_in_half_the_memory(cifar10, monkeypatch):
    dataset = data.open_dataset("cifar10", cifar10, say=silent)
    size = dataset.train.images.nbytes + dataset.test.images.nbytes
    monkeypatch.setattr(data, "_FfcvLoader", lambda *_, **__: "ffcv")
    monkeypatch.setattr(data, "_free_bytes", lambda device: 2 * size - 2)
    assert loader_of(dataset) == "ffcv"
    monkeypatch.setattr(data, "_free_bytes", lambda device: 2 * size)
    assert isinstance(loader_of(dataset), data._ResidentLoader)
    # What is there already has been taken from the free memory, and must not count again.
    monkeypatch.setattr(data, "_free_bytes", lambda device: 2 * size - dataset.train.images.nbytes)
    assert isinstance(loader_of(dataset, "test"), data._ResidentLoader)


def test_the_drawing_thread_ends_by_itself():
    """A thread that did not end would keep an interrupted process from ending."""
    before, loader = set(threading.enumerate()), loader_of(numbered(64))
    loader.start(0)
    loader.ahead[1].result()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_start_raises_the_exception_of_the_drawing_thread():
    loader = loader_of(numbered(64), rng=lambda *names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loader.start(0)
