"""Stages of a job that are finished, kept in a folder: a job that was stopped, or another one, goes on from them.

A stage is known by all that decides what it finds: the network, its weights and its code, the clean images, the
settings, this program and torch. Files hold tensors and plain values and are read without running code from them.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_file
from debackdoor.models.copying import copied
from debackdoor.models.forward import in_eval
from debackdoor.runtime import versions
from debackdoor.types import Progress

T = TypeVar("T")

TAKEN = "take finished stages"
"""What progress calls it when a stage is taken from the folder."""

_HASHED = 16
"""Hexadecimal digits of a hash in the name of a file or folder."""


class Keep(Protocol):
    """Calls ``make``, or returns what it returned when ``given`` was the same."""

    def __call__(self, name: str, make: Callable[[], T], *given: object) -> T: ...


def of(keep: Keep, *known: object) -> Keep:
    """The same, where ``known`` decides, too, what every stage returns."""

    def kept(name: str, make: Callable[[], T], *given: object) -> T:
        return keep(name, make, *known, *given)

    return kept


def anew(name: str, make: Callable[[], T], *given: object) -> T:
    """Keeps nothing."""
    return make()


@dataclass(frozen=True)
class Stages:
    """The finished stages of jobs on one network with the same images and settings.

    Attributes:
        folder: where they are; no other network's are in it.
        network: what a network that is kept is a copy of, with other weights.
        progress: called when a stage is taken from the folder.
    """

    folder: Path
    network: nn.Module
    progress: Progress | None = None

    def __call__(self, name: str, make: Callable[[], T], *given: object) -> T:
        """What ``make`` returns; networks, tensors, plain values and dataclasses of these can be kept.

        Args:
            name: of the stage.
            make: does the work.
            given: all that decides what it returns beside what the folder stands for.
        """
        path = self.folder / f"{name}-{_hash_of(*given)}.pt"
        if path.exists():
            self._tell(0)
            try:
                found: T = _unpacked(torch.load(path, map_location="cpu", weights_only=True), self.network)
            except Exception as error:  # damaged bytes make the unpickler raise almost anything
                _warn(path, f"is damaged, or no stage of this program ({type(error).__name__}); it is made anew")
            else:
                self._tell(1)
                return found
        made = make()
        try:
            with atomic_file(path) as file:
                torch.save(_packed(made), file)
        except OSError as error:
            _warn(path, f"was not written: {error.strerror or error}; check the disk")
        except Exception as error:  # what was found is worth more than that it is kept
            _warn(path, f"was not written: this network's cannot be kept ({type(error).__name__})")
        return made

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(TAKEN, done, 1, {})


def _warn(path: Path, what: str) -> None:
    warnings.warn(f"{path} {what}", stacklevel=3)


def stages_in(folder: str | Path, network: nn.Module, *given: object, progress: Progress | None = None) -> Stages:
    """Those of ``network`` in a part of ``folder`` of their own; both are made where they are not there.

    Raises:
        DebackdoorError: if that cannot be done.
    """
    part = Path(folder) / _hash_of(versions(), _own_source(), network, *given)
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DebackdoorError(
            f"{folder}: expected a folder that finished stages can be kept in, got {error.strerror or error}; give "
            "another"
        ) from error
    if not os.access(part, os.W_OK | os.X_OK):
        raise DebackdoorError(f"{part}: expected a folder to write to, got one without permission; choose another")
    return Stages(part, network, progress)


def _packed(value: Any) -> Any:
    """The same of tensors, numbers, words, lists, tuples and dicts alone."""
    if value is None or isinstance(value, (Tensor, bool, str)):
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, nn.Module):
        learning = [name for name, parameter in value.named_parameters() if parameter.requires_grad]
        return {"network": {name: tensor.detach() for name, tensor in _tensors(value).items()}, "learning": learning}
    if is_dataclass(value):
        kind = type(value)
        inside = {field.name: _packed(getattr(value, field.name)) for field in fields(value)}
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": inside}
    if isinstance(value, Mapping):
        return {"items": [(_packed(key), _packed(item)) for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_packed, value))
    raise TypeError(f"expected a stage of networks, tensors and plain values, got {type(value).__name__}")


def _unpacked(value: Any, network: nn.Module) -> Any:
    """What :func:`_packed` was given; networks are copies of ``network`` with their weights."""
    if isinstance(value, (list, tuple)):
        return type(value)(_unpacked(item, network) for item in value)
    if not isinstance(value, dict):
        return value
    if "network" in value:
        return _network(value["network"], set(value["learning"]), network)
    if "items" in value:
        return {_unpacked(key, network): _unpacked(item, network) for key, item in value["items"]}
    module, _, name = value["class"].partition(":")
    kind = getattr(import_module(module), name) if module.startswith("debackdoor.") else None
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise TypeError(f"expected a dataclass of this program, got {value['class']}")
    return kind(**{key: _unpacked(item, network) for key, item in value["fields"].items()})


def _network(tensors: Mapping[str, Tensor], learning: set[str], like: nn.Module) -> nn.Module:
    made = in_eval(copied(like))
    own = _tensors(made)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in tensors.items()}:
        raise TypeError("expected the weights of the same network")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in learning)
    return made


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers, also those that a state dict leaves out."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _hash_of(*values: object) -> str:
    digest = hashlib.sha256()
    for value in values:
        _add(digest, value)
    return digest.hexdigest()[:_HASHED]


def _add(digest: Any, value: Any) -> None:
    """Adds to a hash all that tells the value from another one."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, nn.Module):
        for name, module in value.named_modules():
            kind = type(module)
            # What a network's own words for a layer say of where in memory something is differs from run to run.
            words = re.sub(r" at 0x[0-9a-f]+", "", module.extra_repr())
            digest.update(f"{name} {kind.__qualname__} {words}\n".encode())
            for base in kind.__mro__:
                digest.update(_source_of(base))
        for name, tensor in _tensors(value).items():
            digest.update(name.encode())
            _add(digest, tensor)
    elif is_dataclass(value):
        for field in fields(value):
            digest.update(field.name.encode())
            _add(digest, getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} of ".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{value!r}\n".encode())


def _source_of(kind: type) -> bytes:
    """A hash of the file that a class stands in; torch's own are known by their module and its version.

    Not the module's name for others: that of a file which was read as an architecture differs from run to run.
    """
    if kind.__module__.partition(".")[0] in ("torch", "builtins"):
        return kind.__module__.encode()
    try:
        file = inspect.getsourcefile(kind)
        return b"" if file is None else hashlib.sha256(Path(file).read_bytes()).digest()
    except (OSError, TypeError):  # written at a prompt
        return b""


@functools.cache
def _own_source() -> str:
    """A hash of this program: another one may find something else."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
