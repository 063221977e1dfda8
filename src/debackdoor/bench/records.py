"""Reads the records of a bench."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from debackdoor.errors import DebackdoorError

SCHEMA = "debackdoor/bench/1"
RATES = ("clean_accuracy", "attack_success_rate", "robust_accuracy")

_NEEDED = (
    "model", "attack", "defense", "defense_parameters", "blind", "seed", "clean_images", *RATES, "der", "seconds",
    "peak_memory_mib",
)  # fmt: skip
_WHEN = ("before", "after")
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(("model", "attack", "defense"), ("text", (str,))),
    **dict.fromkeys(("seed", "clean_images"), ("a whole number", (int,))),
    "blind": ("true or false", (bool,)),
    "error": ("text or null", (str, type(None))),
}


def read_record(path: str | Path) -> dict[str, Any]:
    """One cell's record.

    Raises:
        DebackdoorError: if the file is missing, damaged, or no record of a bench.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DebackdoorError(f"{path}: expected a record, got none ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DebackdoorError(f"{path}: expected JSON, got something else or half a file; delete it") from error
    found = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if found != SCHEMA:
        raise DebackdoorError(f"{path}: expected schema {SCHEMA!r}, got {found!r}; move it out of the folder")
    missing = [name for name in (*_NEEDED, "error") if name not in record]
    if missing:
        raise DebackdoorError(f"{path}: expected the entry {missing[0]}, got none; delete it and measure again")
    for name in RATES:
        if not isinstance(record[name], dict) or not set(_WHEN) <= set(record[name]):
            raise DebackdoorError(f"{path}: expected {name} before and after, got {record[name]!r}; delete it")
    for name, (expected, kinds) in _KINDS.items():
        if not isinstance(record[name], kinds):
            raise DebackdoorError(f"{path}: expected {expected} for {name}, got {record[name]!r}; delete it")
    if record["error"] is None:
        _check_measured(path, record)
    return record


def _check_measured(path: str | Path, record: Mapping[str, Any]) -> None:
    """Whether the numbers are numbers; those of triggers are null where the model has none."""
    clean = record["der"] is None
    names = ("seconds", "peak_memory_mib") if clean else ("seconds", "peak_memory_mib", "der")
    rates = {f"{name} {when}": record[name][when] for name in RATES[: 1 if clean else 3] for when in _WHEN}
    for name, value in {**rates, **{name: record[name] for name in names}}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DebackdoorError(f"{path}: expected a number for {name}, got {value!r}; delete it and measure again")


def read_records(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """All records in the folders and the folders in them.

    Raises:
        DebackdoorError: if a folder is missing or has none, a file is no record, or a cell has two.
    """
    cells: dict[tuple[Any, ...], Path] = {}
    records = []
    for folder in map(Path, folders):
        paths = sorted(folder.rglob("*.json"))
        if not paths:
            raise DebackdoorError(f"{folder}: expected a folder with records, got none; make some with bench run")
        for path in paths:
            record = read_record(path)
            key = tuple(record[name] for name in ("model", "defense", "seed", "clean_images"))
            if key in cells:
                raise DebackdoorError(f"{path}: expected one record a cell, got another in {cells[key]}; leave one out")
            cells[key] = path
            records.append(record)
    return records


def as_read(value: object) -> Any:
    """What JSON makes of a value, such as lists of tuples."""
    return json.loads(json.dumps(value))
