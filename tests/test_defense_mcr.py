"""MCR: points on the curve, its ends, statistics measured anew, and a victim that loses its backdoor."""

import pytest
import torch
from torch import nn

from debackdoor.defenses import FineTuning, mcr
from debackdoor.defenses.mcr import MCR, on_curve
from debackdoor.errors import DebackdoorError
from debackdoor.types import CleanSet
from defense_cases import check_holdout, check_manners, check_removed, check_settings, corner_set, corner_victim
from rnp_cases import TwoPixels, two_pixel_set

QUICK = {"shift": 0.0, "batch_size": 20, "precision": "fp32"}


@pytest.mark.parametrize(
    ("t", "expected"), [(0.0, 100.0), (1.0, 1.0), (0.5, 100 / 4 + 10 / 2 + 1 / 4), (0.1, 81 + 0.18 * 10 + 0.01)]
)
def test_points_on_the_curve_by_hand(t: float, expected: float) -> None:
    found = on_curve({"w": torch.tensor(100.0)}, {"w": torch.tensor(10.0)}, {"w": torch.tensor(1.0)}, t)
    assert found["w"].item() == pytest.approx(expected)


def test_the_ends_are_the_suspect_model_and_its_fine_tuned_copy() -> None:
    model, clean = corner_victim(), corner_set(60)
    quick = {"epochs": 3, "tuning_epochs": 2, "tuning_lr": 0.05, "seed": 4, **QUICK}
    tuned = FineTuning(lr=0.05, epochs=2, seed=4, **QUICK)(model, clean).model
    for t, end in ((0.0, model), (1.0, tuned)):
        result = MCR(t=t, **quick)(model, clean)
        for name, value in end.named_parameters():
            assert torch.allclose(result.model.get_parameter(name), value, atol=1e-6), name


def test_statistics_are_those_of_the_model_on_the_curve() -> None:
    """Of the two-channel convolution's outputs, averaged over three batches, whatever the suspect model had."""
    model, clean = corner_victim(), corner_set(60)
    model[1].num_batches_tracked += 7
    norm_before = model[1].running_mean.clone()
    repaired = MCR(epochs=2, tuning_epochs=1, **QUICK)(model, clean).model
    with torch.no_grad():
        outputs = repaired[0](clean.x)
    assert torch.allclose(repaired[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(repaired[1].running_var, outputs.var((0, 2, 3)), rtol=0.1)
    assert not torch.allclose(repaired[1].running_mean, norm_before, atol=1e-4)
    assert (repaired[1].momentum, repaired[1].num_batches_tracked.item()) == (0.1, 7)


def test_statistics_are_those_of_shifted_images() -> None:
    """The curve learns from such: where a shift brings zeros in, the first convolution's outputs are lower."""
    settings = {**QUICK, "epochs": 1, "tuning_epochs": 1, "lr": 1e-9, "tuning_lr": 1e-9}
    clean = CleanSet(torch.ones(60, 1, 8, 8), torch.arange(60) % 4)
    plain, shifted = (MCR(**{**settings, "shift": shift})(corner_victim(), clean).model[1] for shift in (0.0, 0.5))
    kept = 1 - (2 * sum(range(1, 5)) / 9 / 8)  # of each axis, on average over shifts by -4 to 4 of 8 pixels
    assert plain.running_mean.tolist() == pytest.approx([1.0, 0.5], abs=1e-4)
    assert shifted.running_mean.tolist() == pytest.approx([kept**2, kept**2 / 2], rel=0.15)


def test_the_middle_point_alone_learns() -> None:
    """Weights I and a fine-tuned end that hardly moves: what differs from I at t = 0.1 is 0.18 times the middle."""
    quick = {"lr": 0.03, "tuning_lr": 1e-9, "tuning_epochs": 1, "epochs": 10, "batch_size": 8, "shift": 0.0}
    at = {t: MCR(t=t, precision="fp32", **quick)(TwoPixels(), two_pixel_set()).model[1].weight for t in (0.1, 0.5)}
    moved = {t: weight - torch.eye(2) for t, weight in at.items()}
    assert moved[0.5][0, 0] > 0.01
    assert torch.allclose(moved[0.1] / 0.18, moved[0.5] / 0.5, atol=1e-5)


def test_a_model_without_normalisation_and_one_with_frozen_statistics_are_taken() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    bare = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 4))
    for model in (plain, bare):
        result = MCR(epochs=1, tuning_epochs=1, **QUICK)(model, corner_set(20))
        assert result.changed
        assert list(result.model.state_dict()) == list(model.state_dict())


def test_the_backdoor_goes_further_along_the_curve() -> None:
    result = check_removed(MCR(t=0.5, lr=0.03, tuning_lr=0.05, epochs=40, **QUICK))
    assert [step.name for step in result.steps] == ["fine-tune", "connect"]
    assert "t = 0.5" in result.steps[1].reason
    assert (len(result.history["fine-tune"]), len(result.history["mcr"])) == (20, 40)


@pytest.mark.parametrize(
    ("rates", "place"), [([0.9, 0.88], 0.5), ([0.9, 0.7, 0.87, 0.9], 0.4), ([0.9] + 10 * [0.8], None)]
)
def test_the_place_is_the_largest_within_the_budget(
    rates: list[float], place: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suspect model's accuracy comes first, then those from the middle on; where none will do, nothing changes."""
    left = iter(rates)
    monkeypatch.setattr(mcr, "accuracy", lambda *_: next(left))
    result = MCR(t=None, epochs=1, tuning_epochs=1, **QUICK)(corner_victim(), corner_set(40))
    said = "the suspect model kept" if place is None else f"taken at t = {place}"
    assert said in result.steps[1].reason
    assert result.changed == (place is not None)
    assert not list(left)


def test_the_backdoor_goes_at_the_place_that_is_chosen() -> None:
    check_removed(MCR(t=None, lr=0.03, tuning_lr=0.05, epochs=40, **QUICK), holdout=0.25)


def test_manners() -> None:
    check_manners(MCR(t=None, epochs=2, tuning_epochs=1, **QUICK))
    check_manners(MCR(epochs=2, tuning_epochs=1, **QUICK))
    check_holdout(MCR(epochs=2, tuning_epochs=1, **QUICK))


def test_bad_settings_are_refused() -> None:
    check_settings(MCR)
    with pytest.raises(DebackdoorError, match=r"expected t from 0 to 1, got 1\.1"):
        MCR(t=1.1)
    for name in ("tuning_lr", "tuning_epochs"):
        with pytest.raises(DebackdoorError, match=f"expected {name} above 0, got 0"):
            MCR(**{name: 0})
    assert (MCR().t, MCR.name) == (0.1, "mcr")
