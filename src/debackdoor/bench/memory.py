"""The most memory that a piece of work takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

_MIB = 1 << 20
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Measures from its making to :meth:`record`: the process as a whole, with what it held before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # glibc keeps what was freed; others have no such function
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # only Linux has it; elsewhere the peak is that of the process's whole life
            Path("/proc/self/clear_refs").write_text("5")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def record(self) -> dict[str, int | None]:
        """Whole MiB of main memory, and of the GPU's where there is one."""
        gpu = torch.cuda.max_memory_allocated(self._device) // _MIB if self._device.type == "cuda" else None
        return {"peak_memory_mib": _peak() // _MIB, "peak_gpu_memory_mib": gpu}


def _peak() -> int:
    """Bytes."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
