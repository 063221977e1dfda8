"""ABL's second phase: climb the error on samples that are thought poisoned.

Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021,
https://arxiv.org/abs/2110.11571, section 4 (backdoor unlearning). The first phase isolates these samples while a model
is trained on poisoned data; here they are given, for example by sample detection.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.data import check_labels, split_clean
from debackdoor.defenses.base import Defense, accuracy_after, check_loss, suspect_copy
from debackdoor.errors import DataError, TooFewError, check_count, check_fraction, check_positive
from debackdoor.models.copying import same_gradients
from debackdoor.models.forward import accuracy, in_eval, logits_of, predict
from debackdoor.runtime import autocast, generator, seeded, shuffled_batches
from debackdoor.types import CleanSet, Progress, RepairResult, Step


@dataclass(frozen=True, kw_only=True)
class ABLUnlearning(Defense):
    """Gradient ascent on given samples: their images and the labels that they were found with.

    The clean set teaches nothing. Published are 1 % of the training data, 500 images for CIFAR-10, which is 8 steps an
    epoch, and four of the five epochs unlearn, the first only measures; here all do. Fewer samples take fewer steps.
    Training is in train mode, as published: the statistics of batch normalisation move to those of the samples, and
    that alone takes a part of a patch's backdoor away.

    Attributes:
        poisoned: at least two images on the model's device, with the labels that they were found with.
        lr: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        epochs: passes over the poisoned samples.
        batch_size: images a step.
        budget: how far accuracy on the hold-out part may fall, a fraction: the last epoch within it is what remains,
            which may be none. None goes through all epochs, as published.
        holdout: share of the clean set that judges; 0 lets all of it judge.

    Example:
        >>> result = ABLUnlearning(poisoned=suspects, budget=0.02)(model, clean)  # doctest: +SKIP
    """

    name: ClassVar[str] = "abl-unlearning"

    poisoned: CleanSet = field(repr=False)
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    epochs: int = 5
    batch_size: int = 64
    budget: float | None = None
    holdout: float = 0.25

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_count(epochs=self.epochs, batch_size=self.batch_size)
        check_fraction(momentum=self.momentum, weight_decay=self.weight_decay)
        check_fraction(budget=self.budget, holdout=self.holdout)
        if len(self.poisoned) < 2:
            raise TooFewError(
                f"{self.poisoned.source}: expected at least 2 samples that are thought poisoned, "
                f"got {len(self.poisoned)}; add samples, or use a defence that needs none"
            )

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        judges = split_clean(clean, self.holdout, self.seed)[1] if self.holdout else clean
        climbing = suspect_copy(model, clean, self.precision).requires_grad_(True)
        logits = predict(climbing, judges.x, precision=self.precision)
        self._check_poisoned(clean, logits.shape[1])
        before = accuracy(logits, judges.y)
        with seeded(self.seed, clean.x.device):
            history = self._climb(climbing, judges, before, progress)
        kept = [row for row in history if row["kept"]]
        after = kept[-1]["accuracy"] if kept else before
        same_gradients(climbing, model)
        step = Step("unlearn", self._rule(), {"epochs": len(kept), "accuracy": after})
        rates = {"before": before, "after": after}
        return RepairResult(climbing, (), rates, None, {"unlearn": history}, (step,), changed=bool(kept))

    def _check_poisoned(self, clean: CleanSet, classes: int) -> None:
        check_labels(self.poisoned, classes)
        wanted, got = tuple(clean.x.shape[1:]), tuple(self.poisoned.x.shape[1:])
        if wanted != got:
            raise DataError(
                f"{self.poisoned.source}: expected images of shape {wanted}, like the clean ones, got {got}; "
                "bring them to that size"
            )

    def _rule(self) -> str:
        if self.budget is None:
            return f"{self.epochs} epochs at a step size of {self.lr}"
        return f"as far as accuracy on the hold-out part falls by at most {self.budget}, {self.epochs} epochs at most"

    def _climb(
        self, model: nn.Module, judges: CleanSet, before: float, progress: Progress | None
    ) -> list[dict[str, Any]]:
        """Changes the model, and leaves it in eval mode; one row an epoch, and whether the epoch is kept."""
        random, history, poisoned = generator(self.seed), list[dict[str, Any]](), self.poisoned.detached()
        optimizer = torch.optim.SGD(model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)
        for epoch in range(1, self.epochs + 1):
            last = copy.deepcopy(model.state_dict())
            model.train()
            batches = shuffled_batches(len(poisoned), self.batch_size, random, poisoned.x.device)
            errors = torch.cat([self._step(model, optimizer, poisoned.subset(index)) for index in batches])
            check_loss(float(errors.mean()), f"epoch {epoch}", self.lr)
            now = accuracy_after(in_eval(model), judges, self.lr, self.precision)
            kept = self.budget is None or before - now <= self.budget + 1e-9
            row = {"epoch": epoch, "loss": float(errors.mean()), "accuracy": now, "kept": kept}
            history.append(row)
            if progress is not None:
                progress("unlearn", epoch, self.epochs, {"loss": row["loss"], "accuracy": now})
            if not kept:
                model.load_state_dict(last)
                break
        optimizer.zero_grad(set_to_none=True)
        return history

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: CleanSet) -> Tensor:
        """One step of ascent; the error of each sample before it."""
        with autocast(batch.x.device, self.precision):
            logits = logits_of(model(batch.x)).float()
        errors = F.cross_entropy(logits, batch.y, reduction="none")
        optimizer.zero_grad(set_to_none=True)
        (-errors.mean()).backward()
        optimizer.step()
        return errors.detach()
