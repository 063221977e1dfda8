"""Networks from timm, torchvision and transformers, each imported only when asked for; never their weights."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

from torch import nn

from debackdoor.errors import MissingDependencyError, ModelError
from debackdoor.models.factory import Factory, brief


def timm_factory(name: str) -> Factory:
    """Builds timm's ``name`` with random weights.

    Raises:
        MissingDependencyError: if timm does not import.
    """
    return partial(_timm, _import("timm", "vision"), name)


def torchvision_factory(name: str) -> Factory:
    """Builds torchvision's ``name`` with random weights.

    Raises:
        MissingDependencyError: if torchvision does not import.
    """
    return partial(_torchvision, _import("torchvision", "vision"), name)


def hf_factory(folder: str) -> Factory:
    """Builds the image classifier that ``folder/config.json`` describes, with random weights, from local files alone.

    Raises:
        MissingDependencyError: if transformers does not import.
        ModelError: if the folder has no config.json.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"expected a folder with a config.json after hf:, got {folder!r}; check the path")
    return partial(_hf, _import("transformers", "hf"), folder)


def _timm(library: ModuleType, name: str, num_classes: int, in_channels: int | None = None) -> nn.Module:
    try:
        return library.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels or 3)
    except Exception as error:  # each of its networks has its own checks
        raise ModelError(f"timm cannot build {name!r}: {brief(error)}; see timm.list_models()") from error


def _torchvision(library: ModuleType, name: str, num_classes: int, in_channels: int | None = None) -> nn.Module:
    if in_channels not in (None, 3):
        raise ModelError(
            f"expected images of 3 channels for torchvision:{name}, got {in_channels}; use another network"
        )
    try:
        # Others than classifiers would fetch the weights of their backbones.
        known = name.lower() in library.models.list_models(module=library.models)
        if not known:
            raise ValueError(f"{name} is none of its classifiers")
        return library.models.get_model(name, weights=None, num_classes=num_classes)
    except Exception as error:  # each of its networks has its own checks
        raise ModelError(
            f"torchvision cannot build {name!r}: {brief(error)}; see list_models(module=torchvision.models) there"
        ) from error


def _hf(library: ModuleType, folder: str, num_classes: int, in_channels: int | None = None) -> nn.Module:
    try:
        # Without trust_remote_code=False a config that names code would be asked about, or run.
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.num_labels != num_classes:
            config.num_labels = num_classes
        if in_channels is not None:
            config.num_channels = in_channels
        return library.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # each of its networks has its own checks
        raise ModelError(f"transformers cannot build hf:{folder}: {brief(error)}; check its config.json") from error


def _import(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a build that does not fit this torch fails with anything from ImportError to OSError
        raise MissingDependencyError(
            f'expected {name} to import, got {brief(error)}; run pip install "debackdoor[{extra}]"'
        ) from error
