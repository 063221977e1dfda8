"""What the records of a bench come to: one row a defence, on the cells that all of them have."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from debackdoor.errors import DebackdoorError

Record = Mapping[str, Any]
Place = tuple[str, int, int]
"""What a defence was tried on: model, seed and number of clean images."""


@dataclass(frozen=True)
class Row:
    """One defence; rates are fractions, means over the compared cells unless said otherwise.

    Attributes:
        defense: its name.
        blind: whether the clean set alone set how far it goes.
        cells: how many of backdoored models are compared.
        der_mean, der_spread, der_worst: mean, standard deviation and lowest of the DER.
        worst_model: whose the lowest is.
        accuracy_lost: clean accuracy before less that after.
        attack_success_rate: after the defence.
        attack_success_rate_tuned: after the fine-tuning that followed it; None where that was not measured.
        robust_accuracy: after the defence.
        seconds: of a repair.
        peak_memory_mib: the highest of all.
        accuracy_lost_clean: the accuracy that clean models lose; None where none is compared.
        failed: how many cells of this defence ended with an error, compared or not.
    """

    defense: str
    blind: bool
    cells: int
    der_mean: float
    der_spread: float
    der_worst: float
    worst_model: str
    accuracy_lost: float
    attack_success_rate: float
    attack_success_rate_tuned: float | None
    robust_accuracy: float
    seconds: float
    peak_memory_mib: int
    accuracy_lost_clean: float | None
    failed: int


@dataclass(frozen=True)
class Comparison:
    """Defences side by side.

    Attributes:
        rows: by mean DER, the highest first.
        shared: the backdoored models, seeds and numbers of clean images that every defence has.
        shared_clean: the same of clean models.
        left_out: how many finished cells are not compared, since not every defence has theirs.
        failed: how many cells ended with an error.
        devices: what the compared cells were computed on.
        records: all of them.
    """

    rows: tuple[Row, ...]
    shared: frozenset[Place]
    shared_clean: frozenset[Place]
    left_out: int
    failed: int
    devices: tuple[str, ...]
    records: Sequence[Record]

    @property
    def note(self) -> str:
        """What is compared and what is not, in a few sentences."""
        models = len({place[0] for place in self.shared})
        seeds = len({place[1] for place in self.shared})
        numbers = " or ".join(str(number) for number in sorted({place[2] for place in self.shared}))
        said = (
            f"{len(self.rows)} defences on {_count(len(self.shared), 'cell')} each: "
            f"{_count(models, 'backdoored model')}, {_count(seeds, 'seed')}, {numbers} clean images."
        )
        if self.left_out:
            said += f" {_count(self.left_out, 'cell')} left out, since not all of the defences have them."
        if self.failed:
            said += f" {_count(self.failed, 'cell')} failed and left out."
        if len(self.devices) > 1:
            said += f" Seconds and memory are those of {' and '.join(self.devices)}: compare them on one alone."
        if not all(row.blind for row in self.rows):
            said += " Not blind: how far the method goes was published with it, not chosen on the clean images."
        return said


def compare(records: Sequence[Record], defenses: Iterable[str] = ()) -> Comparison:
    """Ranks defences by their mean DER on the cells that all of them have.

    Args:
        records: of any number of defences.
        defenses: which to compare; without any, all.

    Raises:
        DebackdoorError: if there is no record of one of the defences, or no cell that all have, or records of one
            model or one defence are of different weights or settings.
    """
    by_defense: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_defense[record["defense"]].append(record)
    for name in (wanted := list(dict.fromkeys(defenses)) or sorted(by_defense)):
        if name not in by_defense:
            known = ", ".join(sorted(by_defense)) or "none"
            raise DebackdoorError(f"expected defences out of {known}, got {name!r}; choose of them")
    chosen = {name: by_defense[name] for name in wanted}
    _check_alike([record for found in chosen.values() for record in found])
    finished = [record for rows in chosen.values() for record in rows if record["error"] is None]
    shared = _shared(chosen, lambda record: record["der"] is not None)
    if not shared:
        raise DebackdoorError(
            f"expected a backdoored model, seed and number of clean images that all of {', '.join(chosen)} were tried "
            "on, got none; measure more cells, or compare fewer with --defense"
        )
    shared_clean = _shared(chosen, lambda record: record["der"] is None)
    rows = [_row(name, found, shared, shared_clean) for name, found in chosen.items()]
    everything = [record for found in chosen.values() for record in found]
    return Comparison(
        rows=tuple(sorted(rows, key=lambda row: (-row.der_mean, -row.der_worst, row.defense))),
        shared=shared,
        shared_clean=shared_clean,
        left_out=len(finished) - len(chosen) * (len(shared) + len(shared_clean)),
        failed=len(everything) - len(finished),
        devices=_devices(record for record in finished if place_of(record) in shared | shared_clean),
        records=everything,
    )


def _check_alike(records: Iterable[Record]) -> None:
    """Checks that what has one name is one thing, as far as the records say."""
    first: dict[tuple[str, str], object] = {}
    for record in records:
        for kind, value in (("model", "sha256"), ("defense", "defense_parameters")):
            found, name = record.get(value), record[kind]
            if found is not None and first.setdefault((kind, name), found) != found:
                raise DebackdoorError(
                    f"expected records of one {kind} {name}, got two of different {value}; measure one of them again, "
                    "or give it a folder of its own"
                )


def place_of(record: Record) -> Place:
    """The model, seed and number of clean images of a record."""
    return record["model"], record["seed"], record["clean_images"]


def _devices(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(sorted({record.get("device") or "an unnamed device" for record in records}))


def _shared(chosen: Mapping[str, Sequence[Record]], wanted: Callable[[Record], bool]) -> frozenset[Place]:
    places = [
        frozenset(place_of(record) for record in found if record["error"] is None and wanted(record))
        for found in chosen.values()
    ]
    return frozenset.intersection(*places) if places else frozenset()


def _row(name: str, found: Sequence[Record], shared: frozenset[Place], shared_clean: frozenset[Place]) -> Row:
    used = [record for record in found if record["error"] is None and place_of(record) in shared]
    clean = [record for record in found if record["error"] is None and place_of(record) in shared_clean]
    ders = [record["der"] for record in used]
    worst = min(used, key=lambda record: (record["der"], place_of(record)))
    return Row(
        defense=name,
        blind=all(record["blind"] for record in found),
        cells=len(used),
        der_mean=statistics.fmean(ders),
        der_spread=statistics.pstdev(ders),
        der_worst=worst["der"],
        worst_model=worst["model"],
        accuracy_lost=statistics.fmean(map(accuracy_lost, used)),
        attack_success_rate=statistics.fmean(record["attack_success_rate"]["after"] for record in used),
        attack_success_rate_tuned=_tuned(used),
        robust_accuracy=statistics.fmean(record["robust_accuracy"]["after"] for record in used),
        seconds=statistics.fmean(record["seconds"] for record in used),
        peak_memory_mib=max(record["peak_memory_mib"] for record in used),
        accuracy_lost_clean=statistics.fmean(map(accuracy_lost, clean)) if clean else None,
        failed=sum(record["error"] is not None for record in found),
    )


def _tuned(records: Sequence[Record]) -> float | None:
    """The mean ASR after fine-tuning; models that a defence left alone are not tuned, and stay as they are."""
    rates = [record["attack_success_rate"] for record in records]
    lacking = any(record.get("changed") and "fine_tuned" not in record["attack_success_rate"] for record in records)
    if lacking or not any("fine_tuned" in rate for rate in rates):
        return None
    return statistics.fmean(rate.get("fine_tuned", rate["after"]) for rate in rates)


def accuracy_lost(record: Record) -> float:
    """Clean accuracy before less that after, a fraction; below 0 where it rose."""
    return float(record["clean_accuracy"]["before"] - record["clean_accuracy"]["after"])


_HEADINGS = (
    "defence",
    "blind",
    "cells",
    "DER mean",
    "spread",
    "worst",
    "on",
    "CA lost",
    "ASR",
    "ASR, tuned",
    "RA",
    "seconds",
    "peak MiB",
    "CA lost, clean models",
    "failed",
)


def to_markdown(comparison: Comparison) -> str:
    """A table with the best defence first, rates in percent, and what it compares."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    lines += ["| " + " | ".join(in_words(row).values()) + " |" for row in comparison.rows]
    return "\n".join([*lines, "", comparison.note])


def in_words(row: Row) -> dict[str, str]:
    """A row's cells as they are shown, by their headings."""
    cells = [
        row.defense,
        "yes" if row.blind else "no",
        str(row.cells),
        *(f"{value:.3f}" for value in (row.der_mean, row.der_spread, row.der_worst)),
        row.worst_model,
        points(row.accuracy_lost),
        points(row.attack_success_rate),
        "-" if row.attack_success_rate_tuned is None else points(row.attack_success_rate_tuned),
        points(row.robust_accuracy),
        f"{row.seconds:.1f}",
        str(row.peak_memory_mib),
        "-" if row.accuracy_lost_clean is None else points(row.accuracy_lost_clean),
        str(row.failed),
    ]
    return dict(zip(_HEADINGS, cells, strict=True))


def to_csv(comparison: Comparison) -> str:
    """The same rows with all digits, rates as fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(item.name for item in fields(Row))
    for row in comparison.rows:
        writer.writerow("" if value is None else value for value in astuple(row))
    return text.getvalue()


def points(rate: float) -> str:
    """A fraction in percent, or a difference in points, without a minus before zero."""
    return f"{round(rate * 100, 1) + 0.0:.1f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
