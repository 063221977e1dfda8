"""The blind rule: the strongest level that costs no more than the budget, measured with masks."""

from math import nan

import pytest
import torch
from torch import nn

from debackdoor.channels import MaskableLayer, find_channels
from debackdoor.defenses.base import differ
from debackdoor.defenses.levels import (
    DEVIATIONS,
    Choice,
    Level,
    below_levels,
    cost,
    outlier_levels,
    pruned_result,
    pruning_step,
    rank_outliers,
    strongest,
)
from debackdoor.rnp.prune import prune
from debackdoor.types import CleanSet, Plan, PlannedChannel, Step
from prune_cases import BAD, NORMED, clean_images, victim
from rnp_cases import NAN, Dial, dial_set


def plan(count: int) -> Plan:
    return tuple(PlannedChannel("layer", index, 0.0) for index in range(count))


class Measure:
    """Accuracy by number of pruned channels, and what was asked for."""

    def __init__(self, *accuracies: float) -> None:
        self.accuracies, self.asked = accuracies, list[int]()

    def __call__(self, found: Plan) -> float:
        self.asked.append(len(found))
        return self.accuracies[len(found)]


LEVELS = tuple(Level(count / 10, plan(count)) for count in range(1, 5))


@pytest.mark.parametrize(
    ("budget", "value", "after"), [(0.0, None, 0.9), (0.01, 0.1, 0.89), (0.05, 0.3, 0.87), (0.4, 0.4, 0.5)]
)
def test_the_strongest_level_within_the_budget(budget: float, value: float | None, after: float) -> None:
    choice = strongest(LEVELS, Measure(0.9, 0.89, 0.84, 0.87, 0.5), budget)
    assert (None if choice.level is None else choice.level.value) == value
    assert (choice.before, choice.after) == (0.9, after)
    assert choice.plan == (() if value is None else plan(round(value * 10)))


def test_a_fall_of_exactly_the_budget_is_within_it() -> None:
    assert 0.9 - 0.88 > 0.02  # what binary fractions make of it
    assert strongest(LEVELS[:1], Measure(0.9, 0.88), 0.02).level is LEVELS[0]


def test_the_search_ends_at_the_first_level_that_fits() -> None:
    heard: list[tuple[int, int, float]] = []
    measure = Measure(0.9, 0.0, 0.89, 0.5, 0.4)
    choice = strongest(
        LEVELS,
        measure,
        0.02,
        progress=lambda stage, done, total, numbers: heard.append((done, total, *numbers.values())),
    )
    assert measure.asked == [0, 4, 3, 2]
    assert choice.history == [
        {"level": 0.2, "channels": 2, "accuracy": 0.89},
        {"level": 0.3, "channels": 3, "accuracy": 0.5},
        {"level": 0.4, "channels": 4, "accuracy": 0.4},
    ]
    assert heard == [(1, 4, 0.4), (2, 4, 0.5), (3, 4, 0.89)]


def test_equal_plans_are_measured_once() -> None:
    levels = (Level(1, ()), Level(2, plan(1)), Level(3, plan(2)), Level(4, plan(2)))
    measure = Measure(0.9, 0.5, 0.5)
    choice = strongest(levels, measure, 0.02)
    assert measure.asked == [0, 2, 1]
    assert choice.level is levels[0]
    assert [row["accuracy"] for row in choice.history] == [0.9, 0.5, 0.5, 0.5]


def test_no_level_prunes_nothing() -> None:
    choice = strongest((), Measure(0.9), 0.02)
    assert (choice.level, choice.plan, choice.after, choice.history) == (None, (), 0.9, [])
    assert "level" not in pruning_step(choice, "rule").numbers


def test_masks_cost_what_pruning_costs() -> None:
    model, clean = victim(), clean_images()
    layers = find_channels(model, clean.x[:2])
    measure = cost(model, layers, clean, "fp32")
    for indices in ((), (BAD,), range(7), range(7, 15), range(16)):
        going = tuple(PlannedChannel(NORMED, index, 0.0) for index in indices)
        with torch.no_grad():
            logits = prune(model, layers, going)(clean.x)
        assert measure(going) == float((logits.argmax(1) == clean.y).double().mean())
    # With no channel left, every image gets the first class.
    assert measure(tuple(PlannedChannel(NORMED, index, 0.0) for index in range(16))) == 0.5


def test_an_answer_that_is_not_finite_is_wrong() -> None:
    answers = [0, 0, 1, NAN, 2, 2, 3, 0]
    model, clean = Dial([answers]).eval(), dial_set()
    layers = (MaskableLayer("norm", "norm", 1, ("norm.weight",)),)
    assert cost(model, layers, clean, "fp32")(()) == 6 / 8


