"""A pile of images to judge, labelled or not; labels are passed over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from debackdoor.data.load import check_size, open_source
from debackdoor.data.named import FOLDERS, named_folder
from debackdoor.data.source import read
from debackdoor.errors import DataError
from debackdoor.files import new_folder


@dataclass(frozen=True)
class Pile:
    """Images and what they are called.

    Attributes:
        x: float32 (N, 3, H, W) in [0, 1].
        names: one an image: its path below the folder, or ``row`` and its number.
        folder: where the image files are, or None where the images came from one file.
    """

    x: Tensor
    names: tuple[str, ...]
    folder: Path | None


def load_pile(source: str | os.PathLike[str], split: str = "train", image_size: int | None = None) -> Pile:
    """All images of any form of DATA, in the source's order, whether it has labels or not.

    Of a folder, that is every image in it and its sub-folders; of an ``.npz`` file ``x`` alone, of a ``.parquet`` file
    the column ``image``.

    Args:
        source: as for :func:`~debackdoor.data.load.load_dataset`.
        split: ``train`` or ``test``, where the source has both.
        image_size: resize every image to this many pixels each way, or None to leave them as they are.

    Raises:
        DataError: if the source is unknown, unreadable or malformed, its images differ in size and ``image_size`` is
            None, or an argument is out of range.
    """
    opened = open_source(source, split, labelled=False)
    check_size(image_size)
    images = read(opened, np.arange(len(opened.labels)), image_size)
    files = opened.files
    if files is None:
        return Pile(images.x, tuple(f"row {row}" for row in range(len(images))), None)
    folder = named_folder(str(source)) if source in FOLDERS else Path(source)
    return Pile(images.x, tuple(str(file.relative_to(folder)) for file in files), folder)


def write_images(pile: Pile, chosen: Tensor, out: Path) -> None:
    """Writes the chosen images into ``out``: copies of their files where there are any, else PNG files.

    All of them are there, or none: the folder gets its name when it is complete.

    Args:
        pile: what to choose from.
        chosen: bool (N,).
        out: a folder that does not exist yet, or is empty.

    Raises:
        DataError: if the folder has something in it already, or a file cannot be written.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out}: expected an empty folder or none, got one with files in it; give another")
        with new_folder(out) as folder:
            for index in chosen.nonzero()[:, 0].tolist():
                _write_image(pile, index, folder)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); check the folder and the disk"
        ) from error


def _write_image(pile: Pile, index: int, folder: Path) -> None:
    name = pile.names[index]
    if pile.folder is None:
        _to_picture(pile.x[index]).save(folder / f"{name.replace(' ', '-')}.png")
        return
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((pile.folder / name).read_bytes())


def _to_picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
