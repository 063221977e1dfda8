"""NAD: where attention is taken, what it is, hooks that come off, and a victim that loses its backdoor."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toys
from channel_cases import assert_as_found, images, snapshot
from debackdoor.defenses import FineTuning
from debackdoor.defenses.nad import NAD, Place, attention, find_places, watching
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.models.normalize import Normalized
from debackdoor.models.resnet import resnet18
from defense_cases import (
    CallerError,
    check_holdout,
    check_manners,
    check_removed,
    check_settings,
    corner_set,
    corner_victim,
)

QUICK = {"shift": 0.0, "batch_size": 20, "precision": "fp32"}


class SharedActivation(nn.Module):
    """One ReLU behind both convolutions, as in torchvision's networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 2, stride=2)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))


PLACES: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int]]]] = {
    # Of the five resolutions 32 (twice), 16, 8 and 4 pixels, the blocks' ends at the last three.
    "residual": (lambda: resnet18(width=2), [("layer2", 0), ("layer3", 0), ("layer4", 0)]),
    "inside a normalising wrapper": (
        lambda: Normalized(resnet18(width=2), [0.5], [0.5]),
        [("network.layer2", 0), ("network.layer3", 0), ("network.layer4", 0)],
    ),
    "one activation called twice": (SharedActivation, [("relu", 0), ("relu", 1)]),
    "pooled to one pixel": (corner_victim, [("2", 0), ("3", 0)]),
    # Images that are pooled before the first layer depend on no parameter.
    "a pool first": (
        lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1), nn.ReLU(), toys.pool(), nn.Linear(4, 2)), [("2", 0)]
    ),
    "upwards and down again": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 2, stride=2), toys.pool(), nn.Linear(4, 2)
        ),
        [("1", 0), ("2", 0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_attention_is_taken_at_the_ends_of_the_last_resolutions(case: str) -> None:
    factory, expected = PLACES[case]
    model = factory().train()
    before = snapshot(model)
    example = images(1 if case == "pooled to one pixel" else 3, 32 if "al" in case else 8)
    assert find_places(model, example) == tuple(Place(*place) for place in expected)
    assert_as_found(model, before)


def test_a_network_without_feature_maps_is_refused() -> None:
    for model in (toys.mlp(), nn.Sequential(toys.pool(), nn.Linear(3, 2))):
        with pytest.raises(ModelError, match=r"feature maps.*take another defence"):
            find_places(model, images(1 if model[0].__class__ is nn.Flatten else 3, 2)[..., :1])


def test_attention_by_hand() -> None:
    """Two channels: at the first place (1, 2), at the second (0, 2). Squares sum to (5, 4), of norm sqrt(41)."""
    maps = torch.tensor([[[[1.0, 0.0]], [[-2.0, 2.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    found = attention(maps)
    assert torch.allclose(found, torch.tensor([[5.0, 4.0], [0.0, 0.0]]) / math.sqrt(41))
    assert torch.allclose(attention(maps, 1.0)[0], torch.tensor([3.0, 2.0]) / math.sqrt(13))
    assert torch.allclose(attention(7 * maps), found)


def test_watching_gives_the_calls_asked_for_and_takes_its_hooks_off() -> None:
    model, x = SharedActivation(), images(3, 8)
    before = snapshot(model)
    with watching(model, [Place("relu", 0), Place("relu", 1)]) as take:
        for _ in range(2):
            model(x)
            first, second = take()
            assert torch.equal(first, model.first(x).relu())
            assert second.shape == (2, 4, 4, 4)
    assert_as_found(model, before)


def fail_while_watching(model: nn.Module, x: Tensor, error: Exception) -> None:
    with watching(model, [Place("relu", 0)]):
        model(x)
        assert model.get_submodule("relu")._forward_hooks
        raise error


def test_hooks_come_off_after_errors() -> None:
    model, x = SharedActivation(), images(3, 8)
    before = snapshot(model)
    with pytest.raises(CallerError):
        fail_while_watching(model, x, CallerError())
    assert_as_found(model, before)
    with watching(model, [Place("relu", 2)]) as take:
        model(x)
        with pytest.raises(ModelError, match="expected relu to run in every forward pass"):
            take()
    assert_as_found(model, before)
    with pytest.raises(RuntimeError):
        find_places(model, images(1, 8))  # two channels too few
    assert_as_found(model, before)


def test_the_loss_by_hand() -> None:
    """One epoch of one step: the loss is the error plus the betas times the distances from the teacher's maps."""
    model, clean = corner_victim_without_dropout(), corner_set(20)
    quick = {"epochs": 1, "batch_size": 20, "shift": 0.0, "precision": "fp32"}
    none, two = (
        NAD(betas=betas, teacher_epochs=1, teacher_lr=0.01, **quick)(model, clean).history["nad"][0]["loss"]
        for betas in ((9.0, 0.0, 0.0), (9.0, 3.0, 5.0))
    )
    model.train()
    assert none == pytest.approx(nn.functional.cross_entropy(model(clean.x), clean.y).item(), abs=1e-6)
    teacher = FineTuning(**quick)(corner_victim_without_dropout(), clean).model
    maps = [[attention(net[:depth](clean.x)) for depth in (3, 4)] for net in (model, teacher)]
    first, second = ((ours - theirs).square().mean().item() for ours, theirs in zip(*maps, strict=True))
    assert first > 0
    assert two - none == pytest.approx(3 * first + 5 * second, rel=1e-3)


def corner_victim_without_dropout() -> nn.Sequential:
    model = corner_victim()
    model[5].p = 0.0
    return model


def test_the_backdoor_goes() -> None:
    result = check_removed(NAD(lr=0.05, teacher_lr=0.05, **QUICK))
    assert [step.name for step in result.steps] == ["teach", "distil"]
    assert set(result.history) == {"fine-tune", "nad"}
    assert "2, 3" in result.steps[1].reason


def test_manners() -> None:
    check_manners(NAD(epochs=2, teacher_epochs=1, **QUICK))
    check_holdout(NAD(epochs=2, teacher_epochs=1, **QUICK))


def test_bad_settings_are_refused() -> None:
    check_settings(NAD)
    for name in ("power", "teacher_lr", "teacher_epochs"):
        with pytest.raises(DebackdoorError, match=f"expected {name} above 0, got 0"):
            NAD(**{name: 0})
    for betas in ((1.0, 2.0), (1.0, 1.0, -1.0), (1.0, 1.0, float("nan"))):
        with pytest.raises(DebackdoorError, match="expected three betas of at least 0"):
            NAD(betas=betas)  # type: ignore[arg-type]
    assert (NAD().betas, NAD().power, NAD.name) == ((500.0, 1000.0, 1000.0), 2.0, "nad")
