"""Repairs victims that `debackdoor attack` made, once a seed; writes a run record of each repair and a table of all.

    python benchmarks/repair_victims.py run VICTIM... --data cifar10 --out benchmarks/results/repair-slim
    python benchmarks/repair_victims.py table benchmarks/results/repair-slim

The repair gets the model and the clean images alone; the trigger is used once, on the finished model.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import debackdoor as db
from debackdoor.attacks import load_trigger
from debackdoor.evaluation import Evaluation, accuracy, defence_effectiveness, evaluate
from debackdoor.files import atomic_write_text
from debackdoor.models import open_model
from debackdoor.runtime import versions
from debackdoor.types import CleanSet

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.command()
def run(
    victims: Annotated[list[Path], typer.Argument(help="folders that `debackdoor attack` wrote")],
    data: Annotated[str, typer.Option(help="where the clean images (train split) and test images come from")],
    out: Annotated[Path, typer.Option(help="folder for the records")],
    seeds: Annotated[int, typer.Option(help="repairs a victim")] = 3,
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
) -> None:
    """One record a victim and seed; finished ones are skipped."""
    test = db.load_clean(data, limit=None, split="test")
    out.mkdir(parents=True, exist_ok=True)
    for victim in victims:
        for seed in range(seeds):
            target = out / f"{victim.name}-seed{seed}-n{limit}.json"
            if not target.exists():
                clean = db.load_clean(data, limit=limit, seed=seed)
                record = measure(victim, clean, test, seed)
                atomic_write_text(target, json.dumps(record, indent=1) + "\n")
                typer.echo(row([record]))


def measure(victim: Path, clean: CleanSet, test: CleanSet, seed: int) -> dict[str, Any]:
    """Repairs one victim and measures it before and after."""
    made = json.loads((victim / "record.json").read_text())
    loaded = open_model(victim / "model.safetensors", made["arch"], mean=made["mean"], std=made["std"])
    started = time.perf_counter()
    result = db.repair(loaded.model, clean, seed=seed)
    seconds = time.perf_counter() - started
    before, after = (_rates(model, test, victim) for model in (loaded.model, result.model))
    return {
        "schema": "debackdoor/bench/1",
        "model": victim.name,
        "attack": made["attack"],
        "dataset": made["dataset"],
        "arch": made["arch"],
        "defense": "repair",
        "defense_parameters": {"budget": 0.02},
        "blind": True,
        "seed": seed,
        "clean_images": len(clean),
        **{
            rate: {"before": getattr(before, rate, None), "after": getattr(after, rate, None)}
            for rate in ("clean_accuracy", "attack_success_rate", "robust_accuracy")
        },
        "der": defence_effectiveness(before, after) if isinstance(before, Evaluation) else None,
        "seconds": round(seconds, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "changed": result.changed,
        "channels_pruned": len(result.plan),
        "steps": [asdict(step) for step in result.steps],
        "verification": None if result.verification is None else asdict(result.verification),
        "sha256": loaded.checkpoint.sha256,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "error": None,
    }


@dataclass(frozen=True)
class CleanRates:
    """What there is to measure of a model without a backdoor."""

    clean_accuracy: float


def _rates(model: torch.nn.Module, test: CleanSet, victim: Path) -> Evaluation | CleanRates:
    if (victim / "trigger").exists():
        return evaluate(model, test, load_trigger(victim / "trigger"))
    return CleanRates(accuracy(model, test))


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


@app.command()
def table(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[list[Path] | None, typer.Option(help="file whose table between the markers is replaced")] = None,
) -> None:
    """A Markdown table: means over the seeds, and the worst DER."""
    text = render(json.loads(path.read_text()) for path in sorted(records.glob("*.json")))
    if not into:
        typer.echo(text)
    for page in into or []:
        start, end = f"<!-- {records.name} -->", f"<!-- /{records.name} -->"
        head, _, rest = page.read_text().partition(start)
        _, found, tail = rest.partition(end)
        if not found:
            raise typer.BadParameter(f"{page}: expected a line '{start}' and a line '{end}', got none; add them")
        atomic_write_text(page, f"{head}{start}\n{text}\n{end}{tail}")


HEADER = """\
| victim | CA before | CA after | ASR before | ASR after | RA after | DER (worst) | channels pruned | seconds |
|---|---|---|---|---|---|---|---|---|"""


def render(records: Iterable[dict[str, Any]]) -> str:
    """The table of all records, one row a victim."""
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_model[record["model"]].append(record)
    return "\n".join([HEADER, *(row(rows) for rows in by_model.values())])


def row(records: Sequence[dict[str, Any]]) -> str:
    """One victim: means over its records, with the range where there are several."""

    def percent(rate: str, when: str) -> str:
        return _spread([record[rate][when] * 100 for record in records], 1)

    cells = [records[0]["model"], percent("clean_accuracy", "before"), percent("clean_accuracy", "after")]
    if records[0]["der"] is None:
        cells += ["-"] * 4
    else:
        ders = [record["der"] for record in records]
        cells += [percent("attack_success_rate", "before"), percent("attack_success_rate", "after")]
        cells += [percent("robust_accuracy", "after"), f"{statistics.mean(ders):.3f} ({min(ders):.3f})"]
    cells += [_spread([record["channels_pruned"] for record in records], 0)]
    cells += [_spread([record["seconds"] for record in records], 0)]
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    app()
