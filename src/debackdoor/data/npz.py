"""A NumPy archive with images ``x`` and labels ``y``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from debackdoor.data.source import Images, ImageSource, Indices, reason
from debackdoor.errors import DataError


def open_npz(name: str, path: Path, labelled: bool = True) -> ImageSource:
    """The images of an ``.npz`` file. Nothing in it is ever unpickled.

    ``x`` is uint8 (N, H, W, C), or float (N, C, H, W) in [0, 1], or either as (N, H, W) grey; C is 1, 3 or 4 (alpha).
    ``y`` is integer (N,); where no labels are needed it may be missing, or of any type.

    Raises:
        DataError: if the file cannot be read or an array is missing or not as above.
    """
    x, y = _arrays(path, labelled)
    pixels = _channels_last(path, x)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or len(y) != len(x):
        raise DataError(
            f"{path}: expected y to be {len(x)} integer labels, got {y.dtype} of shape {y.shape}; convert it"
        )

    def images(indices: Indices) -> Images:
        return ((f"{path} row {index}", pixels[index]) for index in indices)

    return ImageSource(name, y.astype(np.int64), images)


def _arrays(path: Path, labelled: bool) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    try:
        archive = np.load(path, allow_pickle=False)
        names = set(archive.files) if isinstance(archive, np.lib.npyio.NpzFile) else set()
        if ({"x", "y"} if labelled else {"x"}) <= names:
            with archive:
                x = archive["x"]
                return x, archive["y"] if labelled else np.zeros(len(x), dtype=np.int64)
    except Exception as error:  # a damaged archive can raise nearly anything
        raise DataError(
            f"{path}: expected a NumPy archive of plain arrays, got an error ({reason(error)}); "
            "save it with numpy.savez(path, x=..., y=...)"
        ) from error
    raise DataError(
        f"{path}: expected an archive of {'the arrays x and y' if labelled else 'an array x'}, "
        f"got {', '.join(sorted(names)) or 'none'}; "
        "save it with numpy.savez(path, x=..., y=...)"
    )


def _channels_last(path: Path, x: NDArray[np.generic]) -> NDArray[np.generic]:
    """``x`` as (N, H, W, C), by its dtype, or as (N, H, W)."""
    shape, floating = x.shape, np.issubdtype(x.dtype, np.floating)
    if x.ndim == 4 and floating:
        x = x.transpose(0, 2, 3, 1)
    right_type = floating or x.dtype == np.uint8
    right_shape = 0 not in shape[1:] and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3, 4)))
    if not (right_type and right_shape):
        raise DataError(
            f"{path}: expected x to be uint8 (N, H, W, C), float (N, C, H, W) in [0, 1], or grey (N, H, W), "
            f"got {x.dtype} of shape {shape}; convert it"
        )
    return x
