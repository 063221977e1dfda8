"""Frozen dataclasses that every floor of the package shares.

Those that hold tensors are equal to themselves alone: a tensor's ``==`` has no single answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.errors import DataError
from debackdoor.runtime import contiguous

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called as ``progress(stage, done, total, numbers)`` from inside long loops."""


@dataclass(frozen=True, eq=False)
class CleanSet:
    """Images with their labels: the defender's trusted samples, or a test split.

    Attributes:
        x: float32 images in [0, 1], shape (N, C, H, W).
        y: int64 labels, shape (N,), each at least 0.
        class_names: one name a class, or empty where the source names none.
        source: where the images came from, for messages and records.

    Raises:
        DataError: if a shape, dtype or value range is not as above.
    """

    x: Tensor
    y: Tensor
    class_names: tuple[str, ...] = ()
    source: str = "memory"

    def __post_init__(self) -> None:
        x, y = self.x, self.y
        if x.ndim != 4 or x.dtype != torch.float32:
            raise DataError(
                f"{self.source}: expected float32 images of shape (N, C, H, W), got {x.dtype} {tuple(x.shape)}"
            )
        if y.ndim != 1 or y.dtype != torch.int64 or len(y) != len(x):
            raise DataError(
                f"{self.source}: expected {len(x)} int64 labels, one an image, got {y.dtype} of shape {tuple(y.shape)}"
            )
        if len(x) == 0:
            raise DataError(f"{self.source}: expected at least one image, got none; check the path and the limit")
        if x.numel() == 0:
            raise DataError(f"{self.source}: expected images with pixels, got shape {tuple(x.shape)}; check them")
        low, high = (float(value) for value in x.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):
            raise DataError(
                f"{self.source}: expected pixel values in [0, 1], got {low:.3g} to {high:.3g}; "
                "scale the images, and give normalisation to the model with --mean and --std"
            )
        if int(y.min()) < 0:
            raise DataError(f"{self.source}: expected labels of at least 0, got {int(y.min())}")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def num_classes_seen(self) -> int:
        """How many different labels occur."""
        return int(self.y.unique().numel())

    def subset(self, indices: Tensor) -> CleanSet:
        """The samples at ``indices`` (int64), in that order."""
        return CleanSet(self.x[indices], self.y[indices], self.class_names, self.source)

    def to(self, device: torch.device | str) -> CleanSet:
        """The same samples on another device."""
        return CleanSet(self.x.to(device), self.y.to(device), self.class_names, self.source)

    def detached(self) -> CleanSet:
        """The same samples, their images without a gradient and contiguous."""
        y = self.y.clone() if self.y.is_inference() else self.y
        return CleanSet(contiguous(self.x.detach()), y, self.class_names, self.source)


@dataclass(frozen=True)
class PlannedChannel:
    """One channel to prune.

    Attributes:
        layer: the module's dotted name.
        index: its output channel.
        score: the channel's mask value after recovery; low means suspicious.
    """

    layer: str
    index: int
    score: float


Plan = tuple[PlannedChannel, ...]
"""Channels in the order in which they are pruned."""


@dataclass(frozen=True)
class Step:
    """One thing a repair did: its name, why, and the numbers it ended with (fractions, seconds, counts)."""

    name: str
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """A repair's own check, made from clean data alone.

    Attributes:
        passed: whether fresh searches find nothing against the labels that were suspect before, or all of them, and
            what leads the suspect model there leads the repaired one no longer; a pile-up is measured again only where
            no search had led to its label.
        label: the most suspect label, or None where nothing was exposed, or a backdoor to many labels (all-to-all).
        evidence: the numbers behind it, before and after the repair.
        message: one sentence for a person.
        conclusive: whether the check could tell; False where the clean task could not be unlearned, signs name
            different labels, or one comes near to its threshold (a scan calls such a model suspicious).
    """

    passed: bool
    label: int | None
    evidence: Mapping[str, float]
    message: str
    conclusive: bool = True


@dataclass(frozen=True)
class RepairResult:
    """What a defence returns.

    Attributes:
        model: the repaired model, a new object in eval mode.
        plan: the channels that were pruned, in order; empty where pruning was not needed or not the method.
        clean_accuracy: ``{"before": float, "after": float}``, fractions, on the hold-out part; where none is held out,
            on all clean images.
        verification: the check that a repair ends with; None where a bare defence does not check itself.
        history: numbers over time, a list of rows a stage.
        steps: what was done, in order.
        changed: whether any weight differs from the input's.
    """

    model: nn.Module
    plan: Plan
    clean_accuracy: Mapping[str, float]
    verification: Verification | None
    history: Mapping[str, list[dict[str, Any]]]
    steps: tuple[Step, ...]
    changed: bool


