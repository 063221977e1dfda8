"""Trigger recovery: the smallest mask and pattern that send clean images to a label.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019,
section IV. The searches for several labels share their forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.models.forward import logits_of, predict
from debackdoor.runtime import autocast, generator
from debackdoor.types import CleanSet, Progress, RecoveredTrigger


@dataclass(frozen=True)
class SearchSettings:
    """Hyper-parameters of the search.

    Attributes:
        steps: optimisation steps.
        lr: of Adam (betas 0.5, 0.9), on the unconstrained mask and pattern.
        cost: first weight of the mask's L1 norm, per pixel; raised while the trigger works, lowered while it does not.
        success: the share of a batch that counts as working.
        batch_size: images a step, for each label.
    """

    steps: int = 100
    lr: float = 0.1
    cost: float = 1e-3
    success: float = 0.9
    batch_size: int = 32


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
        if progress is not None:
            progress("search trigger", done + 1, settings.steps, {"pixels": float(search.best_l1.min())})
    return [search.result(position, holdout) for position in range(len(labels))]


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
        self.best_l1 = torch.full((count,), float("inf"), device=fit.x.device)
        self.best = self.mask.sigmoid().detach().clone(), self.pattern.sigmoid().detach().clone()

    def step(self) -> None:
        s, count = self.settings, len(self.labels)
        index = torch.randint(len(self.fit), (count * s.batch_size,), generator=self.random)
        x = self.fit.x[index].view(count, s.batch_size, *self.fit.x.shape[1:])
        mask, pattern = self.mask.sigmoid(), self.pattern.sigmoid()
        stamped = (1 - mask[:, None]) * x + mask[:, None] * pattern[:, None]
        with autocast(x.device, self.precision):
            logits = logits_of(self.model(stamped.flatten(0, 1))).float()
        target = self.labels.repeat_interleave(s.batch_size)
        errors = F.cross_entropy(logits, target, reduction="none").view(count, -1).mean(1)
        l1 = mask.flatten(1).sum(1)
        grads = torch.autograd.grad((errors + self.cost * l1).sum(), (self.mask, self.pattern))
        self.mask.grad, self.pattern.grad = grads
        with torch.no_grad():
            works = (logits.argmax(1) == target).view(count, -1).float().mean(1) >= s.success
            self._keep_best(works, l1.detach(), mask.detach(), pattern.detach())
            self.cost = torch.where(works, self.cost * 1.2, self.cost / 1.2)
        self.optimizer.step()

    def _keep_best(self, works: Tensor, l1: Tensor, mask: Tensor, pattern: Tensor) -> None:
        """Of the triggers that worked the smallest is kept; until one works, the latest."""
        better = (works & (l1 < self.best_l1)) | self.best_l1.isinf()
        for kept, now in zip(self.best, (mask, pattern), strict=True):
            kept[better] = now[better]
        self.best_l1 = torch.where(works & (l1 < self.best_l1), l1, self.best_l1)

    def result(self, position: int, holdout: CleanSet) -> RecoveredTrigger:
        label = int(self.labels[position])
        mask, pattern = (kept[position] for kept in self.best)
        others = holdout.x[holdout.y != label]
        answers = predict(self.model, (1 - mask) * others + mask * pattern, precision=self.precision).argmax(1)
        return RecoveredTrigger(label, mask, pattern, float((answers == label).float().mean()), float(mask.sum()))
