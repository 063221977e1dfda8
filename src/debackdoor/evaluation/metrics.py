"""Clean accuracy, attack success rate, robust accuracy, and how much a defence achieved: one evaluator for all methods.

Definitions as in Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV
2023. All rates are fractions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.attacks import Attack
from debackdoor.attacks.base import ALL_TO_ONE
from debackdoor.errors import DataError, ModelError
from debackdoor.models.forward import eval_mode, predict_of_any, trusted_precision
from debackdoor.types import CleanSet, Progress

SCHEMA = "debackdoor/evaluate/1"
_BATCH = 500
_TRIED = 32
"""Images that precision is tried on."""


@dataclass(frozen=True)
class Evaluation:
    """What a model does with a test set, clean and triggered.

    Attributes:
        clean_accuracy: share of all clean images that get their true label.
        attack_success_rate: share of the triggered images that get the attacker's label.
        robust_accuracy: share of the triggered images that still get their true label.
        clean_images: how many images the first is a share of.
        triggered_images: how many the others are shares of: all-to-one leaves out images of the target class.
    """

    clean_accuracy: float
    attack_success_rate: float
    robust_accuracy: float
    clean_images: int
    triggered_images: int

    def record(self) -> dict[str, Any]:
        """The entries of an evaluation record, its schema first."""
        return {"schema": SCHEMA, **asdict(self)}


def accuracy(model: nn.Module, data: CleanSet, *, precision: str = "auto") -> float:
    """Share of the images that the model, in eval mode, gives their label; the model is left in the mode it was in.

    Args:
        model: takes images (N, C, H, W) in [0, 1] on its own device.
        data: the images; any device.
        precision: ``auto``, ``fp32`` or ``bf16``.

    Raises:
        ModelError: if the model does not take the images, or its outputs are not finite.
    """
    data = data.detached()
    return _share(_answers(model, data.x, _trusted(model, data.x, precision)) == data.y.cpu())


def evaluate(
    model: nn.Module,
    test: CleanSet,
    attack: Attack,
    *,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a model on a test set and on the same images with the attack's trigger.

    In all-to-one mode, images whose true label is the target are left out of the triggered ones; in all-to-all mode
    every image counts, and success is the answer y + 1 mod K. The model is left in the mode it was in.

    Args:
        model: takes images (N, C, H, W) in [0, 1] on its own device.
        test: clean test images with true labels.
        attack: the trigger and its label rule.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every batch.

    Raises:
        TriggerError: if the images do not fit the trigger.
        DataError: if the labels do not, or every image is of the target class.
        ModelError: if the model does not take the images, or its outputs are not finite.
    """
    attack.check_fits(test)
    victims = test = test.detached()
    if attack.mode == ALL_TO_ONE:
        others = (test.y != attack.target).nonzero()[:, 0]
        if len(others) == 0:
            raise DataError(
                f"{test.source}: expected images of other classes than the target {attack.target}, got none; "
                "give the whole test set"
            )
        victims = test.subset(others)
    y = victims.y.cpu()
    precision = _trusted(model, test.x, precision)
    count = _Count(len(test) + len(victims), progress)
    clean = _answers(model, test.x, precision, count=count)
    answers = _answers(model, victims.x, precision, attack.apply, count)
    return Evaluation(
        clean_accuracy=_share(clean == test.y.cpu()),
        attack_success_rate=_share(answers == attack.target_labels(y)),
        robust_accuracy=_share(answers == y),
        clean_images=len(test),
        triggered_images=len(victims),
    )


def defence_effectiveness(before: Evaluation, after: Evaluation) -> float:
    """The defence effectiveness rating (DER) in [0, 1]: 0.5 where nothing changed, 1 for a full removal free of cost.

    ``(max(0, ASR before - ASR after) - max(0, CA before - CA after) + 1) / 2``
    """
    removed = max(0.0, before.attack_success_rate - after.attack_success_rate)
    lost = max(0.0, before.clean_accuracy - after.clean_accuracy)
    return (removed - lost + 1) / 2


def _share(hits: Tensor) -> float:
    # Counted rather than averaged: a float32 mean of 0.958 reads 0.9580000042915344 in a record.
    return int(hits.sum()) / len(hits)


class _Count:
    """How many images were seen, told to a progress callback."""

    def __init__(self, total: int, progress: Progress | None = None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, images: int) -> None:
        self._done += images
        if self._progress is not None:
            self._progress("evaluate", self._done, self._total, {})


def _trusted(model: nn.Module, x: Tensor, precision: str) -> str:
    """The precision that scan and repair would take, too."""
    place = next((item.device for item in model.parameters()), x.device)
    with eval_mode(model), torch.inference_mode():
        return trusted_precision(model, x[:_TRIED].to(place), precision)


def _answers(
    model: nn.Module,
    x: Tensor,
    precision: str,
    trigger: Callable[[Tensor], Tensor] = lambda images: images,
    count: _Count | None = None,
) -> Tensor:
    """The labels (N,) that the model gives, on the CPU; the trigger is put on batch by batch, to save memory."""
    place = next((item.device for item in model.parameters()), x.device)
    parts = []
    with eval_mode(model), torch.inference_mode():
        for part in x.split(_BATCH):
            logits = predict_of_any(model, trigger(part.to(place)), precision=precision)
            if not bool(torch.isfinite(logits).all()):  # their largest would be answer 0, perhaps the target
                raise ModelError("expected finite outputs, got NaN or infinity; the weights are damaged")
            parts.append(logits.argmax(1).cpu())
            if count is not None:
                count.add(len(part))
    return torch.cat(parts)
