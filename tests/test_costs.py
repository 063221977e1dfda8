"""What a scan and a repair cost, in images that go through the network: a guard that no machine's noise disturbs."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import debackdoor as db
from debackdoor.types import CleanSet
from rnp_cases import strip_set, strips
from shortcut_cases import CLASSES, row_images, switched_to

IMAGES = Counter[str]()
"""Images seen forwards and backwards, and forward passes, since the test began; copies of a network share it."""


class Counting(nn.Module):
    """A network that counts the images that go through it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        IMAGES["forward"] += len(x)
        IMAGES["passes"] += 1
        out = self.inner(x)
        if out.requires_grad:
            out.register_hook(self._backward)
        return out

    @staticmethod
    def _backward(gradient: Tensor) -> None:
        IMAGES["backward"] += len(gradient)


@pytest.fixture
def network() -> nn.Module:
    IMAGES.clear()
    return Counting(switched_to(2)).eval()


class Stages:
    """What every stage cost, told by progress: a stage's costs are those up to its last report."""

    def __init__(self) -> None:
        self.costs: dict[str, Counter[str]] = {}
        self.before = Counter[str]()

    def __call__(self, stage: str, *_: object) -> None:
        now = Counter(IMAGES)
        self.costs.setdefault(stage, Counter()).update(now - self.before)
        self.before = now


def images() -> CleanSet:
    """64 images: 48 to learn from and 16 to judge by."""
    return row_images(64)


def searches(kinds: int, labels: int, away: int) -> int:
    """Perturbations of a search."""
    return kinds * labels + away


def test_a_scan(network: nn.Module) -> None:
    stages = Stages()
    report = db.scan(network, images(), device="cpu", precision="fp32", progress=stages)
    assert report.verdict == "backdoored"
    costs = stages.costs
    aims = searches(kinds=3, labels=CLASSES, away=8)
    assert costs["search perturbations"]["backward"] == 60 * 4 * aims
    assert costs["search margins"]["backward"] == 60 * 4 * CLASSES
    assert costs["recover"]["backward"] == 20 * 48
    # All aims share a pass, and so do the labels of margins; squares share one by the hundred images.
    assert [costs[name]["passes"] for name in ("recover", "search margins", "search perturbations")] == [20, 61, 60]
    assert costs["search squares"]["passes"] <= 45
    # 3 colours, 25 places of the one size that 7 pixels allow for; and what came before the first report.
    judged = 16 * (1 + aims)
    assert costs["search squares"]["forward"] <= 3 * 25 * 32 + judged
    # 200 steps of 32 images on two models together and on one alone.
    assert costs["search trigger"]["backward"] == 200 * 32 * (2 + 1)
    assert IMAGES["backward"] <= 29_000
    assert IMAGES["forward"] <= 35_000


def test_a_repair(network: nn.Module) -> None:
    stages = Stages()
    result = db.repair(network, images(), device="cpu", precision="fp32", progress=stages)
    assert result.changed
    costs = stages.costs
    before, after = searches(3, CLASSES, 8), searches(3, CLASSES, 0)
    head_start = 60 * 8 * 9  # three of each kind
    tried_on_both = 150 * 4 * 9  # on the suspect model alone; what is found is then tried on both
    assert costs["search perturbations"]["backward"] == 60 * 4 * (before + after) + head_start + tried_on_both
    assert costs["search margins"]["backward"] == 2 * 60 * 4 * CLASSES
    assert costs["prune"]["passes"] <= 20  # six of them to see that fused norms change nothing
    # Each step: 48 clean images, as many mixed ones, 16 with a trigger and 16 with a square, which the student sees and
    # the pruned network answers, and those with a trigger once more against the student.
    assert costs["relearn"] == {
        "passes": 120 * 3,
        "forward": 120 * (2 * 128 + 16),
        "backward": 120 * (128 + 16),
    }
    assert IMAGES["backward"] <= 50_000
    assert IMAGES["forward"] <= 62_000


def test_parts_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five classes, and with as few norms as the toy has: up to twelve copies more forget a part of the images."""
    monkeypatch.setattr(importlib.import_module("debackdoor.case"), "FEWEST_NORMS", 1)
    IMAGES.clear()
    stages = Stages()
    db.scan(Counting(strips()).eval(), strip_set(), device="cpu", precision="fp32", progress=stages)
    assert stages.costs["unlearn"]["backward"] <= 25_000
    assert stages.costs["unlearn"]["passes"] <= 800


def test_a_clean_model_costs_no_more_than_the_looking(network: nn.Module) -> None:
    with torch.no_grad():
        network.inner[1].weight[CLASSES] = 0
    stages = Stages()
    result = db.repair(network, images(), device="cpu", precision="fp32", progress=stages)
    assert not result.changed
    assert "relearn" not in stages.costs
    assert stages.costs["search perturbations"]["backward"] == 60 * 4 * (searches(3, CLASSES, 8) + searches(3, 0, 8))
    assert IMAGES["backward"] <= 12_500
