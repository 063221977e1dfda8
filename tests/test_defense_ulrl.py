"""ULRL: last layers, outliers among their neurons, fresh weights, and a victim that loses its backdoor."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import toys
from channel_cases import assert_as_found, images, snapshot
from debackdoor.defenses.ulrl import ULRL, find_heads, outliers, sum_changes
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.rnp.unlearn import UnlearnSettings
from defense_cases import check_holdout, check_manners, check_removed, check_settings, corner_set, corner_victim

QUICK = {"shift": 0.0, "batch_size": 20, "precision": "fp32"}

HEADS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), toys.pool(), nn.Linear(4, 2)), ("2",)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), toys.pool()), ("2",)),
    "two averaged": (toys.TwoHeads, ("heads.0.0", "heads.1.1")),
    "a norm on the logits": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), toys.pool(), nn.Linear(4, 2), nn.BatchNorm1d(2)), ("2",)
    ),
    "as many hidden neurons": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.ReLU(), nn.Linear(2, 2)), ("3",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_last_layers_are_found_from_outside(case: str) -> None:
    factory, expected = HEADS[case]
    model = factory().train()
    before = snapshot(model)
    assert find_heads(model, images()) == expected
    assert_as_found(model, before)


def test_a_network_whose_last_layer_has_no_plain_rows_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), toys.pool(), parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(ModelError, match=r"one row of weights for each of the 2 classes.*another defence"):
        find_heads(model, images())


@pytest.mark.parametrize(
    ("changes", "most", "expected"),
    [
        # Median 3, deviations 2 1 0 1 97, MAD 1: above 3 + 3.5 * 1.4826 = 8.19 is the last alone.
        ([1.0, 2.0, 3.0, 4.0, 100.0], 2, [4]),
        ([1.0, 2.0, 3.0, 4.0, 8.1], 2, []),
        ([1.0, 2.0, 3.0, 4.0, 8.2], 2, [4]),
        # One that changed far less than the others is none.
        ([10.0, 11.0, 12.0, 13.0, -100.0], 2, []),
        # Of three, the two that changed most, the first before.
        ([20.0, 1.0, 2.0, 3.0, 2.0, 40.0, 1.0, 30.0, 2.0], 2, [5, 7]),
        ([20.0, 1.0, 2.0, 3.0, 2.0, 40.0, 1.0, 30.0, 2.0], 1, [5]),
        # Most equal: the MAD is 0.
        ([1.0, 1.0, 1.0, 1.1], 2, [3]),
        ([1.0, 1.0], 2, []),
        # Two classes deviate equally.
        ([1.0, 9.0], 2, []),
    ],
)
def test_outliers_by_hand(changes: list[float], most: int, expected: list[int]) -> None:
    assert outliers(torch.tensor(changes), 3.5, most) == expected


def test_changes_are_summed_over_inputs_and_heads() -> None:
    before, after = (nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Conv2d(1, 2, 1)}) for _ in range(2))
    for model, a, b in ((before, [1, 2, 3, 4], [0, 0]), (after, [0, 4, 3, 5], [-5, 7])):
        toys.set_values(model["a"].weight, a)
        toys.set_values(model["b"].weight, b)
    assert sum_changes(before, after, ["a"]).tolist() == [3.0, 1.0]
    assert sum_changes(before, after, ["a", "b"]).tolist() == [8.0, 8.0]


def test_suspicious_neurons_alone_start_anew() -> None:
    """With a step size of almost nothing, what relearning starts from can be read off the result."""
    model, clean = corner_victim(), corner_set(40)
    toys.set_values(model[6].bias, [1, 2, 3, 4])
    still = {"lr": 1e-12, "epochs": 1, "threshold": 1e-6, **QUICK}
    result = ULRL(most=1, **still)(model, clean)
    changes = [row["change"] for row in result.history["changes"]]
    label = changes.index(max(changes))
    old, new = model[6], result.model[6]
    kept = [i for i in range(4) if i != label]
    assert torch.allclose(new.weight[kept], old.weight[kept], atol=1e-6)
    assert torch.allclose(new.bias[kept], old.bias[kept], atol=1e-6)
    assert abs(new.bias[label].item()) < 1e-6
    # Uniform within sqrt(2 / 32) = 0.25: of 32 draws, some on both sides and the largest close to it.
    fresh = new.weight[label]
    assert 0.2 < fresh.abs().max() <= 0.25
    assert fresh.min() < -0.1 < 0.1 < fresh.max()
    assert result.steps[1].reason == f"class neurons: {label}"
    assert torch.allclose(result.model[0].weight, model[0].weight, atol=1e-6)


def test_the_cosine_is_part_of_the_loss() -> None:
    """At the start of relearning, so in one epoch of one step, it is that of the fresh weights."""
    model, clean = corner_victim(), corner_set(20)
    model[5].p = 0.0
    quick = {"lr": 1e-12, "epochs": 1, "most": 1, "threshold": 1e-6, **QUICK}
    without, with_it = (ULRL(alpha=alpha, **quick)(model, clean) for alpha in (0.0, 2.0))
    label = int(without.steps[1].reason.split()[-1])
    cosine = nn.functional.cosine_similarity(without.model[6].weight[label], model[6].weight[label], dim=0)
    losses = [result.history["ulrl"][0]["loss"] for result in (without, with_it)]
    assert losses[1] - losses[0] == pytest.approx(2 * cosine.item(), abs=1e-5)


def test_without_an_outlier_the_model_is_fine_tuned() -> None:
    result = ULRL(threshold=1e9, **QUICK)(corner_victim(), corner_set(40))
    assert result.steps[1].numbers == {"neurons": 0}
    assert result.steps[1].reason == "class neurons: none"
    assert "restarted_accuracy" not in result.steps[2].numbers
    assert result.changed


def test_the_backdoor_goes() -> None:
    result = check_removed(ULRL(lr=0.05, threshold=1.0, **QUICK))
    assert [step.name for step in result.steps] == ["unlearn", "draw anew", "relearn"]
    assert set(result.history) == {"unlearn", "changes", "ulrl"}
    assert result.steps[1].reason == "class neurons: 0"
    clean = corner_set()
    share = (result.model(clean.x[clean.y == 0]).argmax(1) == 0).float().mean().item()
    assert result.steps[2].numbers["restarted_accuracy"] == pytest.approx(share)


def test_manners() -> None:
    brief = UnlearnSettings(lr=0.01, max_passes=2, least_steps=1, batch_size=20)
    check_manners(ULRL(epochs=2, unlearning=brief, **QUICK))
    check_holdout(ULRL(epochs=2, unlearning=brief, **QUICK))


def test_bad_settings_are_refused() -> None:
    check_settings(ULRL)
    for name in ("threshold", "most"):
        with pytest.raises(DebackdoorError, match=f"expected {name} above 0, got 0"):
            ULRL(**{name: 0})
    assert (ULRL().lr, ULRL().alpha, ULRL().threshold, ULRL().most, ULRL.name) == (0.005, 0.7, 3.5, 2, "ulrl")
    assert ULRL().unlearning.stop_accuracy == 0.2
