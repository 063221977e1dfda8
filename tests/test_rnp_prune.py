"""Ranking, choosing and removing channels."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import toys
from channel_cases import assert_as_found, snapshot
from debackdoor.channels import MaskableLayer, find_channels
from debackdoor.errors import ModelError
from debackdoor.rnp.prune import Cost, below, plan_mask, prune, rank, spared
from debackdoor.types import Plan, PlannedChannel

LAYERS = (MaskableLayer("first", "norm", 2, ("first.weight",)), MaskableLayer("second", "norm", 3, ("second.weight",)))


def ranking_of(count: int) -> Plan:
    return tuple(PlannedChannel("layer", index, index / max(count, 1)) for index in range(count))


def test_the_lowest_score_comes_first_and_ties_are_broken_by_the_second_number() -> None:
    scores = torch.tensor([1.0, 0.0, 1.0, 0.25, 0.0])
    ties = torch.tensor([0.75, 0.5, 0.25, 1.0, 0.125])
    assert rank(LAYERS, scores, ties) == (
        PlannedChannel("second", 2, 0.0),
        PlannedChannel("first", 1, 0.0),
        PlannedChannel("second", 1, 0.25),
        PlannedChannel("second", 0, 1.0),
        PlannedChannel("first", 0, 1.0),
    )


def test_channels_equal_in_both_keep_their_order() -> None:
    found = rank(LAYERS, torch.ones(5), torch.ones(5))
    assert [(channel.layer, channel.index) for channel in found] == [
        ("first", 0), ("first", 1), ("second", 0), ("second", 1), ("second", 2),
    ]  # fmt: skip


def test_below_takes_the_threshold_itself() -> None:
    ranking = ranking_of(4)  # scores 0, 0.25, 0.5, 0.75
    assert below(ranking, 0.5) == ranking[:3]
    assert below(ranking, 0.0) == ranking[:1]
    assert below(ranking, 0.499) == ranking[:2]
    assert below(ranking, 1.0) == ranking
    assert below((), 1.0) == ()


class Costs:
    """What pruning costs where every channel has its own price: a fall of accuracy and a rise of the loss."""

    def __init__(self, falls: Sequence[float], rises: Sequence[float]) -> None:
        self.falls, self.rises = falls, rises
        self.asked: list[Plan] = []

    def __call__(self, plan: Plan) -> Cost:
        self.asked.append(plan)
        indices = [channel.index for channel in plan]
        return Cost(1 - sum(self.falls[i] for i in indices), 0.5 + sum(self.rises[i] for i in indices))


def spared_one_by_one(falls: Sequence[float], rises: Sequence[float], budget: float) -> list[int]:
    """The rule in its plainest form, for costs that add up."""
    taken: list[int] = []
    for index, (fall, rise) in enumerate(zip(falls, rises, strict=True)):
        if rise <= budget / 8 and fall + sum(falls[i] for i in taken) <= budget:
            taken.append(index)
    return taken


@pytest.mark.parametrize("group", [1, 2, 3, 8, 100])
def test_what_the_clean_task_can_spare_does_not_depend_on_groups_where_costs_add_up(group: int) -> None:
    choices = random.Random(group)
    for _ in range(100):
        count = choices.randrange(40)
        # Multiples of powers of two, so that sums are exact.
        falls = [choices.choice([0, 0, 0, 1, 4, 9]) / 64 for _ in range(count)]
        rises = [choices.choice([0, 0, 1, 2, 3, 20]) / 64 for _ in range(count)]
        found = spared(ranking_of(count), Costs(falls, rises), 0.25, group=group)
        assert [channel.index for channel in found] == spared_one_by_one(falls, rises, 0.25)


def test_a_channel_that_is_needed_is_passed_over_and_those_behind_it_are_not() -> None:
    costs = Costs([0, 0.5, 0, 0, 0], [0, 0, 0, 2.0, 0])
    told: list[tuple[Any, ...]] = []
    found = spared(ranking_of(5), costs, 0.1, group=4, progress=lambda *call: told.append(call[:3]))
    assert [channel.index for channel in found] == [0, 2, 4]
    assert told[-1] == ("prune", 5, 5)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert costs.asked[0] == ()


def test_a_channel_whose_loss_helps_lowers_the_bar_for_the_next() -> None:
    """The first brings the loss from 0.5 to 0.25; 0.25 more for the second is too much, though no more than before."""
    found = spared(ranking_of(2), Costs([0, 0], [-0.25, 0.25]), 0.1, group=1)
    assert [channel.index for channel in found] == [0]


def test_a_fall_of_exactly_the_budget_is_within_it() -> None:
    for right in range(5, 251):
        found = spared(ranking_of(1), lambda plan, right=right: Cost((right - 5 * len(plan)) / 250, 0.0), 0.02)
        assert len(found) == 1, right
    assert spared(ranking_of(1), lambda plan: Cost(1 - 6 / 250 * len(plan), 0.0), 0.02) == ()
    assert spared(ranking_of(3), Costs([0, 0.01, 0], [0, 0, 0]), 0.0) == (ranking_of(3)[0], ranking_of(3)[2])
    assert spared((), Costs([], []), 0.02) == ()


def test_few_plans_are_measured_where_most_are_free() -> None:
    costs = Costs([0] * 800, [0] * 799 + [1.0])
    assert len(spared(ranking_of(800), costs, 0.02, group=8)) == 799
    # The start, every group, and the first halves of the last; its second halves make it whole again.
    assert len(costs.asked) == 1 + math.ceil(800 / 13) + 3  # of 800 channels no more than 64 groups
    assert len({frozenset(plan) for plan in costs.asked}) == len(costs.asked)


def test_of_many_channels_that_are_needed_few_plans_are_measured() -> None:
    """Of the groups that come late, those without a needed channel are taken, and the others passed over whole."""
    needed = [index % 2 or index // 100 % 2 for index in range(6400)]
    costs = Costs([0] * 6400, needed)
    found = [channel.index for channel in spared(ranking_of(6400), costs, 0.02, group=8, most=512)]
    assert len(costs.asked) <= 512 + 64
    assert found[:50] == list(range(0, 100, 2))
    assert not any(needed[index] for index in found)
    free = Costs([0] * 6400, [0] * 6400)
    assert len(spared(ranking_of(6400), free, 0.02)) == 6400
    assert len(free.asked) == 1 + 64


def test_a_plans_mask_is_zero_at_its_places() -> None:
    plan = (PlannedChannel("second", 1, 0.0), PlannedChannel("first", 0, 0.5))
    assert plan_mask(LAYERS, plan).tolist() == [0, 1, 1, 0, 1]
    assert plan_mask(LAYERS, ()).tolist() == [1] * 5
    with pytest.raises(ModelError, match="third"):
        plan_mask(LAYERS, (PlannedChannel("third", 0, 0.0),))
    with pytest.raises(ModelError, match="0 to 1, got 2"):
        plan_mask(LAYERS, (PlannedChannel("first", 2, 0.0),))


# Each toy with one channel to prune, the zeros that this leaves, and its logits on images of ones, worked out.
CASES: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], PlannedChannel, dict[str, list], list[float]]] = {
    # Norm (0 * 1 + 1, 3 * -2 + 10) = (1, 4): the bias is kept.
    "norm": (
        toys.conv_norm, (1, 1, 1), PlannedChannel("1", 0, 0.0), {"1.weight": [0, 3], "1.bias": [1, 10]}, [5, -3]
    ),
    # Convolution (4, 0): weight and bias are gone.
    "convolution": (
        toys.conv_plain, (1, 1, 1), PlannedChannel("0", 1, 0.0), {"0.weight": [1, 0], "0.bias": [3, 0]}, [4, 4]
    ),
    # Stored as (inputs, outputs): outputs (1 + 3 + 1, 0).
    "transposed convolution": (
        toys.conv_transposed, (2, 1, 1), PlannedChannel("0", 1, 0.0),
        {"0.weight": [1, 0, 3, 0], "0.bias": [1, 0]}, [5, 5],
    ),
    # On the image (1, 1): hidden relu(0, 1 - 1 + 4) = (0, 4).
    "hidden neuron": (
        toys.mlp, (1, 1, 2), PlannedChannel("1", 0, 0.0), {"1.weight": [0, 0, 1, -1], "1.bias": [0, 4]}, [4, -4]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pruning_sets_exactly_these_places_to_zero(case: str) -> None:
    factory, shape, channel, changed, logits = CASES[case]
    model = factory().train()
    ones = torch.ones(1, *shape)
    layers = find_channels(model, ones)
    before = snapshot(model)
    pruned = prune(model, layers, (channel,))
    assert_as_found(model, before)
    assert pruned is not model
    assert pruned.training
    for name, value in pruned.state_dict().items():
        if name in changed:
            assert value.flatten().tolist() == changed[name]
        else:
            assert torch.equal(value, before["tensors"][name])
    assert pruned.eval()(ones)[0].tolist() == logits
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_an_empty_plan_changes_no_bit() -> None:
    model = toys.conv_norm().double()
    model[1].weight.data = torch.tensor([-0.0, 1e-310], dtype=torch.float64)
    layers = find_channels(model, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    pruned = prune(model, layers, ())
    for name, value in model.state_dict().items():
        found = pruned.state_dict()[name]
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
    assert torch.equal(pruned[1].weight.signbit(), model[1].weight.signbit())


def test_a_plan_of_another_model_is_refused() -> None:
    model = toys.conv_norm()
    layers = find_channels(model, torch.ones(1, 1, 1, 1))
    with pytest.raises(ModelError, match="layer1"):
        prune(model, layers, (PlannedChannel("layer1.bn1", 0, 0.0),))
