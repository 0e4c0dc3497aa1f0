"""Augment training images at random on the device, with separate draws for each image.

    paper   crop+flip: a crop of the image padded by 4 black pixels, a left-right flip (He et al. 2016, 4.2)
    photo   flip+brightness+rotation+shift+zoom+shear: how photographs of one object differ
    none

Any sum of these parts is an augmentation too. Most ranges are those that a Keras study gave to Keras's
ImageDataGenerator: brightness 0.7 to 1.3, shift and zoom 0.1. The study's shear of 0.1 was in degrees and had
next to no effect; here it is 0.1 pixels per pixel. Its "tiny" rotation is up to 5 degrees here. To add a
part, append it to PARTS.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from datasets import DataError

NAMED = {"paper": "crop+flip", "photo": "flip+brightness+rotation+shift+zoom+shear", "none": ""}
PAD = 4  # pixels around an image before a crop

Stream = Callable[[str, int], np.random.RandomState]  # returns the generator for a name and an epoch


def crop_and_flip(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Crop each image from its zero-padded version, and flip it left to right if drawn.

    `images` is uint8 [N, H, W, 3]. `draws` [N, 3] has the row and column of the crop (0 to 2 PAD) in the
    image padded by PAD pixels on every side, and 1 for a flip, else 0. Returns uint8 [N, H, W, 3].
    """
    (count, height, width, _), draws = images.shape, draws.long()
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    first_rows = torch.arange(count, device=images.device)[:, None] * (height + 2 * PAD) + draws[:, :1]
    rows = first_rows + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(draws[:, 2:] > 0, width - 1 - columns, columns) + draws[:, 1:2]
    pixels = rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]
    return padded.view(-1, 3).index_select(0, pixels.view(-1)).view(images.shape)


def brighten(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Multiply each image [N, H, W, 3] by its draw [N, 1], and clip at 255. Returns float32."""
    return (images.float() * draws[..., None, None]).clamp_(max=255)


def warp(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Resample each image [N, H, W, 3], H = W, through a window of the same size, as float32.

    `draws` [N, 6] place the window on the image: the angle in radians by which it is turned about its centre,
    its shift down and across as fractions of the image's side, its zoom along y and x, and its shear. The
    pixel at (x, y) from the window's centre shows the image at R(angle) S(shear) diag(zoom) (x, y) + shift,
    interpolated bilinearly. Beyond the border, the image's outermost pixels are repeated.
    """
    side = images.shape[1]
    angle, down, across, zoom_y, zoom_x, shear = (draw[:, None, None] for draw in draws.unbind(1))
    at = (2 * torch.arange(side, device=images.device) + 1) / side - 1  # pixel centres, from -1 to 1
    y, x = zoom_y * at[:, None], zoom_x * at
    x = x + shear * y
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    grid = torch.stack([x + 2 * across, y + 2 * down], -1)
    channels_first = images.float().permute(0, 3, 1, 2)
    seen = F.grid_sample(channels_first, grid, "bilinear", padding_mode="border", align_corners=False)
    return seen.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Part:
    """One way to change images. Neighbours in PARTS with the same function are passed to it together."""

    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # takes images and the draws for them
    range: tuple[float, float]  # of the draws
    unchanged: float  # the draw that changes nothing
    draws: int = 1  # per image
    whole: bool = False  # integers from the stream "augment", else floats from "augment/<name>"; uniform


PARTS = {  # in the order of application, and of the columns of `draws`
    "crop": Part(crop_and_flip, (0, 2 * PAD), PAD, draws=2, whole=True),
    "flip": Part(crop_and_flip, (0, 1), 0, whole=True),
    "brightness": Part(brighten, (0.7, 1.3), 1.0),
    "rotation": Part(warp, (math.radians(-5), math.radians(5)), 0.0),
    "shift": Part(warp, (-0.1, 0.1), 0.0, draws=2),
    "zoom": Part(warp, (0.9, 1.1), 1.0, draws=2),
    "shear": Part(warp, (-0.1, 0.1), 0.0),
}
DRAWS = sum(part.draws for part in PARTS.values())  # per image
GROUPS = [list(names) for _, names in itertools.groupby(PARTS, lambda name: PARTS[name].change)]


def canonical(name: str) -> str:
    """Return an augmentation's one spelling: paper, photo or none if it is one, else parts in a fixed order.

    Raises DataError if `name` is not an augmentation.
    """
    asked = parts_of(name) if name in NAMED else set(name.split("+"))
    if unknown := asked - set(PARTS):
        what = f"--augment {name}: {sorted(unknown)[0]!r} is not known"
        raise DataError(f"{what}; choose {', '.join(NAMED)}, or parts joined by +: {', '.join(PARTS)}")
    parts = "+".join(part for part in PARTS if part in asked)
    return {value: key for key, value in NAMED.items()}.get(parts, parts)


def parts_of(name: str) -> set[str]:
    return set(NAMED.get(name, name).split("+")) - {""}


def draw(parts: set[str], rng: Stream, epoch: int, count: int) -> np.ndarray:
    """Return the draws of `augment` for each image of an epoch, float32 [count, DRAWS].

    Crop and flip share a stream and always draw from it. Every other part has its own stream. So no part
    shifts the draws of another.
    """
    columns, whole_numbers = [], rng("augment", epoch)
    for name, part in PARTS.items():
        size, (low, high) = (count, part.draws), part.range
        if part.whole:
            drawn = whole_numbers.randint(low, high + 1, size, dtype=np.int64)
        elif name in parts:
            drawn = rng(f"augment/{name}", epoch).uniform(low, high, size)
        columns.append(drawn if name in parts else np.full(size, part.unchanged))
    return np.concatenate(columns, axis=1, dtype=np.float32)


def augment(images: torch.Tensor, draws: torch.Tensor, parts: set[str]) -> torch.Tensor:
    """Change each image by its draws, in the order of PARTS.

    `images` is uint8 [N, H, W, 3] and `draws` float32 [N, DRAWS]. Returns the shape of `images`: uint8, or
    float32 from 0 to 255 if parts other than crop and flip are applied. No shape depends on a value and
    nothing waits for the device, so a CUDA graph can capture it.
    """
    widths = [sum(PARTS[name].draws for name in names) for names in GROUPS]
    for names, columns in zip(GROUPS, draws.split(widths, 1), strict=True):
        if parts.intersection(names):
            images = PARTS[names[0]].change(images, columns)
    return images
