"""Networks that the user's own code defines."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch import nn

from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.models.copying import copied


class Factory(Protocol):
    """Builds a network; None for ``in_channels`` leaves that number to the network's own default."""

    def __call__(self, num_classes: int, in_channels: int | None = None) -> nn.Module: ...


def load_symbol(arch: str) -> Callable[..., Any]:
    """What ``file.py:name`` or ``package.module:name`` names. This runs that file or module: it is the user's own code.

    Raises:
        ModelError: if there is no such file, module or name, or running it fails.
    """
    place, _, name = arch.rpartition(":")
    if not place or not name:
        raise ModelError(f"expected file.py:factory or package.module:factory, got {arch!r}")
    module = _run_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        defined = ", ".join(sorted(key for key in own if not key.startswith("_"))[:12]) or "nothing of that kind"
        raise ModelError(f"expected a factory {name!r} in {place}, which defines {defined}; give one of its names")
    found = getattr(module, name)
    if not callable(found):
        raise ModelError(f"expected a factory under {arch}, got {type(found).__name__}; give a function or a class")
    return found


def call(factory: Callable[..., Any], arch: str, num_classes: int, in_channels: int | None = None) -> nn.Module:
    """What ``factory`` returns, given ``num_classes`` and ``in_channels`` where it accepts them.

    A module under that name, rather than a function, is copied.

    Raises:
        ModelError: if it raises, or returns no module.
    """
    if isinstance(factory, nn.Module):
        return copied(factory)
    try:
        parameters = inspect.signature(factory).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        arguments = {"num_classes": num_classes} if takes_any or "num_classes" in parameters else {}
        if in_channels is not None and "in_channels" in parameters:
            arguments["in_channels"] = in_channels
        network = factory(**arguments)
    except DebackdoorError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(f"{arch} failed to build a network: {brief(error)}; correct the factory") from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"expected {arch} to return a torch.nn.Module, got {type(network).__name__}; correct the factory"
        )
    return network


def brief(error: BaseException) -> str:
    """An exception's type and the first line of its message, without the full stop."""
    first = str(error).strip().partition("\n")[0].rstrip(". ")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"expected a Python file with a factory, got no file {path}; check the path")
    # Its own name, so that a file called torch.py replaces no module; classes look themselves up by it.
    name = f"debackdoor_user_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"expected a Python file with a factory, got {path}, which Python cannot import")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _on_path(path.resolve().parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        del sys.modules[name]
        raise ModelError(f"{path} failed when run: {brief(error)}; correct the file") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        with _on_path(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(f"module {name!r} failed to import: {brief(error)}; check its name and your path") from error


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Lets the user's code import its neighbours meanwhile; last, so that nothing in the folder hides a library."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        # The last of that name: an earlier one is the caller's. The user's code may have taken it out itself.
        places = [place for place, entry in enumerate(sys.path) if entry == str(folder)]
        if places:
            del sys.path[places[-1]]
