"""The search for universal perturbations that send images to a label, or away from their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.data.augment import random_shift_by
from debackdoor.detectors.perturbations import KINDS, Additive, Patch, Perturbations, Sizes
from debackdoor.models.forward import accuracy, logits_of, predict, predict_changed, share_led
from debackdoor.runtime import at_most, autocast, generator, sent, to_report
from debackdoor.types import CleanSet, Progress

AWAY = -1
"""The target of a perturbation that may lead to any label but the image's own."""

AT_ONCE = 128
"""Images that go through the model at once; a search for many labels would take the most memory of all."""


@dataclass(frozen=True)
class Aim:
    """One perturbation to search for: its kind, and the label it leads to, or :data:`AWAY`."""

    kind: type[Perturbations]
    target: int


def aims_at(labels: Sequence[int], count: int = 1) -> list[Aim]:
    """``count`` perturbations of every kind towards every label."""
    return [Aim(kind, label) for kind in KINDS for label in labels for _ in range(count)]


class UniversalSearch:
    """Adam on several perturbations at once, each with its own aim; they share their forward passes.

    Attributes:
        aims: what is searched for, in the order of the indices that :meth:`apply` takes.
    """

    def __init__(self, aims: Sequence[Aim], like: Tensor, sizes: Sizes, seed: int) -> None:
        """Starts from random perturbations of images like ``like`` (N, C, H, W)."""
        self.random = generator(seed)
        self.aims = sorted(aims, key=lambda aim: KINDS.index(aim.kind))
        self.targets = torch.tensor([aim.target for aim in self.aims])
        counts = [sum(aim.kind is kind for aim in self.aims) for kind in KINDS]
        self.groups = [
            kind(count, like.shape[1:], sizes, self.random).to(like.device)
            for kind, count in zip(KINDS, counts, strict=True)
            if count
        ]
        self.optimizer = torch.optim.Adam(
            [{"params": group.parameters, "lr": group.lr} for group in self.groups], betas=(0.5, 0.9)
        )

    def __len__(self) -> int:
        return len(self.aims)

    @property
    def parameters(self) -> list[Tensor]:
        return [value for group in self.groups for value in group.parameters]

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """The images (N, C, H, W) in [0, 1], each under the perturbation that ``index`` (N,), on the CPU, names."""
        out, first = x.clone(), 0
        for group in self.groups:
            count = len(group.parameters[0])
            rows = ((index >= first) & (index < first + count)).nonzero()[:, 0]
            if len(rows):
                chosen, which = sent(rows, x.device), sent(index[rows] - first, x.device)
                out = out.index_copy(0, chosen, group.apply(x[chosen], which))
            first += count
        return out

    def pattern(self, number: int) -> Tensor:
        """The additive pattern (C, H, W) that the aim of that number has come to."""
        (patterns,) = next(group.parameters for group in self.groups if isinstance(group, Additive))
        return patterns[[aim.kind for aim in self.aims[:number]].count(Additive)].detach().clone()

    def loss(self, logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """What the perturbations descend: the sum over the images of how far their answers are from the aims'.

        ``index`` (N,), on the CPU, names the aims.
        """
        target = sent(self.targets[index], logits.device)
        towards = F.cross_entropy(logits, target.clamp(min=0), reduction="none")
        # Bounded, so that an image that is far from its label already does not outvote the others.
        away = -F.cross_entropy(logits, y, reduction="none").clamp(max=8)
        return torch.where(target == AWAY, away, towards).sum()

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One step along the gradients of :meth:`loss` with respect to :attr:`parameters`."""
        for value, gradient in zip(self.parameters, gradients, strict=True):
            value.grad = torch.zeros_like(value) if gradient is None else gradient
        self.optimizer.step()
        for group in self.groups:
            group.project()

    def run(
        self,
        model: nn.Module,
        fit: CleanSet,
        steps: int,
        images: int = 8,
        *,
        precision: str = "auto",
        progress: Progress | None = None,
    ) -> UniversalSearch:
        """``steps`` steps on the model as it is, with ``images`` images a perturbation; returns itself."""
        index = torch.arange(len(self)).repeat_interleave(images)
        for done in range(steps):
            # A patch that is large at first finds its place more often than one that is small from the beginning.
            for group in self.groups:
                group.loosen(1 + 3 * max(0.0, 1 - 2 * done / steps))
            loss = self._descend(model, fit, index, images, precision)
            if progress is not None and to_report(done + 1, steps):
                progress("search perturbations", done + 1, steps, {"loss": loss.item() / len(self)})
        return self

    def _descend(self, model: nn.Module, fit: CleanSet, index: Tensor, images: int, precision: str) -> Tensor:
        """One step on fresh images, one an entry of ``index``; the loss before it."""
        drawn = sent(torch.randint(len(fit), (len(index),), generator=self.random), fit.x.device)
        sums, loss = [torch.zeros_like(value) for value in self.parameters], torch.zeros((), device=fit.x.device)
        for some, which in zip(drawn.split(at_most(AT_ONCE)), index.split(at_most(AT_ONCE)), strict=True):
            x = random_shift_by(fit.x[some], 1 / 16, self.random)
            with autocast(x.device, precision):
                logits = logits_of(model(self.apply(x, which))).float()
            part = self.loss(logits, fit.y[some], which) / images
            gradients = torch.autograd.grad(part, self.parameters, allow_unused=True)
            sums = [a if b is None else a + b for a, b in zip(sums, gradients, strict=True)]
            loss += part.detach()
        self.step(sums)
        return loss

    @torch.no_grad()
    def answers(self, model: nn.Module, x: Tensor, number: int, *, precision: str = "auto") -> Tensor:
        """The model's labels (N,) for all images under one of the perturbations."""

        def perturbed(part: Tensor) -> Tensor:
            return self.apply(part, torch.full((len(part),), number))

        return predict_changed(model, perturbed, x, precision=precision).argmax(1)

    def success(self, model: nn.Module, images: CleanSet, number: int, *, precision: str = "auto") -> float:
        """The share of images of other labels that one of the perturbations sends to its own.

        Where it leads away: how far accuracy on all images falls under it.
        """
        target = self.aims[number].target
        if target != AWAY:
            return share_led(images, target, lambda x: self.answers(model, x, number, precision=precision))
        right = accuracy(predict(model, images.x, precision=precision), images.y)
        return right - float((self.answers(model, images.x, number, precision=precision) == images.y).float().mean())


def patches_away(count: int) -> list[Aim]:
    """Patches that may lead anywhere: what an all-to-all backdoor answers to."""
    return [Aim(Patch, AWAY)] * count
