"""Markdown tables of the records of ``speed.py``: medians over the pairs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Record = Mapping[str, Any]

LOOPS = ("unlearn", "recover")


def _header(*names: str) -> str:
    return f"{_row(names)}\n{'|---' * len(names)}|"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_median = statistics.median


_LOOPS = _header(
    "network", "parameters", "GEMM, TFLOP/s", "unlearning: images/s, ours", "published", "ratio", "share of GEMM rate",
    "recovery: images/s, ours", "published", "ratio", "share of GEMM rate",
)  # fmt: skip
_WHOLE = _header(
    "network", "pairs", "repair, s", "published, s", "ratio", "without tests after passes", "ratio", "peak memory, MiB",
    "published", "scan, s", "both, s", "ASR before", "after", "one test, s", "scaled from a part",
    "of one image in",
)  # fmt: skip
_LARGE = _header("network", "parameters", "clean images", "limit, GiB", "peak, MiB", "s")


def render(records: Sequence[Record]) -> dict[str, str]:
    """The tables that there are records for, by the name of their markers."""
    loops = [record for record in records if record.get("loops")]
    whole = [record for record in records if record.get("whole")]
    large = [record for record in records if "memory" in record]
    tables = {
        "speed-loops": [_LOOPS, *map(_loop_row, loops)],
        "speed-whole": [_WHOLE, *map(_whole_row, whole)],
        "speed-large": [_LARGE, *map(_large_row, large)],
    }
    return {name: "\n".join(lines) for name, lines in tables.items() if len(lines) > 1}


def _loop_row(record: Record) -> str:
    rows = record["loops"]
    gemm = _median([max(row["gemm"].values()) for row in rows])
    cells = [record["name"], f"{record['parameters'] / 1e6:.1f} M", f"{gemm / 1e12:.2f}"]
    for loop in LOOPS:
        ours = [row["ours"][loop] for row in rows]
        share = _median([found["flops"] / max(row["gemm"].values()) for found, row in zip(ours, rows, strict=True)])
        theirs = [row["published"][loop]["images"] for row in rows if loop in row["published"]]
        ratios = [found["images"] / other for found, other in zip(ours, theirs, strict=False)]
        cells.append(f"{_median([found['images'] for found in ours]):.0f}")
        cells += [f"{_median(theirs):.0f}", f"{_median(ratios):.2f}"] if theirs else ["-", "-"]
        cells.append(f"{share:.0%}")
    return _row(cells)


def _whole_row(record: Record) -> str:
    before, ours, theirs = ([row[kind] for row in record["whole"]] for kind in ("before", "ours", "published"))
    seconds = [found["seconds"] for found in ours]
    cells = [record["name"], str(len(ours)), f"{_median(seconds):.0f}"]
    # A run that gave up, since its unlearning ended too early, says nothing of what the whole procedure takes.
    whole = [(here, found) for here, found in zip(seconds, theirs, strict=True) if not found["error"]]
    for name in ("seconds", "seconds_without_tests"):
        if not whole:
            cells += ["gave up", "-"]
            continue
        ratios = [found[name] / here for here, found in whole]
        cells += [f"{_median([found[name] for _, found in whole]):.0f}", f"{_median(ratios):.1f}"]
    cells += [str(max(found["peak_memory_mib"] for found in kind)) for kind in (ours, theirs)]
    cells.append(f"{record['scan']['seconds']:.0f}" if "scan" in record else "-")
    both = [found["seconds"] for found in record.get("together", [])]
    cells.append(f"{_median(both):.0f}" if both else "-")
    rates = before, [found["after"] for found in ours]
    cells += [f"{_median([rate['attack_success_rate'] for rate in kind]):.1%}" for kind in rates]
    test = record.get("test")
    cells += [f"{test[name]:.1f}" for name in ("seconds", "scaled_seconds")] if test else ["-", "-"]
    return _row([*cells, ", ".join(sorted({str(found["one_in"]) for found in theirs}))])


def _large_row(record: Record) -> str:
    cells = [record["name"], f"{record['parameters'] / 1e6:.1f} M", str(record["clean_images"])]
    return _row([*cells, f"{record['memory']:g}", str(record["peak_memory_mib"]), f"{record['seconds']:.0f}"])


def loop_line(row: Record) -> str:
    """One pair in words."""
    best = max(row["gemm"].values())
    parts = [f"GEMM {best / 1e9:.0f} GFLOP/s"]
    for kind in ("ours", "published"):
        for name, found in row[kind].items():
            parts.append(f"{kind} {name} {found['images']:.0f}/s ({found['flops'] / best:.0%})")
    return ", ".join(parts)


def whole_line(row: Record) -> str:
    """One pair in words."""
    ours, theirs = row["ours"], row["published"]
    return (
        f"ours {ours['seconds']:.0f} s ({ours['peak_memory_mib']} MiB, changed: {ours['changed']}), published "
        f"{theirs['seconds']:.0f} s ({theirs['peak_memory_mib']} MiB, error: {theirs['error']}), without tests "
        f"{theirs['seconds_without_tests']:.0f} s"
    )


def draw(records: Sequence[Record], path: Path) -> None:
    """Seconds of whole repairs, and images a second of the steps of learning, ours and published."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    whole = [record for record in records if record.get("whole")]
    bars = {
        "ours": ("ours", "seconds"),
        "published": ("published", "seconds"),
        "published, without tests after passes": ("published", "seconds_without_tests"),
    }
    _bars(left, whole, {label: _seconds(whole, *place) for label, place in bars.items()}, "seconds of a repair")
    loops = [record for record in records if record.get("loops")]
    rates = {f"{loop}, {kind}": _rates(loops, kind, loop) for loop in LOOPS for kind in ("ours", "published")}
    _bars(right, loops, rates, "images a second")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _seconds(records: Sequence[Record], kind: str, name: str) -> list[float]:
    """Medians; no number where every run gave up."""
    found = [[row[kind][name] for row in record["whole"] if not row[kind].get("error")] for record in records]
    return [_median(values) if values else float("nan") for values in found]


def _rates(records: Sequence[Record], kind: str, loop: str) -> list[float]:
    found = [[row[kind][loop]["images"] for row in record["loops"] if loop in row[kind]] for record in records]
    return [_median(values) if values else float("nan") for values in found]


def _bars(axes: Axes, records: Sequence[Record], series: Mapping[str, Sequence[float]], label: str) -> None:
    """One group a network, on a logarithmic scale, each bar with its number."""
    wide = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place + wide * (number - (len(series) - 1) / 2) for place in range(len(records))]
        found = axes.bar(places, values, wide, label=name)
        axes.bar_label(found, fmt=lambda value: f"{value:.0f}" if value == value else "", fontsize=6)
    axes.set_xticks(range(len(records)), [record["name"] for record in records], fontsize=7, rotation=15)
    axes.set(yscale="log", ylabel=label, xlim=(-0.5, len(records) - 0.5))
    axes.margins(y=0.1)
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
