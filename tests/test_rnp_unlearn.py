"""Unlearning: where every step leads, why it stops, and what it leaves alone."""

import math
from collections.abc import Callable
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
from debackdoor.rnp.unlearn import Unlearned, UnlearnSettings, unlearn
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from rnp_cases import DIAL_LABELS, NAN, Dial, TwoPixels, dial_set, quadrant_set, quadrants, two_pixel_set

RIGHT = list(DIAL_LABELS)
HALF = [0, 0, 1, 1, 3, 3, 2, 2]  # accuracy 0.5, evenly spread
WRONG = [3, 3, 2, 2, 1, 1, 0, 0]  # accuracy 0, evenly spread
# One check a step, and one step a stage of Dial.
DIAL = UnlearnSettings(
    lr=1.0, momentum=0.0, weight_decay=0.0, clip=0.1, stop_accuracy=0.2, past_peak=None, check_every=1,
    largest_fall=1.0, max_passes=40, least_steps=1, batch_size=8, shift=0,
)  # fmt: skip


def turn(
    stages: list[list[int]], spy: Callable[[Dial], None] = lambda model: None, **changes: Any
) -> tuple[Unlearned, float]:
    """Unlearns a Dial and says where its parameter ended."""
    found = unlearn(Dial(stages, spy), dial_set(), replace(DIAL, **changes), precision="fp32")
    return found, float(found.model.t.detach())


def column(found: Unlearned, name: str) -> list[Any]:
    return [row[name] for row in found.history]


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


def test_it_stops_when_the_task_is_forgotten() -> None:
    found, t = turn([RIGHT, RIGHT, HALF, WRONG, WRONG])
    assert found.reason == "forgotten"
    assert t == pytest.approx(0.3, rel=1e-4)
    assert column(found, "accuracy") == [1.0, 0.5, 0.0]
    assert column(found, "step") == [1, 2, 3]
    assert found.accuracy == 0.0
    assert found.label_shares == [0.25] * 4
    assert not found.model.training


def test_the_target_itself_is_enough() -> None:
    found, _ = turn([RIGHT, HALF, WRONG], stop_accuracy=0.5)
    assert (found.reason, len(found.history)) == ("forgotten", 1)


def test_by_default_the_target_is_a_tenth_above_chance() -> None:
    """Four classes: 0.35. Three of eight right is above it, two of eight are not."""
    three_right, two_right = [0, 0, 1, 2, 3, 3, 0, 0], [0, 0, 2, 2, 3, 3, 0, 0]
    found, _ = turn([RIGHT, HALF, three_right, two_right, WRONG], stop_accuracy=None)
    assert column(found, "accuracy") == [0.5, 0.375, 0.25]
    assert found.reason == "forgotten"


def test_a_small_fit_part_gets_as_many_steps_as_a_large_one() -> None:
    found, _ = turn([RIGHT], max_passes=3, least_steps=7)
    assert (found.reason, column(found, "step")[-1]) == ("steps", 7)


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"check_every": 0}, {"batch_size": -1}, {"max_passes": 0}, {"clip": -1.0}]
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {next(iter(bad))} above 0"):
        replace(DIAL, **bad)


# Shares of label 2, and accuracies: 1/4 and 1, 1/2 and 3/4, 3/4 and 1/2, 5/8 and 5/8, 1/2 and 1/2, 1/4 and 1/2.
GATHERING = [
    RIGHT,
    [0, 0, 1, 1, 2, 2, 2, 2],
    [0, 2, 1, 2, 2, 2, 2, 2],
    [0, 2, 1, 1, 2, 2, 2, 2],
    [0, 3, 1, 0, 2, 2, 2, 2],
    HALF,
]


def test_answers_that_spread_again_bring_back_the_peak() -> None:
    found, t = turn(GATHERING, past_peak=0.2)
    assert found.reason == "piled up"
    assert [shares[2] for shares in column(found, "label_shares")] == [0.5, 0.75, 0.625, 0.5]
    assert t == pytest.approx(0.2, rel=1e-4)  # the peak, not where the last step led
    assert found.accuracy == column(found, "accuracy")[1] == 0.5
    assert found.label_shares == [0.125, 0.125, 0.75, 0.0]


def test_what_the_labels_are_is_no_peak() -> None:
    """Six of eight images have label 0, and as many answers at the start; half of these are on one label then."""
    uneven = dial_set().subset(torch.tensor([0, 1, 0, 1, 0, 1, 2, 4]))
    model = Dial([RIGHT, [1, 3, 1, 1, 2, 2, 3, 3], WRONG])
    found = unlearn(model, uneven, replace(DIAL, past_peak=0.2), precision="fp32")
    assert [max(shares) for shares in column(found, "label_shares")] == [0.5, 0.75]
    assert (found.reason, found.accuracy) == ("forgotten", 0.0)


