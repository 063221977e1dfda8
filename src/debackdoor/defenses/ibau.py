"""I-BAU: unlearn the worst universal perturbation, with weights that foresee how it answers.

Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022,
https://arxiv.org/abs/2110.03735. The fixed-point series is that of Grazzi et al., "On the Iteration Complexity of
Hypergradient Computation", ICML 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from debackdoor.data import split_clean
from debackdoor.defenses.base import Defense, accuracy_after, check_loss, suspect_copy
from debackdoor.errors import DebackdoorError, check_count, check_fraction, check_positive
from debackdoor.models.copying import same_gradients
from debackdoor.models.forward import accuracy, logits_of, predict
from debackdoor.runtime import autocast, generator, sent, shuffled_batches
from debackdoor.types import CleanSet, Progress, RepairResult, Step

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
"""What may search for the perturbation."""


@dataclass(frozen=True, kw_only=True)
class IBAU(Defense):
    """Rounds of a search for one perturbation of all images that misleads, and a pass of unlearning it.

    The model stays in eval mode: its normalisation statistics do not move. The defaults are the published ones. They
    were published for 5,000 images, which is 50 steps a pass; of 500 images a pass has 5.

    Attributes:
        rounds: how often a perturbation is searched for and unlearned.
        lr: of Adam, on all weights.
        batch_size: images a step.
        share: of each batch that gets the perturbation while the weights learn, a fraction; at least one image does.
        regulariser: weight of the perturbation's squared L2 norm.
        search: what searches, ``sgd`` or ``adam``.
        search_lr: its step size; published are 10 for ``sgd`` and 1 for ``adam``.
        search_passes: passes over the fit part for one perturbation.
        inner_lr: step size of the gradient step whose fixed point the perturbation is taken for.
        fixed_point_steps: terms of the series that the hypergradient is cut off after.
        clamp: whether perturbed images are brought back to [0, 1]; published is no.
        holdout: share of the clean set that is not learned from and tells what unlearning costs; 0 learns from all.

    Example:
        >>> result = IBAU(rounds=5)(model, clean)  # doctest: +SKIP
    """

    name: ClassVar[str] = "i-bau"

    rounds: int = 5
    lr: float = 1e-3
    batch_size: int = 100
    share: float = 0.01
    regulariser: float = 1e-3
    search: str = "sgd"
    search_lr: float = 10.0
    search_passes: int = 1
    inner_lr: float = 0.1
    fixed_point_steps: int = 5
    clamp: bool = False
    holdout: float = 0.0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, regulariser=self.regulariser, search_lr=self.search_lr, inner_lr=self.inner_lr)
        check_count(rounds=self.rounds, batch_size=self.batch_size)
        check_count(search_passes=self.search_passes, fixed_point_steps=self.fixed_point_steps)
        check_fraction(share=self.share, holdout=self.holdout)
        if self.search not in OPTIMIZERS:
            raise DebackdoorError(f"expected search to be one of {', '.join(OPTIMIZERS)}, got '{self.search}'")

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        fit, judges = split_clean(clean, self.holdout, self.seed) if self.holdout else (clean, clean)
        repaired = suspect_copy(model, clean, self.precision).requires_grad_(True)
        before = accuracy(predict(repaired, judges.x, precision=self.precision), judges.y)
        history = self._unlearn(repaired, fit, progress)
        same_gradients(repaired, model)
        after = accuracy_after(repaired, judges, self.lr, self.precision)
        rates = {"before": before, "after": after}
        step = Step("unlearn", f"{self.rounds} rounds at a step size of {self.lr}", {"accuracy": after})
        return RepairResult(repaired, (), rates, None, {"unlearn": history}, (step,), changed=True)

    def _unlearn(self, model: nn.Module, fit: CleanSet, progress: Progress | None) -> list[dict[str, Any]]:
        """Changes the model; one row a round: the outer loss, what the perturbation flips, and its L2 norm."""
        random, history = generator(self.seed), list[dict[str, Any]]()
        optimizer = torch.optim.Adam(model.parameters(), self.lr)
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for done in range(1, self.rounds + 1):
                d = self._search(model, fit, random)
                row = {"round": done, "flipped": self._flipped(model, fit, d), "norm": float(d.detach().norm())}
                loss, seen = torch.zeros((), dtype=torch.float64, device=fit.x.device), 0
                for index in shuffled_batches(len(fit), self.batch_size, random, fit.x.device):
                    loss += self._step(model, optimizer, fit.subset(index), d, random) * len(index)
                    seen += len(index)
                history.append({**row, "loss": loss.item() / seen})
                check_loss(history[-1]["loss"], f"round {done}", self.lr)
                if progress is not None:
                    progress("unlearn", done, self.rounds, {"loss": history[-1]["loss"]})
        optimizer.zero_grad(set_to_none=True)
        return history

    def _search(self, model: nn.Module, fit: CleanSet, random: torch.Generator) -> Tensor:
        """A perturbation (1, C, H, W) from nothing, away from what the model itself says of the images."""
        d = torch.zeros_like(fit.x[:1]).requires_grad_()
        optimizer = OPTIMIZERS[self.search]([d], lr=self.search_lr)  # type: ignore[call-arg]
        said = predict(model, fit.x, precision=self.precision).argmax(1)
        for _ in range(self.search_passes):
            for index in shuffled_batches(len(fit), self.batch_size, random, fit.x.device):
                (d.grad,) = torch.autograd.grad(self._inner(model, fit.x[index], said[index], d), d)
                optimizer.step()
        return d.detach().requires_grad_()

    def _step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: CleanSet, d: Tensor, random: torch.Generator
    ) -> Tensor:
        """One step of the weights along the hypergradient; the outer loss before it."""
        # Rounded down, as published, 1 % of a batch below 100 would be no image, and d would teach nothing.
        count = max(1, round(self.share * len(batch)))
        chosen = torch.zeros(len(batch), 1, 1, 1)
        chosen[torch.randperm(len(batch), generator=random)[:count]] = 1.0
        outer = self._loss(model, batch.x, batch.y, sent(chosen, d.device) * d)
        weights = list(model.parameters())
        gradients = hypergradient(
            self._inner(model, batch.x, batch.y, d), outer, d, weights, self.fixed_point_steps, self.inner_lr
        )
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        return outer.detach().double()

    def _inner(self, model: nn.Module, x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        """What the perturbation minimises."""
        return self.regulariser * d.square().sum() - self._loss(model, x, y, d)

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        with autocast(x.device, self.precision):
            logits = logits_of(model(self._perturbed(x, d))).float()
        return F.cross_entropy(logits, y)

    def _perturbed(self, x: Tensor, d: Tensor) -> Tensor:
        return (x + d).clamp(0, 1) if self.clamp else x + d

    def _flipped(self, model: nn.Module, fit: CleanSet, d: Tensor) -> float:
        """The share of the images that get another answer under the perturbation."""
        one, other = (
            predict(model, x, precision=self.precision).argmax(1) for x in (fit.x, self._perturbed(fit.x, d.detach()))
        )
        return int((one != other).sum()) / len(fit)


def hypergradient(
    inner: Tensor, outer: Tensor, d: Tensor, weights: Sequence[Tensor], steps: int, lr: float
) -> list[Tensor | None]:
    """The gradient of ``outer`` by the weights, d moving with them as the fixed point of a gradient step on ``inner``.

    At the fixed point of ``d - lr * inner'(d)``, with H the second derivative of ``inner`` by d, d moves with the
    weights by ``-(lr H)^-1 lr`` times the mixed second derivative. The inverse is the series of ``(1 - lr H)^k``, cut
    off after ``steps`` terms; it is multiplied by vectors alone, and no matrix is built.

    Args:
        inner: a scalar that d minimises, with its graph.
        outer: a scalar that the weights minimise, with its graph.
        d: what moves, any shape.
        weights: what the gradient is by.
        steps: terms of the series.
        lr: step size of the gradient step.

    Returns:
        A gradient for each weight, None for one that neither loss depends on.
    """
    (slope,) = torch.autograd.grad(inner, d, create_graph=True)
    pull, *direct = torch.autograd.grad(outer, [d, *weights], allow_unused=True)
    series = pull
    for _ in range(steps - 1):
        (bend,) = torch.autograd.grad(slope, d, series, retain_graph=True)
        series = pull + series - lr * bend
    through = torch.autograd.grad(slope, weights, -lr * series, allow_unused=True)
    return [_sum(one, other) for one, other in zip(direct, through, strict=True)]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
