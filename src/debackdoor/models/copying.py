"""Copies of networks, also of those that keep what they compute."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from debackdoor.errors import ModelError

Network = TypeVar("Network", bound=nn.Module)


def check_float32(model: nn.Module) -> None:
    """Checks that the weights are in the precision that everything is computed from.

    Raises:
        ModelError: if not.
    """
    other = next((value.dtype for value in model.parameters() if value.dtype != torch.float32), None)
    if other is not None:
        raise ModelError(f"expected float32 weights, got {other}; call model.float() first")


def copied(model: Network) -> Network:
    """A copy that shares nothing with ``model``.

    Activations that a network keeps as attributes, which torch refuses to copy, are copied without their history.

    Raises:
        ModelError: if a hook computes a weight before each pass, so that to change that weight changes nothing, or if
            the network holds something that cannot be copied.
    """
    memo: dict[int, object] = {}
    for name, module in model.named_modules():
        _check_weights(name, module)
        _detach(vars(module).values(), memo)
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"expected a model that can be copied, got {type(model).__name__}, which cannot ({why}); take out of it "
            "what is no part of the network"
        ) from error


def _check_weights(name: str, module: nn.Module) -> None:
    """The old weight_norm and spectral_norm set an attribute ``weight``, of which no parameter has the name."""
    for key, value in vars(module).items():
        if isinstance(value, Tensor) and {f"{key}_g", f"{key}_orig"} & set(module._parameters):
            raise ModelError(
                f"expected a model that can be copied, got one with computed weights in {name or 'itself'!r}; after "
                "torch.nn.utils.weight_norm or spectral_norm call remove_weight_norm or remove_spectral_norm first"
            )


def _detach(values: Iterable[object], memo: dict[int, object]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        elif isinstance(value, Mapping):
            _detach(value.values(), memo)
        elif isinstance(value, list | tuple):
            _detach(value, memo)
