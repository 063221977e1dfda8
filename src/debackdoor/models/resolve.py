"""From an ``--arch`` string to something that builds the network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from debackdoor.errors import ModelError
from debackdoor.models.factory import Factory, call, load_symbol
from debackdoor.models.libraries import hf_factory, timm_factory, torchvision_factory
from debackdoor.models.registry import BUILT_IN_NAMES, BuiltIn, find_built_in

_LIBRARIES = {"timm": timm_factory, "torchvision": torchvision_factory, "hf": hf_factory}


def resolve_arch(arch: str, state_dict: Mapping[str, Tensor] | None = None) -> Factory:
    """The factory ``arch`` stands for, called as ``factory(num_classes, in_channels)``.

    ``arch`` is a built-in name with an optional width (``resnet18``, ``resnet18-w16``), ``file.py:factory``,
    ``package.module:factory``, ``timm:NAME``, ``torchvision:NAME`` or ``hf:DIR``. Given a ``state_dict``, a built-in
    takes its number of input channels, and without a width suffix its width, from the shapes there. ``in_channels``
    of None leaves the number to that, or to the factory's own default.

    Raises:
        ModelError: if the name is unknown, or the file, module or factory is not as it should be.
        MissingDependencyError: if the library that ``arch`` asks for does not import.
    """
    source, colon, rest = arch.partition(":")
    if colon and source in _LIBRARIES:
        return _LIBRARIES[source](rest)
    if colon:
        return partial(call, load_symbol(arch), arch)
    matched = re.fullmatch(r"(.+?)(?:-w(\d+))?", arch)
    built_in = find_built_in(matched[1]) if matched else None
    if matched is None or built_in is None:
        raise ModelError(_unknown(arch))
    width = int(matched[2]) if matched[2] else None
    if width == 0:
        raise ModelError(f"expected a width of at least 1, got {arch!r}")
    return _sized(built_in, arch, width, state_dict)


def _sized(built_in: BuiltIn, arch: str, width: int | None, state_dict: Mapping[str, Tensor] | None) -> Factory:
    stem = (state_dict or {}).get(built_in.stem)
    sizes: dict[str, int] = {}
    if stem is not None and stem.ndim == 4 and stem.numel():
        sizes = {"width": stem.shape[0], "in_channels": stem.shape[1]}
    if width is not None:
        sizes["width"] = width
    return partial(call, partial(built_in.build, **sizes), arch)


def _unknown(arch: str) -> str:
    close = difflib.get_close_matches(arch, BUILT_IN_NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "did you mean one of them, or a file.py:factory?"
    return f"expected an architecture such as {', '.join(BUILT_IN_NAMES)}, got {arch!r}; {hint}"
