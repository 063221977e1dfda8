"""Copies of networks, also of those that keep what they compute."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


def standalone_copy(model: nn.Module) -> nn.Module:
    """A copy of a caller's model, whose weights can be exchanged and written back under the same names.

    Raises:
        ModelError: if it is of a kind that cannot be copied or whose weights cannot be exchanged.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"expected the network itself, got it inside {type(model).__name__}; pass model.module")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError("expected a network in Python, got a compiled ScriptModule; pass the one it was made from")
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ModelError("expected a network as it was written, got one from torch.compile; pass what it was made from")
    check_float32(model)
    owners: dict[int, str] = {}
    for name, value in model.named_parameters():
        if value.numel() and owners.setdefault(value.data_ptr(), name) != name:
            raise ModelError(
                f"expected weights of their own, got {owners[value.data_ptr()]} and {name} in one memory, which a copy "
                "would part; give both modules the same Parameter"
            )
    return copied(model)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Checks that a copy that is called inside calls no module of the caller's network, of which it would change some.

    Raises:
        ModelError: if it does.
    """
    called: list[str] = []
    here = threading.get_ident()  # the caller may use the network in another thread meanwhile

    def hook_of(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name) if threading.get_ident() == here else None

    hooks = list[RemovableHandle]()
    try:
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(hook_of(name or "itself")))
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if called:
        raise ModelError(
            f"expected a network whose copy stands alone, got one in which a function holds on to {called[0]!r}; write "
            "it as a method of the module"
        )


def same_gradients(copy: nn.Module, model: nn.Module) -> None:
    """Lets those parameters of a copy ask for a gradient, after it was trained, that do so in ``model``."""
    for name, parameter in model.named_parameters():
        copy.get_parameter(name).requires_grad_(parameter.requires_grad)


def _check_weights(name: str, module: nn.Module) -> None:
    """The old weight_norm and spectral_norm set an attribute ``weight``, of which no parameter has the name."""
    for key, value in vars(module).items():
        if isinstance(value, Tensor) and {f"{key}_g", f"{key}_orig"} & set(module._parameters):
            raise ModelError(
                f"expected a model that can be copied, got one with computed weights in {name or 'itself'!r}; after "
                "torch.nn.utils.weight_norm or spectral_norm call remove_weight_norm or remove_spectral_norm first, "
                "after those of torch.nn.utils.prune its remove"
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
