"""Unlearning: where every step leads, and what it leaves alone."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from channel_cases import assert_as_found, snapshot
from debackdoor.data.augment import random_shift
from debackdoor.errors import DebackdoorError
from debackdoor.models.forward import label_shares
from debackdoor.models.resnet import resnet18
from debackdoor.rnp.unlearn import UnlearnSettings, unlearn
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from rnp_cases import (
    DIAL,
    DIAL_LABELS,
    HALF,
    RIGHT,
    WRONG,
    Dial,
    TwoPixels,
    column,
    dial_set,
    quadrant_set,
    quadrants,
    turn,
    two_pixel_set,
)


def test_the_first_step_is_the_one_on_paper() -> None:
    """The margin is 1 and the step size 0.5: the gradient on each weight is 1 / (1 + e) / 2."""
    settings = replace(DIAL, lr=0.5, clip=None, max_passes=1)
    found = unlearn(TwoPixels(), two_pixel_set(), settings, precision="fp32")
    step = 0.5 * 0.5 / (1 + math.e)
    wanted = torch.tensor([[1 - step, step], [step, 1 - step]])
    torch.testing.assert_close(found.model[1].weight.detach(), wanted)
    assert found.reason == "steps"
    (row,) = found.history
    assert row["loss"] == pytest.approx(math.log(1 + math.exp(-1)))
    assert row == row | {"step": 1, "accuracy": 1.0, "lr": 0.5, "label_shares": [0.5, 0.5], "taken_back": False}


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"check_every": 0}, {"batch_size": -1}, {"max_passes": 0}, {"clip": -1.0}]
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {next(iter(bad))} above 0"):
        replace(DIAL, **bad)


def test_norms_learn_and_dropout_is_off() -> None:
    modes = set()

    def spy(model: Dial) -> None:
        if torch.is_grad_enabled():
            modes.add((model.norm.training, model.dropout.training))

    found, _ = turn([RIGHT], spy, max_passes=3)
    assert modes == {(True, False)}
    assert int(found.model.norm.num_batches_tracked) == 3
    # Momentum 0.1 from 0, three times, towards the mean pixel 0.035.
    assert float(found.model.norm.running_mean) == pytest.approx(0.035 * (1 - 0.9**3))


def test_progress_hears_of_every_check() -> None:
    heard = []
    settings = replace(DIAL, max_passes=10, batch_size=4, check_every=2)
    unlearn(
        Dial([RIGHT, RIGHT, HALF, HALF, WRONG]), dial_set(), settings, precision="fp32",
        progress=lambda *report: heard.append(report),
    )  # fmt: skip
    assert heard == [("unlearn", 2, 20, {"accuracy": 0.5}), ("unlearn", 4, 20, {"accuracy": 0.0})]


@pytest.fixture
def gradient_norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The gradient norms that the optimiser sees."""
    norms: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *rest: Any, **named: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return step(self, *rest, **named)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    return norms


def test_gradients_are_clipped_after_backward(gradient_norms: list[float]) -> None:
    settings = UnlearnSettings(
        lr=0.05, clip=0.02, check_every=1, largest_fall=1.0, past_peak=None, least_steps=1, max_passes=4
    )
    unlearn(quadrants(), quadrant_set(), settings, precision="fp32")
    clipped = list(gradient_norms)
    gradient_norms.clear()
    unlearn(quadrants(), quadrant_set(), replace(settings, clip=None), precision="fp32")
    assert min(gradient_norms) > 0.02  # so there was something to clip at every step
    assert clipped == pytest.approx([0.02] * 4, rel=1e-3)


def test_weights_decay_too() -> None:
    """Without a gradient on the norm, decay alone moves its weight: ascent and decay do not share a sign."""
    found, _ = turn([RIGHT], weight_decay=0.5, lr=0.1, max_passes=2)
    assert float(found.model.norm.weight.detach()) == pytest.approx((1 - 0.05) ** 2)


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18(4, width=2, in_channels=1)
    model.linear.bias.grad = torch.ones(4)
    return model


