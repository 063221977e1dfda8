"""What the benchmark of sample detectors makes of its records, on records made by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


def test_the_table_has_means_over_seeds_and_the_worst_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both numbers where a detector was tried on both models, one where on one, none where on none."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    render = importlib.import_module("sample_tables").render
    records = [
        {"model": "a", "aurocs": {"strip": {"original": 0.5, "exposed": 0.75}, "exposed-margin": {"exposed": 1.0}}},
        {"model": "a", "aurocs": {"strip": {"original": 0.75, "exposed": 0.25}, "exposed-margin": {"exposed": 0.5}}},
        {"model": "b", "aurocs": {"strip": {"original": 0.125, "exposed": 1.0}}},
    ]
    assert render(records).splitlines() == [
        "| model | strip | exposed-margin |",
        "|---|---|---|",
        "| a | 0.625 / 0.500 | 0.750 |",
        "| b | 0.125 / 1.000 | - |",
        "| **mean** | 0.375 / 0.750 | 0.750 |",
        "| **worst** | 0.125 / 0.500 | 0.750 |",
    ]
