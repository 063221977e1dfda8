"""Small image files with known pixels, for the tests of every reader."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from debackdoor.errors import DataError
from debackdoor.types import CleanSet


def png(value: int | tuple[int, ...], size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root: Path, classes: dict[str, int]) -> Path:
    """Class folders whose image i of class c is one flat colour: red 10 * c + i, in the order of ``classes``."""
    for c, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(png((10 * c + i, 0, 0)))
    return root


def make_parquet(path: Path, labels: list[int], names: list[str] | None = None, **options: object) -> Path:
    """Image i is flat red i."""
    rows = [{"bytes": png((i, 0, 0)), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, **options)
    return path


def reds(clean: CleanSet) -> list[int]:
    """The flat red of every image, 0 to 255."""
    return [round(value * 255) for value in clean.x[:, 0, 0, 0].tolist()]


def one_sentence(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "; " in message or "check" in message, f"says nothing to do: {message}"
    return message


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))
