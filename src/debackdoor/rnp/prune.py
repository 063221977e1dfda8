"""Stage 3 of RNP: rank the channels by their recovered masks, choose how many to prune, and prune them.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, section 3.2 (pruning). Scoring, choosing and
removing are separate, so a plan can be read before it is applied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer, count_channels, flat_index, locate, mask_parameters
from debackdoor.types import Plan, PlannedChannel


def rank(layers: Sequence[MaskableLayer], scores: Tensor, ties: Tensor) -> Plan:
    """All channels, the most suspicious (lowest score) first.

    Args:
        layers: the maskable layers, in order.
        scores: one number a channel, (channels,), in the layers' order.
        ties: a second number a channel, (channels,), by which channels of equal score are ordered, lowest first.
    """
    order = np.lexsort((ties.cpu().numpy(), scores.cpu().numpy()))
    return tuple(PlannedChannel(*locate(layers, int(i)), score=float(scores[i])) for i in order)


def below(ranking: Plan, threshold: float) -> Plan:
    """The channels whose score is at most ``threshold``: the paper's rule."""
    return tuple(channel for channel in ranking if channel.score <= threshold)


def longest_prefix(
    ranking: Plan, accepts: Callable[[Plan], bool], *, first_step: int = 1, growth: float = 1.25
) -> Plan:
    """The longest prefix of the ranking found such that it and every shorter one looked at is accepted.

    Prefix lengths grow geometrically until one is refused; the gap before it is then halved down to a single channel.

    Args:
        ranking: channels, most suspicious first.
        accepts: whether a prefix may be pruned.
        first_step: the first length looked at.
        growth: ratio of two lengths looked at.
    """
    good, length = 0, first_step
    while length <= len(ranking) and accepts(ranking[:length]):
        good, length = length, max(length + 1, round(length * growth))
    bad = min(length, len(ranking) + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if accepts(ranking[:middle]):
            good = middle
        else:
            bad = middle
    return ranking[:good]


def plan_mask(layers: Sequence[MaskableLayer], plan: Plan, device: torch.device | str = "cpu") -> Tensor:
    """The flat mask (channels,) of a plan: 0 where it prunes, 1 elsewhere."""
    mask = torch.ones(count_channels(layers), device=device)
    if plan:
        mask[[flat_index(layers, channel.layer, channel.index) for channel in plan]] = 0.0
    return mask


def prune(model: nn.Module, layers: Sequence[MaskableLayer], plan: Plan) -> nn.Module:
    """A copy of the model with the plan's channels set to zero, all shapes as they are.

    Of a normalisation the weight is set to zero and the bias stays; of a convolution or linear layer, both are.
    """
    pruned = copy.deepcopy(model)
    parameters = dict(pruned.named_parameters())
    device = next(iter(parameters.values())).device
    with torch.no_grad():
        for name, value in mask_parameters(layers, plan_mask(layers, plan, device), parameters).items():
            parameters[name].copy_(value)
    return pruned
