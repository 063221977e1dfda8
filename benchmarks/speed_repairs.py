"""Whole repairs, ours and the published procedure: how long they take, and what they come to."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import speed_tables
import torch
import typer
from publish import commit
from speed_loops import official
from torch import nn

import debackdoor as db
from debackdoor.attacks import Attack
from debackdoor.bench.memory import PeakMemory
from debackdoor.evaluation import evaluate
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

SCALE = 10
"""The published procedure's evaluations see one test image in so many."""

JUDGED = 10
"""What a repair comes to is measured on one test image in so many."""


def time_repairs(model: nn.Module, attack: Attack, clean: CleanSet, pairs: int) -> Iterator[dict[str, Any]]:
    """Whole repairs, ours and the published procedure, turn by turn."""
    measure = _test(attack)
    before = measure(model)
    for _ in range(pairs):
        row: dict[str, Any] = {"before": before, "ours": _ours(model, clean, measure)}
        row["published"] = _published(model, clean, partial(measure, share=SCALE))
        row |= {"commit": commit(), "threads": torch.get_num_threads()}
        typer.echo(speed_tables.whole_line(row))
        yield row


def time_scan(model: nn.Module, clean: CleanSet) -> dict[str, Any]:
    """Seconds of one scan, and its verdict."""
    started = time.perf_counter()
    report = db.scan(model, clean)
    return {"seconds": time.perf_counter() - started, "verdict": report.verdict, "commit": commit()}


def time_test(model: nn.Module, attack: Attack) -> dict[str, float]:
    """Seconds of one evaluation of the whole test set, and of one of a part, scaled: the two should be alike."""
    measure, seconds = _test(attack), {}
    for share in (SCALE, 1):
        started = time.perf_counter()
        measure(model, share)
        seconds[share] = time.perf_counter() - started
    return {"seconds": seconds[1], "scaled_seconds": SCALE * seconds[SCALE], "one_in": SCALE}


class Stages:
    """Progress that adds up the seconds of every stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, stage: str, *_: object) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


def _test(attack: Attack) -> Callable[..., dict[str, float]]:
    """Evaluates a model on one test image in so many, clean and triggered."""
    test = db.load_clean("cifar10", limit=None, split="test")
    order = torch.randperm(len(test), generator=generator(0))

    def measure(model: nn.Module, share: int = JUDGED) -> dict[str, float]:
        found = asdict(evaluate(model, test.subset(order[: len(test) // share]), attack, precision="fp32"))
        return {name: value for name, value in found.items() if not name.endswith("images")}

    return measure


def _ours(model: nn.Module, clean: CleanSet, measure: Callable[[nn.Module], dict[str, float]]) -> dict[str, Any]:
    memory, stages, started = PeakMemory(torch.device("cpu")), Stages(), time.perf_counter()
    result = db.repair(model, clean, progress=stages)
    seconds = time.perf_counter() - started
    peak = memory.record()
    return {
        "seconds": seconds,
        "stages": stages.seconds,
        **peak,
        "changed": result.changed,
        "after": measure(result.model),
    }


def _published(model: nn.Module, clean: CleanSet, measure: Callable[[nn.Module], dict[str, float]]) -> dict[str, Any]:
    settings = official.Settings(1.0, 128, 0.01, 0.20, 21, 20, 98)
    memory, tests = PeakMemory(torch.device("cpu")), list[float]()

    def timed(model: nn.Module) -> dict[str, float]:
        started = time.perf_counter()
        found = measure(model)
        tests.append(time.perf_counter() - started)
        return found

    with TemporaryDirectory() as folder:
        record = official.reproduce(copy.deepcopy(model), clean, timed, settings, Path(folder) / "masks.txt", True)
    clock = record["seconds"]
    learning = clock["unlearn"] + clock.get("recover", 0.0)
    between = SCALE * (clock["test while unlearning"] + clock.get("test while recovering", 0.0))
    # Masks are written and read, and the model pruned, between the tests of thresholds: that is not scaled.
    swept = sum(tests[len(tests) - len(record["sweep"]) :])
    sweep = clock.get("sweep", 0.0) + (SCALE - 1) * swept
    return {
        "seconds": learning + between + sweep,
        "seconds_without_tests": learning + sweep,
        "learning": learning,
        "stages": clock,
        "one_in": SCALE,
        "evaluations": len(record["unlearn"]) + len(record["recover"]) + len(record["sweep"]),
        **memory.record(),
        "error": record["error"],
    }