def test_the_callers_model_is_left_alone_and_the_seed_decides() -> None:
    model = small_network().train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    clean, before = quadrant_set(40), snapshot(model)
    settings = UnlearnSettings(
        lr=0.05, batch_size=16, least_steps=1, max_passes=4, check_every=2, stop_accuracy=0.0, past_peak=None
    )
    one, two, other = (unlearn(model, clean, settings, seed=seed) for seed in (3, 3, 4))
    assert_as_found(model, before)
    assert one.history == two.history
    weights = [found.model.state_dict() for found in (one, two, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["linear.weight"], weights[2]["linear.weight"])
    assert not torch.equal(weights[0]["conv1.weight"], before["tensors"]["conv1.weight"])  # frozen weights unlearn too


def test_the_callers_model_is_left_alone_after_an_error() -> None:
    model = small_network().train()
    before = snapshot(model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearn(model, quadrant_set(40), UnlearnSettings(), progress=fail)
    assert_as_found(model, before)


def test_a_check_asks_some_of_the_images_and_the_same_every_time() -> None:
    asked: list[Tensor] = []
    model = quadrants()
    model.register_forward_pre_hook(lambda _, inputs: None if torch.is_grad_enabled() else asked.append(inputs[0]))
    clean = quadrant_set(40)
    settings = UnlearnSettings(lr=0.01, checked=10, least_steps=1, max_passes=3, check_every=1, stop_accuracy=0.0)
    found = unlearn(model, clean, settings, precision="fp32")
    assert len(asked) == len(found.history) + 1 >= 3
    assert all(torch.equal(images, asked[0]) for images in asked)
    rows = (asked[0][:, None] == clean.x).flatten(2).all(2).nonzero()[:, 1].unique()
    assert len(rows) == len(asked[0]) == 10
    right = (found.model(asked[0]).argmax(1) == clean.y[rows]).float().mean()
    assert found.accuracy == pytest.approx(float(right))


def test_a_trained_classifier_forgets() -> None:
    settings = UnlearnSettings(
        lr=0.02,
        least_steps=1,
        max_passes=200,
        check_every=4,
        batch_size=20,
        past_peak=None,
        stop_accuracy=0.3,
        largest_fall=0.3,
    )
    found = unlearn(quadrants(), quadrant_set(), settings, precision="fp32")
    accuracies = column(found, "accuracy")
    assert found.reason == "forgotten"
    assert max(accuracies) == 1.0
    assert accuracies[-1] == found.accuracy <= 0.3
    kept = [a for a, taken_back in zip(accuracies, column(found, "taken_back"), strict=True) if not taken_back]
    assert all(later >= earlier - 0.3 - 1e-6 for earlier, later in pairwise(kept))
    assert all(sum(shares) == pytest.approx(1) for shares in column(found, "label_shares"))


def test_shifted_images_are_windows_of_the_padded_one() -> None:
    x = torch.rand(30, 2, 4, 5, generator=generator(1))
    shifted = random_shift(x, 2, generator(0))
    assert shifted.shape == x.shape
    padded = nn.functional.pad(x, (2,) * 4)
    found = [_offsets(padded[i], shifted[i]) for i in range(30)]
    assert all(len(places) == 1 for places in found)
    assert {row for ((row, _),) in found} == set(range(5))
    assert {col for ((_, col),) in found} == set(range(5))
    assert shifted.is_contiguous()
    assert random_shift(x[:, :1], 2, generator(0)).stride() == (20, 20, 5, 1)  # by which convolutions go
    assert random_shift(x, 0, generator(0)) is x


def _offsets(padded: Tensor, window: Tensor) -> list[tuple[int, int]]:
    places = [(row, column) for row in range(5) for column in range(5)]
    return [(r, c) for r, c in places if torch.equal(padded[:, r : r + 4, c : c + 5], window)]


def test_label_shares_count_answers() -> None:
    logits = torch.tensor([[0.0, 1, 0], [0, 2, 0], [3, 0, 0], [0, 0.5, 0]])
    assert label_shares(logits) == [0.25, 0.75, 0.0]


def test_a_single_image_too_many_is_left_out() -> None:
    """Batch normalisation cannot learn from a batch of one: nine images in batches of four are two steps a pass."""
    x = torch.cat([dial_set().x, torch.zeros(1, 1, 1, 1)])
    clean = CleanSet(x, torch.tensor([*DIAL_LABELS, 0]))
    found = unlearn(Dial([RIGHT]), clean, replace(DIAL, batch_size=4, max_passes=2), precision="fp32")
    assert column(found, "step") == [1, 2, 3, 4]
