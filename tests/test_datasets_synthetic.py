"""Tests of datasets/synthetic.py: images are the same on every machine and not easy to classify."""

import numpy as np
from layouts import silent

import data


def test_synthetic_images_are_fixed_and_not_classified_by_mean_images(tmp_path):
    dataset = data.open_dataset("synthetic", tmp_path, say=silent)
    assert dataset.fingerprint == "d83bf12d75fd0000"
    assert dataset.train.images.shape == (10_000, 32, 32, 3) and len(dataset.test.labels) == 2_000
    assert np.bincount(dataset.train.labels).tolist() == [1000] * 10
    # Choosing the class whose mean image is nearest must not classify the images well; chance gives 10 %.
    means = np.stack([dataset.train.images[dataset.train.labels == c].mean(0) for c in range(10)]).reshape(
        10, -1
    )
    test = dataset.test.images.reshape(2_000, -1).astype(np.float64)
    nearest = ((means**2).sum(1) - 2 * test @ means.T).argmin(1)
    assert (nearest == dataset.test.labels).mean() < 0.5
