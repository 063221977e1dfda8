"""Neural Cleanse's unlearning: a shortcut found and unlearned, and a model without one left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from debackdoor.data import split_clean
from debackdoor.defenses import nc_unlearning
from debackdoor.defenses.nc_unlearning import NCUnlearning
from debackdoor.detectors.neural_cleanse import Anomalies, neural_cleanse
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.types import RecoveredTrigger
from shortcut_cases import CLASSES, SIZE, SWITCH, row_images
from unlearning_cases import LABEL, Spy, check_is_a_copy, check_leaves_the_model_alone, right, success, victim

QUICK = {"lr": 0.05, "shift": 0.0, "precision": "fp32"}


def one_pixel(label: int, l1: float = 1.0) -> RecoveredTrigger:
    """The pixel ``SWITCH`` at 1."""
    mask = torch.zeros(1, SIZE, SIZE)
    mask.view(-1)[SWITCH] = 1.0
    return RecoveredTrigger(label, mask, mask.clone(), 1.0, l1)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search finds the one pixel to ``LABEL``, with an index of 3, and larger triggers to the others."""
    triggers = tuple(one_pixel(label, 1.0 if label == LABEL else 5.0 + label) for label in range(CLASSES))
    anomalies = Anomalies(triggers, (0.1, 0.0, 3.0, -0.1), LABEL)
    monkeypatch.setattr(nc_unlearning, "neural_cleanse", lambda *_, **__: anomalies)


def test_a_shortcut_is_found_and_unlearned() -> None:
    model = victim(30.0)
    assert success(model) == 1.0
    result = NCUnlearning(**QUICK)(model, row_images())
    assert success(result.model) <= 0.05
    assert right(result.model, row_images()) == 1.0
    assert result.clean_accuracy == {"before": 1.0, "after": 1.0}
    assert result.changed
    search = neural_cleanse(model, row_images(), row_images(), CLASSES, precision="fp32")
    assert [row["l1"] for row in result.history["search trigger"]] == [trigger.l1 for trigger in search.triggers]
    assert [step.name for step in result.steps] == ["search", "fine-tune"]
    assert result.steps[0].numbers == {
        "label": LABEL, "index": search.index, "l1": search.triggers[LABEL].l1,
        "success_rate": search.triggers[LABEL].success_rate,
    }  # fmt: skip
    assert [row["epoch"] for row in result.history["fine-tune"]] == list(range(1, 11))


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize(("outlying", "always", "changed"), [(3.0, False, True), (3.1, False, False), (9, True, True)])
def test_a_trigger_is_unlearned_from_an_index_on_or_if_asked_for(outlying: float, always: bool, changed: bool) -> None:
    model = victim()
    model[1].bias.requires_grad_(False)
    result = NCUnlearning(outlying=outlying, always=always, **QUICK)(model, row_images())
    check_is_a_copy(model, result)
    assert result.changed is changed
    same = [torch.equal(one, other) for one, other in zip(model.parameters(), result.model.parameters(), strict=True)]
    assert all(same) is not changed
    assert ("fine-tune" in result.history) is changed
    assert result.steps[0].numbers["label"] == LABEL
    assert result.steps[1].name == ("fine-tune" if changed else "nothing")


def test_sizes_that_are_all_alike_are_not_outlying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every index is 0; if asked for, the smallest is unlearned, not the first."""
    sizes = (7.0, 7.0, 7.0, 6.0)
    triggers = tuple(one_pixel(label, l1) for label, l1 in enumerate(sizes))
    monkeypatch.setattr(nc_unlearning, "neural_cleanse", lambda *_, **__: Anomalies(triggers, (0.0,) * CLASSES, 0))
    assert not NCUnlearning(**QUICK)(victim(), row_images()).changed
    assert NCUnlearning(always=True, **QUICK)(victim(), row_images()).steps[0].numbers["label"] == 3


def bright(heard: list[tuple[bool, Tensor]]) -> list[int]:
    """How many images carry the trigger, in every call in train mode."""
    return [int((x.flatten(1)[:, SWITCH] == 1).sum()) for training, x in heard if training]


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.2, 10), (1.0, 48)])
def test_a_share_of_the_images_carries_the_trigger_others_in_every_pass(share: float, count: int) -> None:
    spy = Spy(victim())
    NCUnlearning(share=share, epochs=3, batch_size=100, **QUICK)(spy, row_images())
    assert bright(spy.heard) == [count] * 3


@pytest.mark.usefixtures("found")
def test_the_images_are_shifted_and_the_trigger_is_not() -> None:
    spy = Spy(victim())
    NCUnlearning(share=1.0, epochs=1, batch_size=100, lr=0.01, shift=0.3, precision="fp32")(spy, row_images())
    (seen,) = (x for training, x in spy.heard if training)
    assert bright(spy.heard) == [48]
    assert float((seen[:, 0, 0] == 1).float().sum()) < 48  # the bright pixels of the classes are not all in row 0


@pytest.mark.usefixtures("found")
def test_images_can_be_held_out() -> None:
    spy, clean = Spy(victim()), row_images()
    result = NCUnlearning(holdout=0.25, seed=3, epochs=1, batch_size=100, **QUICK)(spy, clean)
    _, judges = split_clean(clean, 0.25, 3)
    assert [len(x) for _, x in spy.heard] == [32, 12, 36, 12]
    assert torch.equal(spy.heard[-1][1], judges.x)
    assert result.clean_accuracy["after"] == right(result.model, judges)


def test_the_callers_model_is_left_alone_and_the_seed_decides() -> None:
    settings = {**QUICK, "search_steps": 3, "epochs": 2, "always": True}
    check_leaves_the_model_alone(*(NCUnlearning(**settings, seed=seed) for seed in (0, 0, 1)))


def test_the_defaults() -> None:
    assert NCUnlearning.name == "nc-unlearning"
    assert NCUnlearning() == NCUnlearning(
        outlying=2.0, always=False, search_steps=200, share=0.2, epochs=10, lr=0.01, momentum=0.9, weight_decay=0.0,
        batch_size=32, shift=0.125, holdout=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["outlying", "search_steps", "epochs", "lr", "batch_size"])
def test_settings_of_zero_are_refused(name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"{name} above 0, got 0"):
        NCUnlearning(**{name: 0})


@pytest.mark.parametrize("name", ["share", "shift", "holdout"])
def test_shares_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {name} from 0 to 1, got -0.1"):
        NCUnlearning(**{name: -0.1})


@pytest.mark.usefixtures("found")
def test_a_step_size_that_is_far_too_large_is_told_of() -> None:
    with pytest.raises(ModelError, match=r"finite loss, got (nan|inf) in epoch \d+ of fine-tuning.*smaller step size"):
        NCUnlearning(**(QUICK | {"lr": 1e30}))(victim(), row_images())
