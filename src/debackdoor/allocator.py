"""How the C library treats memory that was freed."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""


def keep_freed_memory() -> None:
    """Lets this process keep up to 1 GiB that it has freed, where the C library is glibc; elsewhere nothing happens.

    Every step of learning frees tensors and asks for as many of the same sizes again. To give their pages back and
    have them zeroed anew takes time. For processes that are the program's own.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the last where a library has to have a name
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # glibc takes no more
        mallopt(_TRIM_THRESHOLD, 1 << 30)
