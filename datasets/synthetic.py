"""The synthetic set: ten classes of 32x32 RGB images, generated offline, identical on every machine."""

import numpy as np


def draw(counts: dict[str, int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return `counts` images of each split, uint8 [N, 32, 32, 3], and their labels, int64 [N].

    Every machine draws the same images. For that, no library's sine or logarithm is used, because their last
    bits differ.
    """
    rng, images, labels = np.random.RandomState(20_200_301), {}, {}
    for split, count in counts.items():
        labels[split] = rng.permutation(count).astype(np.int64) % 10
        blocks = [_draw_block(labels[split][start : start + 500], rng) for start in range(0, count, 500)]
        images[split] = np.concatenate(blocks)
    return images, labels


def _draw_block(labels: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Return uint8 images [N, 32, 32, 3] of classes `labels` [N]: a bright shape on dark, noisy clutter."""

    def uniform(low: float, high: float, channels: int = 1) -> np.ndarray:
        return (low + (high - low) * rng.random_sample((len(labels), 1, 1, channels))).astype(np.float32)

    y, x = (axis.astype(np.float32)[None, :, :, None] for axis in np.mgrid[:32, :32])
    slope = np.clip(0.5 + (uniform(-1, 1) * (x - 16) + uniform(-1, 1) * (y - 16)) / 32, 0, 1)
    start, end = uniform(0, 128, 3), uniform(0, 128, 3)
    canvas = start + (end - start) * slope
    for _ in range(3):  # distractor boxes
        inside = (abs(x - uniform(0, 32)) < uniform(1, 4)) & (abs(y - uniform(0, 32)) < uniform(1, 4))
        canvas = np.where(inside, uniform(0, 255, 3), canvas)

    half = uniform(-1, 1)  # tan(angle / 2) gives sine and cosine without a library
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    radius = uniform(8, 12)
    dx, dy = (x - uniform(12, 20)) / radius, (y - uniform(12, 20)) / radius
    across, along = cosine * dx + sine * dy, cosine * dy - sine * dx
    wide, tall, round_ = abs(across), abs(along), across * across + along * along
    shapes = (
        round_ < 0.8,  # disc
        np.maximum(wide, tall) < 0.75,  # square
        (along < 0.6) & (1.8 * wide - along < 1),  # triangle
        (np.minimum(wide, tall) < 0.3) & (np.maximum(wide, tall) < 1),  # cross
        (round_ < 1) & (round_ > 0.3),  # ring
    )
    kind, striped = (part[:, None, None, None] for part in divmod(labels, 2))
    mask = np.select([kind == index for index in range(5)], shapes)
    gaps = (striped > 0) & ((across * radius + uniform(0, 6)) % 6 < 3)
    canvas = np.where(mask, np.where(gaps, uniform(0, 128, 3), uniform(140, 255, 3)), canvas)
    canvas += rng.randint(-20, 21, canvas.shape, dtype=np.int8)
    return np.clip(canvas, 0, 255).astype(np.uint8)
