"""Trigger search on classifiers whose smallest trigger is known."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from channel_cases import assert_as_found, snapshot
from debackdoor.detectors.trigger import RecoveredTrigger, SearchSettings, _Search, search_triggers
from debackdoor.types import CleanSet
from toys import set_values

SETTINGS = SearchSettings(steps=200, lr=0.1, cost=1e-3, success=0.9, batch_size=8)
SWITCH, BLOCK = 5, 10


def one_pixel_backdoor() -> nn.Sequential:
    """On 1x4x4 images: pixel 0 says class 0, pixel 15 class 1, and ``SWITCH`` class 2, unless ``BLOCK`` is bright.

    Logits 4 x0, 4 x15 and 20 xS - 8 - 100 xB: with the switch at 1 the third is 12, above the other two.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    weight = torch.zeros(3, 16)
    weight[0, 0], weight[1, 15], weight[2, SWITCH], weight[2, BLOCK] = 4, 4, 20, -100
    set_values(model[1].weight, weight.flatten().tolist())
    set_values(model[1].bias, [0, 0, -8])
    return model.eval()


def images(blocked: int = 0, third: int = 0) -> CleanSet:
    """Twelve images of classes 0 and 1, of which ``blocked`` are bright at ``BLOCK``, and ``third`` of class 2."""
    x, y = torch.zeros(12 + third, 16), torch.zeros(12 + third, dtype=torch.int64)
    x[:6, 0] = 1
    x[6:12, 15] = y[6:12] = 1
    x[:blocked, BLOCK] = 1
    x[12:, SWITCH] = 1
    y[12:] = 2
    return CleanSet(x.view(-1, 1, 4, 4), y)


def test_the_smallest_trigger_is_one_pixel() -> None:
    model = one_pixel_backdoor()
    (found,) = search_triggers(model, images(), images(), [2], SETTINGS, precision="fp32")
    mask, pattern = found.mask.flatten(), found.pattern.flatten()
    assert found.label == 2
    # The switch has to reach (8 + 4) / 20 where no other pixel is touched.
    assert 0.5 < float(mask[SWITCH] * pattern[SWITCH]) <= 1.0
    assert 0.5 < found.l1 < 1.5
    assert float(mask.sum() - mask[SWITCH]) < 0.5
    assert found.l1 == pytest.approx(float(mask.sum()))
    assert found.success_rate == 1.0
    assert found.mask.shape == found.pattern.shape == (1, 4, 4)
    assert 0 <= float(torch.stack([mask, pattern]).min()) <= float(torch.stack([mask, pattern]).max()) <= 1
    assert model(found.apply(images().x)).argmax(1).tolist() == [2] * 12


def test_the_success_rate_is_the_share_of_other_labels_hold_out_images() -> None:
    """Three of twelve are blocked; the five that have the label already do not count."""
    (found,) = search_triggers(
        one_pixel_backdoor(), images(), images(blocked=3, third=5), [2], SETTINGS, precision="fp32"
    )
    assert found.success_rate == 9 / 12


def test_labels_are_searched_for_together_and_come_back_in_order() -> None:
    found = search_triggers(one_pixel_backdoor(), images(), images(), [1, 2, 0], SETTINGS, precision="fp32")
    assert [trigger.label for trigger in found] == [1, 2, 0]
    # Towards class 1 the other class's pixel has to lose to pixel 15: two pixels or a bright one.
    assert [int(trigger.mask.flatten().argmax()) for trigger in found][1] == SWITCH
    assert all(trigger.success_rate == 1.0 for trigger in found)


def test_the_smallest_trigger_that_worked_is_kept() -> None:
    """The search goes on to smaller masks that fail and to larger ones that work; neither replaces the best."""
    pixels: list[float] = []
    (found,) = search_triggers(
        one_pixel_backdoor(), images(), images(), [2], SETTINGS, precision="fp32",
        progress=lambda stage, done, total, numbers: pixels.append(numbers["pixels"]),
    )  # fmt: skip
    assert pixels[0] == float("inf")
    assert all(later <= earlier for earlier, later in pairwise(pixels))
    assert found.l1 == pytest.approx(pixels[-1])


