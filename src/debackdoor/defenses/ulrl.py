"""Unlearn and relearn (ULRL).

Min, Pham and Sun, "Unified Neural Backdoor Removal with Only Few Clean Samples through Unlearning and Relearning",
arXiv 2405.14781, https://arxiv.org/abs/2405.14781; authors' code https://github.com/NayMyatMin/ULRL.

From the paper and its code: the error on the clean set is maximised; the neurons of the last layer (one a class) whose
weights changed out of line with the others (median absolute deviation, at most two) are suspicious; in the suspect
model as it was, their weights are drawn anew and their biases set to 0; the whole model then learns the clean set, with
the cosine between the suspicious neurons' old and new weights as a penalty. All numbers are those of the code for
CIFAR-10, whose 500 clean images are as many as here.

Ours: of more than two outliers, those that changed most are taken (the code takes the first labels); last layers are
found from outside, in any network, and may be convolutions or several; dropout is off while unlearning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor._graph import LAYERS, classifier_outputs, trace
from debackdoor.defenses.tuning import Tuned, Tuning
from debackdoor.errors import ModelError, check_positive
from debackdoor.models.forward import accuracy, eval_mode, in_eval, logits_of, predict
from debackdoor.rnp.unlearn import UnlearnSettings, unlearn
from debackdoor.runtime import autocast, generator
from debackdoor.types import CleanSet, Progress, Step


def published_unlearning() -> UnlearnSettings:
    """The code's settings: at most 20 passes, to an accuracy over a pass of 0.2."""
    return UnlearnSettings(
        lr=0.01, momentum=0.9, weight_decay=5e-4, clip=20.0, stop_accuracy=0.2, past_peak=None, check_every=None,
        largest_fall=1.0, max_passes=20, least_steps=1, batch_size=128, decay_at=(10,), running=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ULRL(Tuning):
    """Draws the class neurons that unlearning moves most anew, and relearns the clean set away from what they were.

    With the published ``alpha`` and few steps, a small network may not learn the class itself again; then no image gets
    that label, triggered or not. The last step's ``restarted_accuracy`` tells.

    Attributes:
        threshold: deviations from the median above which a neuron is suspicious, in units of 1.4826 MAD.
        most: how many neurons at most.
        alpha: weight of the cosine between a suspicious neuron's old and new weights.
        unlearning: hyper-parameters of unlearning.
    """

    name: ClassVar[str] = "ulrl"

    lr: float = 0.005
    weight_decay: float = 0.0
    batch_size: int = 128
    threshold: float = 3.5
    most: int = 2
    alpha: float = 0.7
    unlearning: UnlearnSettings = field(default_factory=published_unlearning)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(threshold=self.threshold, most=self.most)

    def _tune(self, model: nn.Module, fit: CleanSet, progress: Progress | None) -> Tuned:
        heads = find_heads(model, fit.x[:2])
        unlearned = unlearn(model, fit, self.unlearning, seed=self.seed, precision=self.precision, progress=progress)
        changes = sum_changes(model, unlearned.model, heads)
        rows = outliers(changes, self.threshold, self.most)
        layers = [model.get_submodule(name) for name in heads]
        old = [_rows_of(layer, rows).detach().clone() for layer in layers]
        for layer in layers:
            _draw_anew(layer, rows, generator(self.seed))
        model.train()

        def backward(x: Tensor, y: Tensor) -> Tensor:
            with autocast(x.device, self.precision):
                loss = F.cross_entropy(logits_of(model(x)).float(), y)
            for layer, before in zip(layers, old, strict=True):
                loss = loss + self.alpha * F.cosine_similarity(_rows_of(layer, rows), before, dim=1).sum()
            loss.backward()
            return loss.detach()

        history = self._descend(self.name, model.parameters(), fit, backward, progress)
        labels = ", ".join(map(str, rows)) or "none"
        numbers = dict(history[-1])
        restarted = torch.isin(fit.y, torch.tensor(rows, dtype=torch.int64, device=fit.y.device))
        if restarted.any():
            logits = predict(in_eval(model), fit.x[restarted], precision=self.precision)
            numbers["restarted_accuracy"] = accuracy(logits, fit.y[restarted])
        steps = (
            Step("unlearn", unlearned.reason, {"accuracy": unlearned.accuracy}),
            Step("draw anew", f"class neurons: {labels}", {"neurons": len(rows)}),
            Step("relearn", f"{self.epochs} epochs at a step size of {self.lr}", numbers),
        )
        changed = [{"label": label, "change": change} for label, change in enumerate(changes.tolist())]
        return Tuned(model, {"unlearn": unlearned.history, "changes": changed, self.name: history}, steps)


def find_heads(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """The names of the layers that make the logits and have one row of weights a class.

    Args:
        model: any image classifier; it is left as found.
        example: images that it takes, (N, C, H, W).

    Raises:
        ModelError: if there is none.
    """
    traced = trace(model, example)
    outputs = classifier_outputs(traced)
    with eval_mode(model):
        classes = predict(model, example).shape[1]
    names = {module: name for name, module in model.named_modules()}
    heads = dict.fromkeys(
        names[call.module]
        for call in traced.calls
        if call.node in outputs and isinstance(call.module, LAYERS) and _has_rows(call.module, classes)
    )
    if not heads:
        raise ModelError(
            f"expected a last layer with one row of weights for each of the {classes} classes, got "
            f"{type(model).__name__} without a plain one; remove weight norm from it, or take another defence"
        )
    return tuple(heads)


def sum_changes(before: nn.Module, after: nn.Module, heads: Sequence[str]) -> Tensor:
    """How far the weights of each class's neuron moved: sums of absolute differences, float (K,)."""
    parts = [
        (_weight(after.get_submodule(name)) - _weight(before.get_submodule(name))).detach().abs().flatten(1).sum(1)
        for name in heads
    ]
    return torch.stack(parts).sum(0)


def outliers(changes: Tensor, threshold: float, most: int) -> list[int]:
    """The indices of at most ``most`` values, the largest first, that are too far above the median.

    Too far is more than ``threshold`` times 1.4826 MAD; where more than half of the values are equal, the MAD is 0 and
    any value above them is.
    """
    values = changes.double().cpu().numpy()
    above = values - np.median(values)
    spread = 1.4826 * np.median(np.abs(above))
    return [int(i) for i in np.argsort(-values, kind="stable") if above[i] > threshold * spread][:most]


def _weight(layer: nn.Module) -> Tensor:
    return dict(layer.named_parameters(recurse=False))["weight"]


def _has_rows(layer: nn.Module, classes: int) -> bool:
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.shape[0] == classes and not getattr(layer, "transposed", False)


def _rows_of(layer: nn.Module, rows: Sequence[int]) -> Tensor:
    return _weight(layer)[list(rows)].flatten(1)


@torch.no_grad()
def _draw_anew(layer: nn.Module, rows: Sequence[int], random: torch.Generator) -> None:
    """Weights uniform within plus or minus ``sqrt(2 / inputs)``, bias 0."""
    parameters = dict(layer.named_parameters(recurse=False))
    for row in rows:
        weight = parameters["weight"][row]
        bound = math.sqrt(2 / weight.numel())
        weight.copy_((2 * torch.rand(weight.shape, generator=random) - 1) * bound)
        if "bias" in parameters:
            parameters["bias"][row] = 0.0
