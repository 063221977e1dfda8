"""Runs a function on many items in processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from debackdoor.bench.work import Outcome, check_retries, error_of
from debackdoor.errors import check_count

T = TypeVar("T")

_PATIENCE = 5.0
"""Seconds that a process gets to end by itself."""


def run_local(
    work: Callable[[T], None], items: Sequence[T], *, workers: int = 1, threads: int = 1, retries: int = 1
) -> Generator[Outcome[T], None, None]:
    """Runs ``work`` on every item in processes of this machine; each keeps its process, and what it cached, to the end.

    Closing the iterator, or an exception such as KeyboardInterrupt in its reader, ends the processes at once.

    Args:
        work, items, workers, threads, retries: see :func:`execute`.
    """
    check_count(workers=workers, threads=threads)
    check_retries(retries)
    return _run_local(pickle.dumps(work), items, min(workers, len(items)), threads, retries)


def _run_local(
    pickled: bytes, items: Sequence[T], workers: int, threads: int, retries: int
) -> Generator[Outcome[T], None, None]:
    waiting, deaths = deque(range(len(items))), [0] * len(items)
    crew: dict[Connection, _Worker] = {}
    try:
        while waiting or crew:
            while waiting and len(crew) < workers:
                worker = _Worker(pickled, threads)
                crew[worker.pipe] = worker
                worker.give(waiting.popleft(), items)
            for pipe in wait(list(crew)):
                worker = crew[pipe]  # type: ignore[index]  # a Connection, as those given
                number = worker.number
                error, alive = worker.take()
                if not alive:
                    del crew[worker.pipe]
                    deaths[number] += 1
                    if deaths[number] <= retries:
                        waiting.append(number)
                        continue
                elif waiting:
                    worker.give(waiting.popleft(), items)
                else:
                    crew.pop(worker.pipe).end()
                yield Outcome(items[number], error)
    finally:
        for worker in crew.values():
            worker.stop()
        for worker in crew.values():
            worker.end()


class _Worker:
    """One process that works on one item at a time.

    Attributes:
        pipe: ready to read when the item is done, or the process has ended.
        number: which item it works on.
    """

    def __init__(self, pickled: bytes, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads, as torch has, may hang
        self.pipe, theirs = context.Pipe()
        self.number = -1
        self._process = context.Process(target=_serve, args=(theirs, pickled, threads), daemon=True)
        # Ctrl-C goes to all processes of a terminal; this one alone decides what it means. The tracker is started
        # first, since starting it would let the signal through again.
        resource_tracker.ensure_running()
        with _held_back(signal.SIGINT):
            self._process.start()
        theirs.close()

    def give(self, number: int, items: Sequence[Any]) -> None:
        self.number = number
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is dead, and the pipe will say so
            self.pipe.send(items[number])

    def take(self) -> tuple[str | None, bool]:
        """The item's error, and whether the process is still there."""
        try:
            return self.pipe.recv(), True
        except (EOFError, ConnectionResetError):
            self.end()
            return f"the worker process was lost: {_end_of(self._process.exitcode)}", False

    def stop(self) -> None:
        """Ends the process in the middle of its work."""
        self._process.terminate()

    def end(self) -> None:
        """Sees to it that the process, which has nothing more to do, is gone."""
        self.pipe.close()  # an idle process ends by this
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, pickled: bytes, threads: int) -> None:
    """What a process does: one item after the other, until nobody sends any."""
    _end_with_parent()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(error_of(pickled, threads, pipe.recv()))


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """Holds a signal back; processes started inside never get it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_of(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with exit code {code}"
    killed = "; the machine may be out of memory" if -code == getattr(signal, "SIGKILL", None) else ""
    return f"it was ended by {signal.Signals(-code).name}{killed}"
