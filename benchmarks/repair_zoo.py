"""Repairs the zoo's models, once a seed; writes a run record of each repair and a table of all.

    python benchmarks/repair_zoo.py run --out benchmarks/results/repair
    python benchmarks/repair_zoo.py table benchmarks/results/repair --into docs/results.md --summary-into README.md

The repair gets the model and the clean images alone; the trigger is used once, on the finished model.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import debackdoor as db
from debackdoor.attacks import load_trigger
from debackdoor.evaluation import Evaluation, accuracy, defence_effectiveness, evaluate
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.runtime import versions
from debackdoor.types import CleanSet
from debackdoor.zoo import CLEAN, Card, list_cards, trigger_of, weights_of

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    names: Annotated[list[str] | None, typer.Argument(help="models of the zoo; by default all")] = None,
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="of the clean images and the repair")] = None,
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
) -> None:
    """One record a model and seed; finished ones are skipped."""
    out.mkdir(parents=True, exist_ok=True)
    for card in list_cards(zoo):
        for seed in (seeds or [0]) if not names or card.name in names else []:
            target = out / f"{card.name}-seed{seed}-n{limit}.json"
            if not target.exists():
                record = measure(card, zoo, seed, limit)
                atomic_write_text(target, json.dumps(record, indent=1) + "\n")
                typer.echo(row([record]))


def measure(card: Card, zoo: Path, seed: int, limit: int) -> dict[str, Any]:
    """Repairs one model and measures it before and after."""
    clean = db.load_clean(card.dataset, limit=limit, seed=seed)
    test = db.load_clean(card.dataset, limit=None, split="test")
    model = load_model(weights_of(zoo, card.name), card.arch)
    started = time.perf_counter()
    result = db.repair(model, clean, seed=seed)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    before, after = (_rates(found, test, card, zoo) for found in (model, result.model))
    return {
        "schema": "debackdoor/bench/1",
        "model": card.name,
        "attack": card.attack,
        "dataset": card.dataset,
        "arch": card.arch,
        "target": card.target,
        "mode": card.mode,
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
        "peak_memory_mib": peak,
        "changed": result.changed,
        "channels_pruned": len(result.plan),
        "steps": [asdict(step) for step in result.steps],
        "verification": None if result.verification is None else asdict(result.verification),
        "sha256": card.sha256,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "error": None,
    }


@dataclass(frozen=True)
class CleanRates:
    """What there is to measure of a model without a backdoor."""

    clean_accuracy: float


def _rates(model: torch.nn.Module, test: CleanSet, card: Card, zoo: Path) -> Evaluation | CleanRates:
    if card.attack == CLEAN:
        return CleanRates(accuracy(model, test))
    return evaluate(model, test, load_trigger(trigger_of(zoo, card.name)))


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


@app.command()
def table(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[Path | None, typer.Option(help="page whose table between the markers is replaced")] = None,
    summary_into: Annotated[Path | None, typer.Option(help="page that gets the summary alone")] = None,
) -> None:
    """A Markdown table: means over the seeds with their range, and what they come to together."""
    rows = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    if into is None:
        typer.echo(render(rows))
    else:
        _replace(into, records.name, render(rows))
    if summary_into is not None:
        _replace(summary_into, f"{records.name}-summary", summary(rows))


def _replace(page: Path, marker: str, text: str) -> None:
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = page.read_text().partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise typer.BadParameter(f"{page}: expected a line '{start}' and a line '{end}', got none; add them")
    atomic_write_text(page, f"{head}{start}\n{text}\n{end}{tail}")


HEADER = """\
| model | CA before | CA after | ASR before | ASR after | RA after | DER | label | check | pruned | seconds |
|---|---|---|---|---|---|---|---|---|---|---|"""


def render(records: Sequence[dict[str, Any]]) -> str:
    """The table of all records, one row a model, and what they come to together."""
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_model[record["model"]].append(record)
    return "\n".join([HEADER, *(row(rows) for rows in by_model.values()), "", summary(records)])


def summary(records: Sequence[dict[str, Any]]) -> str:
    """One sentence on the backdoored models and one on the clean ones."""
    bad = [record for record in records if record["der"] is not None]
    clean = [record for record in records if record["der"] is None]
    parts = []
    if bad:
        ders = [record["der"] for record in bad]
        success = statistics.mean(record["attack_success_rate"]["after"] for record in bad)
        worst = min(bad, key=lambda record: record["der"])
        parts.append(
            f"{len(bad)} repairs of backdoored models: mean DER {statistics.mean(ders):.3f}, worst "
            f"{worst['der']:.3f} ({worst['model']}), mean ASR after {success:.1%}, mean accuracy lost "
            f"{statistics.mean(map(_lost, bad)) * 100:.1f} points, {sum(map(_changed, bad))} of {len(bad)} touched."
        )
    if clean:
        parts.append(
            f"{len(clean)} repairs of clean models: {len(clean) - sum(map(_changed, clean))} came out unchanged, most "
            f"accuracy lost {max(map(_lost, clean)) * 100:.1f} points."
        )
    return " ".join(parts)


def _lost(record: Mapping[str, Any]) -> float:
    return float(record["clean_accuracy"]["before"] - record["clean_accuracy"]["after"])


def _changed(record: Mapping[str, Any]) -> bool:
    return bool(record["changed"])


def row(records: Sequence[dict[str, Any]]) -> str:
    """One model: means over its records, with the range where there are several."""

    def percent(rate: str, when: str) -> str:
        return _spread([record[rate][when] * 100 for record in records], 1)

    cells = [records[0]["model"], percent("clean_accuracy", "before"), percent("clean_accuracy", "after")]
    if records[0]["der"] is None:
        cells += ["-"] * 4
    else:
        cells += [percent("attack_success_rate", "before"), percent("attack_success_rate", "after")]
        cells += [percent("robust_accuracy", "after"), _spread([record["der"] for record in records], 3)]
    cells += ["; ".join(dict.fromkeys(_label(record) for record in records))]
    cells += ["; ".join(dict.fromkeys(_check(record) for record in records))]
    cells += [_spread([record["channels_pruned"] for record in records], 0)]
    cells += [_spread([record["seconds"] for record in records], 0)]
    return "| " + " | ".join(cells) + " |"


def _label(record: Mapping[str, Any]) -> str:
    label = record["verification"]["label"]
    if label is None:
        return "none"
    return f"{label}, right" if label == record["target"] else f"{label}, wrong"


def _check(record: Mapping[str, Any]) -> str:
    if not record["changed"]:
        return "left alone"
    return "passed" if record["verification"]["passed"] else "not passed"


def _spread(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    app()
