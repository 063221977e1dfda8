"""What the benchmark of scans makes of its records, on records made by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scan_tables")


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scan_zoo")


def record(
    model: str, arch: str, score: float, verdict: str, target: int | None = None, index: float = 0.0, **more: Any
) -> dict[str, Any]:
    """A scan that names label 3 if it names one; Neural Cleanse names label 3 too."""
    named = [{"label": 3}] if verdict == "backdoored" else []
    return {
        "model": model,
        "attack": model,
        "arch": arch,
        "score": score,
        "verdict": verdict,
        "target": target,
        "mode": None if model == "clean" else "all-to-one",
        "all_to_all": False,
        "suspects": named,
        "neural_cleanse": {"original": {"index": index, "label": 3}},
        "triggers": {},
    } | more


FOUND = {"scan": {"label": 3, "success_rate": 0.9, "l1": 4.0, "iou": 0.25, "shifted_iou": 0.5}}
ALL_WAYS = {
    way: {"label": 3, "success_rate": rate, "l1": 4.0, "iou": 0.25, "shifted_iou": 0.5}
    for way, rate in (("scan", 1.0), ("neural-cleanse-original", 0.5), ("neural-cleanse-exposed", 0.25))
}
RECORDS = [
    record("badnets", "net-a", 2.0, "backdoored", 3, 3.0, triggers=FOUND),
    record("blend", "net-b", 0.5, "clean", 1, 0.25),
    record("wanet", "net-b", 1.4, "backdoored", 2, 1.0, triggers={"scan": {"label": 3, "success_rate": 0.5, "l1": 9}}),
    record("clean", "net-a", 0.6, "suspicious", index=0.5),
    record("clean", "net-b", 0.3, "clean", index=0.0),
]


def test_the_threshold_is_halfway_between_a_clean_score_and_the_next_backdoored_one(tables: ModuleType) -> None:
    """Of 0.6 and 1.4; a backdoored score below the clean ones does not count; without one above it is the clean one."""
    assert tables.threshold(RECORDS) == pytest.approx(1.0)
    assert tables.threshold([RECORDS[1], RECORDS[3]]) == 0.6


def test_every_network_is_tried_with_the_threshold_of_the_others(tables: ModuleType) -> None:
    """Without net-a it is halfway from 0.3 to 0.5, which its clean scan passes; without net-b from 0.6 to 2.0."""
    assert tables.calibration(RECORDS).splitlines()[2:] == [
        "| net-a | 0.40 | 1 of 1 | 1 of 1 |",
        "| net-b | 1.30 | 0 of 1 | 1 of 2 |",
        "| **sum** | - | 1 of 2 | 2 of 3 |",
    ]


def test_the_summary_counts_verdicts_labels_and_triggers(tables: ModuleType) -> None:
    """Of six pairs of a backdoored and a clean model the score orders five, all but 0.5 and 0.6; so does the index."""
    assert tables.summary(RECORDS) == (
        "2 of 3 scans of backdoored models call them backdoored or suspicious; 0 of 2 scans of clean models call them "
        "backdoored, and 1 suspicious. The score's AUROC is 0.833. The first suspect label is the attacker's in 1 of 3 "
        "scans of models with one such label. The anomaly index of Neural Cleanse on the original model has an AUROC "
        "of 0.833, and its most anomalous label is the attacker's in 1 of 3."
    )


def test_triggers_are_compared_where_all_ways_recovered_one(tables: ModuleType) -> None:
    more = record("cl", "net-a", 2.0, "backdoored", 3, 3.0, triggers=ALL_WAYS)
    _, sentence = tables.summary([*RECORDS, more]).split("Triggers recovered for ")
    overlap = "of held-out images and have an IoU of 0.25 with the true patch, 0.50 after the best shift"
    assert sentence == (
        f"1 patch attacks: those of the scan work on 100.0% {overlap}; those of Neural Cleanse on the original model "
        f"work on 50.0% {overlap}; those of Neural Cleanse on the exposed model work on 25.0% {overlap}."
    )


def test_a_row_has_all_scans_of_a_model(tables: ModuleType) -> None:
    lines = tables.render([*RECORDS, record("badnets", "net-a", 0.9, "suspicious", 3, 2.0)]).splitlines()
    assert lines[2] == (
        "| badnets | backdoored; suspicious | 0.90 to 2.00 | 3; none | 3 | 90%, 4.0, 0.25, 0.50 | 2.5, label 3 | - |"
    )
    assert lines[4] == "| wanet | backdoored | 1.40 | 3 | 2 | 50%, 9.0 | 1.0, label 3 | - |"
    assert lines[5].startswith("| clean | suspicious; clean | 0.30 to 0.60 | none | - | - |")
    many = record("badnets-all", "net-a", 1.5, "backdoored", mode="all-to-all", all_to_all=True, neural_cleanse={})
    assert tables.render([many, *RECORDS]).splitlines()[2].endswith("| 1.50 | many | all | - | - | - |")


def square(row: int, column: int) -> torch.Tensor:
    """Two by two pixels of 12 by 12."""
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[row : row + 2, column : column + 2] = True
    return mask


def test_overlap_is_intersection_over_union(zoo: ModuleType) -> None:
    """A square and its neighbour share two of six pixels."""
    assert zoo.overlap(square(4, 4), square(4, 4)) == 1.0
    assert zoo.overlap(square(4, 4), square(4, 5)) == pytest.approx(1 / 3)
    assert zoo.overlap(square(4, 4), square(6, 4)) == 0.0
    assert zoo.overlap(square(4, 4) & False, square(4, 4) & False) == 0.0


def test_the_best_overlap_is_looked_for_eight_pixels_each_way(zoo: ModuleType) -> None:
    """Ten pixels away two are missing; nine away one column still meets. Half a square more is four of six."""
    assert zoo.best_overlap(square(1, 9), square(9, 1)) == 1.0
    assert zoo.best_overlap(square(9, 1), square(1, 9)) == 1.0
    assert zoo.best_overlap(square(0, 0), square(0, 9)) == pytest.approx(1 / 3)
    assert zoo.best_overlap(square(0, 0), square(0, 10)) == 0.0
    assert zoo.best_overlap(square(0, 0) | square(0, 1), square(5, 5)) == pytest.approx(4 / 6)
