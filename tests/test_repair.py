"""Repair from a model and a clean set: what stays as it was, and that the backdoor goes."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import debackdoor as db
from channel_cases import assert_as_found, snapshot
from conftest import DigitsVictim, train_digits_victim
from debackdoor.defenses import RNP
from debackdoor.detectors.label import PileUp
from debackdoor.detectors.perturbations import KINDS
from debackdoor.detectors.shortcut import Shortcuts
from debackdoor.evaluation import evaluate
from debackdoor.types import RepairResult
from evidence_cases import evidence
from rnp_cases import lived_in, quadrant_set, quadrants

# Not ``import debackdoor.repair as ...``, which is the function.
REPAIR = import_module("debackdoor.repair")
STAGES = import_module("debackdoor.defenses.rnp")
EXAMINATION = import_module("debackdoor.detectors.examination")
CASE = import_module("debackdoor.case")


@pytest.fixture
def exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever unlearning finds, label 1 counts as exposed, though four classes are too few to tell."""
    monkeypatch.setattr(CASE, "FEWEST_CLASSES", 4)
    monkeypatch.setattr(CASE, "FEWEST_NORMS", 1)
    monkeypatch.setattr(CASE, "most_repeated", lambda shares: PileUp(1, 1.0))


@pytest.fixture
def not_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No label stands out, neither while the clean task is forgotten nor by a shortcut."""
    nowhere = Shortcuts({kind.kind: dict.fromkeys(range(4), 0.1) for kind in KINDS}, 0.1, 0.3)
    monkeypatch.setattr(EXAMINATION, "find_shortcuts", lambda *_, **__: nowhere)


@pytest.mark.usefixtures("exposed")
def test_the_callers_model_is_left_alone_and_the_seed_decides() -> None:
    model, clean = lived_in(), quadrant_set()
    x, y = clean.x.clone(), clean.y.clone()
    before = snapshot(model)
    heard: list[str] = []
    one = db.repair(model, clean, budget=0.3, seed=2, progress=lambda stage, *_: heard.append(stage))
    assert_as_found(model, before)  # torch's random state included
    assert torch.equal(clean.x, x)
    assert torch.equal(clean.y, y)
    torch.manual_seed(99)  # the surroundings must not matter
    two = db.repair(lived_in(), clean, budget=0.3, seed=2)
    assert one.plan == two.plan
    assert one.history == two.history
    assert one.verification == two.verification
    weights, again = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert {"unlearn", "recover"} <= set(heard)
    assert list(dict.fromkeys(heard))[:2] == ["unlearn", "recover"]
    assert not one.model.training
    assert one.clean_accuracy["after"] >= one.clean_accuracy["before"] - 0.3 - 1e-6
    assert one.steps[-1].name == "verify"
    assert one.verification is not None
    assert one.verification.label == 1
    assert one.steps[-1].reason == one.verification.message


class StageError(Exception):
    """Stands for whatever can go wrong."""


@pytest.mark.usefixtures("exposed")
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (CASE, "split_clean"),
        (STAGES, "find_channels"),
        (STAGES, "unlearn"),
        (STAGES, "recover"),
        (RNP, "choose"),
        (STAGES, "prune"),
        (REPAIR, "relearn"),
        (EXAMINATION, "largest_margins"),
        (EXAMINATION, "find_shortcuts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_callers_model_is_left_alone_when_a_stage_fails(
    place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lived_in()
    before = snapshot(model)

    def fail(*_: object, **__: object) -> None:
        raise StageError(name)

    monkeypatch.setattr(place, name, fail)
    with pytest.raises(StageError, match=name):
        db.repair(model, quadrant_set())
    assert_as_found(model, before)


@pytest.mark.usefixtures("exposed")
@pytest.mark.parametrize("stage", ["unlearn", "recover"])
def test_the_callers_model_is_left_alone_when_interrupted(stage: str) -> None:
    model = lived_in()
    before = snapshot(model)

    def interrupt(now: str, *_: object) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        db.repair(model, quadrant_set(), progress=interrupt)
    assert_as_found(model, before)


@pytest.mark.usefixtures("not_exposed")
def test_where_nothing_is_exposed_no_bit_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StageError

    monkeypatch.setattr(RNP, "choose", fail)
    model = lived_in()
    model[1].weight.data[2] = -0.0
    before = snapshot(model)
    result = db.repair(model, quadrant_set())
    assert_as_found(model, before)
    assert result.model is not model
    assert not any(module.training for module in result.model.modules())
    found = result.model.state_dict()
    assert list(found) == list(before["tensors"])
    for name, value in before["tensors"].items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name
    assert result.plan == ()
    assert result.changed is False
    assert result.clean_accuracy["before"] == result.clean_accuracy["after"]
    assert result.verification is not None
    assert (result.verification.passed, result.verification.label) == (True, None)
    assert "left as it is" in result.verification.message


class Counting(nn.Module):
    """Counts in a buffer how often it is called, and works on its images in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = quadrants()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x.mul_(2).sub_(0.1))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("not_exposed")