def test_answers_that_spread_before_half_is_forgotten_do_not_stop_it() -> None:
    early = [RIGHT, [2, 0, 1, 1, 2, 2, 2, 3], RIGHT, RIGHT, WRONG]
    found, _ = turn(early, past_peak=0.2)
    assert column(found, "accuracy") == [0.75, 1.0, 1.0, 0.0]
    assert found.reason == "forgotten"


def test_without_past_peak_it_goes_on() -> None:
    found, t = turn(GATHERING, max_passes=5)
    assert found.reason == "steps"
    assert t == pytest.approx(0.5, rel=1e-4)
    assert found.label_shares == [0.25] * 4


def test_steps_run_out() -> None:
    found, t = turn([RIGHT], max_passes=3, batch_size=4)
    assert found.reason == "steps"
    assert column(found, "step") == [1, 2, 3, 4, 5, 6]
    assert t == pytest.approx(0.6, rel=1e-4)


def test_one_check_a_pass_and_a_step_size_that_decays() -> None:
    found, t = turn([RIGHT], max_passes=3, batch_size=4, check_every=None, decay_at=(1, 2))
    assert column(found, "step") == [2, 4, 6]
    assert t == pytest.approx(2 * (0.1 + 0.01 + 0.001), rel=1e-4)


def test_every_step_too_large_is_stuck() -> None:
    """The third step falls off the edge at t = 0.3; each half of the step size gets closer and falls off again."""
    found, t = turn([RIGHT, RIGHT, RIGHT, WRONG], largest_fall=0.3)
    assert found.reason == "stuck"
    assert column(found, "taken_back") == [False, False, True] + [False, True] * 10
    assert column(found, "lr")[2::2] == [2.0**-power for power in range(11)]
    assert t == pytest.approx(0.3 - 0.1 * 2.0**-10, rel=1e-4)
    assert found.accuracy == 1.0


def test_steps_taken_back_leave_no_trace() -> None:
    stages = [RIGHT, RIGHT, RIGHT, WRONG]
    before, _ = turn(stages, max_passes=2, largest_fall=0.3)
    after, _ = turn(stages, max_passes=3, largest_fall=0.3)
    assert column(after, "taken_back") == [False, False, True]
    assert column(after, "accuracy") == [1.0, 1.0, 0.0]
    assert after.accuracy == 1.0
    kept, found = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    assert int(found["norm.num_batches_tracked"]) == 2


def test_after_a_step_back_momentum_starts_afresh() -> None:
    """t goes 0.1, 0.29, 0.561 (over the edge), back to 0.29, and on by half a first step."""
    found, t = turn([RIGHT] * 5 + [WRONG], momentum=0.9, largest_fall=0.3, max_passes=4)
    assert column(found, "taken_back") == [False, False, True, False]
    assert column(found, "lr") == [1.0, 1.0, 1.0, 0.5]
    assert t == pytest.approx(0.29 + 0.05, rel=1e-4)


def test_a_fall_is_allowed_up_to_its_limit() -> None:
    found, _ = turn([RIGHT, HALF, WRONG], largest_fall=0.5)
    assert column(found, "taken_back") == [False, False]
    assert found.reason == "forgotten"


@pytest.mark.parametrize("largest_fall", [0.3, 1.0])
def test_a_model_that_breaks_down_is_never_returned(largest_fall: float) -> None:
    found, t = turn([RIGHT, RIGHT, [NAN] * 8], largest_fall=largest_fall, max_passes=60)
    assert found.reason == "stuck"
    assert found.accuracy == 1.0
    assert t == pytest.approx(0.2 - 0.1 * 2.0**-10, rel=1e-4)


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


def test_as_published_it_stops_by_the_accuracy_over_the_pass() -> None:
    """A pass has two steps; the first is right throughout, the second in half, and the check sees what comes after."""
    settings = {"check_every": 2, "stop_accuracy": 0.75}
    stages = [RIGHT, HALF, WRONG, WRONG, WRONG]
    checked, _ = turn(stages, **settings)
    assert (checked.reason, column(checked, "step")) == ("forgotten", [2])
    over_the_pass, _ = turn(stages, **settings, running=True)
    assert (over_the_pass.reason, column(over_the_pass, "step")) == ("forgotten", [2])
    later, _ = turn(stages, check_every=2, stop_accuracy=0.7, running=True)
    assert (later.reason, column(later, "step")) == ("forgotten", [2, 4])
    assert column(later, "accuracy") == [0.0, 0.0]
    assert later.accuracy == 0.0


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
