"""From a checkpoint file and an ``--arch`` to a classifier of [0, 1] images."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from debackdoor.checkpoint import Checkpoint, load_into, read_checkpoint
from debackdoor.errors import CheckpointError, ModelError
from debackdoor.models.forward import in_eval
from debackdoor.models.head import infer_num_classes
from debackdoor.models.normalize import Normalized, unwrap
from debackdoor.models.renamed import with_names_of
from debackdoor.models.resolve import resolve_arch


@dataclass(frozen=True)
class LoadedModel:
    """A classifier and where it came from.

    Attributes:
        model: float32, in eval mode; takes images (N, C, H, W) in [0, 1].
        checkpoint: what the file held; ``write_checkpoint(..., like=checkpoint)`` writes a file of the same form.
        arch: the name it was built by.
        num_classes: how many classes it tells apart.
        mean, std: of the normalisation inside the model; None without one.
    """

    model: nn.Module
    checkpoint: Checkpoint
    arch: str
    num_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def open_model(
    path: str | Path,
    arch: str,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedModel:
    """Loads an untrusted checkpoint into the network ``arch`` names (see :func:`resolve_arch`).

    Args:
        path: a safetensors or torch file.
        arch: a built-in name, ``file.py:factory``, ``package.module:factory``, ``timm:``, ``torchvision:`` or ``hf:``.
        num_classes: by default as many as the checkpoint's last layer has.
        mean: what the network was trained to have subtracted from each channel of a [0, 1] image; none by default.
        std: what it was trained to have each channel divided by.

    Raises:
        CheckpointError: if the file is damaged or unsafe, or does not fit ``arch`` or ``num_classes``.
        ModelError: if ``arch``, ``mean`` or ``std`` is not usable.
        MissingDependencyError: if ``arch`` needs a library that does not import.
    """
    checkpoint = read_checkpoint(path)
    classes = _class_count(checkpoint, num_classes)
    network = _with_weights(resolve_arch(arch, checkpoint.state_dict)(classes), arch).float()
    checkpoint = with_names_of(network, checkpoint)
    try:
        load_into(network, checkpoint, arch)
    except CheckpointError:
        _check_class_count(checkpoint, num_classes)
        raise
    _check_floats(network, checkpoint)
    model = in_eval(_normalised(network, mean, std))
    inside = [None if values is None else tuple(values) for values in (mean, std)]
    return LoadedModel(model, checkpoint, arch, classes, *inside)


def load_model(
    path: str | Path,
    arch: str,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The model of :func:`open_model`, with the same arguments and errors.

    Example:
        >>> model = load_model("model.safetensors", arch="resnet18")  # doctest: +SKIP
    """
    return open_model(path, arch, num_classes, mean, std).model


def build_model(
    arch: str,
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    in_channels: int = 3,
) -> nn.Module:
    """A new network to train, with random weights from torch's generator; arguments as for :func:`open_model`.

    Raises:
        ModelError: if an argument is not usable.
        MissingDependencyError: if ``arch`` needs a library that does not import.
    """
    if num_classes < 2 or in_channels < 1:
        raise ModelError(f"expected at least 2 classes and 1 channel, got {num_classes} and {in_channels}")
    return _normalised(resolve_arch(arch)(num_classes, in_channels).float(), mean, std)


def state_dict_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the network inside, with the keys its checkpoint has, without normalisation."""
    return unwrap(model).state_dict()


def _with_weights(network: nn.Module, arch: str) -> nn.Module:
    """The same network, if its weights are there to be filled: torch fills those on the meta device with nothing."""
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(value) or value.is_meta:
            got = f"{name!r} " + ("whose shape is not known yet" if is_lazy(value) else "on the meta device")
            raise ModelError(
                f"expected {arch} to build a network with weights of its own, got {got}; build it on the CPU, and call "
                "a lazy one once"
            )
    return network


def _check_floats(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Written back in whole numbers, a repaired network would not be the one that was checked."""
    for name, value in network.state_dict().items():
        stored = checkpoint.state_dict.get(name, value)
        if value.is_floating_point() and not stored.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.path}: expected floating-point weights, got {stored.dtype} in {name!r}; dequantise them "
                "first"
            )


def _class_count(checkpoint: Checkpoint, given: int | None) -> int:
    if given is not None:
        return given
    try:
        return infer_num_classes(checkpoint.state_dict)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _check_class_count(checkpoint: Checkpoint, given: int | None) -> None:
    """Of a checkpoint that does not fit: whether that may be for the number of classes that was asked for.

    Asked only then, since what is inferred may be another layer's.
    """
    found = given
    if given is not None:
        with contextlib.suppress(CheckpointError):  # it is unclear
            found = infer_num_classes(checkpoint.state_dict)
    if found != given:
        raise CheckpointError(
            f"{checkpoint.path}: expected {given} classes as asked for, got a last layer of {found}; "
            f"give --num-classes {found} or leave it out"
        )


def _normalised(network: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    if mean is None and std is None:
        return network
    if mean is None or std is None:
        raise ModelError(f"expected mean and std together, got only {'std' if mean is None else 'mean'}; give both")
    return Normalized(network, mean, std)
