"""One traced forward pass: which layer's output reaches which layer's input, read from the autograd graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.models.forward import logits_of
from debackdoor.models.stateless import call_with

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
"""Batch, instance and group normalisation. LayerNorm is none of them."""
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
"""Convolutions, transposed ones too, and linear layers."""

# An output that reaches the next layer through one of these was mixed by attention: a projection, no hidden neuron.
_ATTENTION = ("Softmax", "Attention")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: ``source`` made its input, ``node`` its output; ``reshapes`` if the two shapes differ."""

    module: nn.Module
    source: Node | None
    node: Node
    reshapes: bool


@dataclass(frozen=True)
class Use:
    """A layer or norm that an output reaches with no other between; ``alone`` if it is that call's only source."""

    call: Call
    alone: bool


@dataclass(frozen=True)
class Trace:
    """The calls of one forward pass in order, and the graph nodes of the images and of the logits."""

    calls: tuple[Call, ...]
    images: Node
    logits: Node


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Run ``model`` once on ``example`` in eval mode and record its parametrised calls; the model is left as found.

    Raises:
        ModelError: if the model does not take the example, or its logits carry no gradient.
    """
    devices = [example.device] if example.is_cuda else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices), _recording(model) as calls:
        try:
            # The images are a source like any layer (a residual stream can start at them), so they need a node.
            images = example.detach().clone().requires_grad_().clone()
            output = call_with(model, _copies(model), images)
        except DebackdoorError:
            raise
        except Exception as error:  # a model is anyone's code and may raise anything
            why = (str(error).splitlines() or [""])[0]
            raise ModelError(
                f"expected a model that takes {example.dtype} images of shape {tuple(example.shape)}, "
                f"got {type(error).__name__}: {why}; check image size, channels, type and device"
            ) from error
        logits = logits_of(output).grad_fn
        if images.grad_fn is None or logits is None:
            raise ModelError(
                "expected logits that depend on the model's parameters, got some without gradient; "
                "remove torch.no_grad() and detach() from the model's forward"
            )
        return Trace(tuple(calls), images.grad_fn, logits)


def uses(traced: Trace) -> Mapping[Node, list[Use]]:
    """For every output of a layer or norm: the layers and norms that it reaches."""
    calls = [call for call in traced.calls if isinstance(call.module, NORMS + LAYERS)]
    marks = {call.node for call in calls} | {traced.images}
    found: dict[Node, list[Use]] = defaultdict(list)
    for call in calls:
        passed = _ancestors(call.source, marks)
        sources = passed & marks
        attended = any(word in node.name() for node in passed for word in _ATTENTION)
        for node in sources:
            found[node].append(Use(call, len(sources) == 1 and not attended))
    return found


def classifier_outputs(traced: Trace) -> Set[Node]:
    """The outputs that make the logits.

    The walk goes back from the logits and ends at the first layer on every path. It goes past norms and other modules
    that keep the shape (temperature, scale), because logits before them are logits too. Where a model multiplies by a
    bare parameter instead of calling a module, the walk ends later and takes real channels along: it errs on that side.
    """
    ends = {call.node for call in traced.calls if isinstance(call.module, LAYERS) or call.reshapes}
    return _ancestors(traced.logits, ends) & {call.node for call in traced.calls}


def _ancestors(start: Node | None, ends: Set[Node]) -> set[Node]:
    """All nodes that ``start`` comes from, itself included; nothing behind a node of ``ends``."""
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node not in ends:
            waiting.extend(before for before, _ in node.next_functions)
    return seen


def _copies(model: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for all parameters and buffers: frozen ones get a gradient, and a forward pass changes only these."""
    tensors = {name: value.detach().clone() for name, value in model.named_buffers()}
    for name, value in model.named_parameters():
        tensors[name] = value.detach().clone().requires_grad_(value.is_floating_point())
    return tensors


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[Call]]:
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is None or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        # The clone gives each call a graph node of its own, which later in-place operations and views leave alone.
        marked = output.clone()
        if marked.grad_fn is not None:
            calls.append(Call(module, given.grad_fn, marked.grad_fn, given.shape != output.shape))
        return marked

    modes = [(module, module.training) for module in model.modules()]
    hooks = []
    try:
        for module, _ in modes:
            module.training = False  # not eval(): a model may override train()
            if isinstance(module, LAYERS) or _is_parametrised_leaf(module):
                hooks.append(module.register_forward_hook(record, with_kwargs=True))
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode


def _is_parametrised_leaf(module: nn.Module) -> bool:
    own = len(list(module.parameters(recurse=False)))
    return own > 0 and own == len(list(module.parameters()))
