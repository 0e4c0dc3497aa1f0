"""datasets/synthetic.py: the same images on every machine, and no class to be told by its colours."""

import numpy as np
from layouts import silent

import data


def test_synthetic_is_the_same_everywhere_and_colour_gives_no_class_away(tmp_path):
    dataset = data.open_dataset("synthetic", tmp_path, say=silent)
    assert dataset.fingerprint == "d83bf12d75fd0000"
    assert dataset.train.images.shape == (10_000, 32, 32, 3) and len(dataset.test.labels) == 2_000
    assert np.bincount(dataset.train.labels).tolist() == [1000] * 10
    # The class whose mean image is nearest: what pixels alone tell, against 10 % by chance.
    means = np.stack([dataset.train.images[dataset.train.labels == c].mean(0) for c in range(10)]).reshape(
        10, -1
    )
    test = dataset.test.images.reshape(2_000, -1).astype(np.float64)
    nearest = ((means**2).sum(1) - 2 * test @ means.T).argmin(1)
    assert (nearest == dataset.test.labels).mean() < 0.5
