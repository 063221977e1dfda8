"""The maskable channels of any classifier, and masks put on them from outside.

Masks on normalisation weights are those of ANP (Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep
Models", NeurIPS 2021) and RNP (Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023): the mask
multiplies gamma, and beta stays. Layers that no such norm follows are masked as a whole, bias included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.parametrize import is_parametrized

from debackdoor._graph import LAYERS, NORMS, Call, Use, classifier_outputs, trace, uses
from debackdoor.errors import ModelError, UnsupportedError
from debackdoor.models.forward import logits_of
from debackdoor.models.stateless import call_with


@dataclass(frozen=True)
class MaskableLayer:
    """The channels of one module.

    Attributes:
        name: the module's dotted name.
        kind: "norm", "conv" or "linear".
        size: number of channels.
        parameters: full names of the parameters that the mask multiplies.
        transposed: whether the weight's output channels lie along dimension 1, as in transposed convolutions.
    """

    name: str
    kind: str
    size: int
    parameters: tuple[str, ...]
    transposed: bool = False


def find_channels(model: nn.Module, example: Tensor) -> tuple[MaskableLayer, ...]:
    """The maskable layers of ``model`` in the order in which they run.

    - Affine weights of batch, group and instance norms.
    - Convolutions, unless every use of the output is such a norm of the same size.
    - Hidden neurons: linear layers whose every use is another layer that takes them as its inputs. So neither attention
      projections nor layers that write to a residual stream.
    - Never the outputs that make the logits, LayerNorms, embeddings, layers without a plain weight (weight norm),
      grouped transposed convolutions, or modules that a forward pass in eval mode does not run.

    A module that is called several times, and modules with one weight, are one entry, which must fit all calls. The
    model is left as found: hooks, modes, buffers, gradients, flags and torch's random state.

    Args:
        model: any image classifier.
        example: images that it takes, (N, C, H, W), on the model's device; N = 1 will do.

    Raises:
        ModelError: if the model does not take the example, or its logits carry no gradient.
        UnsupportedError: if nothing is maskable.
    """
    traced = trace(model, example)
    followers, classifier = uses(traced), classifier_outputs(traced)
    module_names = {module: name for name, module in model.named_modules()}
    parameter_names = {parameter: name for name, parameter in model.named_parameters()}
    layers = tuple(
        _describe([call.module for call in calls], module_names, parameter_names)
        for calls in _by_weight(traced.calls)
        if _is_maskable(calls, followers, classifier)
    )
    if not layers:
        hint = "a linear classifier alone cannot be pruned"
        if any(map(is_parametrized, model.modules())):
            hint = "its weights are parametrised: call torch.nn.utils.parametrize.remove_parametrizations on each first"
        raise UnsupportedError(
            f"expected a model with normalisation, convolution or hidden linear layers, got {type(model).__name__} "
            f"with no channel that can be masked; {hint}"
        )
    return layers


def norms_or_all(layers: Sequence[MaskableLayer]) -> tuple[MaskableLayer, ...]:
    """The normalisation layers, which ANP and RNP mask as published; all ``layers`` where there are none."""
    return tuple(layer for layer in layers if layer.kind == "norm") or tuple(layers)


def count_channels(layers: Sequence[MaskableLayer]) -> int:
    """How many channels ``layers`` have: the length of a flat mask."""
    return sum(layer.size for layer in layers)


def layer_slices(layers: Sequence[MaskableLayer]) -> dict[str, slice]:
    """Where each layer's channels lie in a flat mask, by layer name."""
    ends = accumulate(layer.size for layer in layers)
    return {layer.name: slice(end - layer.size, end) for layer, end in zip(layers, ends, strict=True)}


def flat_indices(layers: Sequence[MaskableLayer], channels: Iterable[tuple[str, int]]) -> list[int]:
    """The places in a flat mask of many channels, each a layer's name and its index there.

    Raises:
        ModelError: if there is no such layer or channel.
    """
    spans, found = layer_slices(layers), []
    for name, index in channels:
        span = spans.get(name)
        if span is None:
            raise ModelError(f"expected the name of a maskable layer, got {name!r}; was the plan made for this model?")
        if not 0 <= index < span.stop - span.start:
            raise ModelError(f"expected a channel of {name} from 0 to {span.stop - span.start - 1}, got {index}")
        found.append(span.start + index)
    return found


def all_channels(layers: Sequence[MaskableLayer]) -> list[tuple[str, int]]:
    """Every channel in the order of a flat mask: its layer's name and its index there."""
    return [(layer.name, index) for layer in layers for index in range(layer.size)]


