"""Largest margins on classifiers where they can be worked out."""

import pytest
import torch
from torch import nn

from channel_cases import assert_as_found, snapshot
from debackdoor.detectors.margin import MarginSettings, largest_margins, summarise
from debackdoor.errors import DebackdoorError
from toys import set_values

WEIGHTS = (1.0, 2.0, 3.0, 2.0, 1.0, 40.0)
IMAGE = torch.zeros(1, 1, 2, 3)


def own_pixel_each() -> nn.Sequential:
    """Logit k is weight k times pixel k, so the largest margin of label k is its weight: its pixel 1, all others 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 6))
    set_values(model[1].weight, torch.diag(torch.tensor(WEIGHTS)).flatten().tolist())
    set_values(model[1].bias, [0.0] * 6)
    return model.eval()


def test_the_largest_margin_of_every_label_is_found() -> None:
    model = own_pixel_each()
    before, state = snapshot(model), torch.get_rng_state()
    found = largest_margins(model, IMAGE, 6, precision="fp32")
    assert found.values == pytest.approx(WEIGHTS, abs=1e-4)
    assert found.label == 5
    assert found.ratio == pytest.approx(20, abs=1e-3)
    assert found.p_value < 1e-3
    assert_as_found(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_that_do_not_fit_one_batch_are_searched_for_in_turn() -> None:
    heard: list[tuple[int, int]] = []
    found = largest_margins(
        own_pixel_each(), IMAGE, 6, MarginSettings(batch_size=4), precision="fp32",
        progress=lambda stage, done, total, numbers: heard.append((done, total)),
    )  # fmt: skip
    assert found.values == pytest.approx(WEIGHTS, abs=1e-4)
    assert heard == [(4, 6), (6, 6)]


def test_the_seed_decides() -> None:
    few = MarginSettings(steps=2)
    one, two, other = (largest_margins(own_pixel_each(), IMAGE, 6, few, seed=seed) for seed in (1, 1, 2))
    assert one == two != other


def test_equal_labels_are_no_surprise() -> None:
    assert summarise([1.0, 1.2, 0.9, 1.1, 1.25]).p_value > 0.1
    assert summarise([1.0] * 6).p_value == 1.0
    assert summarise([1.0] * 5 + [2.0]).p_value == 0.0
    assert summarise([1.0, 1.2, 0.9, 1.1, 1.25, 1.3, 0.8, 1.0]).label == 5


def test_labels_that_never_lead_have_no_margin() -> None:
    found = summarise([-3.0, 1.0, 1.1, 0.9, 1.0, 1.2])
    assert found.ratio == pytest.approx(1.2)
    assert 0 <= found.p_value <= 1


def test_few_classes_tell_nothing() -> None:
    assert summarise([1.0, 1.0, 1.0, 50.0]).p_value == 1.0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(DebackdoorError, match="steps above 0, got 0"):
        MarginSettings(steps=0)
