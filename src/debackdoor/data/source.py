"""What every reader hands over: labels at once, images on request, so that sampling comes before decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from debackdoor.errors import DataError
from debackdoor.types import CleanSet

Indices = NDArray[np.int64]
Images = Iterator[tuple[str, NDArray[np.generic]]]
"""Pairs of an image's name, for messages, and its (H, W) or (H, W, C) pixels: uint8, or floats in [0, 1]."""


@dataclass(frozen=True)
class ImageSource:
    """A labelled collection of images that are not decoded yet.

    Attributes:
        name: what the user called it, for messages.
        labels: int64, one an image.
        images: called with ascending indices, yields those images in that order.
        class_names: one name a class, or empty.
        files: one an image, where each has a file of its own; else None.

    Raises:
        DataError: if there is no image, or a label is negative or has no name.
    """

    name: str
    labels: Indices
    images: Callable[[Indices], Images]
    class_names: tuple[str, ...] = ()
    files: tuple[Path, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.labels) == 0:
            raise DataError(f"{self.name}: expected at least one image, got none; check the path")
        top = len(self.class_names) or np.iinfo(np.int64).max
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= top))
        if len(wrong):
            expected = f"labels of 0 to {top - 1}, one a class name" if self.class_names else "labels of at least 0"
            raise DataError(
                f"{self.name}: expected {expected}, got {self.labels[wrong[0]]} in row {wrong[0]}; correct the labels"
            )


def read(source: ImageSource, indices: Indices, image_size: int | None) -> CleanSet:
    """Decodes the images at ``indices`` (any order, at least one) into a set in that order.

    Raises:
        DataError: if an image cannot be read, or differs in size from the first while ``image_size`` is None.
    """
    order = np.argsort(indices, kind="stable")
    x, first = torch.empty(0, device="cpu"), ""
    for position, (where, pixels) in zip(order, source.images(indices[order]), strict=True):
        image = _to_tensor(where, pixels, image_size)
        if not first:
            # Filled in place: a list of images and its stack would need the memory twice.
            x, first = torch.empty(len(indices), *image.shape, dtype=torch.float32, device="cpu"), where
        elif image.shape != x.shape[1:]:
            raise DataError(
                f"{where}: expected {_size(x[0])} pixels as in {first}, got {_size(image)}; "
                "bring all images to one size (in Python, image_size does)"
            )
        x[int(position)] = image
    return CleanSet(x, torch.from_numpy(source.labels[indices]), source.class_names, source.name)


def _to_tensor(where: str, pixels: NDArray[np.generic], image_size: int | None) -> Tensor:
    """Pixels as a float32 (3, H, W) tensor in [0, 1]: grey is repeated, alpha dropped."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    image = torch.from_numpy(pixels[..., :3].transpose(2, 0, 1).astype(np.float32))
    if pixels.dtype == np.uint8:
        image /= 255
    # Written so that NaN, for which every comparison is false, fails too.
    elif not (image.min() >= 0 and image.max() <= 1):
        raise DataError(
            f"{where}: expected pixel values in [0, 1], got {image.min():.3g} to {image.max():.3g}; scale the images"
        )
    if image_size is not None and image.shape[1:] != (image_size, image_size):
        image = F.interpolate(image[None], size=image_size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    return image.expand(3, -1, -1)


def reason(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing: a part of a one-sentence message."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