def mask_parameters(
    layers: Sequence[MaskableLayer], mask: Tensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masked versions of the parameters that ``layers`` name, differentiable in ``mask`` and in ``parameters``.

    Args:
        layers: what ``find_channels`` returned.
        mask: one value a channel, all layers in order, shape (count_channels(layers),); 1 keeps, 0 removes.
        parameters: the model's parameters by name; may hold more than are masked.

    Returns:
        New tensors by name, with the dtype of their originals; only those that the mask touches.

    Raises:
        ModelError: if the mask has another shape.
    """
    if mask.shape != (count_channels(layers),):
        raise ModelError(f"expected a mask of shape ({count_channels(layers)},), got {tuple(mask.shape)}")
    masked: dict[str, Tensor] = {}
    for layer, part in zip(layers, mask.split([layer.size for layer in layers]), strict=True):
        for name in layer.parameters:  # a bias that two layers share gets the masks of both
            masked[name] = _scale(masked.get(name, parameters[name]), part, layer.transposed)
    return masked


def masked_call(
    model: nn.Module,
    layers: Sequence[MaskableLayer],
    mask: Tensor,
    x: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits (N, K) of ``model`` under a mask, in the mode (train or eval) it is in; the model is not changed.

    Args:
        model: the classifier.
        layers: what ``find_channels`` returned.
        mask: as in ``mask_parameters``.
        x: images (N, C, H, W).
        parameters: all parameters by name; default the model's, detached: then only ``mask`` and ``x`` get gradients.
        buffers: all buffers by name, updated in place by norms in train mode; default copies that are thrown away.

    Raises:
        ModelError: if the mask has another shape, or the model returns no logits.
    """
    if parameters is None:
        parameters = {name: value.detach() for name, value in model.named_parameters()}
    if buffers is None:
        buffers = {name: value.clone() for name, value in model.named_buffers()}
    tensors = {**buffers, **parameters, **mask_parameters(layers, mask, parameters)}
    return logits_of(call_with(model, tensors, x))


def _scale(parameter: Tensor, part: Tensor, transposed: bool) -> Tensor:
    shape = [1] * parameter.ndim
    shape[1 if transposed and parameter.ndim > 1 else 0] = -1
    return (parameter * part.reshape(shape)).to(parameter.dtype)


def _by_weight(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Groups of calls that use one weight, in the order of their first call."""
    groups: dict[nn.Module | Tensor, list[Call]] = {}
    for call in calls:
        weight = _own_parameter(call.module, "weight")
        groups.setdefault(call.module if weight is None else weight, []).append(call)
    yield from groups.values()


def _own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    return dict(module.named_parameters(recurse=False)).get(name)


def _kind(module: nn.Module) -> str | None:
    if _own_parameter(module, "weight") is None:
        return None
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvNd) and not (module.transposed and module.groups > 1):
        return "conv"
    return None


def _is_maskable(calls: Sequence[Call], followers: Mapping[Node, list[Use]], classifier: Set[Node]) -> bool:
    first = calls[0].module
    kind = _kind(first)
    if any((_kind(call.module), _is_transposed(call.module)) != (kind, _is_transposed(first)) for call in calls):
        return False
    if kind is None or any(call.node in classifier for call in calls):
        return False
    if kind == "norm":
        return True
    size = _size(first)
    if kind == "conv":
        return not all(_all_uses(followers.get(call.node, []), NORMS, size) for call in calls)
    return all(_all_uses(followers.get(call.node, []), LAYERS, size) for call in calls)


def _all_uses(found: Sequence[Use], types: tuple[type[nn.Module], ...], size: int) -> bool:
    """Whether modules of ``types`` with ``size`` inputs, and nothing else, use an output, with nothing mixed in."""
    return bool(found) and all(
        use.alone and isinstance(use.call.module, types) and _inputs(use.call.module) == size for use in found
    )


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.transposed


def _size(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else _inputs(module)


def _inputs(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels
    if isinstance(module, nn.Linear):
        return module.in_features
    return int(getattr(module, "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"))


def _describe(
    modules: Sequence[nn.Module], module_names: Mapping[nn.Module, str], parameter_names: Mapping[nn.Parameter, str]
) -> MaskableLayer:
    kind = _kind(modules[0])
    masked = ("weight",) if kind == "norm" else ("weight", "bias")
    found = [_own_parameter(module, name) for module in modules for name in masked]
    # Modules with one weight can have biases of their own: all of them are masked, each once.
    parameters = dict.fromkeys(parameter_names[parameter] for parameter in found if parameter is not None)
    return MaskableLayer(
        module_names[modules[0]], str(kind), _size(modules[0]), tuple(parameters), _is_transposed(modules[0])
    )
