"""I-BAU: the hypergradient on losses that can be differentiated on paper, and a shortcut that is unlearned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.data import split_clean
from debackdoor.defenses.ibau import IBAU, hypergradient
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from shortcut_cases import CLASSES, SIZE, row_images
from unlearning_cases import Spy, check_is_a_copy, check_leaves_the_model_alone, right, success, victim

QUICK = {
    "rounds": 2, "lr": 0.02, "search_lr": 0.3, "search_passes": 2, "batch_size": 16, "share": 0.25, "precision": "fp32",
}  # fmt: skip


@pytest.mark.parametrize(("steps", "series"), [(1, 1.0), (2, 1.8), (3, 2.44), (200, 5.0)])
def test_the_hypergradient_of_parabolas(steps: int, series: float) -> None:
    """d minimises d^2 + 3 w d, so that H is 2 and lr H is 0.2: the series is the sum of 0.8^k, in the end 1 / 0.2.

    The outer loss 7 d + w^2 / 2 pulls with 7 at d and with w = 4 at the weight; the mixed derivative is 3. At the end
    d = -3 w / 2, and the gradient of -7 * 3 w / 2 + w^2 / 2 is -6.5.
    """
    d, w, idle = (torch.tensor(value, requires_grad=True) for value in (1.5, 4.0, 1.0))
    inner, outer = d**2 + 3 * w * d, 7 * d + w**2 / 2
    found, none = hypergradient(inner, outer, d, [w, idle], steps, lr=0.1)
    assert found is not None
    assert float(found) == pytest.approx(4 - 0.1 * 7 * series * 3, rel=1e-5)
    assert steps < 200 or float(found) == pytest.approx(-6.5)
    assert none is None


def test_the_hypergradient_in_several_dimensions() -> None:
    """d minimises d A d / 2 + d B w: it is -A^-1 B w, and the gradient of g d is -B' A^-1 g."""
    root, b, g = (torch.rand(shape, generator=generator(1)) for shape in ((3, 3), (3, 2), (3,)))
    a = root @ root.T + torch.eye(3)
    d, w = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    (found,) = hypergradient(d @ a @ d / 2 + d @ b @ w, g @ d, d, [w], steps=400, lr=0.2)
    assert torch.allclose(found, -b.T @ torch.linalg.solve(a, g), atol=1e-4)


def test_a_shortcut_is_unlearned_and_the_classes_stay() -> None:
    model = victim()
    assert success(model) == right(model, row_images()) == 1.0
    result = IBAU(**QUICK)(model, row_images())
    assert success(result.model) <= 0.05
    assert right(result.model, row_images()) == 1.0
    assert result.clean_accuracy == {"before": 1.0, "after": 1.0}
    assert result.changed
    assert result.steps[0].numbers == {"accuracy": 1.0}
    rows = result.history["unlearn"]
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[0]["flipped"] == 0.75  # the switch: all images of the other three labels


def test_as_many_steps_without_a_perturbation_unlearn_nothing() -> None:
    model, clean = victim(), row_images()
    optimizer = torch.optim.Adam(model.parameters(), QUICK["lr"])
    for _ in range(2 * 3):
        optimizer.zero_grad()
        F.cross_entropy(model(clean.x), clean.y).backward()
        optimizer.step()
    assert success(model) == 1.0


@pytest.mark.parametrize("search", ["sgd", "adam"])
def test_the_perturbation_misleads_and_a_regulariser_keeps_it_small(search: str) -> None:
    """All images of the other three labels flip, three in four of all."""
    settings = {**QUICK, "search": search, "search_passes": 3, "rounds": 1}
    free, held = (
        IBAU(**settings, regulariser=value)(victim(), row_images()).history["unlearn"][0] for value in (1e-3, 1.0)
    )
    assert free["flipped"] == 0.75
    assert held["norm"] < free["norm"]


