"""BNP: channels go whose stored statistics clean images do not bear out."""

from math import log

import pytest
import torch
from torch import nn

import toys
from debackdoor.data.augment import random_shift_by
from debackdoor.defenses.bnp import BNP, divergences
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.types import CleanSet
from prune_cases import (
    BAD,
    NORMED,
    attack_success,
    channels_of,
    check_leaves_the_model_alone,
    clean_accuracy,
    clean_images,
    plain_victim,
    victim,
)
from toys import set_values


def poisoned_victim() -> nn.Sequential:
    """The statistics are those of the images, but for the bad channel's: a quarter of them had the trigger."""
    model = victim()
    given = model[0](clean_images().x).detach()
    model[1].running_mean.copy_(given.mean((0, 2, 3)))
    model[1].running_var.copy_(given.var((0, 2, 3)))
    model[1].running_mean[BAD], model[1].running_var[BAD] = 2.5, 18.75
    set_values(model[4].weight, [8 / 7] * 7 + [0] * 8 + [100] + [0] * 7 + [1] * 8 + [0])
    return model


@pytest.mark.parametrize("u", [3.0, None])
def test_the_backdoor_goes_and_nothing_else(u: float | None) -> None:
    model = poisoned_victim()
    assert (attack_success(model), clean_accuracy(model)) == (1.0, 1.0)
    result = BNP(u=u, precision="fp32")(model, clean_images())
    assert channels_of(result) == {(NORMED, BAD)}
    assert result.plan[0].score == pytest.approx(-3.75)  # one of sixteen differs: 15 / sqrt(16)
    assert (attack_success(result.model), clean_accuracy(result.model)) == (0.0, 1.0)
    assert result.clean_accuracy == {"before": 1.0, "after": 1.0}
    assert result.model[1].weight.tolist() == [1.0] * BAD + [0.0]
    assert torch.equal(result.model[1].bias, model[1].bias)
    assert result.changed
    assert [step.name for step in result.steps] == ["rank", "prune"]


def test_the_divergence_of_two_normal_distributions() -> None:
    """Epsilon is 1/2. Clean images give (0, 1, 0, 1) and (0, 0, 0, 0); stored are means 0 and 3, variances 2 and 1."""
    model = nn.Sequential(nn.BatchNorm2d(2, eps=0.5), toys.pool(), nn.Linear(2, 2)).eval()
    set_values(model[0].running_mean, [0, 3])
    set_values(model[0].running_var, [2, 1])
    x = torch.zeros(2, 2, 1, 2)
    x[:, 0, 0, 1] = 1  # mean 1/2, variance of a sample 1/3
    _, (values,) = divergences(model, x)
    first = log((2.5 / (1 / 3 + 0.5)) ** 0.5) + (1 / 3 + 0.5 + 0.25) / 5 - 0.5
    second = log((1.5 / 0.5) ** 0.5) + (0.5 + 9) / 3 - 0.5
    assert values.tolist() == pytest.approx([first, second])


def test_equal_statistics_do_not_diverge_whatever_the_batches() -> None:
    x = torch.rand(1203, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None), toys.pool(), nn.Linear(3, 2))
    with torch.no_grad():
        model(x)
    _, (values,) = divergences(model.eval(), x)
    assert values.abs().max() < 1e-6


def test_a_channel_that_is_switched_off_already_is_not_compared() -> None:
    model = poisoned_victim()
    model[1].running_mean[0] = 1e6
    with torch.no_grad():
        model[1].weight[0] = 0
    result = BNP()(model, clean_images())
    assert channels_of(result) == {(NORMED, BAD)}
    assert result.plan[0].score == pytest.approx(-14 / 15**0.5)


def test_the_blind_rule_minds_the_budget() -> None:
    """The outlying channel is the one that tells the classes apart: 10 of colour 0, stored mean too low by 50."""
    model = victim()
    set_values(model[0].weight, [weight for _ in range(15) for weight in (0, 0, 1)] + [10, 0, 0])
    set_values(model[1].bias, [0] * 16)
    clean = clean_images()
    given = model[0](clean.x).detach()
    model[1].running_mean.copy_(given.mean((0, 2, 3)))
    model[1].running_var.copy_(given.var((0, 2, 3)))
    # Of class 0 the channel is then more than 50 deviations high, of class 1 less.
    middle = 50 / float(model[1].running_var[BAD]) ** 0.5
    model[1].running_mean[BAD] -= 50
    set_values(model[4].weight, [0] * 15 + [1] + [0] * 16)
    set_values(model[4].bias, [0, middle])
    with torch.no_grad():
        assert torch.equal(model(clean.x).argmax(1), clean.y)
    published, kind = BNP()(model, clean_images()), BNP(u=None)(model, clean_images())
    assert channels_of(published) == {(NORMED, BAD)}
    assert published.clean_accuracy == {"before": 1.0, "after": 0.5}
    assert kind.clean_accuracy == {"before": 1.0, "after": 1.0}
    assert (NORMED, BAD) not in channels_of(kind)


def test_the_statistics_are_those_of_shifted_images() -> None:
    """Training images were: ones of 4x4 pixels that moved by up to 2, with zeros behind them, have other moments."""
    clean = CleanSet(torch.ones(400, 3, 4, 4), torch.arange(400) % 2)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None), toys.pool(), nn.Linear(3, 2))
    with torch.no_grad():
        model(random_shift_by(clean.x, 0.5, torch.Generator().manual_seed(7)))
    model[0].running_mean[2] = 0.0
    result = BNP(u=1.0, shift=0.5)(model.eval(), clean)
    assert channels_of(result) == {("0", 2)}
    _, (plain,) = divergences(model, clean.x)
    _, (shifted,) = divergences(model, random_shift_by(clean.x, 0.5, torch.Generator().manual_seed(0)))
    assert float(shifted[:2].max()) < 0.01 < 1 < float(plain[:2].min())


@pytest.mark.parametrize(
    "model",
    [
        plain_victim(),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), toys.pool(), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True), toys.pool(), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), toys.pool(), nn.Linear(4, 2)),
    ],
    ids=["none", "group", "instance", "not stored"],
)
def test_networks_without_stored_statistics_are_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="expected a model with batch normalisation that stores its statistics, got"):
        BNP()(model, clean_images())


@pytest.mark.parametrize("settings", [{"u": 0.0}, {"u": float("nan")}, {"budget": -0.1}, {"shift": 1.1}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {next(iter(settings))}"):
        BNP(**settings)


@pytest.mark.parametrize("u", [3.0, None])
def test_the_callers_model_is_left_alone(u: float | None) -> None:
    check_leaves_the_model_alone(BNP(u=u), poisoned_victim())
