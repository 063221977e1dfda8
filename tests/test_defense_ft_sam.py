"""FT-SAM: the worst point nearby, the step from it, and a victim that loses its backdoor."""

import math

import pytest
import torch
from torch import nn

from debackdoor.defenses.ft_sam import FTSAM, perturbation
from debackdoor.errors import DebackdoorError
from debackdoor.types import CleanSet
from defense_cases import check_holdout, check_manners, check_removed, check_settings
from rnp_cases import TwoPixels, two_pixel_set

QUICK = {"shift": 0.0, "batch_size": 20, "precision": "fp32"}


def test_the_worst_point_nearby_by_hand() -> None:
    """w = (3, 0), (1) and g = (1, 5), (4): w g = (3, 0), (4), norm 5; w^2 g = (9, 0), (4); times 2 / 5."""
    weights, gradients = (
        [torch.tensor([3.0, 0.0]), torch.tensor([1.0])],
        [torch.tensor([1.0, 5.0]), torch.tensor([4.0])],
    )
    found = perturbation(weights, gradients, 2.0)
    assert torch.allclose(found[0], torch.tensor([3.6, 0.0]))
    assert torch.allclose(found[1], torch.tensor([1.6]))
    # Its length in units of the weights, ||e / |w| ||, is rho.
    assert math.hypot(3.6 / 3, 1.6 / 1) == pytest.approx(2.0)


def test_without_a_gradient_nothing_moves() -> None:
    still = perturbation([torch.ones(2), torch.ones(1)], [torch.zeros(2), None], 2.0)
    assert [move.tolist() for move in still] == [[0.0, 0.0], [0.0]]


def test_one_step_by_hand() -> None:
    """Weights I, margin 1: p = 1 / (1 + e) of the wrong class, and the gradient is p / 2 times (-1, 1; 1, -1).

    In units of the weights only the diagonal moves, by -rho / sqrt(2) each, so the margin there is m = 1 - rho / sqrt 2
    and the step is lr / 2 / (1 + e^m) times (1, -1; -1, 1).
    """
    defense = FTSAM(
        lr=0.1, rho=0.5, smoothing=0.0, epochs=1, batch_size=8, momentum=0.0, weight_decay=0.0, shift=0.0,
        precision="fp32",
    )  # fmt: skip
    result = defense(TwoPixels(), two_pixel_set())
    margin = 1 - 0.5 / math.sqrt(2)
    step = 0.1 / 2 / (1 + math.exp(margin))
    expected = torch.tensor([[1 + step, -step], [-step, 1 + step]])
    assert torch.allclose(result.model[1].weight, expected, atol=1e-6)
    assert result.history["ft-sam"] == [{"epoch": 1, "loss": pytest.approx(math.log(1 + math.exp(-1))), "lr": 0.1}]


def test_smoothing_raises_the_loss_by_its_share_of_the_margin() -> None:
    """With two classes, a tenth of the weight evenly on both: the loss is larger by 0.05 times the margin 1."""
    quick = {"epochs": 1, "batch_size": 8, "shift": 0.0, "precision": "fp32"}
    plain, smooth = (
        FTSAM(smoothing=s, **quick)(TwoPixels(), two_pixel_set()).history["ft-sam"][0]["loss"] for s in (0.0, 0.1)
    )
    assert smooth - plain == pytest.approx(0.05, abs=1e-6)


def test_statistics_come_from_the_first_pass_alone() -> None:
    """The norm stands behind a weight of 1 that the worst point changes; its inputs 0 and 1 have mean 0.5."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 2))
    nn.init.ones_(model[0].weight)
    data = CleanSet(torch.tensor([0.0, 1.0] * 4).view(8, 1, 1, 1), torch.tensor([0, 1] * 4))
    norm = FTSAM(epochs=1, batch_size=8, shift=0.0, precision="fp32")(model, data).model[1]
    assert norm.num_batches_tracked.item() == 1
    assert norm.running_mean.item() == pytest.approx(0.1 * 0.5)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 2 / 7)


def test_the_step_size_falls_along_a_cosine_over_the_epochs() -> None:
    rows = FTSAM(lr=0.2, epochs=4, batch_size=2, shift=0.0, precision="fp32")(TwoPixels(), two_pixel_set()).history
    assert [row["lr"] for row in rows["ft-sam"]] == pytest.approx(
        [0.2, 0.1 + 0.1 / math.sqrt(2), 0.1, 0.0293], abs=1e-4
    )


def test_the_backdoor_goes() -> None:
    """The victim has a thousandth of a ResNet's weights, and smoothed labels would hold its margins down."""
    result = check_removed(FTSAM(lr=0.05, rho=0.5, smoothing=0.0, **QUICK))
    assert len(result.history["ft-sam"]) == 20
    assert [step.name for step in result.steps] == ["fine-tune"]


def test_manners() -> None:
    check_manners(FTSAM(epochs=2, **QUICK))
    check_holdout(FTSAM(epochs=2, **QUICK))


def test_bad_settings_are_refused() -> None:
    check_settings(FTSAM)
    with pytest.raises(DebackdoorError, match="expected rho above 0, got 0"):
        FTSAM(rho=0)
    with pytest.raises(DebackdoorError, match="expected smoothing from 0 to 1, got 2"):
        FTSAM(smoothing=2)
    assert (FTSAM().rho, FTSAM().smoothing, FTSAM().epochs, FTSAM.name) == (2.0, 0.1, 20, "ft-sam")