def differing(heard: list[tuple[bool, Tensor]], images: CleanSet) -> list[int]:
    """For every call with gradients, how many images are not among the clean ones."""
    return [int((x.flatten(1)[:, None] != images.x.flatten(1)).any(2).all(1).sum()) for _, x in heard]


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.01, 1), (0.25, 12), (1.0, 48)])
def test_at_least_one_image_of_a_batch_is_perturbed(share: float, count: int) -> None:
    """The calls: what it says of a few, judges and fit, the search, what flips (twice), the two losses, judges."""
    spy = Spy(victim())
    IBAU(rounds=1, share=share, precision="fp32")(spy, row_images())
    assert differing(spy.heard, row_images()) == [0, 0, 0, 0, 0, 48, count, 48, 0]
    assert not any(training for training, _ in spy.heard)


@pytest.mark.parametrize("clamp", [True, False])
def test_perturbed_images_are_images_only_where_asked(clamp: bool) -> None:
    spy = Spy(victim())
    IBAU(rounds=1, share=1.0, clamp=clamp, precision="fp32")(spy, row_images())
    assert all(0 <= float(x.min()) <= float(x.max()) <= 1 for _, x in spy.heard) is clamp


def test_images_can_be_held_out() -> None:
    spy, clean = Spy(victim()), row_images()
    result = IBAU(rounds=1, holdout=0.25, seed=3, precision="fp32")(spy, clean)
    fit, judges = split_clean(clean, 0.25, 3)
    assert [len(x) for _, x in spy.heard] == [32, 12, *[36] * 6, 12]
    assert torch.equal(spy.heard[1][1], judges.x)
    assert torch.equal(spy.heard[2][1], fit.x)
    assert result.clean_accuracy["after"] == right(result.model, judges)


class Attention(nn.Module):
    """Two heads of fused attention over the columns, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(SIZE, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x[:, 0].transpose(1, 2)).unflatten(2, (2, 4)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.head(attended.transpose(1, 2).flatten(2).mean(1))


def test_attention_is_not_fused_where_it_is_differentiated_twice() -> None:
    model, clean = Attention().eval(), row_images()
    result = IBAU(rounds=1, precision="fp32")(model, clean)
    check_is_a_copy(model, result)
    moved = (result.model.embed.weight - model.embed.weight).detach().abs()
    assert float(moved.max()) == pytest.approx(1e-3, rel=0.01)  # one step of Adam moves every weight by its step size


def test_the_callers_model_is_left_alone_and_the_seed_decides() -> None:
    check_leaves_the_model_alone(IBAU(**QUICK), IBAU(**QUICK), IBAU(**QUICK, seed=1))


def test_the_defaults_are_the_published_ones() -> None:
    assert IBAU.name == "i-bau"
    assert IBAU() == IBAU(
        rounds=5, lr=1e-3, batch_size=100, share=0.01, regulariser=1e-3, search="sgd", search_lr=10.0, search_passes=1,
        inner_lr=0.1, fixed_point_steps=5, clamp=False, holdout=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["rounds", "lr", "batch_size", "regulariser", "search_lr", "search_passes", "inner_lr", "fixed_point_steps"],
)
def test_settings_of_zero_are_refused(name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"{name} above 0, got 0"):
        IBAU(**{name: 0})


@pytest.mark.parametrize("name", ["share", "holdout"])
def test_shares_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {name} from 0 to 1, got 1.5"):
        IBAU(**{name: 1.5})


def test_an_unknown_search_is_refused() -> None:
    with pytest.raises(DebackdoorError, match="expected search to be one of sgd, adam, got 'lbfgs'"):
        IBAU(search="lbfgs")


def test_a_network_without_logits_is_refused() -> None:
    with pytest.raises(DebackdoorError, match="logits of shape"):
        IBAU()(nn.Identity(), row_images())


def test_a_step_size_that_is_far_too_large_is_told_of() -> None:
    with pytest.raises(ModelError, match=r"finite loss, got (nan|inf) in round \d+.*smaller step size"):
        IBAU(**(QUICK | {"lr": 1e36}))(victim(), row_images())
