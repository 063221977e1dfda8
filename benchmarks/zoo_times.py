"""How long the zoo's models take to be scanned and repaired, from the records of ``scan_and_repair_zoo.py``.

    python benchmarks/zoo_times.py benchmarks/results/repair --into docs/performance.md

One look at a model serves both, so that both together take less than the sum.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from publish import replace_between

HEAD = (
    "| network | data | models | scan, s | repair, s | both, s | longest | on |",
    "|---|---|---|---|---|---|---|---|",
)


def main(
    results: Annotated[Path, typer.Argument(help="folder of the repairs' records")],
    into: Annotated[Path, typer.Option(help="page whose table between the markers is replaced")],
) -> None:
    """A Markdown table with a row a network."""
    replace_between(into, "zoo-times", render(timed(results)))


def timed(results: Path) -> list[dict[str, Any]]:
    """The records of repairs that were made together with a scan: those of backdoored models, once each."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*-seed0-n500.json"))]
    return [record for record in found if "with_scan" in record and record["der"] is not None]


def render(records: Sequence[dict[str, Any]]) -> str:
    """Medians over the models of a network, and the model that took longest."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["arch"], record["dataset"]].append(record)
    lines = list(HEAD)
    for (arch, dataset), rows in sorted(groups.items()):
        slowest = max(rows, key=lambda row: row["with_scan"]["seconds"])
        seconds = [(row["with_scan"]["scan_seconds"], row["seconds"], row["with_scan"]["seconds"]) for row in rows]
        medians = [f"{median(column):.0f}" for column in zip(*seconds, strict=True)]
        cells = [arch, dataset, str(len(rows)), *medians, f"{slowest['with_scan']['seconds']:.0f}", slowest["model"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
