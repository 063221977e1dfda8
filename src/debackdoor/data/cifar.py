"""The python batches of CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images").

These are pickles, which can run code when they are loaded. Here nothing of a pickle but numbers, text and containers
comes to life: its arrays become inert stand-ins, and every other name is refused.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from debackdoor.data.source import Images, ImageSource, Indices, reason
from debackdoor.errors import DataError


@dataclass(frozen=True)
class Layout:
    """The file names and keys of one of the two data sets."""

    files: dict[str, tuple[str, ...]]
    labels: str
    meta: str
    names: str


_CIFAR10 = Layout(
    {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    "labels",
    "batches.meta",
    "label_names",
)
_CIFAR100 = Layout({"train": ("train",), "test": ("test",)}, "fine_labels", "meta", "fine_label_names")


def find_layout(folder: Path) -> Layout | None:
    """Which of the two data sets ``folder`` holds, or None."""
    if any((folder / file).is_file() for file in ("data_batch_1", "test_batch", "batches.meta")):
        return _CIFAR10
    return _CIFAR100 if (folder / "meta").is_file() else None


def open_cifar(name: str, folder: Path, layout: Layout, split: str) -> ImageSource:
    """The images of one split, with class names where the meta file is present.

    Raises:
        DataError: if a batch is missing, damaged, not as published, or names anything that could run code.
    """
    batches = [_batch(folder / file, layout.labels) for file in layout.files[split]]
    pixels = np.concatenate([data for data, _ in batches])

    def images(indices: Indices) -> Images:
        return ((f"{folder} image {index}", pixels[index].transpose(1, 2, 0)) for index in indices)

    return ImageSource(name, np.concatenate([labels for _, labels in batches]), images, _class_names(folder, layout))


def _batch(path: Path, key: str) -> tuple[NDArray[np.uint8], Indices]:
    """The (N, 3, 32, 32) pixels and the labels of one batch."""
    content = _load(path)
    data, labels = content.get("data"), content.get(key)
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{path}: expected {key} to be a list of small integers; download the data set again")
    if not isinstance(data, _Array) or data.kind != b"u1" or len(data.raw) != 3072 * len(labels):
        raise DataError(f"{path}: expected data to be {len(labels)} rows of 3072 bytes; download the data set again")
    rows = np.frombuffer(data.raw, dtype=np.uint8).reshape(len(labels), 3072, order=data.order)
    return rows.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _class_names(folder: Path, layout: Layout) -> tuple[str, ...]:
    if not (folder / layout.meta).is_file():
        return ()
    names = _load(folder / layout.meta).get(layout.names)
    return tuple(_text(name) for name in names) if isinstance(names, list) else ()


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        return {_text(key): value for key, value in content.items()}
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected this file, got none; download the data set again") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{path}: expected a CIFAR batch, got an error ({reason(error)}); download the data set again"
        ) from error


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _bytes(value: object) -> bytes:
    """Python 2 strings arrive as bytes, Python 3 ones as text that stands for bytes."""
    if isinstance(value, str):
        return value.encode("latin1")
    if isinstance(value, bytes):
        return value
    raise TypeError(f"expected bytes, got {type(value).__name__}")


class _Kind:
    """Stands for ``numpy.dtype``: keeps the type's code."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = _bytes(code)

    def __setstate__(self, _: object) -> None:
        """The byte order, of no meaning for single bytes."""


class _Array:
    """Stands for ``numpy.ndarray`` and the function that rebuilds one: keeps the raw bytes, their type and order."""

    raw, kind = b"", b""
    order: Literal["C", "F"] = "C"

    def __init__(self, *_: object) -> None:
        """Everything of use comes with the state."""

    def __setstate__(self, state: tuple[object, object, _Kind, object, object]) -> None:
        _, _, kind, column_major, raw = state
        self.order = "F" if column_major else "C"
        self.kind, self.raw = kind.code, _bytes(raw)


class _Encoded:
    """Stands for ``_codecs.encode``, by which Python 3 writes bytes in old pickle protocols."""

    def __new__(cls, text: str, _: str) -> Any:
        return _bytes(text)

    def __setstate__(self, _: object) -> None:
        """Present so that a pickle cannot set attributes of this class."""


_ADMITTED: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _Encoded,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise DataError(
                f"expected plain arrays, got a pickle that asks for {module}.{name}; do not trust it"
            ) from None