@dataclass(frozen=True, eq=False)
class RecoveredTrigger:
    """A trigger found from clean images: ``(1 - mask) * x + mask * pattern``.

    Attributes:
        label: where it sends images.
        mask: float32 (1, H, W) in [0, 1].
        pattern: float32 (C, H, W) in [0, 1].
        success_rate: share of hold-out images of other labels that it sends to ``label``, on the suspect model.
        l1: sum of the mask, in pixels.
    """

    label: int
    mask: Tensor
    pattern: Tensor
    success_rate: float
    l1: float

    def apply(self, x: Tensor) -> Tensor:
        """The images (N, C, H, W) in [0, 1] with the trigger on them."""
        mask, pattern = self.mask.to(x.device), self.pattern.to(x.device)
        return (1 - mask) * x + mask * pattern


@dataclass(frozen=True, eq=False)
class RecoveredPattern:
    """An additive trigger found from clean images: ``x + pattern``.

    Attributes:
        label: where it sends images.
        pattern: float32 (C, H, W) in [-1, 1].
        success_rate: share of hold-out images of other labels that it sends to ``label``, on the suspect model.
    """

    label: int
    pattern: Tensor
    success_rate: float

    @property
    def rms(self) -> float:
        """Root mean square, in pixel values of [0, 1]."""
        return float(self.pattern.square().mean().sqrt())

    def apply(self, x: Tensor) -> Tensor:
        """The images (N, C, H, W) in [0, 1] with the pattern on them."""
        return (x + self.pattern.to(x.device)).clamp(0, 1)


@dataclass(frozen=True)
class Suspect:
    """A label that something speaks against.

    Attributes:
        label: which.
        name: its class name, or None where the clean set names none.
        reasons: what speaks against it: ``pile-up``, ``margin``, ``additive``, ``patch``, ``warp``, ``square``; empty
            where it is only the nearest to a finding.
        evidence: the numbers behind that, fractions and ratios by name.
    """

    label: int
    name: str | None
    reasons: tuple[str, ...]
    evidence: Mapping[str, float]


VERDICTS = ("clean", "suspicious", "backdoored", "inconclusive")
"""What a scan can end with."""


@dataclass(frozen=True)
class ScanReport:
    """What a scan finds.

    Attributes:
        verdict: one of :data:`VERDICTS`.
        message: one sentence for a person: what was found, or what would settle it.
        score: how much speaks for a backdoor, the strongest sign as a multiple of its threshold: at least 1 counts.
            None where no sign could be looked for.
        suspects: the labels that something speaks against, the most suspect first; several for several targets.
        all_to_all: whether a patch leads away from all labels, to no label of its own.
        trigger: the trigger recovered for the first suspect, or None.
        evidence: all numbers, of the model as a whole and of the most suspect label of every kind.
        ranking: all channels with their scores, the most suspicious first.
        history: numbers over time; ``unlearn`` has rows of step, accuracy, loss and label_shares (K fractions).
        pattern: the faint pattern found for the first suspect, or None where none counts against it.
    """

    verdict: str
    message: str
    score: float | None
    suspects: tuple[Suspect, ...]
    all_to_all: bool
    trigger: RecoveredTrigger | None
    evidence: Mapping[str, float]
    ranking: Plan
    history: Mapping[str, list[dict[str, Any]]]
    pattern: RecoveredPattern | None = None


@dataclass(frozen=True, eq=False)
class SampleScores:
    """How likely each of a pile of images carries the trigger.

    Attributes:
        scores: float32 (N,); higher is more likely.
        threshold: scores above it are flagged; set on clean images alone.
        flagged: bool (N,).
        answers: int64 (N,), the labels that the suspect model gives the images.
        false_positive_rate: the share of clean images that the threshold was set to flag at most, a fraction; with n of
            them held out never less than 1 / (n + 1).
        p_value: how probable it is that so many of a pile of clean images are flagged, [0, 1], if each is judged for
            itself; methods that judge a whole class at once (``clustering``) flag more at a time by chance.
        method: what the scores are.
        conclusive: False where the scores rest on an exposed model that could not be made to forget the clean task.
    """

    scores: Tensor
    threshold: float
    flagged: Tensor
    answers: Tensor
    false_positive_rate: float
    p_value: float
    method: str
    conclusive: bool = True

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[float]:
        return iter(self.scores.tolist())

    def __getitem__(self, index: int) -> float:
        return float(self.scores[index])