def test_a_network_that_keeps_count_comes_out_as_it_was() -> None:
    model, clean = Counting().eval(), quadrant_set()
    images = clean.x.clone()
    result = db.repair(model, clean)
    assert (result.changed, float(result.model.calls), float(model.calls)) == (False, 0, 0)
    assert torch.equal(clean.x, images)


@pytest.mark.usefixtures("exposed")
def test_a_network_that_works_in_place_is_repaired_from_images_that_stay_as_they_are() -> None:
    model, clean = Counting().eval(), quadrant_set()
    images = clean.x.clone()
    assert db.repair(model, clean).changed
    assert torch.equal(clean.x, images)


class Twice(nn.Module):
    """A block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = quadrants()
        block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.01 * block(x)
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("exposed")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_shared_block_is_repaired_whatever_the_caller_has_switched_off(context: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, clean = Twice().eval(), quadrant_set()
    before = snapshot(model)
    with context():
        result = db.repair(model, clean)
    assert_as_found(model, before)
    assert result.changed
    assert result.model.blocks[0] is result.model.blocks[1]
    assert all(value.requires_grad for value in result.model.parameters())


@pytest.mark.usefixtures("not_exposed")
@pytest.mark.parametrize(("norm", "touched"), [(nn.Identity(), False), (nn.BatchNorm2d(4), True)])
def test_a_pile_up_counts_only_with_batch_statistics(
    norm: nn.Module, touched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CASE, "FEWEST_CLASSES", 4)
    monkeypatch.setattr(CASE, "FEWEST_NORMS", 1)
    monkeypatch.setattr(CASE, "most_repeated", lambda shares: PileUp(1, 1.0))
    model = quadrants()
    model[1] = norm
    assert db.repair(model.eval(), quadrant_set()).changed is touched


@pytest.mark.usefixtures("not_exposed")
def test_an_unlearning_that_did_not_get_there_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = STAGES.unlearn
    monkeypatch.setattr(STAGES, "unlearn", lambda *given, **named: replace(learn(*given, **named), reason="steps"))
    result = db.repair(quadrants(), quadrant_set())
    assert result.verification is not None
    assert (result.verification.conclusive, result.verification.passed, result.changed) == (False, False, False)
    assert "not unlearned" in result.verification.message


@pytest.mark.parametrize(("unseen", "passed"), [(True, False), (False, True)])
def test_the_unlearnings_are_repeated_where_no_search_had_led_to_the_label(
    unseen: bool, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers gather on label 1 after the repair, too; a search that led there before is the better judge."""
    before = evidence(pile_up=PileUp(1, 0.9), **({} if unseen else {"patch": {1: 0.9}}))
    monkeypatch.setattr(EXAMINATION.Examination, "again", lambda *_: evidence())
    monkeypatch.setattr(CASE.Case, "pile_ups", lambda *_: [0.0, 0.9, 0.0, 0.0, 0.0])
    case = CASE.open_case(lived_in(), quadrant_set(), RNP())
    verification = REPAIR.repair_case(case, case.expose(), before, budget=0.5).verification
    assert verification.passed == passed
    assert verification.label == 1


def repair_and_evaluate(victim: DigitsVictim) -> tuple[RepairResult, float, float]:
    """Repairs with a budget of 5 points; what clean accuracy that costs on the test set, and what is left of ASR."""
    model = victim.trained.model
    before = evaluate(model, victim.test, victim.attack)
    assert before.clean_accuracy > 0.95
    assert before.attack_success_rate > 0.8
    found = snapshot(model)
    result = db.repair(model, victim.clean, budget=0.05, device="cpu")
    assert_as_found(model, found)
    after = evaluate(result.model, victim.test, victim.attack)
    return result, before.clean_accuracy - after.clean_accuracy, after.attack_success_rate


def test_a_real_backdoor_is_found_and_weakened(digits_victim: DigitsVictim) -> None:
    result, cost, success = repair_and_evaluate(digits_victim)
    assert cost <= 0.05
    assert success < 0.25
    assert result.verification is not None
    assert result.verification.label == digits_victim.attack.target
    assert result.changed
    assert result.clean_accuracy["after"] >= result.clean_accuracy["before"] - 0.05 - 1e-9
    pruned = {(channel.layer, channel.index) for channel in result.plan}
    assert len(pruned) == len(result.plan) > 0
    repaired = dict(result.model.named_parameters())
    assert all(repaired[f"{channel.layer}.weight"][channel.index].item() == 0 for channel in result.plan)
    assert [step.name for step in result.steps] == ["unlearn", "recover", "prune", "relearn", "verify"]


@pytest.mark.slow
def test_a_real_backdoor_in_a_wider_network_is_gone() -> None:
    result, cost, success = repair_and_evaluate(train_digits_victim("preactresnet18-w16", seed=0))
    assert cost <= 0.05
    assert success < 0.1
    assert result.verification is not None
    assert result.verification.label == 3
