"""The matrix of defences on the slim zoo, from the records of ``bench run`` and of ``repair_zoo.py``.

    debackdoor bench run --out benchmarks/results/bench benchmarks/matrix.toml
    debackdoor bench run --out benchmarks/results/bench benchmarks/matrix-clean.toml
    python benchmarks/matrix.py benchmarks/results/repair benchmarks/results/bench --into docs/results.md \\
        --summary-into README.md --html docs/matrix.html

Clean models count with seed 0, for the accuracy that they lose, and nowhere else. The first table is of what worked
on every model, the second of all defences on the models that all of them took. A defence with fewer than ``--least``
cells is in neither of them nor on the page: one that has enough with seed 0 is in the third table, which is of that
seed alone, and any other is named.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from publish import replace_between

from debackdoor.bench.methods import METHODS
from debackdoor.bench.page import to_html
from debackdoor.bench.records import read_records
from debackdoor.bench.tables import Comparison, Row, compare, to_markdown
from debackdoor.files import atomic_write_text
from debackdoor.zoo import CLEAN

OURS = ("repair", "rnp")


def publish(
    folders: Annotated[list[Path], typer.Argument(help="folders of records")],
    into: Annotated[Path, typer.Option(help="page whose tables between the markers are replaced")],
    summary_into: Annotated[Path, typer.Option(help="page that gets the summary alone")],
    html: Annotated[Path, typer.Option(help="page with the whole matrix")],
    images: Annotated[int, typer.Option(help="clean images")] = 500,
    least: Annotated[int, typer.Option(help="cells that a defence must have, failed ones included")] = 40,
    least_once: Annotated[int, typer.Option(help="the same with seed 0, for the third table")] = 15,
) -> None:
    """Tables, the page, and a summary."""
    records = [
        record
        for record in read_records(folders)
        if record["clean_images"] == images and (record["attack"] != CLEAN or record["seed"] == 0)
    ]
    backdoored = [record for record in records if record["attack"] != CLEAN]
    cells = Counter(dict.fromkeys(METHODS.keys() - {"rnp"}, 0))  # whose records say repair
    cells.update(record["defense"] for record in backdoored)
    once = [record for record in backdoored if record["seed"] == 0]
    cells_once = Counter(record["defense"] for record in once)
    slow = [name for name, count in cells.items() if count < least and cells_once[name] >= least_once]
    few = {name: count for name, count in sorted(cells.items()) if count < least and name not in slow}
    failing = {record["defense"] for record in backdoored if record["error"] is not None}
    names = [name for name in cells if name not in few and name not in slow]
    everywhere = compare(records, [name for name in names if name not in failing])
    everything = compare(records, names)
    replace_between(into, "matrix", to_markdown(everywhere))
    replace_between(into, "matrix-all", to_markdown(everything))
    replace_between(into, "matrix-once", to_markdown(compare(once, [*names, *slow])) if slow else "none yet")
    replace_between(into, "matrix-few", ", ".join(f"{name}: {count}" for name, count in few.items()) or "none")
    replace_between(summary_into, "matrix-summary", summary(everywhere, everything))
    atomic_write_text(html, to_html(everything))


def summary(everywhere: Comparison, everything: Comparison) -> str:
    """Ours beside the best of the others."""
    said = []
    for found, where in (
        (everywhere, "that work on every model"),
        (everything, "some of which fail without batch normalisation"),
    ):
        ours = next(row for row in found.rows if row.defense in OURS)
        others = [row for row in found.rows if row.defense not in OURS]
        best, steady = max(others, key=lambda row: row.der_mean), max(others, key=lambda row: row.der_worst)
        said.append(
            f"Of {len(found.rows)} defences {where}, `{ours.defense}` has a mean DER of {ours.der_mean:.3f} and a "
            f"worst of {ours.der_worst:.3f}, over {ours.cells} cells (a model and a choice of clean images) of "
            f"{len({place[0] for place in found.shared})} models. The best other mean is that of {_in_words(best)}, "
            f"the best other worst cell that of {_in_words(steady)}."
        )
    return " ".join(said)


def _in_words(row: Row) -> str:
    return f"`{row.defense}` (mean {row.der_mean:.3f}, worst {row.der_worst:.3f})"


if __name__ == "__main__":
    typer.run(publish)
