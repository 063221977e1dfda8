"""Works for other processes; nothing that takes long to import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from debackdoor.bench.executors import execute


def work(folder: Path, item: str) -> None:
    """Does what its item says, and leaves a file named like it: which process, and how many threads are wanted."""
    if item == "raise":
        raise ValueError("two\n lines")
    if item == "exit":
        sys.exit(3)
    if item.startswith("die"):
        tries = folder / f"{item}.tries"
        with tries.open("a") as file:
            file.write("x")
        if item == "die-always" or len(tries.read_text()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    (folder / item).write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")


def rest(folder: Path, item: int) -> None:
    """The first item is done at once; the others take an hour."""
    (folder / f"{item}.pid").write_text(str(os.getpid()))
    if item:
        time.sleep(3600)


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and only waits to be noticed is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for something that other processes do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def threads(folder: Path, item: str) -> None:
    """Leaves how many threads torch has."""
    import torch

    (folder / item).write_text(str(torch.get_num_threads()))


def devices(folder: Path, item: str) -> None:
    """Leaves which GPUs it may see."""
    (folder / item).write_text(os.environ["CUDA_VISIBLE_DEVICES"])


if __name__ == "__main__":
    # What is started in the background ignores Ctrl-C, and what it starts in turn.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in execute(partial(rest, Path(sys.argv[1])), [0, 1, 2], workers=2):
        pass
