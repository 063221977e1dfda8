"""How many images may go through a model at once for a run to keep within its memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from debackdoor.errors import DebackdoorError
from debackdoor.models.forward import logits_of
from debackdoor.models.stateless import call_with
from debackdoor.runtime import autocast

GIB = 1 << 30

DEFAULT = 6.0
"""GiB that a run may take."""

RUNTIME = 0.6
"""GiB that Python and its libraries take before there is a model."""

MODELS, CLEAN_SETS = 9, 3
"""Copies of the weights and of the clean images that a repair holds at most.

Two are the caller's, a checkpoint's tensors and the network they were loaded into, and two are there until the end: the
suspect and the exposed model. The other five are relearning's: the pruned model and one of it with fused layers, and
the student with its gradients and momentum. The last look at pile-ups comes to as many, the repaired model and one that
forgets with three snapshots, and so does unlearning, where there is no exposed model yet: one that learns with its
gradients and momentum, and three snapshots. Of images they are all, the two parts of them, and a few under
perturbations.
"""

BESIDE = 1.5
"""What a step takes, as a multiple of what it keeps for the way back: the way back needs room of its own."""

MOST = 1 << 20
"""No batch is as large as that."""

FEWEST = 4
"""Batch statistics of fewer images say nothing."""


def images_within(limit: float, model: nn.Module, x: Tensor, precision: str = "auto") -> int:
    """How many images a repair may let through ``model`` at once to stay within ``limit`` GiB; a power of two.

    Args:
        limit: GiB; infinity for none.
        model: the suspect model.
        x: all clean images (N, C, H, W); four of them are tried.
        precision: ``auto``, ``fp32`` or ``bf16``.

    Raises:
        DebackdoorError: if the limit is too low for this model and as many clean images.
    """
    saved = (value for value in model.state_dict().values() if isinstance(value, Tensor))  # modules may add anything
    weights = sum(value.numel() * value.element_size() for value in saved)
    base = RUNTIME * GIB + MODELS * weights + CLEAN_SETS * x.numel() * x.element_size()
    each = max(1.0, BESIDE * _kept(model, x, precision))
    images = int(min((limit * GIB - base) / each, MOST))
    if images < FEWEST:
        needed = math.ceil(10 * (base + FEWEST * each) / GIB) / 10
        raise DebackdoorError(
            f"expected a memory of at least {needed} GiB for this model and {len(x)} clean images, got {limit:g}; "
            "raise --memory or give fewer images"
        )
    return 1 << (images.bit_length() - 1)


def _kept(model: nn.Module, x: Tensor, precision: str) -> float:
    """Bytes an image that a forward pass keeps for the way back."""
    few, more = (x[:count].clone() for count in (2, 4))  # a view would hold on to the memory of all
    added = _saved(model, more, precision) - _saved(model, few, precision)
    return added / max(1, len(more) - len(few))


def _saved(model: nn.Module, x: Tensor, precision: str) -> int:
    weights = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    own = {value.untyped_storage().data_ptr() for value in weights.values()}
    saved: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), autocast(x.device, precision):
        # The answers hold on to all that was saved, so that no address comes up twice.
        answers = logits_of(call_with(model, weights, x))
    del answers
    return sum(saved.values())
