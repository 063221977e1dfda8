"""ABL's unlearning: one step worked out on paper, where it stops, and a shortcut that is unlearned."""

from __future__ import annotations

import math

import pytest
import torch

from debackdoor.data import split_clean
from debackdoor.defenses.abl import ABLUnlearning
from debackdoor.errors import DataError, DebackdoorError, ModelError, TooFewError
from debackdoor.types import CleanSet
from rnp_cases import TwoPixels, two_pixel_set
from shortcut_cases import CLASSES, SIZE, row_images
from unlearning_cases import (
    Spy,
    check_is_a_copy,
    check_leaves_the_model_alone,
    poisoned,
    right,
    stamped,
    success,
    victim,
)

QUICK = {"lr": 0.1, "epochs": 20, "batch_size": 16, "precision": "fp32"}


def first_class() -> CleanSet:
    """Four images (1, 0) of class 0."""
    return CleanSet(torch.tensor([1.0, 0.0]).repeat(4, 1).view(4, 1, 1, 2), torch.zeros(4, dtype=torch.int64))


def test_one_step() -> None:
    """The logits are (1, 0), the error's gradient by the weights of the first pixel (p - 1, 1 - p); decay is downhill.

    That pixel's weights move up the error by 0.5 (1 - p) each, and all weights shrink by 0.5 * 0.1 of themselves.
    """
    doubt = 1 / (1 + math.e)
    result = ABLUnlearning(poisoned=first_class(), lr=0.5, weight_decay=0.1, epochs=1, precision="fp32")(
        TwoPixels(), two_pixel_set()
    )
    expected = torch.tensor([[0.95 - 0.5 * doubt, 0.0], [0.5 * doubt, 0.95]])
    assert torch.allclose(result.model[1].weight, expected, atol=1e-6)
    assert result.history["unlearn"] == [
        {"epoch": 1, "loss": pytest.approx(-math.log(1 - doubt)), "accuracy": 1.0, "kept": True}
    ]


def climb(budget: float | None, lr: float = 1.0, epochs: int = 5) -> tuple[torch.Tensor, list[bool], bool, float]:
    """Without momentum: the weights, which epochs are kept, whether anything changed, and the accuracy it says.

    The margin of class 0 is 1; an epoch takes 2 lr (1 - p) from it. With lr 1 it is 0.46 after one and -0.31 after two,
    when the four of eight images that are of class 0 are lost. With lr 3 one epoch is enough for that.
    """
    defense = ABLUnlearning(
        poisoned=first_class(), lr=lr, momentum=0.0, weight_decay=0.0, epochs=epochs, budget=budget, precision="fp32"
    )
    result = defense(TwoPixels(), two_pixel_set())
    kept = [row["kept"] for row in result.history["unlearn"]]
    assert result.steps[0].numbers == {"epochs": sum(kept), "accuracy": result.clean_accuracy["after"]}
    assert result.clean_accuracy["before"] == 1.0
    assert result.clean_accuracy["after"] == right(result.model, two_pixel_set())
    return result.model[1].weight.detach(), kept, result.changed, result.clean_accuracy["after"]


def test_the_last_epoch_within_the_budget_remains() -> None:
    weights, kept, changed, after = climb(budget=0.4)
    assert (kept, changed, after) == ([True, False], True, 1.0)
    assert torch.equal(weights, climb(None, epochs=1)[0])


@pytest.mark.parametrize("budget", [None, 0.5])
def test_without_a_stop_all_epochs_are_gone_through(budget: float | None) -> None:
    _, kept, changed, after = climb(budget)
    assert (kept, changed, after) == ([True] * 5, True, 0.5)


def test_no_epoch_within_the_budget_leaves_the_model_as_it_was() -> None:
    weights, kept, changed, after = climb(budget=0.4, lr=3.0)
    assert (kept, changed, after) == ([False], False, 1.0)
    assert torch.equal(weights, torch.eye(2))


