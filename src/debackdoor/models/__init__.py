"""Built-in architectures, and loading checkpoints into these or the user's own."""

from debackdoor.models.forward import logits_of
from debackdoor.models.head import infer_num_classes
from debackdoor.models.load import LoadedModel, build_model, load_model, open_model, state_dict_of
from debackdoor.models.normalize import Normalized, unwrap
from debackdoor.models.registry import BUILT_IN_NAMES
from debackdoor.models.resolve import resolve_arch

__all__ = [
    "BUILT_IN_NAMES",
    "LoadedModel",
    "Normalized",
    "build_model",
    "infer_num_classes",
    "load_model",
    "logits_of",
    "open_model",
    "resolve_arch",
    "state_dict_of",
    "unwrap",
]
