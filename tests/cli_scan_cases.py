"""What the tests of the command scan share: a stand-in for the scan, the words of a command, valid records."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from torch import nn

import report_cases
from cli_cases import Shell
from debackdoor.report import load_schema
from debackdoor.types import CleanSet, ScanReport


class StandIn:
    """Takes the place of the scan: returns a made-up report."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.report: ScanReport = report_cases.report("clean")

    def __call__(self, model: nn.Module, clean: CleanSet, **options: Any) -> ScanReport:
        self.given = {"model": model, "images": len(clean), **options}
        options["progress"]("unlearn", 1, 2, {"accuracy": 0.5})
        if self.error is not None:
            raise self.error
        return self.report


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(importlib.import_module("debackdoor.scan"), "scan", made)
    return made


def scan_of(shell: Shell, *more: object) -> list[object]:
    return ["scan", shell.checkpoint(), "--arch", shell.arch, "--clean", "digits", *more]


def valid(text: str) -> Any:
    """The record, if it is as its schema says."""
    record = json.loads(text)
    Draft202012Validator(load_schema("scan")).validate(record)
    return record
