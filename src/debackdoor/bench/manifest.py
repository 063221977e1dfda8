"""Manifests for ``scan-many``: which checkpoints are scanned, and how each of them is read."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from debackdoor.data.named import FOLDERS
from debackdoor.errors import DataError

REQUIRED = ("path", "arch", "clean")
OPTIONAL = ("name", "num_classes", "mean", "std", "limit", "seed")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint to scan.

    Attributes:
        name: unique in its manifest, and the name of its record.
        path: of the checkpoint, absolute.
        arch: as ``open_model`` takes it; a path in it is absolute.
        clean: as ``load_clean`` takes it; absolute where it is a path.
        num_classes, mean, std: as ``open_model`` takes them.
        limit, seed: of this model alone; None takes those of all.
        as_given: ``path`` and ``arch`` as the manifest has them.
    """

    name: str
    path: str
    arch: str
    clean: str
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    limit: int | None = None
    seed: int | None = None
    as_given: tuple[str, str]


def read_manifest(path: str | Path) -> tuple[Entry, ...]:
    """The models in a ``.csv`` file with a header, or in a ``.parquet`` file; at least one.

    The columns ``path``, ``arch`` and ``clean`` are needed, those of :data:`OPTIONAL` are not, and others are passed
    over. Relative paths begin where the manifest is.

    Raises:
        DataError: if the file cannot be read, or is not as above. The message names the row, counted from 1 without
            the header, and the column.
    """
    path = Path(path)
    columns, rows = _read(path)
    _check_columns(path, columns)
    if not rows:
        raise DataError(f"{path}: expected at least one model, got none; add a row for each")
    folder = path.absolute().parent
    entries = tuple(_entry(f"{path} row {number}", row, folder) for number, row in enumerate(rows, 1))
    _check_names(path, entries)
    return entries


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of all columns, and the rows with those that are known."""
    kinds = {".csv": _read_csv, ".parquet": pq.read_table}
    read = kinds.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: expected a .csv or .parquet file, got another suffix; rename or convert it")
    if not path.is_file():
        got = "a folder or device" if path.exists() else "no such file"
        raise DataError(f"{path}: expected a manifest of models, got {got}; check the path")
    try:
        table = read(path)
        names = table.schema.names  # decoded here, not before
        known = [name for name in (*REQUIRED, *OPTIONAL) if names.count(name) == 1]
        return names, table.select(known).to_pylist()  # as are the cells
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        why = " ".join(why.split())[:200].rstrip(".")
        raise DataError(f"{path}: expected a manifest of models, got an error ({why}); check the file") from error


def _read_csv(path: Path) -> pa.Table:
    """Everything as text, so that a name such as 007 stays what it is."""
    kinds = dict.fromkeys((*REQUIRED, *OPTIONAL), pa.string())
    return pc.read_csv(
        path,
        parse_options=pc.ParseOptions(newlines_in_values=True),
        convert_options=pc.ConvertOptions(column_types=kinds),
    )


def _check_columns(path: Path, names: Sequence[str]) -> None:
    for name in (*REQUIRED, *OPTIONAL):
        if names.count(name) > 1:
            raise DataError(f"{path}: expected one column {name}, got {names.count(name)}; remove all but one")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise DataError(
            f"{path}: expected the columns {', '.join(REQUIRED)}, got no {missing[0]} among "
            f"{', '.join(names) or 'none'}; add it"
        )
    absent = [name for name in OPTIONAL if name not in names]
    for name in names:
        # Passed over, a misspelt column would change what is scanned without a word.
        close = difflib.get_close_matches(name.strip().lower(), absent, n=1, cutoff=0.75)
        if close and name not in REQUIRED + OPTIONAL:
            raise DataError(f"{path}: expected columns with known names, got {name!r}; did you mean {close[0]!r}?")


def _entry(where: str, row: Mapping[str, Any], folder: Path) -> Entry:
    def get(column: str, convert: Callable[[Any], Any], expected: str) -> Any:
        value = row.get(column)
        if value is None or (isinstance(value, str) and not value.strip()) or _is_nan(value):
            if column in REQUIRED:
                raise DataError(f"{where}, column {column}: expected {expected}, got nothing; fill it in")
            return None
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where}, column {column}: expected {expected}, got {value!r}; correct it") from error

    path = get("path", _text, "a checkpoint's path")
    arch = get("arch", _text, "an architecture such as resnet18")
    name = get("name", _name, "a name of letters, digits, - . and _, at most 100")
    mean = get("mean", _numbers, "numbers such as 0.49,0.48,0.45")
    std = get("std", _positive_numbers, "numbers above 0 such as 0.25,0.24,0.26")
    if (mean is None) != (std is None):
        absent = "mean" if mean is None else "std"
        raise DataError(f"{where}, column {absent}: expected mean and std together, got no {absent}; give both or none")
    if mean is not None and len(mean) != len(std):
        raise DataError(f"{where}, column std: expected {len(mean)} numbers as in mean, got {len(std)}; correct one")
    return Entry(
        name=name or _name_of(path),
        path=str(folder / path),
        arch=_arch(arch, folder),
        clean=_clean(get("clean", _text, "a folder or file of clean images, or a word such as digits"), folder),
        num_classes=get("num_classes", _whole(2), "a whole number of at least 2"),
        mean=mean,
        std=std,
        limit=get("limit", _whole(1), "a whole number of at least 1"),
        seed=get("seed", _whole(0, _LARGEST_SEED), f"a whole number from 0 to {_LARGEST_SEED}"),
        as_given=(path, arch),
    )


def _check_names(path: Path, entries: Sequence[Entry]) -> None:
    """Whether names differ, also where a file system does not tell a from A."""
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries, 1):
        first = seen.setdefault(entry.name.casefold(), number)
        if first != number:
            raise DataError(
                f"{path} row {number}, column name: expected a name of its own, got {entry.name!r} as in row {first}; "
                "rename one (without a name, it is that of the file)"
            )


def _is_nan(value: Any) -> bool:
    """Whether it is what some writers leave in place of no number."""
    return isinstance(value, float) and math.isnan(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value.strip()


def _name(value: Any) -> str:
    name = str(value).strip()
    if not _NAME.fullmatch(name):
        raise ValueError(name)
    return name


def _name_of(path: str) -> str:
    """The file's own name without its suffix, other characters replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).strip("-._")[:100]
    return name or "model"


def _whole(low: int, high: int | None = None) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        number = float(value)  # a column with gaps comes from pandas as 500.0
        if isinstance(value, bool) or not number.is_integer():
            raise ValueError(value)
        if number < low or (high is not None and number > high):
            raise ValueError(value)
        return int(number)

    return convert


def _numbers(value: Any) -> tuple[float, ...]:
    """From ``0.49,0.48,0.45``, the same with spaces, a list, or one number."""
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    numbers = tuple(float(part) for part in (parts if isinstance(parts, list) else [parts]))
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(value)
    return numbers


def _positive_numbers(value: Any) -> tuple[float, ...]:
    numbers = _numbers(value)
    if min(numbers) <= 0:
        raise ValueError(value)
    return numbers


def _arch(arch: str, folder: Path) -> str:
    """The same with the path of ``file.py:factory`` or ``hf:DIR`` absolute."""
    source, colon, rest = arch.partition(":")
    if colon and source == "hf":
        return f"hf:{folder / rest}"
    place, colon, name = arch.rpartition(":")
    return f"{folder / place}:{name}" if colon and place.endswith(".py") else arch


def _clean(data: str, folder: Path) -> str:
    return data if data in ("digits", *FOLDERS) else str(folder / data)
