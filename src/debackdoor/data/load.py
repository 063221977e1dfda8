"""From what a user names to a set of images."""

from __future__ import annotations

import os
from pathlib import Path

from debackdoor.data.cifar import find_layout, open_cifar
from debackdoor.data.digits import open_digits
from debackdoor.data.folder import open_flat, open_folder
from debackdoor.data.named import FOLDERS, named_folder
from debackdoor.data.npz import open_npz
from debackdoor.data.parquet import find_parquet, open_parquet
from debackdoor.data.sampling import balanced_sample
from debackdoor.data.source import ImageSource, read
from debackdoor.errors import DataError
from debackdoor.types import CleanSet


def load_clean(
    source: str | os.PathLike[str],
    limit: int | None = 500,
    seed: int = 0,
    split: str = "train",
    image_size: int | None = None,
) -> CleanSet:
    """The defender's clean set: a class-balanced, seeded sample of at most ``limit`` images.

    The same as :func:`load_dataset`, with a clean set's defaults.

    Example:
        >>> clean = load_clean("digits", limit=100)
        >>> clean.x.shape, clean.num_classes_seen
        (torch.Size([100, 3, 32, 32]), 10)
    """
    return load_dataset(source, split, limit, seed, image_size)


def load_dataset(
    source: str | os.PathLike[str],
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> CleanSet:
    """Images and labels from any form of DATA; only the images that are returned are decoded.

    Args:
        source: a folder of class sub-folders, a ``.parquet`` file or a folder of ``train*.parquet`` and
            ``test*.parquet`` files, an ``.npz`` file with ``x`` and ``y``, a ``cifar-10-batches-py`` or
            ``cifar-100-python`` folder, or the word ``digits``, ``cifar10`` or ``gtsrb`` (the last two are folders in
            the one that the environment variable ``DEBACKDOOR_DATA`` names). Write ``./digits`` for a folder of that
            name.
        split: ``train`` or ``test``; a source with a single split gives it for both.
        limit: at most this many images, class-balanced and in an order set by ``seed``; None takes all in the source's
            order.
        seed: of the sample, at least 0.
        image_size: resize every image to this many pixels each way (bilinear), or None to leave them as they are.

    Returns:
        A set with float32 images (N, 3, H, W) in [0, 1]; grey is repeated, alpha dropped.

    Raises:
        DataError: if the source is unknown, unreadable or malformed, its images differ in size and ``image_size`` is
            None, or an argument is out of range. The message names the file or row.
    """
    opened = open_source(source, split)
    check_size(image_size)
    return read(opened, balanced_sample(opened.labels, limit, seed), image_size)


def check_size(image_size: int | None) -> None:
    """Checks a size that images are to be brought to.

    Raises:
        DataError: if it is not a whole number of at least 1 pixel.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise DataError(
            f"expected image_size to be at least 1 pixel, got {image_size!r}; leave it out to keep the size"
        )


def open_source(source: str | os.PathLike[str], split: str, labelled: bool = True) -> ImageSource:
    """What a user names as DATA, its images not decoded yet.

    Args:
        source: as for :func:`load_dataset`.
        split: ``train`` or ``test``.
        labelled: whether labels are needed; without, they are all 0 where a file has none, and a folder is any folder
            with images in it or its sub-folders.

    Raises:
        DataError: if the source is unknown, unreadable or malformed.
    """
    if split not in ("train", "test"):
        raise DataError(f"expected split to be train or test, got {split!r}; choose one of the two")
    if not os.fspath(source):
        raise DataError("expected a folder, a file or a word for the images, got nothing; write . for this folder")
    try:
        return _open(source, split, labelled)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _open(source: str | os.PathLike[str], split: str, labelled: bool) -> ImageSource:
    name, path = str(source), Path(source)
    if source == "digits":
        return open_digits(name, split)
    if source in FOLDERS:
        path = named_folder(name)
    if path.is_dir():
        if layout := find_layout(path):
            return open_cifar(name, path, layout, split)
        if files := find_parquet(path, split):
            return open_parquet(name, files, labelled)
        return open_folder(name, path, split) if labelled else open_flat(name, path)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return open_parquet(name, [path], labelled)
    if path.is_file() and path.suffix.lower() == ".npz":
        return open_npz(name, path, labelled)
    got = "a file of another kind" if path.exists() else "a path that does not exist"
    words = ", ".join(("digits", *FOLDERS))
    raise DataError(
        f"{name}: expected a folder, a .parquet or .npz file, or one of the words {words}, got {got}; check the path"
    )
