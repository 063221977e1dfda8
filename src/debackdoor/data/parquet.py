"""Parquet files in the layout of Hugging Face image data sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from debackdoor.data.image import decode_image
from debackdoor.data.source import Images, ImageSource, Indices, reason
from debackdoor.errors import DataError


def find_parquet(folder: Path, split: str) -> list[Path]:
    """The ``train*.parquet`` or ``test*.parquet`` files of ``folder``; the other split's where one is absent."""
    found = {name: sorted(folder.glob(f"{name}*.parquet")) for name in ("train", "test")}
    return found[split] or found["train"] or found["test"]


def open_parquet(name: str, paths: Sequence[Path], labelled: bool = True) -> ImageSource:
    """The rows of parquet files with a column ``image`` (a struct with ``bytes``, or binary) and an integer ``label``.

    Class names come from the Hugging Face metadata of the first file's schema. Images are read one row group at a time.

    Raises:
        DataError: if a file cannot be read, or a column is missing, of another type, or has an empty entry.
    """
    labels = [_labels(path, labelled) for path in paths]
    starts = np.cumsum([0, *(len(part) for part in labels)])

    def images(indices: Indices) -> Images:
        for path, start, stop in zip(paths, starts, starts[1:], strict=False):
            mine = indices[(indices >= start) & (indices < stop)] - start
            if len(mine):
                yield from _images(path, mine)

    return ImageSource(name, np.concatenate(labels), images, _class_names(paths[0]))


def _labels(path: Path, labelled: bool) -> Indices:
    try:
        with pq.ParquetFile(path) as file:
            if not _check_columns(path, file.schema_arrow, labelled):
                return np.zeros(file.metadata.num_rows, dtype=np.int64)
            column = file.read(columns=["label"]).column("label")
        if column.null_count:
            row = column.is_null().to_numpy().argmax()
            raise DataError(f"{path} row {row}: expected an integer label, got an empty entry; fill or remove the row")
        return column.cast(pa.int64()).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _check_columns(path: Path, schema: pa.Schema, labelled: bool) -> bool:
    """Whether labels are to be read; where none are needed they may be missing, or of any type."""
    types = dict(zip(schema.names, schema.types, strict=True))
    wanted = ("image", "label") if labelled else ("image",)
    if not set(wanted) <= set(types):
        raise DataError(
            f"{path}: expected {'columns' if labelled else 'a column'} {' and '.join(wanted)}, "
            f"got {', '.join(types) or 'none'}; rename them"
        )
    if labelled and not pa.types.is_integer(types["label"]):
        raise DataError(f"{path}: expected integers in the column label, got {types['label']}; convert them")
    if not _is_binary(_bytes_type(types["image"])):
        raise DataError(
            f"{path}: expected the column image to hold encoded images (binary, or a struct with bytes), "
            f"got {types['image']}; store each image as PNG or JPEG bytes"
        )
    return labelled


def _bytes_type(image: pa.DataType) -> pa.DataType:
    if not pa.types.is_struct(image):
        return image
    return image.field("bytes").type if image.get_field_index("bytes") >= 0 else pa.null()


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _images(path: Path, rows: Indices) -> Images:
    try:
        with pq.ParquetFile(path) as file:
            start = 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                mine = rows[(rows >= start) & (rows < stop)]
                if len(mine):
                    column = file.read_row_group(group, columns=["image"]).column("image").take(mine - start)
                    for row, entry in zip(mine, column.to_pylist(), strict=True):
                        where = f"{path} row {row}"
                        data = entry["bytes"] if isinstance(entry, dict) else entry
                        if data is None:
                            raise DataError(
                                f"{where}: expected image bytes, got an empty entry; fill or remove the row"
                            )
                        yield where, decode_image(where, data)
                start = stop
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _class_names(path: Path) -> tuple[str, ...]:
    metadata = pq.read_schema(path).metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()  # other writers leave no names, or other things, there


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: expected a readable parquet file, got an error ({reason(error)}); check the file")
