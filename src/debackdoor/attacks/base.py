"""What every attack shares: hyper-parameters, label rule, and the places where poison enters training.

An attack poisons the training set once (``poison``) or every batch anew (``poison_batch``), or it takes the training
over (``control``). Its trigger is applied in raw pixel space, in float: nothing is ever rounded to 8 bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debackdoor.attacks.control import Control, Training
from debackdoor.errors import DataError, TriggerError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

ALL_TO_ONE = "all-to-one"
ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True, eq=False)
class Poison:
    """What replaces part of a training set.

    Attributes:
        indices: int64 (M,), the samples that are replaced, ascending.
        x: float32 (M, C, H, W) in [0, 1], their new images.
        y: int64 (M,), their new labels.
    """

    indices: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def none(cls, data: CleanSet) -> Poison:
        """Nothing of ``data``."""
        return cls(torch.arange(0), data.x[:0], data.y[:0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Attack(ABC):
    """A trigger and the rule by which it enters training.

    Attributes:
        target: the label that triggered images get; without effect in all-to-all mode.
        poison_rate: the fraction in (0, 1] of the ``candidates`` that is poisoned.
        mode: ``all-to-one`` (every label becomes ``target``) or ``all-to-all`` (label y becomes y + 1 mod K).
        seed: decides which samples are poisoned, and the trigger where it is random.
        num_classes: K.
        image_shape: (C, H, W) of the images.
        tensors: the trigger's tensors by name, which are saved with it. Where the trigger is found in ``poison`` or
            learned in training, they are placeholders until then.

    Raises:
        TriggerError: if a hyper-parameter is out of range.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = (ALL_TO_ONE, ALL_TO_ALL)
    needs_clean_model: ClassVar[bool] = False
    """Whether ``poison`` is made with the help of a clean model of the same architecture."""
    starts_from_clean_model: ClassVar[bool] = False
    """Whether training goes on from a clean model's weights instead of random ones."""
    recipe: ClassVar[Mapping[str, Any]] = {}
    """Epochs, batch_size or lr where this attack needs others than ``train`` usually takes."""

    target: int = 0
    poison_rate: float = 0.1
    mode: str = ALL_TO_ONE
    seed: int = 0
    num_classes: int = 10
    image_shape: tuple[int, int, int] = (3, 32, 32)
    tensors: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "tensors", self._make_tensors())

    @property
    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments: ``type(attack)(**attack.parameters)`` is the same attack."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.init}

    def apply(self, x: Tensor) -> Tensor:
        """New images with the trigger on them; ``x`` keeps its values.

        Args:
            x: float32 (N, C, H, W) in [0, 1], with the attack's image shape.

        Returns:
            Images of the same shape, dtype, range and device.

        Raises:
            TriggerError: if the dtype or the shape differs.
        """
        if x.dtype != torch.float32 or x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise TriggerError(
                f"expected float32 images of shape (N, {', '.join(map(str, self.image_shape))}) for this {self.name} "
                f"trigger, got {x.dtype} {tuple(x.shape)}; use the images it was made for"
            )
        return self._stamp(x)

    def target_labels(self, y: Tensor) -> Tensor:
        """The labels (N,) that the attacker wants for triggered images whose true labels are ``y``."""
        return (y + 1) % self.num_classes if self.mode == ALL_TO_ALL else torch.full_like(y, self.target)

    def candidates(self, y: Tensor) -> Tensor:
        """Indices of the training samples that may be poisoned, given all labels: every one, the target's included."""
        return torch.arange(len(y))

    def copy(self) -> Attack:
        """The same attack with tensors of its own."""
        twin = type(self)(**self.parameters)
        twin.tensors.update({name: value.clone() for name, value in self.tensors.items()})
        return twin

    def training_samples(self, y: Tensor) -> Tensor:
        """Indices of the samples that are trained on, given all labels: every one."""
        return torch.arange(len(y))

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """The samples that this attack replaces before training: ``poison_rate`` of the candidates, to the nearest one.

        Args:
            data: the clean training set, on the CPU; not changed.
            clean_model: in eval mode, for attacks with ``needs_clean_model``; not changed.
            precision: ``auto``, ``fp32`` or ``bf16``, of what goes through the clean model.

        Raises:
            TriggerError, DataError: if the images or labels do not fit, or not one sample would be poisoned.
        """
        self.check_fits(data)
        indices = self._chosen(data)
        return Poison(indices, self.apply(data.x[indices]), self.target_labels(data.y[indices]))

    def _chosen(self, data: CleanSet) -> Tensor:
        """Ascending indices of the candidates that are poisoned."""
        found = self.candidates(data.y)
        count = round(self.poison_rate * len(found))
        if count == 0:
            raise DataError(
                f"{data.source}: expected at least one sample to poison, got {self.poison_rate:g} of {len(found)}; "
                "raise the poison rate or give more images"
            )
        return found[torch.randperm(len(found), generator=generator(self.seed))[:count]].sort().values

    def poison_batch(self, x: Tensor, y: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is trained on in place of a shuffled batch ``x`` (N, C, H, W) and ``y`` (N,): here the batch itself."""
        return x, y

    def control(self, training: Training) -> Control:
        """What runs the steps of a training with this attack; an attack that controls training has its own."""
        return Control(training, self)

    def check_fits(self, data: CleanSet) -> None:
        """Compares the images' shape and the labels with what the attack was made for.

        Raises:
            TriggerError: if the images have another shape.
            DataError: if a label is not below ``num_classes``.
        """
        self.apply(data.x[:1])
        if int(data.y.max()) >= self.num_classes:
            raise DataError(
                f"{data.source}: expected labels below {self.num_classes} for this {self.name} attack, got "
                f"{int(data.y.max())}; give the attack the right number of classes"
            )

    @abstractmethod
    def _make_tensors(self) -> dict[str, Tensor]:
        """The trigger's tensors, from the hyper-parameters alone."""

    @abstractmethod
    def _stamp(self, x: Tensor) -> Tensor:
        """``apply`` for images that are known to fit; returns a new tensor."""

    def _check(self) -> None:
        """Refuses hyper-parameters out of range; subclasses add their own."""
        shape = self.image_shape
        if not isinstance(shape, tuple) or len(shape) != 3 or not all(_is_whole(size) and size > 0 for size in shape):
            raise TriggerError(
                f"expected image_shape as three positive whole numbers (C, H, W), got {shape!r}; correct it"
            )
        self._check_whole("num_classes", 2)
        self._check_whole("target", 0, self.num_classes - 1)
        self._check_whole("seed", 0, 2**31 - 1)
        self._check_number("poison_rate", 0.0, 1.0)
        if self.mode not in self.modes:
            raise TriggerError(
                f"expected mode {' or '.join(self.modes)} for {self.name}, got {self.mode!r}; choose one"
            )

    def _check_whole(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if not _is_whole(value) or value < low or (high is not None and value > high):
            wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise TriggerError(f"expected {name} as a whole number {wanted} for {self.name}, got {value!r}; correct it")

    def _check_number(self, name: str, above: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not above < value <= high
            or value == math.inf
        ):
            wanted = f"above {above:g}" + (f" and at most {high:g}" if high < math.inf else "")
            raise TriggerError(f"expected {name} as a number {wanted} for {self.name}, got {value!r}; correct it")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
