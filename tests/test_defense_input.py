"""What every defence refuses before it does anything, and networks of odd habits that all of them take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from debackdoor.bench.methods import METHODS
from debackdoor.defenses import (
    ANP,
    BNP,
    CLP,
    FTSAM,
    IBAU,
    MCR,
    NAD,
    RNP,
    ULRL,
    ABLUnlearning,
    Defense,
    FinePruning,
    FineTuning,
    NCUnlearning,
)
from debackdoor.errors import DataError, ModelError
from debackdoor.types import CleanSet, RepairResult
from prune_cases import clean_images, victim

Run = Callable[[nn.Module, CleanSet, int], RepairResult]
RUNS: dict[str, Run] = {name: method.run for name, method in METHODS.items() if name != "rnp"}
RUNS["rnp"] = lambda model, clean, seed: RNP(seed=seed)(model, clean)
RUNS["abl"] = lambda model, clean, seed: ABLUnlearning(poisoned=clean_images(8), seed=seed)(model, clean)


class NoReturn(nn.Sequential):
    """Its ``train`` returns nothing, as of many networks that keep their norms frozen."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


@pytest.mark.parametrize("name", RUNS)
def test_labels_that_the_model_does_not_know(name: str) -> None:
    clean = clean_images()
    with pytest.raises(DataError, match="labels of 0 to 1 for a model of 2 classes, got 7"):
        RUNS[name](victim(), CleanSet(clean.x, clean.y * 7), 0)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_precision(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=f"expected float32 weights, got {dtype}"):
        RUNS[name](victim().to(dtype), clean_images(), 0)


@pytest.mark.parametrize("name", RUNS)
def test_weights_that_are_no_numbers(name: str) -> None:
    model = victim()
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    with pytest.raises(ModelError, match="expected finite outputs on the clean images, got NaN"):
        RUNS[name](model, clean_images(), 0)


@pytest.mark.parametrize(
    "defense",
    [
        ABLUnlearning(poisoned=clean_images(8), epochs=1),
        ANP(iterations=2),
        BNP(),
        CLP(),
        FinePruning(epochs=1),
        FineTuning(epochs=1),
        FTSAM(epochs=1),
        IBAU(rounds=1),
        MCR(epochs=1, tuning_epochs=1),
        NAD(epochs=1, teacher_epochs=1),
        NCUnlearning(search_steps=2, epochs=1, always=True),
        RNP(),
        RNP.published(),
        ULRL(epochs=1),
    ],
    ids=lambda defense: defense.name,
)
def test_a_network_whose_train_returns_nothing(defense: Defense) -> None:
    model = NoReturn(*victim())
    model.eval()
    result = defense(model, clean_images())
    assert not any(module.training for module in result.model.modules())


@pytest.mark.parametrize("defense", [FineTuning(epochs=1, batch_size=64, lr=1e38, precision="fp32")])
def test_a_last_step_that_breaks_the_model_is_told_of(defense: FineTuning) -> None:
    with pytest.raises(ModelError, match=r"finite .*take a smaller step"):
        defense(victim(), clean_images())


QUICK: tuple[Defense, ...] = (
    RNP(),
    FineTuning(epochs=1),
    FTSAM(epochs=1),
    ANP(iterations=2),
    NAD(epochs=1, teacher_epochs=1),
    ABLUnlearning(poisoned=clean_images(8), epochs=1),
    FinePruning(epochs=1),
)
quick = pytest.mark.parametrize("defense", QUICK, ids=lambda defense: defense.name)


@quick
def test_what_the_caller_has_set_keeps_no_defence_from_learning(defense: Defense) -> None:
    usual = defense(victim(), clean_images())
    with torch.inference_mode():
        clean = clean_images()
        found = defense(victim(), CleanSet(clean.x, clean.y))
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), usual.model.parameters(), strict=True))


@quick
def test_images_with_a_gradient_and_with_their_channels_last_in_memory(defense: Defense) -> None:
    clean = clean_images()
    usual = defense(victim(), clean)
    pixels = clean.x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).requires_grad_()
    found = defense(victim(), CleanSet((1.0 * pixels).permute(0, 3, 1, 2), clean.y))
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), usual.model.parameters(), strict=True))
    assert pixels.grad is None
