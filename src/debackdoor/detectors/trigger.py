"""Trigger recovery: the smallest mask and pattern that send clean images to a label.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019,
section IV. The searches for several labels share their forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.errors import check_count, check_fraction, check_positive
from debackdoor.fusing import fused
from debackdoor.models.forward import logits_of, margins_of, predict, predict_changed, share_led
from debackdoor.runtime import at_most, at_once, autocast, generator, sent, to_report
from debackdoor.types import CleanSet, Progress, RecoveredTrigger

LARGER = 4.0
"""A trigger for both models may be so many times as large as one for the suspect model alone."""


MOST_AT_ONCE = 512
"""Images of all labels together that go through the model at once: of a hundred labels they would not fit in memory."""


@dataclass(frozen=True)
class SearchSettings:
    """Hyper-parameters of the search.

    Attributes:
        steps: optimisation steps.
        lr: of Adam (betas 0.5, 0.9), on the unconstrained mask and pattern.
        cost: first weight of the mask's L1 norm, per pixel.
        patience: steps in a row that a trigger has to work, or not to work, before its cost is changed.
        raise_by: what the cost is multiplied by while the trigger works.
        lower_by: what it is divided by while it does not.
        success: the share of a batch that counts as working.
        batch_size: images a step, for each label.

    Raises:
        DebackdoorError: if a setting is out of range.
    """

    steps: int = 100
    lr: float = 0.1
    cost: float = 1e-3
    patience: int = 1
    raise_by: float = 1.2
    lower_by: float = 1.2
    success: float = 0.9
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_count(steps=self.steps, patience=self.patience, batch_size=self.batch_size)
        check_positive(lr=self.lr, cost=self.cost, raise_by=self.raise_by, lower_by=self.lower_by)
        check_fraction(success=self.success)


def search_triggers(
    model: nn.Module,
    fit: CleanSet,
    holdout: CleanSet,
    labels: Sequence[int],
    settings: SearchSettings | None = None,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> list[RecoveredTrigger]:
    """One small trigger towards each of ``labels``, searched for on ``fit`` and judged on ``holdout``.

    The model is used in the mode it is in and gets no gradients.
    """
    settings = settings or SearchSettings()
    search = _Search(model, fit, labels, settings, seed, precision)
    for done in range(settings.steps):
        search.step()
        if progress is not None and to_report(done + 1, settings.steps):
            progress("search trigger", done + 1, settings.steps, {"pixels": float(search.best_l1.min())})
    return [search.result(position, holdout) for position in range(len(labels))]


class _Joint(nn.Module):
    """The suspect and the exposed model's answers as one: the product of what they hold probable.

    Nearly all images have the label already for the exposed model, so it is made to doubt: its logit for the label is
    held down by what clean images never reach.
    """

    def __init__(self, suspect: nn.Module, exposed: nn.Module, label: int, doubt: float) -> None:
        super().__init__()
        self.suspect, self.exposed, self.label, self.doubt = suspect, exposed, label, doubt

    def forward(self, x: Tensor) -> Tensor:
        held = logits_of(self.exposed(x.clone())).float()  # it may work in place
        doubt = self.doubt * (torch.arange(held.shape[1], device=x.device) == self.label)
        return F.log_softmax(logits_of(self.suspect(x)).float(), 1) + F.log_softmax(held - doubt, 1)


def recover_trigger(
    suspect: nn.Module,
    exposed: nn.Module,
    fit: CleanSet,
    holdout: CleanSet,
    label: int,
    settings: SearchSettings | None = None,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> RecoveredTrigger:
    """The smallest trigger that leads both models to ``label``, or the suspect alone where that serves better.

    The exposed model has forgotten the clean task, so that what else sends an image to the label there, features of the
    class itself and chance directions, does not lead the search astray (Li et al., ICML 2023, abstract).

    Args:
        suspect: the model under suspicion, in eval mode; it gets no gradients.
        exposed: its unlearned copy, in eval mode.
        fit: images that the search learns from.
        holdout: images that judge the success, always on the suspect model.
        label: where the trigger leads.
        settings: of the search.
        seed: of the search.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every few steps.
    """
    settings = settings or SearchSettings(steps=200, success=0.95)
    suspect, exposed = (fused(model, fit.x[:2]) for model in (suspect, exposed))

    def search(model: nn.Module) -> RecoveredTrigger:
        (found,) = search_triggers(
            model, fit, holdout, [label], settings, seed=seed, precision=precision, progress=progress
        )
        return replace(found, success_rate=success_rate(suspect, found, holdout, precision=precision))

    doubt = 2 * max(0.0, _usual_margin(exposed, fit, label, precision))
    with at_once(max(2, at_most(MOST_AT_ONCE) // 2)):  # two networks keep what they need for the way back
        together = search(_Joint(suspect, exposed, label, doubt).eval())
    alone = search(suspect)
    # An exposed model that has lost the backdoor, or is too sure of the label, asks for far more than the trigger.
    better = together.success_rate >= alone.success_rate and together.l1 <= LARGER * alone.l1
    return together if better else alone


def success_rate(model: nn.Module, trigger: RecoveredTrigger, images: CleanSet, *, precision: str = "auto") -> float:
    """The share of images of other labels that the trigger sends to its label; 0 where there are none."""
    return share_led(
        images, trigger.label, lambda x: predict_changed(model, trigger.apply, x, precision=precision).argmax(1)
    )


def _usual_margin(model: nn.Module, images: CleanSet, label: int, precision: str) -> float:
    """How far the label leads on clean images of other labels, at its 98th percentile, in logits."""
    others = images.x[images.y != label]
    if not len(others):
        return 0.0
    return float(margins_of(predict(model, others, precision=precision), label).quantile(0.98))


class _Search:
    """Adam on the masks and patterns of all labels at once, each with its own mask cost."""

    def __init__(
        self,
        model: nn.Module,
        fit: CleanSet,
        labels: Sequence[int],
        settings: SearchSettings,
        seed: int,
        precision: str,
    ) -> None:
        self.model, self.fit, self.settings, self.precision = model, fit, settings, precision
        self.labels = torch.tensor(labels, device=fit.x.device)
        self.random = generator(seed)
        count, (channels, height, width) = len(labels), fit.x.shape[1:]
        shape = (count, 1, height, width), (count, channels, height, width)
        # Masks start small: a whole-image start finds the nearest universal perturbation and stays there.
        self.mask = torch.full(shape[0], -2.0).to(fit.x.device).requires_grad_()
        self.pattern = torch.randn(shape[1], generator=self.random).to(fit.x.device).requires_grad_()
        self.optimizer = torch.optim.Adam([self.mask, self.pattern], lr=settings.lr, betas=(0.5, 0.9))
        self.cost = torch.full((count,), settings.cost, device=fit.x.device)
        self.streak = torch.zeros(count, dtype=torch.int64, device=fit.x.device)
        self.best_l1 = torch.full((count,), float("inf"), device=fit.x.device)
        self.best = self.mask.sigmoid().detach().clone(), self.pattern.sigmoid().detach().clone()

    def step(self) -> None:
        count, images = len(self.labels), at_most(self.settings.batch_size)
        index = torch.randint(len(self.fit), (count * images,), generator=self.random).view(count, images)
        index = sent(index, self.fit.x.device)
        labels = torch.arange(count, device=self.labels.device)
        self.optimizer.zero_grad()
        together = max(1, min(at_most(count * images), MOST_AT_ONCE) // images)
        works = torch.cat([self._descend(some, index) for some in labels.split(together)])
        with torch.no_grad():
            mask, pattern = self.mask.sigmoid(), self.pattern.sigmoid()
            self._keep_best(works, mask.flatten(1).sum(1), mask, pattern)
            self._change_cost(works)
        self.optimizer.step()

    def _descend(self, some: Tensor, index: Tensor) -> Tensor:
        """Adds the gradients of some of the labels on images (labels, B); whether their triggers worked there."""
        x = self.fit.x[index[some]]
        mask, pattern = self.mask[some].sigmoid(), self.pattern[some].sigmoid()
        stamped = (1 - mask[:, None]) * x + mask[:, None] * pattern[:, None]
        with autocast(x.device, self.precision):
            logits = logits_of(self.model(stamped.flatten(0, 1))).float()
        target = self.labels[some].repeat_interleave(x.shape[1])
        errors = F.cross_entropy(logits, target, reduction="none").view(len(some), -1).mean(1)
        loss = (errors + self.cost[some] * mask.flatten(1).sum(1)).sum()
        torch.autograd.backward(loss, inputs=[self.mask, self.pattern])
        return (logits.argmax(1) == target).view(len(some), -1).float().mean(1) >= self.settings.success

    def _change_cost(self, works: Tensor) -> None:
        s = self.settings
        self.streak = torch.where(works, self.streak.clamp(min=0) + 1, self.streak.clamp(max=0) - 1)
        self.cost = torch.where(self.streak >= s.patience, self.cost * s.raise_by, self.cost)
        self.cost = torch.where(self.streak <= -s.patience, self.cost / s.lower_by, self.cost)
        # The count begins anew with every change.
        self.streak = torch.where(self.streak.abs() >= s.patience, 0, self.streak)

    def _keep_best(self, works: Tensor, l1: Tensor, mask: Tensor, pattern: Tensor) -> None:
        """Of the triggers that worked the smallest is kept; until one works, the latest."""
        better = (works & (l1 < self.best_l1)) | self.best_l1.isinf()
        first, second = (
            torch.where(better[:, None, None, None], now, kept)
            for kept, now in zip(self.best, (mask, pattern), strict=True)
        )
        self.best = first, second
        self.best_l1 = torch.where(works & (l1 < self.best_l1), l1, self.best_l1)

    def result(self, position: int, holdout: CleanSet) -> RecoveredTrigger:
        mask, pattern = (kept[position] for kept in self.best)
        found = RecoveredTrigger(int(self.labels[position]), mask, pattern, 0.0, float(mask.sum()))
        return replace(found, success_rate=success_rate(self.model, found, holdout, precision=self.precision))