def test_outliers_are_ranked_by_their_own_layers_spread() -> None:
    """Deviations of a sample: of (0, 0, 0, 4) the mean is 1 and the deviation 2, of (1, 2, 3) they are 2 and 1."""
    layers = find_channels(
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)),
        torch.zeros(1, 1, 1, 1),
    )
    values = [torch.tensor([0.0, 4.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])]
    ranking = rank_outliers(layers, values, [torch.ones(4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)])
    assert [(c.layer, c.index, c.score) for c in ranking] == [
        ("0", 1, -1.5), ("2", 2, -1.0), ("2", 1, 0.0), ("0", 0, 0.5), ("0", 2, 0.5), ("0", 3, 0.5), ("2", 0, 1.0),
    ]  # fmt: skip
    assert [len(level.plan) for level in outlier_levels(ranking, (2.0, 1.5, 1.25, 1.0, 0.5))] == [0, 0, 1, 1, 2]
    assert below_levels(ranking, (-1.5, 0.0)) == (Level(-1.5, ranking[:1]), Level(0.0, ranking[:3]))


def test_dead_channels_are_neither_compared_nor_pruned() -> None:
    layers = find_channels(victim(), clean_images().x[:2])
    values, alive = torch.full((16,), 1.0), torch.ones(16, dtype=torch.bool)
    values[[0, 1, 2]], alive[[0, 1]] = torch.tensor([torch.inf, nan, 3.0]), False
    ranking = rank_outliers(layers, [values], [alive])
    assert len(ranking) == 14
    assert ranking[0].index == 2
    # The furthest that one of n can be above the mean of a sample is (n - 1) / sqrt(n).
    assert ranking[0].score == pytest.approx(-13 / 14**0.5)


@pytest.mark.parametrize("living", [0, 1])
def test_a_layer_of_less_than_two_live_channels_is_left_alone(living: int) -> None:
    layers = find_channels(victim(), clean_images().x[:2])
    assert rank_outliers(layers, [torch.arange(16.0)], [torch.arange(16) < living]) == ()


def test_equal_channels_do_not_deviate() -> None:
    layers = find_channels(victim(), clean_images().x[:2])
    ranking = rank_outliers(layers, [torch.full((16,), 0.1)], [torch.ones(16, dtype=torch.bool)])
    assert {channel.score for channel in ranking} == {0.0}
    assert outlier_levels(ranking, DEVIATIONS)[-1].plan == ()


def test_deviations_go_from_gentle_to_strong() -> None:
    assert DEVIATIONS == (
        10.0,
        9.5,
        9.0,
        8.5,
        8.0,
        7.5,
        7.0,
        6.5,
        6.0,
        5.5,
        5.0,
        4.5,
        4.0,
        3.5,
        3.0,
        2.5,
        2.0,
        1.5,
        1.0,
        0.5,
    )


@pytest.mark.parametrize("part", ["weight", "buffer"])
def test_whether_a_model_differ(part: str) -> None:
    one, two = victim(), victim()
    assert not differ(one, two)
    with torch.no_grad():
        (two[4].bias if part == "weight" else two[1].running_mean)[0] += 1
    assert differ(one, two)


def test_what_a_pruning_defence_returns() -> None:
    model, layers = victim(), find_channels(victim(), clean_images().x[:2])
    going = (PlannedChannel(NORMED, BAD, -3.0),)
    choice = Choice(Level(3.0, going), 1.0, 0.75, [{"level": 3.0, "channels": 1, "accuracy": 0.75}])
    result = pruned_result(model, layers, choice, Step("rank", "why"), "rule", {"mask": []})
    assert result.model[1].weight.tolist() == [1.0] * BAD + [0.0]
    assert result.plan == going
    assert result.clean_accuracy == {"before": 1.0, "after": 0.75}
    assert result.changed
    assert result.verification is None
    assert result.history == {"mask": [], "levels": choice.history}
    assert result.steps[1] == Step("prune", "rule", {"channels": 1.0, "accuracy": 0.75, "level": 3.0})
    with torch.no_grad():
        model[1].weight[BAD] = 0
    assert not pruned_result(model, layers, choice, Step("rank", "why"), "rule").changed


def test_the_model_is_not_changed_by_measuring() -> None:
    model, clean = victim(), clean_images()
    layers = find_channels(model, clean.x[:2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost(model, layers, CleanSet(clean.x, clean.y), "bf16")((PlannedChannel(NORMED, 0, 0.0),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
