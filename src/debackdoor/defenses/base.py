"""What every defence shares: hyper-parameters in the constructor, model and clean set in the call."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debackdoor.data import check_labels
from debackdoor.errors import ModelError
from debackdoor.models.copying import apart, standalone_copy
from debackdoor.models.forward import accuracy, check_finite, in_eval, predict, predict_of_any, trusted_precision
from debackdoor.runtime import has_fast_bf16, learning
from debackdoor.types import CleanSet, Progress, RepairResult

_TRIED = 32
"""Images that a model is tried on before anything is done."""


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A way to remove a backdoor that sees the model and the clean set, and nothing else.

    Attributes:
        seed: of every random choice the method makes.
        precision: ``auto``, ``fp32`` or ``bf16``.
    """

    name: ClassVar[str]

    seed: int = 0
    precision: str = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = _learning(vars(cls)["__call__"])  # type: ignore[method-assign]

    @abstractmethod
    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        """A repaired copy of ``model``, which itself is not changed.

        Args:
            model: takes images (N, C, H, W) in [0, 1], gives (N, K) logits.
            clean: trusted samples on the model's device.
            progress: called from inside long loops.
        """


def _learning(call: Callable[..., RepairResult]) -> Callable[..., RepairResult]:
    """A defence's call that learns, whatever the caller has set, and asks for no gradient of the images.

    As in a repair, it computes in float32 where the model cannot be trusted in bfloat16.
    """

    @wraps(call)
    def inside(self: Defense, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        with learning():
            images = clean.detached()
            return call(_trusted(self, model, images), model, images, progress=progress)

    return inside


def _trusted(defense: Defense, model: nn.Module, clean: CleanSet) -> Defense:
    """The defence with the precision that it is to compute in."""
    if defense.precision != "auto" or not has_fast_bf16(clean.x.device):
        return defense
    suspect = suspect_copy(model, clean, "fp32")
    return replace(defense, precision=trusted_precision(suspect, clean.x[:_TRIED], "auto"))


def suspect_copy(model: nn.Module, clean: CleanSet, precision: str) -> nn.Module:
    """A copy of the suspect model in eval mode, once it is known that the clean set fits it.

    Raises:
        ModelError: if its weights are not float32 or no copy of them stands alone, it does not take the images, or its
            answers are not finite.
        DataError: if the clean set has labels that it does not know.
    """
    suspect = in_eval(standalone_copy(model))
    with apart(model):
        logits = predict_of_any(suspect, clean.x[:_TRIED], precision=precision)
    check_finite(logits)
    check_labels(clean, logits.shape[1])
    return suspect


def accuracy_after(model: nn.Module, judges: CleanSet, lr: float, precision: str) -> float:
    """Accuracy of a model that was trained, in eval mode, as a fraction.

    Raises:
        ModelError: if its answers are not finite: the last step is one that no loss was computed after.
    """
    logits = predict(model, judges.x, precision=precision)
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"expected finite outputs after training, got NaN or infinity; take a smaller step than {lr}")
    return accuracy(logits, judges.y)


def check_loss(loss: float, where: str, lr: float) -> None:
    """Checks that training has not left the numbers there are.

    Raises:
        ModelError: if the loss is not finite: what came of it would answer one label to everything.
    """
    if not math.isfinite(loss):
        raise ModelError(f"expected a finite loss, got {loss} in {where}; take a smaller step size than {lr}")


def differ(one: nn.Module, other: nn.Module) -> bool:
    """Whether any weight or buffer that is saved differs between two copies of a network."""
    then, now = one.state_dict(), other.state_dict()
    return any(isinstance(value, Tensor) and not torch.equal(value, now[name]) for name, value in then.items())
