"""Repair refuses bad input in one sentence, and leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import debackdoor as db
from channel_cases import assert_as_found, snapshot
from debackdoor.errors import DataError, DebackdoorError, ModelError
from debackdoor.models import Normalized
from debackdoor.types import CleanSet
from rnp_cases import NAN, Dial, quadrant_set, quadrants


def relabelled(y: Tensor) -> CleanSet:
    return CleanSet(quadrant_set(len(y)).x, y)


def with_head(change: Callable[[nn.Linear], None]) -> nn.Module:
    model = quadrants()
    with torch.no_grad():
        change(model[5])
    return model


def with_layer(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Quadrants without normalisation, their weights functions of others."""
    model = quadrants()
    model[1] = nn.Identity()
    model[5] = change(model[5])
    model[0] = change(model[0])
    return model


class Raises(nn.Module):
    """A network with its own check of the image size."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.zeros(1)), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def dial_images() -> CleanSet:
    return CleanSet((torch.arange(24) % 8 / 100).view(24, 1, 1, 1), torch.arange(24) % 8 // 2)


def linear_quadrants() -> nn.Module:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 4, bias=False))
    model[2].weight.data = torch.eye(4)
    return model


BAD: dict[str, tuple[Callable[[], nn.Module], Callable[[], CleanSet], type[Exception], str]] = {
    "constant outputs": (
        lambda: with_head(lambda head: head.weight.zero_()), quadrant_set, ModelError, "depend on the image, got the"
    ),
    "NaN outputs": (lambda: Dial([[NAN] * 8]), dial_images, ModelError, "finite outputs.*got NaN"),
    "NaN for some images": (
        lambda: Dial([[0, 0, 1, 1, 2, NAN, 3, 3]]), dial_images, ModelError, "finite outputs"
    ),
    "chance": (
        quadrants, lambda: relabelled(torch.arange(80) // 4 % 4), ModelError,
        "accuracy 25.0%, no better than chance; .*images of 8x8 pixels, and .* normalised \\(--mean and --std\\)",
    ),
    "labels in another order": (quadrants, lambda: relabelled((torch.arange(80) + 1) % 4), ModelError, "accuracy 0.0%"),
    "the larger class is no skill": (
        lambda: with_head(lambda head: head.bias.copy_(torch.tensor([9.0, 0, 0, 0]))),
        lambda: relabelled((torch.arange(80) > 70).long()), ModelError, "no better than chance",
    ),
    "too few of another class": (
        quadrants, lambda: relabelled((torch.arange(20) > 17).long()), DataError,
        "got 20, of which 90% are of one class; add images",
    ),
    "one class": (quadrants, lambda: relabelled(torch.ones(80).long()), DataError, "at least 2 classes, got only"),
    "too few": (quadrants, lambda: quadrant_set(19), DataError, "at least 20 clean images, got 19"),
    "labels out of range": (
        quadrants, lambda: relabelled(torch.arange(80) % 5), DataError, "labels of 0 to 3 .* got 4 for image 4"
    ),
    "wrong channels": (
        quadrants, lambda: CleanSet(torch.zeros(80, 3, 8, 8), torch.arange(80) % 4), ModelError,
        r"images of shape \(3, 8, 8\), got .*check --arch and the image size",
    ),
    "wrong size": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(49, 4)), quadrant_set, ModelError, r"images of shape \(1, 8, 8\)"
    ),
    "a network that checks the size itself": (
        lambda: Raises(ValueError("Input image size (8*8) doesn't match model (224*224).")), quadrant_set, ModelError,
        r"images of shape \(1, 8, 8\), got .*224\*224",
    ),
    "a network that asserts the size": (
        lambda: Raises(AssertionError()), quadrant_set, ModelError, r"images of shape \(1, 8, 8\)"
    ),
    "normalisation for other channels": (
        lambda: Normalized(quadrants(), [0.5] * 3, [0.2] * 3), quadrant_set, ModelError, "images of 3 channels"
    ),
    "no logits": (lambda: nn.Conv2d(1, 4, 3), quadrant_set, ModelError, r"logits of shape \(N, classes\)"),
    "nothing to mask": (linear_quadrants, quadrant_set, ModelError, "a linear classifier alone"),
    "parametrised weights alone": (
        lambda: with_layer(parametrizations.weight_norm), quadrant_set, ModelError, "call .*remove_parametrizations"
    ),
    "weights computed by a hook": (
        lambda: with_layer(weight_norm), quadrant_set, ModelError, "call remove_weight_norm or"
    ),
    "half precision": (lambda: quadrants().half(), quadrant_set, ModelError, "float32 weights, got torch.float16"),
    "a compiled one": (lambda: torch.compile(quadrants()), quadrant_set, ModelError, "pass what it was made from"),
    "a wrapper": (lambda: nn.DataParallel(quadrants()), quadrant_set, ModelError, "pass model.module"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case: str) -> None:
    model_of, clean_of, error, message = BAD[case]
    model = model_of().train()
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        db.repair(model, clean_of(), device="cpu", precision="fp32")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DebackdoorError)
    assert_as_found(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": -0.1}, "budget from 0 to 1"),
        ({"budget": 2.0}, "budget from 0 to 1"),
        ({"budget": float("nan")}, "budget from 0 to 1"),
        ({"budget": "0.02"}, "budget from 0 to 1, got '0.02'"),
        ({"seed": -1}, "seed from 0 to 2147483647, got -1"),
        ({"seed": 1.5}, "seed from 0 to 2147483647, got 1.5"),
        ({"memory": "6"}, "memory above 0, got '6'"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"precision": "fp8"}, "auto, fp32, bf16"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DebackdoorError, match=message):
        db.repair(quadrants(), quadrant_set(), **arguments)
