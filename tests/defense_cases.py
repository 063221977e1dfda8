"""A victim whose backdoor clean images can tell against, and what the tests of all defences that train share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from channel_cases import assert_as_found, snapshot
from debackdoor.data import split_clean
from debackdoor.defenses import Defense
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.types import CleanSet, RepairResult
from rnp_cases import quadrant_set
from toys import set_values

CORNER = (slice(None), slice(None), slice(6, 8), slice(6, 8))
"""The 2x2 pixels that carry the trigger: the last of the 16 cells that the victim averages over."""


def corner_victim() -> nn.Sequential:
    """Tells which quarter of an 8x8 image is bright, and says 0 when the lower right corner is.

    The corner counts for class 0 whatever else the image shows. It is no part of class 3's quarter, so on clean images
    it is noise: weight on it can only cost the clean task, and learning takes it away.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(32, 4),
    )  # fmt: skip
    set_values(model[0].weight, [1, 0.5])
    set_values(model[0].bias, [0, 0])
    set_values(model[1].running_mean, [0.3, 0.15])
    set_values(model[1].running_var, [0.075, 0.01875])
    set_values(model[1].bias, [1.2, 1.2])
    head = torch.zeros(4, 2, 4, 4)
    for label in range(4):
        row, column = 2 * (label // 2), 2 * (label % 2)
        head[label, :, row : row + 2, column : column + 2] = 0.25
    head[:, :, 3, 3] = torch.tensor([1.5, 0.0, 0.0, 0.0])[:, None]
    set_values(model[6].weight, head.flatten().tolist())
    set_values(model[6].bias, [0, 0, 0, 0])
    return model.eval()


def corner_set(count: int = 160) -> CleanSet:
    """The quarters, with noise below 0.5 in the corner of every image."""
    clean = quadrant_set(count)
    noise = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(9))
    clean.x[CORNER] = 0.5 * noise
    return clean


def triggered(x: Tensor) -> Tensor:
    """The images with a bright corner."""
    x = x.clone()
    x[CORNER] = 1.0
    return x


@torch.no_grad()
def rates(model: nn.Module, data: CleanSet) -> tuple[float, float]:
    """Clean accuracy, and the share of triggered images of other classes that get class 0."""
    victims = data.x[data.y != 0]
    right = (model(data.x).argmax(1) == data.y).float().mean().item()
    return right, (model(triggered(victims)).argmax(1) == 0).float().mean().item()


def check_removed(defense: Defense, holdout: float = 0.0) -> RepairResult:
    """The victim loses its backdoor and nothing else; the cost is told of the part held out, or of all images."""
    model, clean = corner_victim(), corner_set()
    before = rates(model, clean)
    assert before[1] == 1.0
    assert before[0] > 0.8
    result = defense(model, clean)
    after = rates(result.model, clean)
    assert after[1] <= 0.05
    assert after[0] >= 0.97
    judges = split_clean(clean, holdout, defense.seed)[1] if holdout else clean
    told = {"before": rates(model, judges)[0], "after": rates(result.model, judges)[0]}
    assert result.clean_accuracy == pytest.approx(told)
    assert result.changed
    assert result.plan == ()
    assert result.verification is None
    return result


class CallerError(Exception):
    """What a caller's progress callback may raise."""


def check_manners(defense: Defense) -> None:
    """The caller's model and torch's random state are left alone, also after an error, and the seed decides."""
    model, clean = corner_victim().train(), corner_set(40)
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[6].bias.grad = torch.ones(4)
    before = snapshot(model)
    heard: list[str] = []
    one = defense(model, clean, progress=lambda stage, *_: heard.append(stage))
    assert_as_found(model, before)
    assert heard
    assert heard[-1] == defense.name
    assert not any(module.training for module in one.model.modules())
    assert not any(module._forward_hooks for module in one.model.modules())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in one.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in one.model.parameters())
    assert [value.shape for value in one.model.state_dict().values()] == [
        value.shape for value in model.state_dict().values()
    ]
    torch.manual_seed(99)  # the surroundings must not matter
    two, three = defense(model, clean), replace(defense, seed=1)(model, clean)
    assert one.history == two.history != three.history
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name])

    coarse = replace(defense, precision="bf16")(model, clean)
    assert all(torch.isfinite(value).all() for value in coarse.model.state_dict().values())

    def interrupt(stage: str, *_: object) -> None:
        if stage == defense.name:
            raise CallerError

    before["random"] = torch.get_rng_state()
    with pytest.raises(CallerError):
        defense(model, clean, progress=interrupt)
    assert_as_found(model, before)


def check_holdout(defense: Defense) -> None:
    """With a share held out, the accuracies are those on it, and it is not learned from."""
    model, clean = corner_victim(), corner_set(80)
    result = replace(defense, holdout=0.25)(model, clean)  # type: ignore[call-arg]
    fit, judges = split_clean(clean, 0.25, defense.seed)
    assert result.clean_accuracy["before"] == pytest.approx(rates(model, judges)[0])
    assert result.clean_accuracy["after"] == pytest.approx(rates(result.model, judges)[0])
    alone = defense(model, fit)
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])


def check_settings(kind: type[Defense]) -> None:
    """Settings out of range are refused by name, and a step size that is far too large is told of."""
    for name in ("lr", "epochs", "batch_size"):
        with pytest.raises(DebackdoorError, match=f"expected {name} above 0, got 0"):
            kind(**{name: 0})
    for name in ("momentum", "weight_decay", "shift", "holdout"):
        with pytest.raises(DebackdoorError, match=f"expected {name} from 0 to 1, got -0.1"):
            kind(**{name: -0.1})
    with pytest.raises(TypeError):
        kind(0.01)  # type: ignore[call-arg]
    with pytest.raises(ModelError, match=r"finite loss.*smaller step size"):
        kind(lr=1e30, weight_decay=1.0, precision="fp32")(corner_victim(), corner_set(20))  # type: ignore[call-arg]
