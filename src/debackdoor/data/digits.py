"""scikit-learn's bundled handwritten digits, so that everything can be tried without a download."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from debackdoor.data.source import Images, ImageSource, Indices

_TEST_IMAGES = 500


def open_digits(name: str, split: str) -> ImageSource:
    """The 1,797 digits, 8x8 grey enlarged to 32x32: a fixed stratified split of 1,297 train and 500 test images."""
    # Imported here because scikit-learn takes longer to import than most files take to read.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=_TEST_IMAGES, stratify=labels, random_state=0)
    chosen = np.sort(test if split == "test" else train)
    small = torch.from_numpy(raw[chosen]).float().reshape(-1, 1, 8, 8) / 16
    pixels = F.interpolate(small, size=32, mode="bilinear")[:, 0].clamp(0, 1).numpy()

    def images(indices: Indices) -> Images:
        return ((f"{name} image {index}", pixels[index]) for index in indices)

    return ImageSource(name, labels[chosen].astype(np.int64), images, tuple(str(digit) for digit in range(10)))
