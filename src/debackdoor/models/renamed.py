"""Checkpoints whose names differ from the network's, as those of transformers do."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from debackdoor.checkpoint import Checkpoint

_FIRST_TAG = 1000  # away from 0 and 1, which norms start with


def with_names_of(network: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the parameter names of ``network``, which differ from the file's only for transformers.

    From version 5 on, transformers keeps the names of old files but not of old classes, and translates in between. The
    translation is found by having it load a state dict in which every tensor holds its own number. Names that this
    leaves out stay, so that loading can name them.
    """
    # Whoever has built a transformers network has imported the library.
    library = sys.modules.get("transformers")
    if library is None or not isinstance(network, library.PreTrainedModel):
        return checkpoint
    if set(network.state_dict()) == set(checkpoint.state_dict):
        return checkpoint
    names = list(checkpoint.state_dict)
    tagged = {name: _filled(checkpoint.state_dict[name], _FIRST_TAG + i) for i, name in enumerate(names)}
    config = copy.deepcopy(network.config)
    config.dtype = torch.float32  # a tag has to survive exactly
    with _quiet(library):
        try:
            loaded = (
                type(network)
                .from_pretrained(None, config=config, state_dict=tagged, ignore_mismatched_sizes=True)
                .state_dict()
            )
        except Exception:  # whatever does not fit there is named when this checkpoint is loaded
            return checkpoint
    tags = {name: _tag(value) for name, value in loaded.items()}
    new_names = {names[tag]: name for name, tag in tags.items() if tag is not None and tag < len(names)}
    return dataclasses.replace(
        checkpoint,
        state_dict={new_names.get(name, name): value for name, value in checkpoint.state_dict.items()},
        keys={new_names.get(name, name): original for name, original in checkpoint.keys.items()},
    )


def _filled(like: Tensor, value: int) -> Tensor:
    return torch.full(like.shape, value, dtype=torch.int64 if like.dtype == torch.int64 else torch.float32)


def _tag(value: Tensor) -> int | None:
    """The number the tensor was filled with, counted from 0, or None if it was not."""
    if not value.numel() or not bool((value == value.flatten()[0]).all()):
        return None
    number = float(value.flatten()[0]) - _FIRST_TAG
    return int(number) if number >= 0 and number.is_integer() else None


@contextlib.contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """Keeps transformers from drawing bars and warning about weights that are no weights."""
    logging = library.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
