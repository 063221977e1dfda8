"""Tables and a figure of the records of ``scaling.py``, and the lines fitted to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

Record = Mapping[str, Any]

ACTIONS = ("scan", "repair")

WORKERS = (1, 10, 100)

MODELS = 10_000

FEWEST = 3
"""Points that a line is fitted to."""


@dataclass(frozen=True)
class Law:
    """Seconds as a line in what grows, and how well it fits.

    Attributes:
        fixed: seconds at zero.
        slope: seconds for one more.
        fit: the share of the variance that the line explains.
        exponent: of the power law through the points; at most 1 is at most linear.
    """

    fixed: float
    slope: float
    fit: float
    exponent: float


def law(x: Sequence[float], seconds: Sequence[float]) -> Law:
    """The line by least squares, and the power law by least squares of the logarithms."""
    slope, fixed = np.polyfit(x, seconds, 1)
    left = np.var(np.asarray(seconds) - (fixed + slope * np.asarray(x)))
    exponent = np.polyfit(np.log(x), np.log(seconds), 1)[0]
    return Law(float(fixed), float(slope), float(1 - left / np.var(seconds)), float(exponent))


def series(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The points of each series, in the order of what grows."""
    names = dict.fromkeys(record["grows"] for record in records)
    return {name: sorted((record for record in records if record["grows"] == name), key=size) for name in names}


def size(record: Record, name: str | None = None) -> float:
    """What grows, at this point; or something else that grows along."""
    return float(record[name or record["grows"]])


def render(records: Sequence[Record], workers: Record | None) -> dict[str, str]:
    """The tables by the name of their markers, of what was measured."""
    by_name = series(records)
    costs = ("scan, s", "images through it", "repair, s", "images through it")
    points = _header("network", "clean images", "parameters", "channels", "classes", *costs)
    points += [_point(record) for rows in by_name.values() for record in rows]
    laws = _header("grows", "scan: s", "fit", "exponent", "repair: s", "fit", "exponent")
    for name, rows in by_name.items():
        laws.append(_law(name, rows))
        if name == "parameters":  # channels grow with them
            laws.append(_law("channels", rows))
    tables = {"scaling-points": "\n".join(points), "scaling-laws": "\n".join(laws)}
    if "parameters" in by_name:
        tables["scaling-many"] = _many(by_name["parameters"])
    return tables if workers is None else tables | {"scaling-workers": _workers(workers)}


def _header(*names: str) -> list[str]:
    return [_row(names), "|---" * len(names) + "|"]


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _network(record: Record) -> str:
    return f"ResNet-18, width {record['width']}"


def _point(record: Record) -> str:
    cells = [_network(record), record["images"], f"{record['parameters']:,}", record["channels"]]
    cells.append(record["classes"] or 10)
    for action in ACTIONS:
        found = record[action]
        cells += [f"{found['seconds']:.0f}", f"{sum(found['images'].values()):,}"]
    return _row(cells)


def _law(name: str, rows: Sequence[Record]) -> str:
    cells = [name]
    if len(rows) < FEWEST:
        return _row([name, *["-"] * 3 * len(ACTIONS)])
    for action in ACTIONS:
        found = law([size(record, name) for record in rows], [record[action]["seconds"] for record in rows])
        cells += [f"{found.fixed:.1f} + {found.slope:.3g} x", f"{found.fit:.3f}", f"{found.exponent:.2f}"]
    return _row(cells)


def _many(rows: Sequence[Record]) -> str:
    lines = _header("network", "what", *(f"{count} workers" for count in WORKERS))
    for record in rows:
        for action in ACTIONS:
            hours = MODELS * record[action]["seconds"] / 3600
            lines.append(_row([_network(record), action, *(f"{hours / count:,.1f} h" for count in WORKERS)]))
    return "\n".join(lines)


def _workers(found: Record) -> str:
    names = ("executor", "workers", "start, s", "an empty task, ms", f"{found['scans']} scans, s")
    lines = _header(*names, "times as fast as 1 worker")
    alone = {row["executor"]: row["scan_many_seconds"] for row in found["rows"] if row["workers"] == 1}
    for row in found["rows"]:
        seconds = row["scan_many_seconds"]
        cells = [row["executor"], row["workers"], f"{row['start_seconds']:.1f}", f"{row['task_seconds'] * 1000:.1f}"]
        lines.append(_row([*cells, f"{seconds:.0f}", f"{alone[row['executor']] / seconds:.2f}"]))
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path) -> None:
    """One panel a series: points, and the line fitted to them."""
    by_name = series(records)
    figure, panels = plt.subplots(1, len(by_name), figsize=(4 * len(by_name), 3.2), layout="constrained")
    for panel, (name, rows) in zip(np.atleast_1d(panels), by_name.items(), strict=True):
        x = np.array([size(record) for record in rows])
        for action in ACTIONS:
            seconds = [record[action]["seconds"] for record in rows]
            (line,) = panel.plot(x, seconds, "o", label=action)
            if len(rows) < FEWEST:
                continue
            found = law(x.tolist(), seconds)
            panel.plot(x, found.fixed + found.slope * x, color=line.get_color(), linewidth=1)
        panel.set(xlabel={"images": "clean images"}.get(name, name), ylabel="seconds", ylim=(0, None), xlim=(0, None))
    np.atleast_1d(panels)[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
