"""What working on one item means, wherever it is done."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from debackdoor.allocator import keep_freed_memory
from debackdoor.errors import DebackdoorError, in_one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of an item.

    Attributes:
        item: the one that was given.
        error: why it failed, in one line; None where ``work(item)`` returned.
    """

    item: T
    error: str | None


def error_of(pickled: bytes, threads: int, item: Any) -> str | None:
    """Works on an item, in a process of its own, and returns its error."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # what libraries go by that are not imported yet
    keep_freed_memory()
    try:
        work = pickle.loads(pickled)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        with redirect_stdout(sys.stderr):  # what a user's own network prints: stdout may be for JSON
            work(item)
    except (Exception, SystemExit) as error:
        return in_one_line(error)
    return None


def check_retries(retries: int) -> None:
    """Checks how often an item may be tried again.

    Raises:
        DebackdoorError: if it is a negative number.
    """
    if retries < 0:
        raise DebackdoorError(f"expected retries of at least 0, got {retries}; correct it")