def test_where_no_trigger_works_the_rate_says_so() -> None:
    model = one_pixel_backdoor()
    set_values(model[1].bias, [0, 0, -1000])
    (found,) = search_triggers(model, images(), images(), [2], SearchSettings(steps=5), precision="fp32")
    assert found.success_rate == 0.0
    assert 0 < found.l1 < 16
    assert found.l1 == pytest.approx(float(found.mask.sum()))


def test_the_model_is_left_alone_and_the_seed_decides() -> None:
    model = one_pixel_backdoor()
    model[1].weight.grad = torch.ones(3, 16)
    before = snapshot(model)
    heard = []
    settings = SearchSettings(steps=12)
    one, two, other = (
        search_triggers(
            model, images(), images(), [2, 0], settings, seed=seed, progress=lambda *report: heard.append(report)
        )
        for seed in (1, 1, 2)
    )
    assert_as_found(model, before)
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first.mask, second.mask)
        assert torch.equal(first.pattern, second.pattern)
    assert not torch.equal(one[0].pattern, other[0].pattern)
    assert [(stage, done, total) for stage, done, total, _ in heard] == 3 * [
        ("search trigger", done, 12) for done in (10, 12)
    ]


def test_a_trigger_is_put_on_by_its_mask() -> None:
    mask = torch.tensor([[[0.0, 0.5], [1.0, 0.25]]])
    pattern = torch.tensor([[[1.0, 1.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    trigger = RecoveredTrigger(0, mask, pattern, 1.0, 1.75)
    stamped = trigger.apply(torch.full((2, 2, 2, 2), 0.2))
    wanted = torch.tensor([[[0.2, 0.6], [0.5, 0.15]], [[0.2, 0.1], [0.0, 0.4]]])
    torch.testing.assert_close(stamped, torch.stack([wanted, wanted]))


def costs_after(answers: list[bool], settings: SearchSettings) -> list[float]:
    """What the cost of a trigger is after each step that it works at, or does not."""
    search = _Search(one_pixel_backdoor(), images(), [2], settings, 0, "fp32")
    costs = []
    for works in answers:
        search._change_cost(torch.tensor([works]))
        costs.append(search.cost.item())
    return costs


def test_the_cost_changes_after_as_many_steps_in_a_row_as_patience_says() -> None:
    """After five, and again after another five; a step that differs begins a new row."""
    patient = SearchSettings(cost=1.0, patience=5, raise_by=2.0, lower_by=4.0)
    assert costs_after([True] * 11, patient) == [1.0] * 4 + [2.0] * 5 + [4.0] * 2
    assert costs_after([False] * 11, patient) == [1.0] * 4 + [0.25] * 5 + [0.0625] * 2
    assert costs_after(([True] * 4 + [False]) * 3, patient) == [1.0] * 15
    assert costs_after([True] * 4 + [False] * 5 + [True] * 5, patient) == [1.0] * 8 + [0.25] * 5 + [0.5]


def test_without_patience_the_cost_changes_at_every_step() -> None:
    hasty = SearchSettings(cost=1.0, raise_by=2.0, lower_by=4.0)
    assert costs_after([True, True, False, True], hasty) == [2.0, 4.0, 1.0, 2.0]


def test_every_label_has_its_own_cost() -> None:
    settings = SearchSettings(cost=1.0, patience=2, raise_by=2.0, lower_by=4.0)
    search = _Search(one_pixel_backdoor(), images(), [0, 1, 2], settings, 0, "fp32")
    search._change_cost(torch.tensor([True, False, True]))
    search._change_cost(torch.tensor([True, False, False]))
    assert search.cost.tolist() == [2.0, 0.25, 1.0]