def test_a_shortcut_is_unlearned_and_the_classes_stay() -> None:
    model = victim()
    assert success(model) == 1.0
    result = ABLUnlearning(poisoned=poisoned(row_images()), budget=0.0, **QUICK)(model, row_images())
    check_is_a_copy(model, result)
    assert success(result.model) <= 0.05
    assert right(result.model, row_images()) == 1.0
    assert result.changed
    losses = [row["loss"] for row in result.history["unlearn"]]
    assert losses == sorted(losses)


def test_the_clean_set_teaches_nothing_and_its_hold_out_part_judges() -> None:
    spy, clean = Spy(victim()), row_images()
    result = ABLUnlearning(poisoned=poisoned(clean), epochs=2, batch_size=100, seed=3, precision="fp32")(spy, clean)
    _, judges = split_clean(clean, 0.25, 3)
    tried, *asked = [x for training, x in spy.heard if not training]
    assert torch.equal(tried, clean.x[:32])
    assert len(asked) == 3
    assert all(torch.equal(x, judges.x) for x in asked)
    taught = [x for training, x in spy.heard if training]
    assert [len(x) for x in taught] == [36, 36]
    assert all(torch.allclose(x.sum(0), stamped(clean).sum(0)) for x in taught)
    assert not torch.equal(taught[0], taught[1])  # in another order
    assert result.clean_accuracy == {"before": 1.0, "after": right(result.model, judges)}
    everything = Spy(victim())
    ABLUnlearning(poisoned=poisoned(clean), epochs=1, holdout=0.0, precision="fp32")(everything, clean)
    assert [len(x) for training, x in everything.heard if not training] == [32, 48, 48]


def test_the_callers_model_is_left_alone_and_the_seed_decides() -> None:
    found = poisoned(row_images())
    check_leaves_the_model_alone(*(ABLUnlearning(poisoned=found, **QUICK, seed=seed) for seed in (0, 0, 1)))


def test_the_defaults_are_the_published_ones() -> None:
    found = first_class()
    assert ABLUnlearning.name == "abl-unlearning"
    assert ABLUnlearning(poisoned=found) == ABLUnlearning(
        poisoned=found, lr=5e-4, momentum=0.9, weight_decay=1e-4, epochs=5, batch_size=64, budget=None, holdout=0.25
    )


def test_poisoned_samples_that_do_not_fit_are_refused() -> None:
    clean, count = row_images(), 4
    label = torch.full((count,), CLASSES)
    with pytest.raises(DataError, match=f"found: expected labels of 0 to {CLASSES - 1}.*got {CLASSES}"):
        ABLUnlearning(poisoned=CleanSet(clean.x[:count], label, source="found"))(victim(), clean)
    small = CleanSet(torch.zeros(count, 1, SIZE, SIZE - 1), label - 1, source="found")
    with pytest.raises(
        DataError, match=r"found: expected images of shape \(1, 7, 7\), like the clean ones, got \(1, 7, 6"
    ):
        ABLUnlearning(poisoned=small)(victim(), clean)
    with pytest.raises(TooFewError, match="found: expected at least 2 samples that are thought poisoned, got 1"):
        ABLUnlearning(poisoned=CleanSet(clean.x[:1], label[:1], source="found"))


def test_poisoned_samples_have_to_be_given() -> None:
    with pytest.raises(TypeError, match="poisoned"):
        ABLUnlearning()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["lr", "epochs", "batch_size"])
def test_settings_of_zero_are_refused(name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"{name} above 0, got 0"):
        ABLUnlearning(poisoned=first_class(), **{name: 0})


@pytest.mark.parametrize("name", ["budget", "holdout"])
def test_shares_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {name} from 0 to 1, got 1.5"):
        ABLUnlearning(poisoned=first_class(), **{name: 1.5})


def test_a_step_size_that_is_far_too_large_is_told_of() -> None:
    defense = ABLUnlearning(poisoned=first_class(), lr=1e38, budget=None, precision="fp32")
    with pytest.raises(ModelError, match=r"smaller step"):
        defense(TwoPixels(), two_pixel_set())
