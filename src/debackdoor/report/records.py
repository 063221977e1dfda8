"""JSON records: what was done to which file with which settings, and what came of it. Rates are fractions."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from debackdoor.errors import DebackdoorError
from debackdoor.models import LoadedModel
from debackdoor.runtime import versions
from debackdoor.types import Plan, RecoveredPattern, RecoveredTrigger, RepairResult, SampleScores, ScanReport

if TYPE_CHECKING:  # it brings every attack along
    from debackdoor.evaluation import Evaluation

SCAN_SCHEMA = "debackdoor/scan/1"
REPAIR_SCHEMA = "debackdoor/repair/1"
DETECT_SCHEMA = "debackdoor/detect/1"

SCHEMAS = ("scan", "repair", "evaluate", "detect")
"""The kinds of records that have a JSON Schema."""

FAIL_ON = ("suspicious", "backdoored")
"""The verdicts from which on a scan may count as a finding."""

CHANNELS = 50
"""As many channels stand in a record: the lowest scores are what matters, and large networks have thousands."""

LOW = 0.5
"""Channels with a score below this are counted, layer by layer."""


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
        "mean": None if loaded.mean is None else list(loaded.mean),
        "std": None if loaded.std is None else list(loaded.std),
        "data": data,
        "seed": seed,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def scan_record(head: Mapping[str, Any], report: ScanReport, *, clean_images: int, fail_on: str) -> dict[str, Any]:
    """The record of a scan.

    Args:
        head: what ``header`` returned.
        report: what the scan returned.
        clean_images: how many images it was given, both parts together.
        fail_on: the verdict from which on the command tells of a finding, one of :data:`FAIL_ON`.

    Raises:
        DebackdoorError: if ``fail_on`` is none of them.
    """
    if fail_on not in FAIL_ON:
        raise DebackdoorError(f"expected fail_on out of {', '.join(FAIL_ON)}, got '{fail_on}'; choose one of them")
    return {
        "schema": SCAN_SCHEMA,
        **head,
        "clean_images": clean_images,
        "fail_on": fail_on,
        "verdict": report.verdict,
        "message": report.message,
        "score": report.score,
        "all_to_all": report.all_to_all,
        "suspect_labels": [
            {
                "label": suspect.label,
                "name": suspect.name,
                "reasons": list(suspect.reasons),
                "evidence": dict(suspect.evidence),
            }
            for suspect in report.suspects
        ],
        "trigger": _trigger(report.trigger),
        "pattern": _pattern(report.pattern),
        "triggers": [dict(row) for row in report.history.get("triggers", ())],
        "evidence": dict(report.evidence),
        "channels": [asdict(channel) for channel in report.ranking[:CHANNELS]],
        "layers": _layers(report.ranking),
        "unlearning": [
            {
                "step": row["step"],
                "accuracy": row["accuracy"],
                "label_shares": [round(share, 6) for share in row["label_shares"]],
                "taken_back": row["taken_back"],
            }
            for row in report.history.get("unlearn", ())
        ],
    }


def _trigger(trigger: RecoveredTrigger | None) -> dict[str, Any] | None:
    """What there is to say of a trigger; its pictures stand on the page alone."""
    if trigger is None:
        return None
    return {"label": trigger.label, "success_rate": trigger.success_rate, "l1": trigger.l1}


def _pattern(pattern: RecoveredPattern | None) -> dict[str, Any] | None:
    if pattern is None:
        return None
    return {"label": pattern.label, "success_rate": pattern.success_rate, "rms": pattern.rms}


def _layers(ranking: Plan) -> list[dict[str, Any]]:
    """How many channels every layer has, and how many of them score low; the layer with most of those first."""
    scores: dict[str, list[float]] = defaultdict(list)
    for channel in ranking:
        scores[channel.layer].append(channel.score)
    low = {layer: sum(score < LOW for score in found) for layer, found in scores.items()}
    order = sorted(scores, key=lambda layer: -low[layer])
    return [{"layer": layer, "channels": len(scores[layer]), "low": low[layer]} for layer in order]


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


def detect_record(
    head: Mapping[str, Any], scores: SampleScores, *, clean_images: int, suspects: Sequence[str] | Sequence[int]
) -> dict[str, Any]:
    """The record of a sample detection.

    Args:
        head: what ``header`` returned.
        scores: what the detection returned.
        clean_images: how many clean images it was given.
        suspects: the suspect images' names, or their numbers where they have none, in the order of the scores.

    Raises:
        DebackdoorError: if there are not as many as scores.
    """
    if len(suspects) != len(scores.scores):
        raise DebackdoorError(
            f"expected {len(scores.scores)} names, one a score, got {len(suspects)}; give those of all suspect images"
        )
    rows = zip(suspects, scores.scores.tolist(), scores.flagged.tolist(), scores.answers.tolist(), strict=True)
    return {
        "schema": DETECT_SCHEMA,
        **head,
        "clean_images": clean_images,
        "suspect_images": len(suspects),
        "method": scores.method,
        "threshold": scores.threshold,
        "false_positive_rate": scores.false_positive_rate,
        "flagged": int(scores.flagged.sum()),
        "p_value": scores.p_value,
        "conclusive": scores.conclusive,
        "samples": [
            {"image": image, "score": score, "flagged": flagged, "answer": answer}
            for image, score, flagged, answer in rows
        ],
    }


def load_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a kind of record.

    Args:
        name: one of :data:`SCHEMAS`.

    Raises:
        DebackdoorError: if it is none of them.
    """
    if name not in SCHEMAS:
        raise DebackdoorError(f"expected a record out of {', '.join(SCHEMAS)}, got '{name}'; choose one of them")
    schema: dict[str, Any] = json.loads((files("debackdoor.report") / "schemas" / f"{name}.json").read_text("utf-8"))
    return schema


def plain(value: Any) -> Any:
    """The same in JSON's own types; NaN and infinities, which JSON has not, become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(record: Mapping[str, Any]) -> str:
    """The record as JSON that every parser takes: NaN and infinities, which JSON has not, become null."""
    return json.dumps(plain(record), indent=2, allow_nan=False) + "\n"
