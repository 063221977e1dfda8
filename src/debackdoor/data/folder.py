"""A folder with one sub-folder a class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from debackdoor.data.image import SUFFIXES, decode_image
from debackdoor.data.source import Images, ImageSource, Indices
from debackdoor.errors import DataError


def open_folder(name: str, path: Path, split: str) -> ImageSource:
    """The images in the class sub-folders of ``path``.

    Classes are numbered in the order of their names; where all names are whole numbers, each name is its class's label.
    Where the only sub-folders are ``train`` and ``test`` (or one of them), the classes are looked for inside.
    Hidden files and files without an image's suffix are passed over.

    Raises:
        DataError: if there are no class sub-folders, one has no images, or two stand for the same number.
    """
    classes = _subfolders(path)
    if classes and {folder.name for folder in classes} <= {"train", "test"}:
        chosen = next((folder for folder in classes if folder.name == split), classes[0])
        path, classes = chosen, _subfolders(chosen)
    if not classes:
        raise DataError(f"{path}: expected one sub-folder a class, got none; put each class's images in its own folder")
    numbered = _labels(path, classes)
    files, labels = [], []
    for folder, label in zip(classes, numbered, strict=True):
        found = sorted(file for file in _visible(folder) if file.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(
                f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}) in a class folder, got none; "
                "add some or remove the folder"
            )
        files += found
        labels += [label] * len(found)

    # A number says no more about its class than the label does.
    names = () if _numeric(classes) else tuple(folder.name for folder in classes)
    return _source(name, files, np.array(labels, dtype=np.int64), names)


def open_flat(name: str, path: Path) -> ImageSource:
    """Every image in ``path`` and its sub-folders, linked ones included, without labels.

    Raises:
        DataError: if there are none, or a sub-folder cannot be read.
    """
    files = sorted(file for file in _files_below(path) if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{path}: expected images ({', '.join(sorted(SUFFIXES))}), got none; check the path")
    return _source(name, files, np.zeros(len(files), dtype=np.int64))


def _source(name: str, files: list[Path], labels: Indices, names: tuple[str, ...] = ()) -> ImageSource:
    def images(indices: Indices) -> Images:
        for index in indices:
            where = str(files[index])
            try:
                data = files[index].read_bytes()
            except OSError as error:
                raise DataError(f"{where}: cannot be read ({error.strerror}); check the file") from error
            yield where, decode_image(where, data)

    return ImageSource(name, labels, images, names, tuple(files))


def _files_below(path: Path) -> Iterator[Path]:
    """The files in a folder and its sub-folders, but for hidden ones."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check the folder") from error

    entered: set[str] = set()
    for here, folders, files in os.walk(path, onerror=fail, followlinks=True):
        # Links last, so that what they lead to is listed by its own name; one may lead back to where it lies.
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(here, name)), name),
        )
        if (place := os.path.realpath(here)) in entered:
            folders.clear()
            continue
        entered.add(place)
        yield from (Path(here, name) for name in files if not name.startswith("."))


def _visible(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(".")]


def _subfolders(path: Path) -> list[Path]:
    return sorted((entry for entry in _visible(path) if entry.is_dir()), key=lambda entry: entry.name)


def _numeric(classes: list[Path]) -> bool:
    return all(folder.name.isdecimal() for folder in classes)


def _labels(path: Path, classes: list[Path]) -> list[int]:
    """Sorts ``classes`` into label order in place and returns one label each."""
    if not _numeric(classes):
        return list(range(len(classes)))
    classes.sort(key=lambda folder: (int(folder.name), folder.name))
    labels = [int(folder.name) for folder in classes]
    for folder, label, following in zip(classes, labels, labels[1:], strict=False):
        if label == following:
            raise DataError(f"{path}: expected one folder a class, got two for class {label}; rename {folder.name}")
    if labels[-1] > np.iinfo(np.int64).max:
        raise DataError(f"{path}: expected class numbers of 64 bits, got {labels[-1]}; rename the folder")
    return labels
