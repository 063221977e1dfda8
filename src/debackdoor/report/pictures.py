"""What the report shows in pictures: the recovered trigger, and the images most likely to carry one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from debackdoor.errors import DebackdoorError
from debackdoor.report import figures
from debackdoor.report.wording import Name
from debackdoor.types import CleanSet, RecoveredPattern, RecoveredTrigger, SampleScores

STAMPED = 6
"""As many clean images are shown with the trigger."""

SAMPLES = 12
"""As many suspect images are shown: those with the highest scores."""


@dataclass(frozen=True)
class Pictures:
    """What a record does not hold: images. Whatever is missing is left out of the page.

    Attributes:
        trigger: the recovered trigger.
        clean: the clean set, for its class names and for images to put the trigger on.
        scores: how likely each of ``suspects`` carries the trigger.
        suspects: the images that were scored, float32 (N, C, H, W) in [0, 1].
        pattern: the additive pattern found beside the trigger.

    Raises:
        DebackdoorError: if the scores are not one a suspect image, or the trigger does not fit the clean images.
    """

    trigger: RecoveredTrigger | None = None
    clean: CleanSet | None = None
    scores: SampleScores | None = None
    suspects: Tensor | None = None
    pattern: RecoveredPattern | None = None

    def __post_init__(self) -> None:
        if self.scores is not None and (self.suspects is None or len(self.suspects) != len(self.scores.scores)):
            given = 0 if self.suspects is None else len(self.suspects)
            raise DebackdoorError(
                f"expected {len(self.scores.scores)} suspect images, one a score, got {given}; give those scored"
            )
        if self.trigger is not None and self.clean is not None:
            wanted, given_shape = tuple(self.trigger.pattern.shape), tuple(self.clean.x.shape[1:])
            if wanted != given_shape:
                raise DebackdoorError(
                    f"expected clean images of the trigger's shape {wanted}, got {given_shape}; "
                    "give the clean set that the trigger was recovered from"
                )


def trigger_in_pictures(numbers: Mapping[str, Any] | None, pictures: Pictures, name: Name) -> dict[str, Any] | None:
    """The trigger's numbers, its parts, and clean images with and without it; None where there is no trigger.

    Args:
        numbers: those of the record.
        pictures: what there is to show.
        name: what a label is called.
    """
    found = pictures.trigger
    if numbers is None and found is not None:
        numbers = {"label": found.label, "success_rate": found.success_rate, "l1": found.l1}
    if numbers is None:
        return None
    shown: dict[str, Any] = {
        "name": name(numbers["label"]),
        "rate": numbers["success_rate"],
        "l1": numbers["l1"],
        "pixels": None,
        "parts": [],
        "pairs": [],
    }
    if found is None:
        return shown
    mask, pattern = found.mask.detach().float().cpu(), found.pattern.detach().float().cpu()
    shown["pixels"] = mask[0].numel()
    shown["parts"] = [
        ("Mask", "Where the trigger covers the image: white is all of it.", figures.png(mask)),
        ("Pattern", "What it covers the image with.", figures.png(pattern)),
        ("Mask × pattern", "What of the pattern is seen.", figures.png(mask * pattern)),
    ]
    shown["pairs"] = _pairs(pictures.clean, found, name)
    return shown


def pattern_in_pictures(numbers: Mapping[str, Any] | None, pictures: Pictures, name: Name) -> dict[str, Any] | None:
    """The same for the additive pattern."""
    found = pictures.pattern
    if numbers is None and found is not None:
        numbers = {"label": found.label, "success_rate": found.success_rate, "rms": found.rms}
    if numbers is None:
        return None
    shown = {**numbers, "name": name(numbers["label"]), "rate": numbers["success_rate"], "parts": [], "pairs": []}
    if found is not None:
        pattern = found.pattern.detach().float().cpu()
        loud = 0.5 + pattern / (2 * pattern.abs().max().clamp(min=1e-9))
        shown["parts"] = [("Pattern", "What is added, made louder: grey is nothing.", figures.png(loud))]
        shown["pairs"] = _pairs(pictures.clean, found, name)
    return shown


def _pairs(clean: CleanSet | None, trigger: RecoveredTrigger | RecoveredPattern, name: Name) -> list[dict[str, str]]:
    """A few clean images without the trigger and with it."""
    if clean is None:
        return []
    chosen = _of_many_classes(clean.y.tolist(), trigger.label)
    before = clean.x[chosen].detach().float().cpu()
    labels = [name(int(label)) for label in clean.y[chosen]]
    pairs = zip(labels, map(figures.png, before), map(figures.png, trigger.apply(before)), strict=True)
    return [{"label": label, "before": old, "after": new} for label, old, new in pairs]


def samples_in_pictures(pictures: Pictures, name: Name) -> dict[str, Any] | None:
    """The suspect images with the highest scores; None where none were scored.

    Args:
        pictures: what there is to show.
        name: what a label is called.
    """
    scores, images = pictures.scores, pictures.suspects
    if scores is None or images is None or not len(images):
        return None
    top = scores.scores.argsort(descending=True, stable=True)[:SAMPLES].tolist()
    return {
        "all": len(images),
        "flagged": int(scores.flagged.sum()),
        "method": scores.method,
        "rate": scores.false_positive_rate,
        "threshold": scores.threshold,
        "shown": [
            {
                "number": index,
                "score": float(scores.scores[index]),
                "flagged": bool(scores.flagged[index]),
                "answer": name(int(scores.answers[index])),
                "image": figures.png(images[index]),
            }
            for index in top
        ],
    }


def _of_many_classes(labels: Sequence[int], target: int) -> list[int]:
    """A few images that are not of the target's class, of as many other classes as there are."""
    seen: dict[int, int] = {}
    order = []
    for index, label in enumerate(labels):
        if label != target:
            seen[label] = seen.get(label, 0) + 1
            order.append((seen[label], index))
    return [index for _, index in sorted(order)[:STAMPED]]
