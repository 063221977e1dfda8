"""Measures the cells of a bench: finished ones are skipped, failed ones recorded with their error."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from debackdoor.bench.cells import Cell, Matrix
from debackdoor.bench.executors import Executor, Outcome, execute
from debackdoor.bench.measure import Record, Settings, commit, failed, measure
from debackdoor.bench.methods import METHODS
from debackdoor.bench.records import as_read, read_record
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write_text
from debackdoor.runtime import resolve_device
from debackdoor.zoo import Card

Measure = Callable[[Settings, Cell], dict[str, Any]]


@dataclass(frozen=True)
class Finished:
    """A cell of a bench that has its record.

    Attributes:
        cell: which.
        record: what was measured, or the error.
        number: how many cells have theirs, with this one.
        total: how many cells the bench has.
        kept: whether the record was there already.
    """

    cell: Cell
    record: Record
    number: int
    total: int
    kept: bool


def run(
    matrix: Matrix,
    out: str | Path,
    *,
    retry_failed: bool = False,
    device: str = "auto",
    fine_tune: bool = False,
    executor: Executor = "local",
    workers: int | None = 1,
    threads: int = 1,
    address: str | None = None,
    gpus: float = 0,
    measure: Measure = measure,
) -> Generator[Finished, None, None]:
    """Measures every cell of a matrix that has no record in ``out`` yet, and yields all of them as they are ready.

    Args:
        matrix: what to measure.
        out: the folder for the records, made where it is missing.
        retry_failed: whether cells whose record is an error are measured again.
        device, fine_tune: see ``Settings``; cells whose record lacks what is to be fine-tuned are measured again.
        executor, workers, threads, address, gpus: see ``execute``.
        measure: takes the settings and a cell to its record.

    Raises:
        DebackdoorError: before any work, if a name is unknown, or a record in ``out`` is damaged, or that of another
            model or other parameters.
    """
    if executor == "local":  # the machines of a cluster may have what this one has not
        resolve_device(device)
    settings = Settings(matrix.zoo.absolute(), device, fine_tune, commit())
    out = Path(out).absolute()
    cells, cards = matrix.cells(), {card.name: card for card in matrix.cards()}
    found = {cell: record for cell in cells if (record := _found(out, cell, cards[cell.model].sha256)) is not None}
    kept = {cell: record for cell, record in found.items() if not _wanting(record, retry_failed, fine_tune)}
    missing = [cell for cell in cells if cell not in kept]
    outcomes = execute(
        partial(_work, measure, settings, out),
        missing,
        executor=executor,
        workers=workers,
        threads=threads,
        address=address,
        gpus=gpus,
    )
    for cell in missing:
        (out / cell.file).parent.mkdir(parents=True, exist_ok=True)
    return _all(kept, outcomes, partial(_record_of, cards, settings, out), len(cells))


def _all(
    kept: dict[Cell, Record],
    outcomes: Generator[Outcome[Cell], None, None],
    record_of: Callable[[Outcome[Cell]], Record],
    total: int,
) -> Generator[Finished, None, None]:
    for number, (cell, record) in enumerate(kept.items(), 1):
        yield Finished(cell, record, number, total, kept=True)
    with contextlib.closing(outcomes):
        for number, outcome in enumerate(outcomes, len(kept) + 1):
            yield Finished(outcome.item, record_of(outcome), number, total, kept=False)


def _record_of(cards: Mapping[str, Card], settings: Settings, out: Path, outcome: Outcome[Cell]) -> Record:
    """What was measured, or the error; the latter is written unless there is a record of success, which is worth more.

    That may be by another run, by a process that was lost after writing it, or without what was to be added to it.
    """
    cell, error = outcome.item, outcome.error
    path = out / cell.file
    there = read_record(path) if path.exists() else None
    if there is not None and (error is None or not _wanting(there, True, settings.fine_tune)):
        return there
    missing = f"expected a record in {out}, got none; give a folder that all workers share"
    record = failed(cards[cell.model], cell, error or missing, settings.commit)
    if there is None or there["error"] is not None:
        with contextlib.suppress(OSError):  # it is told all the same, and the next run measures the cell again
            _write(path, record)
    return record


def _work(measure: Measure, settings: Settings, out: Path, cell: Cell) -> None:
    _write(out / cell.file, measure(settings, cell))


def _write(path: Path, record: Record) -> None:
    atomic_write_text(path, json.dumps(record, indent=1) + "\n")


def _found(out: Path, cell: Cell, sha256: str) -> Record | None:
    """The cell's record, if it has one.

    Raises:
        DebackdoorError: if it is damaged, or was made of another model or with other parameters.
    """
    path = out / cell.file
    if not path.exists():
        return None
    record = read_record(path)
    wanted = {**vars(cell), "sha256": sha256, "defense_parameters": as_read(METHODS[cell.defense].parameters)}
    for name, value in wanted.items():
        if record.get(name) != value:
            raise DebackdoorError(
                f"{path}: expected a record with {name} {value!r}, got one with {record.get(name)!r}; delete it, or "
                "give another folder"
            )
    return record


def _wanting(record: Record, retry_failed: bool, fine_tune: bool) -> bool:
    """Whether a cell is measured again: its record is an error, or lacks the rates after fine-tuning."""
    if record["error"] is not None:
        return retry_failed
    if "fine_tuning_error" in record:
        return fine_tune and retry_failed
    return fine_tune and record["changed"] and "fine_tuned" not in record["clean_accuracy"]


def failures(finished: Sequence[Finished]) -> list[Finished]:
    """Those whose record is an error."""
    return [item for item in finished if item.record["error"] is not None]
