"""Calling a classifier, whatever its output looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from debackdoor.errors import ModelError


def logits_of(output: Any) -> Tensor:
    """The (N, K) logits inside a model's output.

    Accepts a tensor, an object or mapping with ``logits`` (as transformers returns), or a tuple or list whose first
    entry is the logits (as networks with auxiliary heads return).

    Raises:
        ModelError: if no two-dimensional tensor is found there.
    """
    found = output
    if isinstance(found, Mapping) and "logits" in found:
        found = found["logits"]
    elif hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise ModelError(
            f"expected the model to return logits of shape (N, classes), got {got}; wrap it so that it does"
        )
    return found
