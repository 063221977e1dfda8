"""Recovery: where the masks go, and that nothing else moves."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from channel_cases import assert_as_found, snapshot
from debackdoor.channels import MaskableLayer, count_channels, find_channels
from debackdoor.models.layout import to_faster_layout
from debackdoor.rnp.recover import RecoverSettings, recover
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from rnp_cases import harmful_set, one_harmful_channel, quadrant_set, quadrants

CHANNELS = (MaskableLayer("0", "norm", 3, ("0.weight",)),)
ONE_STEP = RecoverSettings(lr=0.2, momentum=0.9, weight=0.2, passes=1, batch_size=16, shift=0)


def steps(passes: int, **changes: float) -> RecoverSettings:
    return RecoverSettings(**(vars(ONE_STEP) | {"passes": passes} | changes))  # type: ignore[arg-type]


def test_one_step_by_hand() -> None:
    """The margin is -2 and its slope in the last mask -6: the mask falls by lr * weight * 6 * sigmoid(2)."""
    found = recover(one_harmful_channel(), CHANNELS, harmful_set(), ONE_STEP, precision="fp32")
    fall = 0.2 * 0.2 * 6 / (1 + math.exp(-2))
    assert found.mask.tolist() == pytest.approx([1.0, 1.0, 1 - fall])
    assert found.mean_mask.tolist() == pytest.approx([1.0, 1.0, 1 - fall])
    (row,) = found.history
    assert row["pass"] == 1
    assert row["loss"] == pytest.approx(0.2 * math.log(1 + math.exp(2)))
    assert row["accuracy"] == 0.0


def test_a_second_step_has_momentum_and_the_mean_knows_both() -> None:
    found = recover(one_harmful_channel(), CHANNELS, harmful_set(), steps(2), precision="fp32")
    first = 6 * 0.2 / (1 + math.exp(-2))
    mask = 1 - 0.2 * first
    second = 6 * 0.2 / (1 + math.exp(2 * (2 - 3 * mask)))
    end = mask - 0.2 * (0.9 * first + second)
    assert found.mask.tolist() == pytest.approx([1.0, 1.0, end])
    assert found.mean_mask.tolist() == pytest.approx([1.0, 1.0, (mask + end) / 2])


def test_the_harmful_channel_ends_lowest_and_the_task_comes_back() -> None:
    found = recover(one_harmful_channel(), CHANNELS, harmful_set(), steps(20), precision="fp32")
    assert found.mask.tolist() == [1.0, 1.0, 0.0]
    assert 0 < float(found.mean_mask[2]) < 0.5
    assert (found.history[0]["accuracy"], found.history[-1]["accuracy"]) == (0.0, 1.0)
    assert found.history[-1]["loss"] == pytest.approx(0.2 * math.log(1 + math.exp(-4)), rel=1e-4)
    assert [row["pass"] for row in found.history] == list(range(1, 21))


class _Spy(nn.Module):
    """Passes images on, and notes the norm's effective weight and every mode at each call."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model
        self.weights: list[Tensor] = []
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.weights.append(self.model[0].weight.detach().clone())
        self.modes.add((self.model[0].training, self.model[2].training))
        return self.model(x)


def test_masks_stay_between_0_and_1_while_norms_learn_and_dropout_is_off() -> None:
    spy = _Spy(one_harmful_channel())
    layers = (MaskableLayer("model.0", "norm", 3, ("model.0.weight",)),)
    found = recover(spy, layers, harmful_set(), steps(6, lr=50.0), precision="fp32")
    seen = torch.stack(spy.weights)
    assert len(seen) == 6
    assert torch.equal(seen[0], torch.ones(3))
    assert 0.0 <= float(seen.min()) <= float(seen.max()) <= 1.0
    assert torch.equal(found.mask, torch.tensor([1.0, 1.0, 0.0]))
    assert spy.modes == {(True, False)}


@pytest.mark.parametrize("training", [True, False])
def test_the_exposed_model_is_left_alone(training: bool) -> None:
    model = quadrants().train(training)
    model[2].train(not training)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    clean = quadrant_set(40)
    layers = find_channels(model, clean.x[:2])
    before = snapshot(model)
    found = recover(model, layers, clean, RecoverSettings(passes=2, batch_size=16))
    assert_as_found(model, before)
    assert found.mask.shape == found.mean_mask.shape == (count_channels(layers),)
    assert not found.mask.requires_grad


def test_the_exposed_model_is_left_alone_after_an_error() -> None:
    model = quadrants().train()
    model[2].eval()
    clean = quadrant_set(40)
    layers = find_channels(model, clean.x[:2])
    before = snapshot(model)

    def fail(stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(model, layers, clean, RecoverSettings(), progress=fail)
    assert_as_found(model, before)
    with pytest.raises(RuntimeError, match="channels"):
        recover(model, layers, CleanSet(torch.zeros(4, 3, 8, 8), torch.zeros(4).long()), RecoverSettings())
    assert_as_found(model, before)


def test_progress_hears_of_every_pass() -> None:
    heard = []
    recover(
        one_harmful_channel(), CHANNELS, harmful_set(), steps(2), precision="fp32",
        progress=lambda *report: heard.append(report),
    )  # fmt: skip
    assert heard == [("recover", 1, 2, {"accuracy": 0.0}), ("recover", 2, 2, {"accuracy": pytest.approx(0.0)})]


def test_the_seed_decides() -> None:
    clean = quadrant_set(40)
    model = quadrants()
    layers = find_channels(model, clean.x[:2])
    # Labels that are wrong for half of the images, so that the masks have something to do.
    clean = CleanSet(clean.x, torch.where(torch.arange(40) < 20, (clean.y + 1) % 4, clean.y))
    settings = RecoverSettings(passes=3, batch_size=8)
    one, two, other = (recover(model, layers, clean, settings, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.mask, two.mask)
    assert torch.equal(one.mean_mask, two.mean_mask)
    assert one.history == two.history
    assert not torch.equal(one.mean_mask, other.mean_mask)


def test_a_single_image_too_many_does_not_count() -> None:
    """Seventeen images in batches of sixteen: the rates are shares of the sixteen that were used."""
    clean = harmful_set()
    x, y = torch.cat([clean.x, clean.x[:1]]), torch.cat([clean.y, clean.y[:1]])
    found = recover(one_harmful_channel(), CHANNELS, CleanSet(x, y), steps(20), precision="fp32")
    assert found.history[-1]["accuracy"] == 1.0


def test_group_normalisation_is_recovered_in_the_layout_that_repairs_use() -> None:
    """In the channels-last layout this ended the whole process."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ).eval()
    images = CleanSet(torch.rand(16, 3, 8, 8, generator=generator(0)), torch.arange(16) % 2)
    to_faster_layout(model, images.x[:2])
    layers = find_channels(model, images.x[:2])
    found = recover(model, layers, images, RecoverSettings(passes=2), precision="fp32")
    assert torch.isfinite(found.mask).all()
    assert found.mask.shape == (8,)
