"""Times repairs beside the published procedure, in one process, turn by turn; writes one record a network.

    python benchmarks/speed.py run --models victims --out benchmarks/results/speed
    python benchmarks/speed.py together resnet18-w16 --models victims --out benchmarks/results/speed
    python benchmarks/speed.py repair-large --out benchmarks/results/speed
    python benchmarks/speed.py table benchmarks/results/speed --into docs/performance.md
    python benchmarks/speed.py draw benchmarks/results/speed --out docs/figures

A whole repair is timed with its verification; the published procedure with its evaluations of the test set, which are
run on one image in ten and counted ten times, and without those after every pass. Nothing else should run
meanwhile. Networks are trained once and kept in the folder of ``--models``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import speed_tables
import torch
import typer
from publish import commit, replace_between
from speed_cases import CASES, Case, fit_head, images_of, random_network, training_of, victim_of
from speed_loops import gemm_rates, our_loops, passes_for, published_loops, rate
from speed_repairs import Stages, time_repairs, time_scan, time_test
from torch import nn

import debackdoor as db
from debackdoor.allocator import keep_freed_memory
from debackdoor.attacks import Attack
from debackdoor.attacks.resume import weights_hash
from debackdoor.bench.memory import PeakMemory
from debackdoor.data import load_dataset
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.runtime import versions
from debackdoor.types import CleanSet

SCHEMA = "debackdoor/speed/1"

LARGE_IMAGES = 24
"""Clean images of 224 pixels that a whole repair gets: a pass takes its time, and memory does not need more."""

LARGE_BUDGET = 1.0
"""What such a repair may cost: a random network has nothing to lose, and relearning would begin anew time and again."""

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Out = Annotated[Path, typer.Option(help="folder for the records")]


@app.command()
def run(
    out: Out,
    names: Annotated[list[str] | None, typer.Argument(help=f"out of {', '.join(CASES)}; by default all")] = None,
    models: Annotated[Path, typer.Option(help="folder of the trained networks")] = Path("victims"),
    train_on: Annotated[int, typer.Option(help="images that these are trained on")] = 20_000,
    epochs: Annotated[int, typer.Option(help="passes over them")] = 10,
    pairs: Annotated[int, typer.Option(help="times that each is timed")] = 3,
    images: Annotated[int, typer.Option(help="clean images")] = 500,
    whole: Annotated[bool, typer.Option(help="also whole repairs of the networks that are trained for it")] = True,
) -> None:
    """One record a network, written after every pair; finished ones are skipped, others go on."""
    out.mkdir(parents=True, exist_ok=True)
    for case in (CASES[name] for name in names or CASES):
        target = out / f"{case.name}.json"
        record = json.loads(target.read_text()) if target.exists() else {}
        if record and _finished(case, record, pairs, whole):
            continue
        typer.echo(case.name)
        model, attack = _network(case, models, train_on, epochs) if whole else (random_network(case), None)
        clean = images_of(case, images if case.whole else 2 * case.batch)
        record = record or head(case, model, clean) | {"loops": []}
        if record["clean_images"] != len(clean):
            raise typer.BadParameter(
                f"{target}: expected a record of {len(clean)} clean images; delete it to begin anew"
            )
        for row in time_loops(case, model, clean, pairs - len(record["loops"])):
            record["loops"].append(row)
            _write(target, record)
        if attack is not None:
            record |= training_of(case.name, models)
            _whole(target, record, model, attack, clean, pairs)


def _whole(target: Path, record: dict[str, Any], model: nn.Module, attack: Attack, clean: CleanSet, pairs: int) -> None:
    if "scan" not in record:
        record |= {"victim": weights_hash(model), "scan": time_scan(model, clean), "whole": []}
        _write(target, record)
    _check_victim(target, record, model)
    if "test" not in record:
        record["test"] = time_test(model, attack)
        _write(target, record)
    for row in time_repairs(model, attack, clean, pairs - len(record["whole"])):
        record["whole"].append(row)
        _write(target, record)


def _check_victim(target: Path, record: dict[str, Any], model: nn.Module) -> None:
    if record.get("victim") != weights_hash(model):
        raise typer.BadParameter(f"{target}: expected the network of the record, got another; delete it to begin anew")


def _finished(case: Case, record: dict[str, Any], pairs: int, whole: bool) -> bool:
    if len(record["loops"]) < pairs:
        return False
    return not (whole and case.whole) or ("scan" in record and "test" in record and len(record["whole"]) >= pairs)


def _network(case: Case, models: Path, train_on: int, epochs: int) -> tuple[nn.Module, Attack | None]:
    if case.arch is None or not case.whole:
        return random_network(case), None
    return victim_of(case.name, case.arch, load_dataset("cifar10", "train", train_on), models, epochs)


def _write(target: Path, record: dict[str, Any]) -> None:
    atomic_write_text(target, json.dumps(record, indent=1) + "\n")


def head(case: Case, model: nn.Module, clean: CleanSet) -> dict[str, Any]:
    """What was timed, and on what."""
    return {
        "schema": SCHEMA,
        **{name: value for name, value in asdict(case).items() if name != "whole"},
        "parameters": sum(value.numel() for value in model.parameters()),
        "clean_images": len(clean),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "gemm": gemm_rates(),
    }


def time_loops(case: Case, model: nn.Module, clean: CleanSet, pairs: int) -> Iterator[dict[str, Any]]:
    """Images a second of unlearning and recovery, ours and published, turn by turn; the share of the GEMM rate."""
    if pairs < 1:
        return
    kinds = {"ours": our_loops(model, clean, case.batch), "published": published_loops(model, clean, case.batch)}
    passes = {kind: {name: passes_for(loop) for name, loop in loops.items()} for kind, loops in kinds.items()}
    for _ in range(pairs):
        row: dict[str, Any] = {"commit": commit(), "threads": torch.get_num_threads()}
        around = [gemm_rates()]  # other machines on the same hardware come and go
        for kind, loops in kinds.items():
            rates = {name: rate(loop, len(clean), passes[kind][name]) for name, loop in loops.items()}
            row[kind] = {name: {"images": value, "flops": loops[name].flops * value} for name, value in rates.items()}
            if kind == "ours":
                around.append(gemm_rates())
        row["gemm"] = {name: fmean(found[name] for found in around) for name in around[0]}
        typer.echo(speed_tables.loop_line(row))
        yield row


@app.command()
def together(
    out: Out,
    names: Annotated[list[str], typer.Argument(help="networks that have a record")],
    models: Annotated[Path, typer.Option(help="folder of the trained networks")] = Path("victims"),
    times: Annotated[int, typer.Option(help="how often")] = 3,
) -> None:
    """Adds to a network's record the seconds of a scan and a repair that begin with one look at it."""
    for case in (CASES[name] for name in names):
        target = out / f"{case.name}.json"
        record = json.loads(target.read_text())
        model = load_model(models / f"{case.name}-blend.safetensors", str(case.arch))
        _check_victim(target, record, model)
        clean = images_of(case, record["clean_images"])
        record["together"] = []
        for _ in range(times):
            started = time.perf_counter()
            _, result = db.scan_and_repair(model, clean)
            seconds = time.perf_counter() - started
            typer.echo(f"{case.name}: {seconds:.0f} s, changed: {result.changed}")
            record["together"].append({"seconds": seconds, "changed": result.changed, "commit": commit()})
        _write(target, record)


