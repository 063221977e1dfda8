"""Neural Cleanse's mitigation: find the smallest trigger, and teach the model the true labels of images that carry it.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section
VI-C (mitigation by unlearning); the search is that of section IV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from debackdoor.data import split_clean
from debackdoor.data.augment import random_shift_by
from debackdoor.defenses.base import Defense, accuracy_after, check_loss, suspect_copy
from debackdoor.detectors.neural_cleanse import OUTLYING, Anomalies, neural_cleanse, published
from debackdoor.errors import check_count, check_fraction, check_positive
from debackdoor.models.copying import same_gradients
from debackdoor.models.forward import accuracy, in_eval, logits_of, predict
from debackdoor.runtime import autocast, generator, seeded, sent, shuffled_batches
from debackdoor.types import CleanSet, Progress, RecoveredTrigger, RepairResult, Step


@dataclass(frozen=True, kw_only=True)
class NCUnlearning(Defense):
    """Fine-tuning on clean images of which some carry the outlying trigger, all with their true labels.

    Published is one pass over a tenth of the training data, 5,000 images for CIFAR-10. Ten passes over 500 images are
    as many steps, and so that is the default; which images carry the trigger is drawn anew for every pass.

    Attributes:
        outlying: the anomaly index from which a trigger is unlearned; where none reaches it, the model stays as it is.
        always: whether the smallest trigger is unlearned whatever its index.
        search_steps: of the search for triggers.
        share: of the images that carry the trigger, a fraction.
        epochs: passes over the fit part; published is 1.
        lr: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        batch_size: images a step.
        shift: largest random shift before the trigger is put on, a fraction of the image's height and width.
        holdout: share of the clean set that is not learned from and tells what unlearning costs; 0 learns from all.

    Example:
        >>> result = NCUnlearning()(model, clean)  # doctest: +SKIP
    """

    name: ClassVar[str] = "nc-unlearning"

    outlying: float = OUTLYING
    always: bool = False
    search_steps: int = 200
    share: float = 0.2
    epochs: int = 10
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 32
    shift: float = 0.125
    holdout: float = 0.0

    def __post_init__(self) -> None:
        check_positive(outlying=self.outlying, lr=self.lr)
        check_count(search_steps=self.search_steps, epochs=self.epochs, batch_size=self.batch_size)
        check_fraction(momentum=self.momentum, weight_decay=self.weight_decay)
        check_fraction(share=self.share, shift=self.shift, holdout=self.holdout)

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        fit, judges = split_clean(clean, self.holdout, self.seed) if self.holdout else (clean, clean)
        repaired = suspect_copy(model, clean, self.precision).requires_grad_(False)
        logits = predict(repaired, judges.x, precision=self.precision)
        found = self._find(repaired, fit, judges, logits.shape[1], progress)
        smallest = int(np.argmin([trigger.l1 for trigger in found.triggers]))
        trigger, index = found.triggers[smallest], found.indices[smallest]
        history, before = {"search trigger": _rows(found)}, accuracy(logits, judges.y)
        numbers = {"label": trigger.label, "index": index, "l1": trigger.l1, "success_rate": trigger.success_rate}
        steps = [Step("search", f"the smallest trigger of {len(found.triggers)}", numbers)]
        after, changed = before, index >= self.outlying or self.always
        if changed:
            history["fine-tune"] = self._fine_tune(repaired, fit, trigger, progress)
            after = accuracy_after(repaired, judges, self.lr, self.precision)
            steps.append(Step("fine-tune", self._why(index), {"accuracy": after}))
        else:
            steps.append(Step("nothing", f"an anomaly index below {self.outlying}", {"accuracy": after}))
        same_gradients(repaired, model)
        rates = {"before": before, "after": after}
        return RepairResult(repaired, (), rates, None, history, tuple(steps), changed=changed)

    def _find(
        self, model: nn.Module, fit: CleanSet, judges: CleanSet, classes: int, progress: Progress | None
    ) -> Anomalies:
        settings = published(self.search_steps)
        return neural_cleanse(
            model, fit, judges, classes, settings, seed=self.seed, precision=self.precision, progress=progress
        )

    def _why(self, index: float) -> str:
        rule = f"of at least {self.outlying}" if index >= self.outlying else f"below {self.outlying}, as asked for"
        return f"an anomaly index {rule}; {self.epochs} epochs at a step size of {self.lr}"

    def _fine_tune(
        self, model: nn.Module, fit: CleanSet, trigger: RecoveredTrigger, progress: Progress | None
    ) -> list[dict[str, Any]]:
        """Changes the model, and leaves it in eval mode; one row a pass."""
        model.requires_grad_(True).train()
        with seeded(self.seed, fit.x.device):
            history = self._train(model, fit, trigger, progress)
        in_eval(model).zero_grad(set_to_none=True)
        return history

    def _train(
        self, model: nn.Module, fit: CleanSet, trigger: RecoveredTrigger, progress: Progress | None
    ) -> list[dict[str, Any]]:
        random, history = generator(self.seed), list[dict[str, Any]]()
        optimizer = torch.optim.SGD(model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)
        for epoch in range(1, self.epochs + 1):
            carries = torch.zeros(len(fit), 1, 1, 1, dtype=torch.bool)
            carries[torch.randperm(len(fit), generator=random)[: max(1, round(self.share * len(fit)))]] = True
            carries = sent(carries, fit.x.device)
            total, seen = torch.zeros((), dtype=torch.float64, device=fit.x.device), 0
            for index in shuffled_batches(len(fit), self.batch_size, random, fit.x.device):
                x = random_shift_by(fit.x[index], self.shift, random)
                x = torch.where(carries[index], trigger.apply(x), x)
                with autocast(x.device, self.precision):
                    logits = logits_of(model(x)).float()
                loss = F.cross_entropy(logits, fit.y[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, seen = total + loss.detach().double() * len(index), seen + len(index)
            history.append({"epoch": epoch, "loss": total.item() / seen})
            check_loss(history[-1]["loss"], f"epoch {epoch} of fine-tuning", self.lr)
            if progress is not None:
                progress("fine-tune", epoch, self.epochs, {"loss": history[-1]["loss"]})
        return history


def _rows(found: Anomalies) -> list[dict[str, Any]]:
    return [
        {"label": trigger.label, "l1": trigger.l1, "success_rate": trigger.success_rate, "index": index}
        for trigger, index in zip(found.triggers, found.indices, strict=True)
    ]
