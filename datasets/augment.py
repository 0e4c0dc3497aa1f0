"""How training images are changed at random: each by draws of its own, on the device.

    paper   crop+flip: out of 4 pixels of black around the image, and left to right (He et al. 2016, 4.2)
    photo   flip+brightness+rotation+shift+zoom+shear: what photographs of one thing differ in
    none

or any sum of these parts. The ranges are those of Keras's ImageDataGenerator in a Keras study, where they had
an effect: brightness 0.7 to 1.3, shift and zoom 0.1. Its shear of 0.1 was in degrees, which is nothing; here
it is 0.1 pixels a pixel, and its "tiny" rotation up to 5 degrees.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

PARTS = ("crop", "flip", "brightness", "rotation", "shift", "zoom", "shear")
NAMED = {"paper": "crop+flip", "photo": "flip+brightness+rotation+shift+zoom+shear", "none": ""}
PAD = 4  # pixels around an image before a crop
RANGES = {  # of each uniform draw; shift is in sides of the image, down and across, zoom along each too
    "brightness": [(0.7, 1.3)],
    "rotation": [(math.radians(-5), math.radians(5))],
    "shift": [(-0.1, 0.1)] * 2,
    "zoom": [(0.9, 1.1)] * 2,
    "shear": [(-0.1, 0.1)],
}
UNCHANGED = {"brightness": [1.0], "rotation": [0.0], "shift": [0.0] * 2, "zoom": [1.0] * 2, "shear": [0.0]}
DRAWS = 3 + sum(map(len, RANGES.values()))  # per image: row and column of the crop, flip, then those


class AugmentError(ValueError):
    """A name that is no augmentation; the message says what is."""


def canonical(name: str) -> str:
    """One spelling per augmentation: paper, photo or none where it is that, else parts in a fixed order."""
    asked = parts_of(name) if name in NAMED else set(name.split("+"))
    if unknown := asked - set(PARTS):
        what = f"--augment {name}: {sorted(unknown)[0]!r} is not known"
        raise AugmentError(f"{what}; choose {', '.join(NAMED)}, or parts joined by +: {', '.join(PARTS)}")
    parts = "+".join(part for part in PARTS if part in asked)
    return {value: key for key, value in NAMED.items()}.get(parts, parts)


def parts_of(name: str) -> set[str]:
    return set(NAMED.get(name, name).split("+")) - {""}


def draw(
    parts: set[str], rng: Callable[[str, int], np.random.RandomState], epoch: int, count: int
) -> np.ndarray:
    """float32 [count, DRAWS]: what `augment` is to do to each image of an epoch.

    Each part draws from a stream of its own (crop and flip from one), so none shifts another's.
    """
    draws = np.empty((count, DRAWS), np.float32)
    crop_and_flip = rng("augment", epoch)
    draws[:, :2] = crop_and_flip.randint(0, 2 * PAD + 1, (count, 2), dtype=np.int64)
    draws[:, 2:3] = crop_and_flip.randint(0, 2, (count, 1), dtype=np.int64)
    draws[:, :2] = draws[:, :2] if "crop" in parts else PAD
    draws[:, 2:3] = draws[:, 2:3] if "flip" in parts else 0
    column = 3
    for part, ranges in RANGES.items():
        columns = slice(column, column + len(ranges))
        if part in parts:
            low, high = np.transpose(ranges)
            draws[:, columns] = rng(f"augment/{part}", epoch).uniform(low, high, (count, len(ranges)))
        else:
            draws[:, columns] = UNCHANGED[part]
        column = columns.stop
    return draws


def augment(images: torch.Tensor, draws: torch.Tensor, parts: set[str]) -> torch.Tensor:
    """Change each image by its draws, in the order of PARTS.

    `images` uint8 [N, H, W, 3]; `draws` float32 [N, DRAWS]. Returns the same shape: uint8 or, after more than
    crop and flip, float32 from 0 to 255. No shape depends on a value and nothing waits for the device, so it
    can be captured in a CUDA graph.
    """
    if parts & {"crop", "flip"}:
        images = crop_and_flip(images, draws[:, :3].long())
    if "brightness" in parts:
        images = (images.float() * draws[:, 3, None, None, None]).clamp_(max=255)
    if parts & {"rotation", "shift", "zoom", "shear"}:
        images = warp(images.float(), *draws[:, 4:].unbind(1))
    return images


def crop_and_flip(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Crop each image out of its zero-padded self and flip it left to right, or not.

    `images` uint8 [N, H, W, 3]; `draws` int64 [N, 3]: row and column of the crop in the image padded by PAD
    pixels on every side (0 to 2 PAD), and 1 for a flip. Returns uint8 [N, H, W, 3].
    """
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    first_rows = torch.arange(count, device=images.device)[:, None] * (height + 2 * PAD) + draws[:, :1]
    rows = first_rows + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(draws[:, 2:] > 0, width - 1 - columns, columns) + draws[:, 1:2]
    pixels = rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]
    return padded.view(-1, 3).index_select(0, pixels.view(-1)).view(images.shape)


def warp(
    images: torch.Tensor,
    angle: torch.Tensor,
    down: torch.Tensor,
    across: torch.Tensor,
    zoom_y: torch.Tensor,
    zoom_x: torch.Tensor,
    shear: torch.Tensor,
) -> torch.Tensor:
    """Look at each image, float32 [N, H, W, 3], H = W, through a window of the same size that is zoomed,
    sheared, turned (radians) about its centre, and shifted (in sides); each of these is float32 [N].

    A pixel at (x, y) from the window's centre shows the image at R(angle) S(shear) diag(zoom) (x, y) + shift,
    interpolated linearly; beyond the border lies the border's colour.
    """
    side = images.shape[1]
    at = (2 * torch.arange(side, device=images.device) + 1) / side - 1  # pixel centres, of sides from -1 to 1
    angle, down, across, zoom_y, zoom_x, shear = (
        v[:, None, None] for v in (angle, down, across, zoom_y, zoom_x, shear)
    )
    y, x = zoom_y * at[:, None], zoom_x * at
    x = x + shear * y
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    grid = torch.stack([x + 2 * across, y + 2 * down], -1)
    channels_first = images.permute(0, 3, 1, 2)
    seen = F.grid_sample(channels_first, grid, "bilinear", padding_mode="border", align_corners=False)
    return seen.permute(0, 2, 3, 1).contiguous()
