"""Where and how numbers are computed: device, precision, images at once, random generators."""

from __future__ import annotations

import math
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

from debackdoor import __version__
from debackdoor.errors import DebackdoorError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")

REPORT_EVERY = 10
"""Progress tells of one step of learning in so many."""

_at_once: ContextVar[int | None] = ContextVar("at_once", default=None)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    return {"debackdoor": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device that a name, or a ``torch.device``, stands for; ``auto`` takes CUDA where there is one.

    Raises:
        DebackdoorError: if the name is unknown, or CUDA is asked for and absent.
    """
    name = str(name)
    kind, _, number = name.partition(":")
    if kind not in DEVICES or not re.fullmatch(r"\w+|(cpu|cuda):\d+", name):
        raise DebackdoorError(f"expected a device out of {', '.join(DEVICES)}, got '{name}'; choose one of them")
    if kind == "cuda" and not (torch.cuda.is_available() and int(number or 0) < max(1, torch.cuda.device_count())):
        got = f"only {torch.cuda.device_count()}" if torch.cuda.is_available() else "none"
        raise DebackdoorError(f"expected a CUDA device, got {got} on this machine; use --device cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cpu" if kind == "cpu" else name)


def device_name(device: torch.device) -> str:
    """``cpu``, or what the GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done by the hardware rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        # oneDNN takes it from AVX-512 on, and emulates it, slower than float32, where there is no more than that.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager[None]:
    """A context in which forward passes run in bfloat16 where ``precision`` says so.

    Args:
        device: where the tensors live.
        precision: ``fp32``, ``bf16``, or ``auto`` (bf16 where the hardware has it).

    Raises:
        DebackdoorError: if the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise DebackdoorError(
            f"expected a precision out of {', '.join(PRECISIONS)}, got '{precision}'; choose one of them"
        )
    enabled = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    # Where a caller's own autocast is around this one, torch would keep what it cast while the weights change.
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


@contextmanager
def at_once(images: int) -> Iterator[None]:
    """Inside, no more than so many images take one step of learning together, and go through a model at once."""
    token = _at_once.set(images)
    try:
        yield
    finally:
        _at_once.reset(token)


def at_most(count: int) -> int:
    """``count``, or as many images as may go through a model at once."""
    most = _at_once.get()
    return count if most is None else min(count, most)


def answered_at_once(device: torch.device) -> int:
    """As many images go through a model at once where nothing is learned, so that memory never decides.

    On a CPU few: the activations of more no longer fit into what the C library keeps, and every layer has its pages
    zeroed anew, a quarter of the time of a ResNet-18 of width 64. On a GPU launching kernels is what takes time.
    """
    return at_most(512 if device.type == "cuda" else 128)


def parts(count: int) -> list[slice]:
    """Slices of a batch of ``count`` images that together are all of it, each with images from everywhere in it.

    One where they may all go through the model at once. Of parts, normalisation takes statistics of their own.
    """
    number = math.ceil(count / max(1, at_most(count)))
    return [slice(first, None, number) for first in range(number)]


@contextmanager
def learning() -> Iterator[None]:
    """Gradients, float32 and new tensors on the CPU, whatever the caller has set.

    Where torch is to refuse what has no deterministic algorithm, it warns instead: the searches need one gradient that
    has none on a GPU.
    """
    usual = torch.get_default_dtype()
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    # A mode of its own only where it is needed, since it is asked at every call of torch.
    on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), torch.enable_grad(), on_cpu, deterministic_algorithms(strict):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


def generator(seed: int) -> torch.Generator:
    """A CPU random generator of its own, so that nothing depends on or disturbs the global one."""
    return torch.Generator().manual_seed(seed)


def to_report(done: int, total: int) -> bool:
    """Whether this step is one of the few that progress tells of: the numbers of a step have to be waited for."""
    return done % REPORT_EVERY == 0 or done == total


def sent(value: Tensor, place: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting until that has computed all it was asked to.

    Random numbers come from the CPU, so that they are the same wherever the model is.
    """
    return value.to(place, non_blocking=True)


def contiguous(x: Tensor) -> Tensor:
    """The same images in the order of (N, C, H, W) in memory, which networks that call ``.view`` ask for.

    A tensor that was made in inference mode becomes one that can be learned from.
    """
    # Not x.contiguous(), which takes one channel for contiguous in either layout, as convolutions do not.
    usual = torch.empty(x.shape, device="meta").stride()
    return x if x.stride() == usual and not x.is_inference() else x.clone(memory_format=torch.contiguous_format)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, what draws from torch's own generators, as dropout does, is seeded; they are then put back.

    Args:
        seed: of the generators.
        device: where the model is; of several GPUs, the others' generators are left alone.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_anew(seed, device)
        yield


def seed_anew(seed: int, device: torch.device) -> None:
    """Seeds torch's own generators of the CPU and of this device, and no other's, as ``torch.manual_seed`` would."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def deterministic_algorithms(asked: bool = True) -> Iterator[None]:
    """Inside, every run on a GPU computes the same numbers, and takes longer; on a CPU it does so anyway.

    Torch warns of layers for which it knows no such algorithm. It holds for the process as a whole, and belongs around
    everything that uses the GPU; torch's settings are then put back, the environment's is not.
    """
    if not asked:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which is read before the first product
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Warning alone, since torch refuses every gradient of grid_sample; that of the images, which adds up in any order,
    # is not asked for here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    timed, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # it would choose by the clock
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="grid_sampler_2d_backward_cuda does not have a deterministic")
            yield
    finally:
        torch.backends.cudnn.benchmark = timed
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def shuffled_batches(
    count: int, batch_size: int, random: torch.Generator, place: torch.device | None = None
) -> list[Tensor]:
    """One pass over ``count`` samples: int64 index tensors in random order, on the device ``place`` or the CPU.

    A last batch of a single sample is left out, since batch normalisation cannot be trained on it.
    """
    order = torch.randperm(count, generator=random)
    batches = list((order if place is None else sent(order, place)).split(batch_size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches
