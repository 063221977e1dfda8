"""The page of a comparison: the ranking, and the whole matrix of models and defences as a heat map."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from debackdoor import __version__
from debackdoor.bench.tables import Comparison, Record, accuracy_lost, in_words, place_of, points
from debackdoor.report.templates import template

_STEPS = 10
"""So many shades the heat map has above its lowest."""

_LIGHT = ("f0a58a", "f6f3ee", "93c6ee")
_DARK = ("80381b", "2a2f36", "135587")
"""The lowest shade, the one in the middle, and the highest; told apart by those who cannot tell red from green, too."""


@dataclass(frozen=True)
class _Square:
    """One model and one defence: means over what there is.

    Attributes:
        main: what is shown large.
        small: what is shown below it, line by line.
        value: what it is sorted by; None where nothing was measured.
        shade: 0 to 10, from bad to good; None for no colour.
        partial: whether a record of it is not part of the ranking.
    """

    main: str
    small: tuple[str, ...]
    value: float | None
    shade: int | None
    partial: bool = False


@dataclass(frozen=True)
class _Line:
    """One model of the matrix, and its squares in the order of the ranking."""

    model: str
    about: str
    squares: Sequence[_Square]


_EMPTY = _Square("-", ("not tried",), None, None)


def to_html(comparison: Comparison) -> str:
    """One self-contained page; its only script sorts the tables, and nothing has to be fetched.

    Raises:
        MissingDependencyError: if jinja2 does not import.
    """
    template, script = _template()
    defenses = [row.defense for row in comparison.rows]
    return template.render(
        note=comparison.note,
        ranking=[in_words(row) for row in comparison.rows],
        defenses=defenses,
        backdoored=_lines(comparison, defenses, clean=False),
        clean=_lines(comparison, defenses, clean=True),
        light=_colours(*_LIGHT),
        dark=_colours(*_DARK),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        version=__version__,
    )


def _lines(comparison: Comparison, defenses: Sequence[str], clean: bool) -> list[_Line]:
    found: dict[str, dict[str, list[Record]]] = {}
    for record in comparison.records:
        if (record["attack"] == "clean") == clean:
            found.setdefault(record["model"], {}).setdefault(record["defense"], []).append(record)
    shared = comparison.shared_clean if clean else comparison.shared
    lines = []
    for model, by_defense in sorted(found.items()):
        first = next(iter(by_defense.values()))[0]
        about = f"{first['attack']}, {first.get('dataset', '-')}, {first.get('arch', '-')}"
        squares = [_square(by_defense.get(name, ()), shared, clean) for name in defenses]
        lines.append(_Line(model, about, squares))
    return lines


def _square(records: Sequence[Record], shared: frozenset[Any], clean: bool) -> _Square:
    good = [record for record in records if record["error"] is None]
    if not good:
        return _Square("failed", (records[0]["error"],), None, None, partial=True) if records else _EMPTY
    partial = len(good) < len(records) or any(place_of(record) not in shared for record in good)
    lost = statistics.fmean(map(accuracy_lost, good))
    if clean:
        # Five points lost are as bad as it gets here.
        return _Square(points(lost), (_times(good),), -lost, _shade(1 - lost / 0.05), partial)
    der = statistics.fmean(record["der"] for record in good)
    success = statistics.fmean(record["attack_success_rate"]["after"] for record in good)
    small = (f"ASR {points(success)}", f"CA lost {points(lost)}")
    return _Square(f"{der:.3f}", small, der, _shade(2 * der - 1), partial)


def _times(records: Sequence[Record]) -> str:
    changed = sum(bool(record.get("changed")) for record in records)
    return f"changed {changed} of {len(records)}"


def _shade(share: float) -> int:
    """The shade of a share from 0, bad, to 1, good."""
    return round(_STEPS * min(1.0, max(0.0, share)))


def _colours(low: str, middle: str, high: str) -> list[str]:
    """All shades as #rrggbb, evenly from the lowest over the middle to the highest."""
    half = _STEPS / 2
    colours = []
    for shade in range(_STEPS + 1):
        end, share = (high if shade > half else low), abs(shade - half) / half
        mixed = (
            share * one + (1 - share) * other
            for one, other in zip(bytes.fromhex(end), bytes.fromhex(middle), strict=True)
        )
        colours.append("#" + bytes(map(round, mixed)).hex())
    return colours


def check_libraries() -> None:
    """Checks, before any work, that what a page is made with is there.

    Raises:
        MissingDependencyError: if jinja2 does not import.
    """
    _template()


def _template() -> tuple[Any, Any]:
    page = template("debackdoor.bench", "matrix.html.jinja", extra="bench")
    import markupsafe  # a part of jinja2

    script = (files("debackdoor.bench") / "sort.js").read_text(encoding="utf-8")
    return page, markupsafe.Markup(script)
