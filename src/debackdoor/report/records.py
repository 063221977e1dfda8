"""JSON records: what was done to which file with which settings, and what came of it. Rates are fractions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from debackdoor.evaluation import Evaluation
from debackdoor.models import LoadedModel
from debackdoor.runtime import versions
from debackdoor.types import RepairResult

REPAIR_SCHEMA = "debackdoor/repair/1"


def header(loaded: LoadedModel, *, data: str, seed: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The entries that every record of a job on one checkpoint begins with, after its schema.

    Args:
        loaded: the model that the job was done on.
        data: where the images came from.
        seed: the job's seed.
        seconds: spent in each stage of the job.
    """
    return {
        "versions": versions(),
        "checkpoint": str(loaded.checkpoint.path),
        "sha256": loaded.checkpoint.sha256,
        "arch": loaded.arch,
        "num_classes": loaded.num_classes,
        "data": data,
        "seed": seed,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def repair_record(head: Mapping[str, Any], result: RepairResult, *, clean_images: int, budget: float) -> dict[str, Any]:
    """The record of a repair.

    Args:
        head: what ``header`` returned.
        result: what the repair returned.
        clean_images: how many images it was given, both parts together.
        budget: the accuracy that it was allowed to lose, a fraction.
    """
    return {
        "schema": REPAIR_SCHEMA,
        **head,
        "clean_images": clean_images,
        "budget": budget,
        "changed": result.changed,
        "clean_accuracy": dict(result.clean_accuracy),
        "plan": [asdict(channel) for channel in result.plan],
        "steps": [asdict(step) for step in result.steps],
        "verification": None if result.verification is None else asdict(result.verification),
    }


def evaluate_record(head: Mapping[str, Any], evaluation: Evaluation, *, attack: str) -> dict[str, Any]:
    """The record of an evaluation; ``attack`` is the name of the trigger's attack."""
    numbers = evaluation.record()
    return {"schema": numbers.pop("schema"), **head, "attack": attack, **numbers}


def to_json(record: Mapping[str, Any]) -> str:
    """The record as JSON that every parser takes: NaN and infinities, which JSON has not, become null."""
    return json.dumps(_plain(record), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
