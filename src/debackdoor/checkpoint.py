"""Untrusted checkpoint files in, repaired checkpoint files out.

Nothing here runs code from a file: weights come through safetensors or through torch's restricted unpickler, and
everything else is refused with the reason and the way out.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from debackdoor.errors import CheckpointError
from debackdoor.files import atomic_write

_WRAPPERS = ("state_dict", "model_state_dict", "net", "model")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_COUNTER = "num_batches_tracked"
_WAY_OUT = "save the weights alone with torch.save(model.state_dict(), ...) or as safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of one file.

    Attributes:
        path: the file, as it was given.
        sha256: of the file's bytes, in hexadecimal.
        state_dict: tensors on the CPU, with the shapes and dtypes of the file, under names without ``module.`` and
            ``_orig_mod.``.
        keys: the name in ``state_dict`` -> the name in the file, in the same order.
    """

    path: Path
    sha256: str
    state_dict: dict[str, Tensor]
    keys: Mapping[str, str]


class _Skipped:
    """Stands in for a harmless object beside the weights: takes whatever the file gives it and keeps nothing."""

    def __new__(cls, *_: object) -> _Skipped:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# Training scripts often save these beside the weights. The stand-in is built in their place, so not even they run.
_SKIPPED_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Skipped, name)
    for name in (
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "argparse.Namespace",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
    )
]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the weights in a safetensors or torch file (zip or legacy), whatever its suffix, without running its code.

    The state dict may be the whole file or stand under ``state_dict``, ``model_state_dict``, ``net`` or ``model``.

    Raises:
        CheckpointError: if the file is missing, damaged or unsafe, holds no state dict, or a tensor has a dtype that
            is no plain number or a value that is NaN or infinite.
    """
    path = Path(path)
    data = _bytes_of(path)
    found = _find_state_dict(_parse(path, data), depth=2)
    if found is None:
        raise CheckpointError(f"{path}: expected a state dict with tensors, got none in the file; {_WAY_OUT}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: expected tensors with names in the state dict, got {type(value).__name__} under {name!r}; "
                f"{_WAY_OUT}"
            )
        _check_tensor(path, name, value, len(data))
    keys = {_stripped(name): name for name in found}
    if len(keys) != len(found):
        twice = next(name for name in found if keys[_stripped(name)] != name)
        raise CheckpointError(f"{path}: expected one tensor a name, got {_stripped(twice)!r} with and without a prefix")
    state_dict = {name: found[original].detach() for name, original in keys.items()}
    return Checkpoint(path, hashlib.sha256(data).hexdigest(), state_dict, keys)


def load_into(model: nn.Module, checkpoint: Checkpoint, arch: str) -> None:
    """Copies the checkpoint's weights into ``model``, which keeps its own dtype; ``arch`` is for the message.

    Every key has to fit, except that files from before BatchNorm counted its batches may lack that counter.

    Raises:
        CheckpointError: naming the first missing, the first unexpected and the first mis-shaped key.
    """
    expected = {_stripped(name): (name, value) for name, value in model.state_dict().items()}
    given = checkpoint.state_dict
    missing = [name for name in expected if name not in given and not name.endswith(_COUNTER)]
    unexpected = [name for name in given if name not in expected]
    misshaped = [
        f"{name!r} of shape {tuple(value.shape)} where {tuple(expected[name][1].shape)} is expected"
        for name, value in given.items()
        if name in expected and value.shape != expected[name][1].shape
    ]
    problems = [
        f"{len(names)} {kind} (first {names[0] if kind == 'mis-shaped' else repr(names[0])})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {arch}: of its keys {', '.join(problems)}; "
            "give the --arch that it was trained with"
        )
    model.load_state_dict({expected[name][0]: value for name, value in given.items()}, strict=False)


def write_checkpoint(
    path: str | Path, state_dict: Mapping[str, Tensor], like: Checkpoint | None = None, overwrite: bool = False
) -> None:
    """Writes a state dict atomically: with ``torch.save`` for .pt, .pth, .bin and .ckpt, otherwise as safetensors.

    With ``like``, the file has exactly the keys, shapes and dtypes of the file ``like`` was read from, and a tensor
    whose values did not change is written bit for bit as it was there. Tensors that share memory are written apart.

    Raises:
        CheckpointError: if the file exists (``like``'s own file under any name included) and ``overwrite`` is false,
            if it cannot be written, if a tensor holds NaN or Inf, or if keys or shapes differ from ``like``'s.
    """
    path = Path(path)
    _check_target(path, like, overwrite)
    named = dict(state_dict) if like is None else _in_the_form_of(like, state_dict)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in named.items()}
    for name, value in tensors.items():
        if not _is_finite(value):
            raise CheckpointError(f"{path} was not written: expected finite weights, got NaN or Inf in {name!r}")
    if path.suffix.lower() in _TORCH_SUFFIXES:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
    else:
        data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    try:
        atomic_write(path, data)
    except OSError as error:
        raise CheckpointError(
            f"{path} was not written: {error.strerror or error}; check the folder and the disk"
        ) from error


def _bytes_of(path: Path) -> bytes:
    if not path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint file, got no such file; check the path")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file, got a folder or device; give the file itself")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error
    if not data:
        raise CheckpointError(f"{path}: expected a checkpoint, got an empty file; copy or download it again")
    return data


def _parse(path: Path, data: bytes) -> Any:
    # The bytes decide; the suffix only tells what a file too short to have a header was meant to be.
    header = int.from_bytes(data[:8], "little")
    if (data[8:9] == b"{" and header < 100_000_000) or (len(data) < 9 and path.suffix == ".safetensors"):
        try:
            # Its parser returns them in an order that differs from run to run.
            return dict(sorted(safetensors.torch.load(data).items()))
        except Exception as error:  # whatever its parser raises on hostile bytes, the file is damaged
            raise CheckpointError(
                f"{path}: expected a whole safetensors file, got one that is truncated or damaged; "
                "copy or download it again"
            ) from error
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_SKIPPED_GLOBALS):
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes make the unpickler raise almost anything
        raise CheckpointError(_why_not(path, data, error)) from error


def _why_not(path: Path, data: bytes, error: Exception) -> str:
    """One sentence for what torch says in many."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
        return f"{path} was refused: loading it would call {wanted[1]!r}, which can run any code; {_WAY_OUT}"
    if "TorchScript" in str(error):
        return f"{path} was refused: it is a TorchScript archive, which holds code; {_WAY_OUT}"
    if not data.startswith((b"PK\x03\x04", b"\x80")) and not _is_pickle(data):
        return (
            f"{path}: expected a safetensors or torch checkpoint, got something else; check that this is the right file"
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"{path} was refused: it pickles more than tensors, and loading that can run any code; {_WAY_OUT}"
    return f"{path}: expected a whole torch checkpoint, got one that is truncated or damaged; copy or download it again"


def _is_pickle(data: bytes) -> bool:
    """Whether the bytes are a pickle of the oldest kind, which has no header; parses it and runs nothing."""
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(data))
    except Exception:  # hostile bytes make the parser raise almost anything
        return False


def _find_state_dict(loaded: Any, depth: int) -> Mapping[Any, Any] | None:
    """The mapping with tensors, under a usual name before the top, at most ``depth`` names down."""
    if not isinstance(loaded, Mapping):
        return None
    if depth:
        for wrapper in _WRAPPERS:
            found = _find_state_dict(loaded.get(wrapper), depth - 1)
            if found is not None:
                return found
    return loaded if any(isinstance(value, Tensor) for value in loaded.values()) else None


def _check_tensor(path: Path, name: str, value: Tensor, file_size: int) -> None:
    if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _FLOATS + _INTEGERS:
        raise CheckpointError(
            f"{path}: expected dense tensors of float16 to float64, bfloat16, integers or bool, got {value.dtype} "
            f"({value.layout}, on {value.device.type}) in {name!r}; convert the checkpoint"
        )
    if value.numel() * value.element_size() > file_size:
        # A stride of zero lets a few bytes claim a tensor that fills the memory.
        raise CheckpointError(f"{path}: expected tensors no larger than the file, got {tuple(value.shape)} in {name!r}")
    if not _is_finite(value):
        raise CheckpointError(
            f"{path}: expected finite weights, got NaN or Inf in {name!r}; the file is damaged or its training diverged"
        )


def _is_finite(value: Tensor) -> bool:
    return value.dtype not in _FLOATS or bool(torch.isfinite(value).all())


def _stripped(name: str) -> str:
    """The name without what DataParallel (``module.``, in front) and torch.compile (``_orig_mod.``, anywhere) add."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def _check_target(path: Path, like: Checkpoint | None, overwrite: bool) -> None:
    if path.is_dir():
        raise CheckpointError(
            f"{path}: expected a file name to write to, got a folder; add a name such as model.safetensors"
        )
    if overwrite or not os.path.lexists(path):
        return
    if like is not None and path.exists() and like.path.exists() and path.samefile(like.path):
        raise CheckpointError(f"{path} is the input file; give another output, or allow overwriting")
    raise CheckpointError(f"{path} exists; give another output, or allow overwriting")


def _in_the_form_of(like: Checkpoint, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = {_stripped(name): value.detach().cpu() for name, value in state_dict.items()}
    extra = [name for name in given if name not in like.keys and not name.endswith(_COUNTER)]
    missing = [name for name in like.keys if name not in given]
    if extra or missing:
        raise CheckpointError(
            f"expected the keys of {like.path}, got {(extra + missing)[0]!r} in one but not the other"
        )
    out = {}
    for name, original in like.keys.items():
        stored, new = like.state_dict[name], given[name]
        if stored.shape != new.shape:
            raise CheckpointError(f"expected {name!r} of shape {tuple(stored.shape)}, got {tuple(new.shape)}")
        # A float64 file loses digits in a float32 model; what the repair did not touch must not.
        out[original] = stored if torch.equal(stored.to(new.dtype), new) else new.to(stored.dtype)
    return out
