"""Calling a classifier, whatever its output looks like, and counting its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.runtime import answered_at_once, at_most, autocast, has_fast_bf16
from debackdoor.types import CleanSet

Network = TypeVar("Network", bound=nn.Module)

AGREEMENT = 0.9
"""The least share of answers that has to be the same in half precision."""


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


@torch.no_grad()
def predict(
    model: Callable[[Tensor], Any], x: Tensor, *, batch_size: int | None = None, precision: str = "auto"
) -> Tensor:
    """Float32 logits (N, K) on images (N, C, H, W) in [0, 1].

    ``model`` is used in the mode it is in, and may be any function that calls one.
    """
    size = answered_at_once(x.device) if batch_size is None else at_most(batch_size)
    with autocast(x.device, precision):
        # A network that normalises its input in place would change the caller's images.
        return torch.cat([logits_of(model(batch.clone())).float() for batch in x.split(size)])


def predict_of_any(model: nn.Module, x: Tensor, *, precision: str = "auto") -> Tensor:
    """As :func:`predict`, of a network that may be anyone's code and raise anything.

    Raises:
        ModelError: if it does not take the images.
    """
    try:
        return predict(model, x, precision=precision)
    except DebackdoorError:
        raise
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"expected the model to take images of shape {tuple(x.shape[1:])}, got '{why}'; "
            "check --arch and the image size"
        ) from error


def predict_changed(
    model: Callable[[Tensor], Any], change: Callable[[Tensor], Tensor], x: Tensor, *, precision: str = "auto"
) -> Tensor:
    """Float32 logits (N, K) on images (N, C, H, W) that ``change`` makes others of.

    They are changed as they go through the model: never are all of them held.
    """
    parts = x.split(answered_at_once(x.device))
    return torch.cat([predict(model, change(part), precision=precision) for part in parts])


def in_eval(model: Network) -> Network:
    """The model itself, in eval mode: a network's own ``train`` need not return it, as torch's ``eval`` expects."""
    model.eval()
    return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def margins_of(logits: Tensor, label: Tensor | int) -> Tensor:
    """How far the logits (N, K) of one label, or of one a row (int64, N), are above the largest other; float (N,)."""
    index = torch.as_tensor(label, device=logits.device).expand(len(logits))[:, None]
    own = logits.gather(1, index)[:, 0]
    return own - logits.scatter(1, index, -torch.inf).amax(1)


def hits(logits: Tensor, y: Tensor) -> Tensor:
    """How many rows have their largest logit at the label; an int64 number on the device."""
    return (logits.argmax(1) == y).sum()


def check_finite(logits: Tensor) -> None:
    """Checks a suspect model's answers to clean images.

    Raises:
        ModelError: if one is no number.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("expected finite outputs on the clean images, got NaN or infinity; the weights are damaged")


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    # Counted rather than averaged: a float32 mean of 0.958 reads 0.9580000042915344 in a record.
    return int(hits(logits, y)) / len(y)


def share_led(images: CleanSet, label: int, answers: Callable[[Tensor], Tensor]) -> float:
    """The share of images of other labels, somehow changed, whose ``answers`` (N,) are ``label``; 0 of none."""
    others = images.x[images.y != label]
    return float((answers(others) == label).float().mean()) if len(others) else 0.0


def label_shares(logits: Tensor) -> list[float]:
    """How large a share of the answers each label gets; K fractions; answers that are no numbers are of none."""
    answers = logits[logits.isfinite().all(1)].argmax(1)
    counts = torch.bincount(answers, minlength=logits.shape[1])
    return (counts / len(logits)).tolist()


def trusted_precision(model: nn.Module, x: Tensor, precision: str) -> str:
    """The precision to compute in: fp32 for ``auto`` where the model has no answers in bf16, or too many others.

    ``x`` is a batch (N, C, H, W) to try it on.

    Raises:
        ModelError: if the model does not take it in fp32 either.
    """
    if precision != "auto" or not has_fast_bf16(x.device):
        return precision
    full = predict_of_any(model, x, precision="fp32")
    try:
        half = predict(model, x, precision="bf16")
    except Exception:  # a model is anyone's code, and may know one type alone
        return "fp32"
    same = float((full.argmax(1) == half.argmax(1)).float().mean())
    return "auto" if same >= AGREEMENT and bool(torch.isfinite(half).all()) else "fp32"
