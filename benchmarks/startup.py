"""How long the command line takes until it has said what it can do.

    python benchmarks/startup.py --out benchmarks/results/startup.json --into docs/performance.md

Each help page is asked for in a process of its own, turn by turn; the first turn, which reads files from the disk, is
left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from publish import commit, replace_between

from debackdoor.files import atomic_write_text
from debackdoor.runtime import versions

SCHEMA = "debackdoor/startup/1"
PAGES = ((), ("scan",), ("repair",), ("bench", "run"))


def main(
    out: Annotated[Path, typer.Option(help="the record")],
    into: Annotated[Path, typer.Option(help="page whose table between the markers is replaced")],
    times: Annotated[int, typer.Option(help="how often each is asked for", min=1)] = 11,
) -> None:
    """Times the help pages, writes one record and its table."""
    seconds: dict[str, list[float]] = {"debackdoor " + " ".join((*page, "--help")): [] for page in PAGES}
    for turn in range(times + 1):
        for page, found in zip(PAGES, seconds.values(), strict=True):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "debackdoor", *page, "--help"], stdout=subprocess.DEVNULL, check=True)
            if turn > 0:
                found.append(time.perf_counter() - started)
    record = {"schema": SCHEMA, "seconds": seconds, "versions": versions(), "commit": commit()}
    atomic_write_text(out, json.dumps(record, indent=1) + "\n")
    replace_between(into, "startup", render(record))


def render(record: dict[str, Any]) -> str:
    """A Markdown table with a row a help page."""
    lines = ["| command | median, s | worst, s | times |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {median(found):.2f} | {max(found):.2f} | {len(found)} |"
        for name, found in record["seconds"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
