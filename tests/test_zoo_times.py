"""Which records the table of seconds is made of."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_seconds_are_those_of_backdoored_models_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    zoo_times = importlib.import_module("zoo_times")
    usual = {"arch": "net", "dataset": "digits", "der": 0.9, "seconds": 20.0}
    both = {"with_scan": {"scan_seconds": 10.0, "seconds": 25.0}}
    for name, record in {
        "patch-seed0-n500": {"model": "patch", **both},
        "blend-seed0-n500": {"model": "blend", "seconds": 40.0, "with_scan": {"scan_seconds": 30.0, "seconds": 55.0}},
        "patch-seed1-n500": {"model": "patch", **both},
        "patch-seed0-n100": {"model": "patch", **both},
        "clean-seed0-n500": {"model": "clean", **both, "der": None},
        "shift-seed0-n500": {"model": "shift"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**usual, **record}))
    table = zoo_times.render(zoo_times.timed(tmp_path))
    assert table.splitlines()[2:] == ["| net | digits | 2 | 20 | 30 | 40 | 55 | blend |"]
