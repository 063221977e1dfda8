"""Times scan and repair on a GPU, and counts how often they wait for it; writes one record a model.

    python benchmarks/gpu.py run badnets wanet clean-0 --out benchmarks/results/gpu
    python benchmarks/gpu.py table benchmarks/results/gpu --into docs/performance.md

The first scan and repair of a process load kernels and choose among them; ``first`` is their time, ``seconds`` that of
the others.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from publish import commit, replace_between
from torch import nn
from zoo_models import chosen_cards

import debackdoor as db
from debackdoor.attacks import load_trigger
from debackdoor.bench.memory import PeakMemory
from debackdoor.data import load_dataset
from debackdoor.evaluation import evaluate
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.runtime import versions
from debackdoor.types import RepairResult
from debackdoor.zoo import CLEAN, Card, trigger_of, weights_of

SCHEMA = "debackdoor/gpu/1"

PLACE = "cuda"

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    names: Annotated[list[str] | None, typer.Argument(help="models of the zoo; by default all")] = None,
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    rounds: Annotated[int, typer.Option(help="times that each is timed, after the first")] = 2,
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
    count: Annotated[bool, typer.Option(help="count the waits, in a scan and a repair more")] = True,
) -> None:
    """One record a model; finished ones are skipped."""
    out.mkdir(parents=True, exist_ok=True)
    for card in chosen_cards(zoo, names):
        target = out / f"{card.arch}-{card.name}.json"
        if not target.exists():
            record = measure(card, zoo, rounds, limit, count)
            atomic_write_text(target, json.dumps(record, indent=1) + "\n")
            typer.echo(f"{card.name}: scan {record['scan']['seconds']} s, repair {record['repair']['seconds']} s")


def measure(card: Card, zoo: Path, rounds: int, limit: int, count: bool) -> dict[str, Any]:
    """Scans and repairs one model again and again, always with the same seed."""
    model = load_model(weights_of(zoo, card.name), card.arch)
    clean = db.load_clean(card.dataset, limit=limit, seed=0)
    calls = {
        "scan": lambda: db.scan(model, clean, device=PLACE),
        "repair": lambda: db.repair(model, clean, device=PLACE),
    }
    memory = PeakMemory(torch.device(PLACE))
    (scans, reports), (repairs, results) = (_timed(call, rounds) for call in calls.values())
    peak, report, result = memory.record(), reports[-1], results[-1]
    # After the first run, which loads kernels, and before the model is moved to be measured.
    counted = {name: waits(call) for name, call in calls.items()} if count else {}
    return {
        "schema": SCHEMA,
        **{name: getattr(card, name) for name in ("name", "attack", "dataset", "arch", "target", "sha256")},
        "parameters": sum(value.numel() for value in model.parameters()),
        "clean_images": len(clean),
        "scan": scans | {"verdict": report.verdict, "score": report.score},
        "repair": repairs | {"changed": result.changed},
        "rates": _rates(card, zoo, {"before": model, "after": result.model}),
        "same_again": _same(results),
        "waits": counted,
        **peak,
        "gpu": torch.cuda.get_device_name(),
        "versions": versions(),
        "commit": commit(),
    }


def _timed(work: Callable[[], Any], rounds: int) -> tuple[dict[str, Any], list[Any]]:
    seconds, found = list[float](), []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        found.append(work())
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - started, 2))
        typer.echo(f"{type(found[-1]).__name__}: {seconds[-1]} s")
    return {"first": seconds[0], "seconds": seconds[1:]}, found


def _rates(card: Card, zoo: Path, models: dict[str, nn.Module]) -> dict[str, Any]:
    if card.attack == CLEAN:
        return {}
    test, attack = load_dataset(card.dataset, "test"), load_trigger(trigger_of(zoo, card.name))
    return {when: asdict(evaluate(model.to(PLACE), test, attack)) for when, model in models.items()}


def _same(results: list[RepairResult]) -> bool:
    """Whether all repairs gave the same weights to the last bit."""
    first, *others = ([value.cpu() for value in result.model.state_dict().values()] for result in results)
    return all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


def waits(work: Callable[[], Any]) -> dict[str, int]:
    """How often the host waits for the GPU, by the line that makes it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [item for item in caught if "synchronizing" in str(item.message)]
    return dict(Counter("/".join(Path(item.filename).parts[-2:]) + f":{item.lineno}" for item in found).most_common())


@app.command()
def table(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[Path | None, typer.Option(help="page whose table between the markers is replaced")] = None,
) -> None:
    """A Markdown table."""
    text = render([json.loads(path.read_text()) for path in sorted(records.glob("*.json"))])
    if into is None:
        typer.echo(text)
    else:
        replace_between(into, "gpu", text)


def render(records: Sequence[dict[str, Any]]) -> str:
    """The table, small networks first."""
    names = ("network", "parameters", "model", "verdict", "scan, s", "repair, s", "CA before", "after", "ASR before",
             "after", "peak GPU memory, MiB", "GPU")  # fmt: skip
    rows = sorted(records, key=lambda row: row["parameters"])
    return "\n".join(["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *map(_row, rows)])


def _row(row: dict[str, Any]) -> str:
    cells = [row["arch"], f"{row['parameters'] / 1e6:.2f} M", row["name"], row["scan"]["verdict"]]
    cells += [f"{median(row[kind]['seconds']):.1f}" for kind in ("scan", "repair")]
    for rate in ("clean_accuracy", "attack_success_rate"):
        cells += [f"{row['rates'][when][rate]:.1%}" if row["rates"] else "-" for when in ("before", "after")]
    return "| " + " | ".join([*cells, str(row["peak_gpu_memory_mib"]), row["gpu"]]) + " |"


if __name__ == "__main__":
    app()
