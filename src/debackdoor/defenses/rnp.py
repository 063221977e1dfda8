"""Reconstructive Neuron Pruning.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, https://arxiv.org/abs/2305.14876: unlearn
the clean task, recover it with one mask a channel, prune the channels that the recovery leaves behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from debackdoor.channels import MaskableLayer, find_channels, norms_or_all
from debackdoor.data import split_clean
from debackdoor.defenses.base import Defense, differ, suspect_copy
from debackdoor.defenses.levels import HOLDOUT
from debackdoor.errors import check_fraction
from debackdoor.fusing import fused_under_masks
from debackdoor.models.forward import accuracy, in_eval, predict
from debackdoor.rnp.prune import Cost, below, plan_mask, prune, rank, spared
from debackdoor.rnp.recover import Recovered, RecoverSettings, recover
from debackdoor.rnp.unlearn import Unlearned, UnlearnSettings, unlearn
from debackdoor.stages import Keep, anew
from debackdoor.types import CleanSet, Plan, Progress, RepairResult, Step


@dataclass(frozen=True)
class Exposure:
    """What the first two stages find out about a model.

    Attributes:
        unlearned: the exposed model and how it came about.
        recovered: the masks that bring the clean task back.
        layers: the maskable layers, in the masks' order.
        ranking: all channels, the most suspicious first.
    """

    unlearned: Unlearned
    recovered: Recovered
    layers: tuple[MaskableLayer, ...]
    ranking: Plan


@dataclass(frozen=True, kw_only=True)
class RNP(Defense):
    """Unlearn, recover, prune; blind: nothing but the clean set chooses how much is pruned.

    Three quarters of the clean set teach, and the quarter held out tells what pruning costs; with a ``threshold`` all
    images do both.

    Attributes:
        budget: how far accuracy on the clean images may fall, a fraction; pruning goes as far along the ranking.
        suspicious: channels with masks above this are not pruned.
        threshold: where given, prune every channel whose mask is at most this instead (the paper's rule). As in the
            paper masks then lie on normalisation layers alone; on all maskable layers where there are none.
        unlearning: hyper-parameters of stage 1.
        recovery: hyper-parameters of stage 2.

    Example:
        >>> result = RNP(budget=0.02)(model, clean)  # doctest: +SKIP
    """

    name: ClassVar[str] = "rnp"

    budget: float = 0.02
    suspicious: float = 0.5
    threshold: float | None = None
    unlearning: UnlearnSettings = field(default_factory=UnlearnSettings)
    recovery: RecoverSettings = field(default_factory=RecoverSettings)

    def __post_init__(self) -> None:
        check_fraction(budget=self.budget, suspicious=self.suspicious, threshold=self.threshold)

    @classmethod
    def published(cls, threshold: float = 0.2, *, seed: int = 0, precision: str = "fp32") -> RNP:
        """The paper's settings: larger steps, until the accuracy over a pass is low, and a fixed mask threshold.

        All clean images teach. Other than published, images are not mirrored, dropout is off, a pass after which the
        loss is not finite is taken back, and networks without normalisation, which the paper has nothing to mask in,
        are masked as ours are.
        """
        unlearning = UnlearnSettings(
            lr=0.01,
            weight_decay=5e-4,
            clip=None,
            stop_accuracy=0.2,
            past_peak=None,
            check_every=None,
            largest_fall=1.0,
            max_passes=21,
            least_steps=1,
            decay_at=(10, 20),
            running=True,
        )
        return cls(threshold=threshold, unlearning=unlearning, seed=seed, precision=precision)

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        model = suspect_copy(model, clean, self.precision)
        # With a fixed threshold nothing is left to be chosen, so nothing is held out.
        fit, holdout = (clean, clean) if self.threshold is not None else split_clean(clean, HOLDOUT, self.seed)
        exposure = self.expose(model, fit, progress=progress)
        plan = self.choose(model, exposure, clean, progress=progress)
        return self.remove(model, exposure, plan, holdout)

    def expose(
        self, model: nn.Module, fit: CleanSet, *, progress: Progress | None = None, keep: Keep = anew
    ) -> Exposure:
        """Stages 1 and 2, which ``keep`` may have from an earlier run, and the ranking they give."""
        layers = find_channels(model, fit.x[:2])
        if self.threshold is not None:
            layers = norms_or_all(layers)
        usual: dict[str, Any] = {"seed": self.seed, "precision": self.precision, "progress": progress}
        unlearned = keep("unlearn", partial(unlearn, model, fit, self.unlearning, **usual))
        recovered = keep("recover", partial(recover, unlearned.model, layers, fit, self.recovery, **usual))
        return Exposure(unlearned, recovered, layers, rank(layers, recovered.mask, ties=recovered.mean_mask))

    def choose(
        self, model: nn.Module, exposure: Exposure, judges: CleanSet, *, progress: Progress | None = None
    ) -> Plan:
        """The channels to prune, from the ranking and what each costs on the clean images ``judges``.

        All clean images may judge: the masks were learned on the exposed model, and the suspect one was taught nothing.
        """
        if self.threshold is not None:
            return below(exposure.ranking, self.threshold)
        candidates = below(exposure.ranking, self.suspicious)
        answer = fused_under_masks(model, exposure.layers, judges.x[:2])

        def cost(plan: Plan) -> Cost:
            mask = plan_mask(exposure.layers, plan, judges.x.device)
            logits = predict(partial(answer, mask), judges.x, precision=self.precision)
            return Cost(accuracy(logits, judges.y), F.cross_entropy(logits, judges.y).item())

        return spared(candidates, cost, self.budget, progress=progress)

    def remove(self, model: nn.Module, exposure: Exposure, plan: Plan, holdout: CleanSet) -> RepairResult:
        """Stage 3: the pruned copy, and what it costs on the hold-out part."""
        repaired = in_eval(prune(model, exposure.layers, plan))
        before, after = (
            accuracy(predict(m, holdout.x, precision=self.precision), holdout.y) for m in (model, repaired)
        )
        rates = {"before": before, "after": after}
        steps = (
            Step("unlearn", exposure.unlearned.reason, {"accuracy": exposure.unlearned.accuracy}),
            Step("recover", "one mask a channel", {"channels": len(exposure.ranking)}),
            Step("prune", self._rule(), {"channels": len(plan), "accuracy": rates["after"]}),
        )
        history = {"unlearn": exposure.unlearned.history, "recover": exposure.recovered.history}
        return RepairResult(repaired, plan, rates, None, history, steps, changed=bool(plan) and differ(model, repaired))

    def _rule(self) -> str:
        if self.threshold is not None:
            return f"masks of at most {self.threshold}"
        return f"as far as accuracy on the clean images falls by at most {self.budget}"
