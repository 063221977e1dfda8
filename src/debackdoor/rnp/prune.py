"""Stage 3 of RNP: rank the channels by their recovered masks, choose how many to prune, and prune them.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, section 3.2 (pruning). Scoring, choosing and
removing are separate, so a plan can be read before it is applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer, all_channels, count_channels, flat_indices, mask_parameters
from debackdoor.models.copying import copied
from debackdoor.types import Plan, PlannedChannel, Progress


def rank(layers: Sequence[MaskableLayer], scores: Tensor, ties: Tensor) -> Plan:
    """All channels, the most suspicious (lowest score) first.

    Args:
        layers: the maskable layers, in order.
        scores: one number a channel, (channels,), in the layers' order.
        ties: a second number a channel, (channels,), by which channels of equal score are ordered, lowest first.
    """
    scores = scores.cpu()
    order: list[int] = np.lexsort((ties.cpu().numpy(), scores.numpy())).tolist()
    places = all_channels(layers)
    return tuple(PlannedChannel(*places[i], score=float(scores[i])) for i in order)


def below(ranking: Plan, threshold: float) -> Plan:
    """The channels whose score is at most ``threshold``: the paper's rule."""
    return tuple(channel for channel in ranking if channel.score <= threshold)


@dataclass(frozen=True)
class Cost:
    """What a model with a plan's channels masked does on the hold-out part.

    Attributes:
        accuracy: a fraction.
        loss: mean cross-entropy, in nats.
    """

    accuracy: float
    loss: float


def spared(
    ranking: Plan,
    measure: Callable[[Plan], Cost],
    budget: float,
    *,
    group: int = 8,
    groups: int = 64,
    most: int = 512,
    progress: Progress | None = None,
) -> Plan:
    """The channels along the ranking that the clean task can spare, in the ranking's order.

    Groups of channels are tried in turn. One is taken if hold-out accuracy stays within the budget and the loss rises
    by at most an eighth of the budget: a channel that the model needs for its clean task is passed over, however
    suspicious, and does not use up the budget of those behind it. A refused group is halved, down to single channels.
    The loss is asked beside accuracy because it tells apart what a few hundred images' accuracy cannot.

    Each try is a look at all images. So that a large network, whose every look takes long, does not ask for thousands
    of them, its groups are larger, and after ``most`` tries a refused group is passed over as a whole.

    Args:
        ranking: candidates, most suspicious first.
        measure: what pruning a plan costs; called with the empty plan first, and once for the same channels.
        budget: how far accuracy may fall, a fraction.
        group: channels in a group, at least.
        groups: how many groups at most; of more candidates the groups are larger.
        most: tries after which groups are no longer halved.
        progress: called whenever it is decided about a group or a channel.
    """
    plan: Plan = ()
    decided = 0
    # The last part of a refused group, after the others were taken, is the group once more.
    known: dict[frozenset[PlannedChannel], Cost] = {}

    def cost_of(channels: Plan) -> Cost:
        key = frozenset(channels)
        if key not in known:
            known[key] = measure(channels)
        return known[key]

    start = now = cost_of(plan)
    group = max(group, math.ceil(len(ranking) / groups))
    waiting = [ranking[i : i + group] for i in range(0, len(ranking), group)][::-1]
    while waiting:
        candidates = waiting.pop()
        cost = cost_of(plan + candidates)
        # A fall of exactly the budget is within it, whatever the last bit of the difference says.
        if start.accuracy - cost.accuracy <= budget + 1e-9 and cost.loss <= now.loss + budget / 8:
            plan, now = plan + candidates, cost
        elif len(candidates) > 1 and len(known) < most:
            half = len(candidates) // 2
            waiting += [candidates[half:], candidates[:half]]
            continue
        decided += len(candidates)
        if progress is not None:
            progress("prune", decided, len(ranking), {"channels": float(len(plan)), "accuracy": now.accuracy})
    return plan


def plan_mask(layers: Sequence[MaskableLayer], plan: Plan, device: torch.device | str = "cpu") -> Tensor:
    """The flat mask (channels,) of a plan: 0 where it prunes, 1 elsewhere."""
    mask = torch.ones(count_channels(layers), device=device)
    if plan:
        mask[flat_indices(layers, ((channel.layer, channel.index) for channel in plan))] = 0.0
    return mask


def prune(model: nn.Module, layers: Sequence[MaskableLayer], plan: Plan) -> nn.Module:
    """A copy of the model with the plan's channels set to zero, all shapes as they are.

    Of a normalisation the weight is set to zero and the bias stays; of a convolution or linear layer, both are.
    """
    pruned = copied(model)
    parameters = dict(pruned.named_parameters())
    device = next(iter(parameters.values())).device
    with torch.no_grad():
        for name, value in mask_parameters(layers, plan_mask(layers, plan, device), parameters).items():
            parameters[name].copy_(value)
    return pruned
