"""One encoded image to pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from debackdoor.data.source import reason
from debackdoor.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"})
# A closed list: other Pillow decoders start outside programs (EPS) or are hardly ever used on images.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")


def decode_image(where: str, data: bytes) -> NDArray[np.uint8]:
    """An encoded image as (H, W, 3) uint8 RGB pixels; alpha is dropped, and of 16-bit colour the lower half.

    Raises:
        DataError: if ``data`` is no PNG, JPEG, BMP, WebP or PPM image, is damaged, or is grey of more than 8 bits.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged file can raise nearly anything inside a decoder
        got = "something else" if isinstance(error, UnidentifiedImageError) else f"an error ({reason(error)})"
        raise DataError(
            f"{where}: expected a readable PNG, JPEG, BMP, WebP or PPM image, got {got}; replace or remove it"
        ) from error
    if mode.startswith(("I", "F")):
        # Pillow clips such pixels at 255 where they should be scaled.
        raise DataError(f"{where}: expected 8 bits a channel, got Pillow mode {mode}; convert it to 8 bits")
    return pixels
