"""What the tests of the command repair share: a stand-in for the repair, and the words of a command."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from cli_cases import Shell
from debackdoor.types import CleanSet, PlannedChannel, RepairResult, Step, Verification


class StandIn:
    """Takes the place of the repair: sets one weight to zero and returns a made-up result."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.passed = self.conclusive = True
        self.changed = True

    def __call__(self, model: nn.Module, clean: CleanSet, budget: float = 0.02, **options: Any) -> RepairResult:
        self.given = {"images": len(clean), "budget": budget, **options}
        options["progress"]("unlearn", 1, 2, {"accuracy": 0.5})
        options["progress"]("recover", 2, 2, {"accuracy": 0.75})
        if self.error is not None:
            raise self.error
        if self.changed:
            with torch.no_grad():
                model.get_parameter("0.weight")[0] = 0
        return RepairResult(
            model=model,
            plan=(PlannedChannel("1", 0, 0.25),) if self.changed else (),
            clean_accuracy={"before": 0.9, "after": 0.875},
            verification=Verification(
                self.passed, 3, {"ease_after": float("inf")}, "the check says this", self.conclusive
            ),
            history={},
            steps=(Step("prune", "one channel is enough", {"channels": 1}),),
            changed=self.changed,
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(importlib.import_module("debackdoor.repair"), "repair", made)
    return made


def repair_of(shell: Shell, *more: object) -> list[object]:
    return ["repair", shell.checkpoint(), "--arch", shell.arch, "--clean", "digits", *more]