@app.command()
def repair_large(
    out: Out,
    names: Annotated[list[str] | None, typer.Argument(help="networks; by default those of 224 pixels")] = None,
    memory: Annotated[float, typer.Option(help="GiB that the repair may take")] = 6.0,
    images: Annotated[int, typer.Option(help="clean images")] = LARGE_IMAGES,
) -> None:
    """Whole repairs of large networks, random but for a fitted last layer, and the memory they take."""
    out.mkdir(parents=True, exist_ok=True)
    for case in (CASES[name] for name in names or [name for name, case in CASES.items() if not case.whole]):
        target = out / f"{case.name}-repair.json"
        if target.exists():
            continue
        model, clean = random_network(case), images_of(case, images)
        fit_head(model, clean)
        peak, stages, started = PeakMemory(torch.device("cpu")), Stages(), time.perf_counter()
        result = db.repair(model, clean, LARGE_BUDGET, memory=memory, progress=stages)
        seconds = time.perf_counter() - started
        record = head(case, model, clean) | {"memory": memory, "budget": LARGE_BUDGET}
        record |= {"seconds": seconds, "stages": stages.seconds}
        record |= peak.record() | {"changed": result.changed}
        _write(target, record)
        typer.echo(f"{case.name}: {seconds:.0f} s, {record['peak_memory_mib']} MiB, changed: {result.changed}")


@app.command()
def table(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[Path | None, typer.Option(help="page whose tables between the markers are replaced")] = None,
    machine: Annotated[str, typer.Option(help="end of the markers' names, for records of another machine")] = "",
) -> None:
    """Markdown tables of loops, whole repairs and memory."""
    rows = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    for name, text in speed_tables.render(rows).items():
        if into is None:
            typer.echo(text + "\n")
        else:
            replace_between(into, f"{name}-{machine}" if machine else name, text)


@app.command()
def draw(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    out: Annotated[Path, typer.Option(help="folder for the figure")],
) -> None:
    """Seconds of whole repairs and images a second of learning, as bars."""
    rows = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    speed_tables.draw(rows, out / "speed.png")


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    app()
