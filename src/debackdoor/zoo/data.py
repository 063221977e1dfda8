"""The images that a zoo's model is trained and measured on, and the hash that tells them from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from debackdoor.attacks.registry import count_classes
from debackdoor.data import check_test_set, load_dataset
from debackdoor.data.cifar import find_layout
from debackdoor.data.load import open_source
from debackdoor.data.named import FOLDERS, named_folder
from debackdoor.data.parquet import find_parquet
from debackdoor.errors import DataError
from debackdoor.types import CleanSet

_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Splits:
    """Both parts of a data set.

    Attributes:
        train: what models are trained on.
        test: what they are measured on, always whole.
        sha256: for ``train`` and ``test``, what :func:`data_sha256` gives.
    """

    train: CleanSet
    test: CleanSet
    sha256: Mapping[str, str]


def load_splits(dataset: str, limit: int | None = None) -> Splits:
    """Loads a data set in any form that ``load_dataset`` takes, its training part down to ``limit`` images.

    Raises:
        DataError: if it cannot be read, has one part alone, or test images are of classes that the training images
            have not.
    """
    check_apart(dataset, dataset)
    train, test = load_dataset(dataset, "train", limit), load_dataset(dataset, "test")
    check_test_set(test, train, count_classes(train))
    hashes = {name: data_sha256(dataset, name, images) for name, images in (("train", train), ("test", test))}
    if hashes["train"] == hashes["test"]:
        raise _one_part(dataset)
    return Splits(train, test, hashes)


def check_apart(train: str, test: str) -> None:
    """Checks that images to train on and to measure on are not read from the same files.

    Raises:
        DataError: if they are, or either cannot be read.
    """
    if "digits" not in (train, test) and _own_files(train, "train") == _own_files(test, "test"):
        raise _one_part(test)


def _one_part(dataset: str) -> DataError:
    return DataError(
        f"{dataset}: expected a training and a test part, got the same images for both; give a folder with train and "
        "test in it, or a test set of its own"
    )


def data_sha256(dataset: str, split: str, images: CleanSet) -> str:
    """The SHA-256 of a split's files, one after the other in the order of their names; one file's is its own.

    The digits and folders of pictures have no such files; there it is that of the images and labels that were loaded.

    Raises:
        DataError: if a file cannot be read.
    """
    of_files = files_sha256(dataset, split)
    if of_files is not None:
        return of_files
    digest = hashlib.sha256()
    for values in (images.x, images.y):
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def files_sha256(dataset: str, split: str) -> str | None:
    """The part of :func:`data_sha256` that needs no images; None where there are no such files."""
    files = _files(dataset, split)
    if not files:
        return None
    digest = hashlib.sha256()
    try:
        for path in files:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check the data set") from error
    return digest.hexdigest()


def _own_files(dataset: str, split: str) -> list[Path]:
    """The files that a split is read from, pictures included."""
    files = _files(dataset, split) or list(open_source(dataset, split).files or ())
    return [path.resolve() for path in files]


def _files(dataset: str, split: str) -> list[Path]:
    if dataset == "digits":
        return []
    path = named_folder(dataset) if dataset in FOLDERS else Path(dataset)
    if path.is_file():
        return [path]
    layout = find_layout(path)
    return find_parquet(path, split) if layout is None else [path / file for file in layout.files[split]]
