"""Tests of datasets/augment.py: its changes equal a plain reference, and every image has its own draws."""

import math

import numpy as np
import pytest
import torch
from layouts import naive_crop_and_flip, stream

from datasets import DataError, augment

COLUMNS = dict(
    zip(
        ("row", "column", "flip", "brightness", "angle", "down", "across", "zoom_y", "zoom_x", "shear"),
        range(augment.DRAWS),
        strict=True,
    )
)


def unchanged(count: int) -> torch.Tensor:
    return torch.from_numpy(augment.draw(set(), stream(0), 0, count))


def pictures(count: int, side: int = 12) -> np.ndarray:
    return np.random.RandomState(0).randint(1, 256, (count, side, side, 3), dtype=np.uint8)


def naive_window(image: np.ndarray, angle, down, across, zoom_y, zoom_x, shear) -> np.ndarray:
    """Return `image` as augment.warp should, in float64: interpolate each pixel from the four around it."""
    side, out = len(image), np.empty(image.shape)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    affine = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([zoom_x, zoom_y])
    middle = (side - 1) / 2
    for i in range(side):
        for j in range(side):
            x, y = affine @ (j - middle, i - middle) + middle + side * np.array([across, down])
            x, y = (min(max(v, 0), side - 1) for v in (x, y))
            left, top = min(int(x), side - 2), min(int(y), side - 2)
            right_share, low_share = x - left, y - top
            rows = image[top : top + 2, left : left + 2].astype(np.float64)
            rows = rows[:, 0] * (1 - right_share) + rows[:, 1] * right_share
            out[i, j] = rows[0] * (1 - low_share) + rows[1] * low_share
    return out


def test_crops_and_flips_equal_a_plain_reference():
    rng = np.random.RandomState(0)
    images = rng.randint(1, 256, (200, 12, 16, 3), dtype=np.uint8)
    draws = np.concatenate([rng.randint(0, 9, (200, 2)), rng.randint(0, 2, (200, 1))], axis=1)
    draws[:4] = [(0, 0, 0), (8, 8, 1), (0, 8, 0), (4, 4, 0)]
    out = augment.crop_and_flip(torch.from_numpy(images), torch.from_numpy(draws)).numpy()
    expected = [naive_crop_and_flip(i, *d) for i, d in zip(images, draws, strict=True)]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(out[3], images[3])


@pytest.mark.parametrize("part", ["rotation", "shift", "zoom", "shear", "rotation+shift+zoom+shear"])
def test_warps_equal_a_plain_reference(part):
    images, parts = pictures(20), augment.parts_of(part)
    draws = augment.draw(parts, stream(3), 0, 20)
    out = augment.augment(torch.from_numpy(images), torch.from_numpy(draws), parts).numpy()
    expected = [
        naive_window(image, *row[4:].astype(np.float64)) for image, row in zip(images, draws, strict=True)
    ]
    np.testing.assert_allclose(out, expected, atol=5e-3)
    assert np.abs(out - images).mean() > 3, "it changes something"


def test_a_shift_by_whole_pixels_moves_them_and_repeats_the_border():
    images = torch.from_numpy(pictures(2, side=10))
    draws = unchanged(2)
    draws[0, COLUMNS["down"]], draws[1, COLUMNS["across"]] = 0.1, -0.2
    out = augment.augment(images, draws, {"shift"})
    torch.testing.assert_close(out[0, :-1], images[0, 1:].float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[0, -1], images[0, -1].float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[1, :, 2:], images[1, :, :-2].float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[1, :, 0], images[1, :, 0].float(), atol=1e-3, rtol=0)


def test_brightness_multiplies_and_clips_at_white():
    images, draws = torch.from_numpy(pictures(3)), unchanged(3)
    draws[:, COLUMNS["brightness"]] = torch.tensor([0.7, 1.0, 1.3])
    out = augment.augment(images, draws, {"brightness"})
    for image, changed, factor in zip(images.float(), out, (0.7, 1.0, 1.3), strict=True):
        torch.testing.assert_close(changed, (image * factor).clamp(max=255))
    assert out.max() == 255


def test_draws_fill_their_ranges_and_are_uncorrelated():
    draws = augment.draw(set(augment.PARTS), stream(0), 2, 5000)
    limits = {"brightness": (0.7, 1.3), "angle": (-math.radians(5), math.radians(5)), "shear": (-0.1, 0.1)}
    limits |= {"down": (-0.1, 0.1), "across": (-0.1, 0.1), "zoom_y": (0.9, 1.1), "zoom_x": (0.9, 1.1)}
    for name, (low, high) in limits.items():
        drawn, margin = draws[:, COLUMNS[name]], 0.01 * (high - low)
        assert low - 1e-6 <= drawn.min() < low + margin and high - margin < drawn.max() <= high + 1e-6, name
    assert len(np.unique(np.corrcoef(draws.T).round(1))) == 2, "no two of them are drawn together"


def test_no_part_shifts_the_draws_of_another():
    paper = augment.draw(augment.parts_of("paper"), stream(0), 4, 50)
    every = augment.draw(set(augment.PARTS), stream(0), 4, 50)
    np.testing.assert_array_equal(paper[:, :3], every[:, :3])
    for name in ("brightness", "rotation", "shift", "zoom", "shear"):
        alone = augment.draw({name}, stream(0), 4, 50)
        differs = (alone != augment.draw(set(), stream(0), 4, 50)).any(0)
        assert differs.any() and (alone[:, differs] == every[:, differs]).all()


@pytest.mark.parametrize(
    "given, canonical",
    [
        ("paper", "paper"),
        ("flip+crop", "paper"),
        ("none", "none"),
        ("zoom+flip", "flip+zoom"),
        ("shear+zoom+shift+rotation+brightness+flip", "photo"),
        ("photo+crop", None),
        ("blur", None),
    ],
)
def test_an_augmentation_has_one_spelling(given, canonical):
    if canonical is None:
        with pytest.raises(DataError, match="choose paper, photo, none"):
            augment.canonical(given)
    else:
        assert augment.canonical(given) == canonical
