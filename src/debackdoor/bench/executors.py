"""Runs a list of items through one function in other processes: here, or on a Ray cluster.

The function writes its own result, so nothing comes back but whether it went well. A process that dies takes no more
than its own item with it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal, TypeVar

from debackdoor.bench.local import run_local
from debackdoor.bench.on_ray import run_ray
from debackdoor.bench.work import Outcome

__all__ = ["Executor", "Outcome", "execute", "run_local", "run_ray"]

T = TypeVar("T")
Executor = Literal["local", "ray"]


def execute(
    work: Callable[[T], None],
    items: Sequence[T],
    *,
    executor: Executor = "local",
    workers: int | None = 1,
    threads: int = 1,
    address: str | None = None,
    gpus: float = 0,
    retries: int = 1,
) -> Generator[Outcome[T], None, None]:
    """Runs ``work`` on every item, by :func:`run_local` or :func:`run_ray`, and yields outcomes as items finish.

    Args:
        work: a function of a module, or a ``functools.partial`` of one, that writes its own result in one step.
        items: what it is called with, one at a time; must pickle.
        executor: ``local`` or ``ray``.
        workers: as many items are worked on at once; None leaves that to Ray, and is one for ``local``.
        threads: of each of them.
        address: of a Ray cluster; None starts one on this machine.
        gpus: that Ray sets aside for each item; without effect for ``local``.
        retries: how often an item is tried again after its process died.

    Raises:
        DebackdoorError: if a number is out of range.
        MissingDependencyError: if Ray is wanted and does not import.
    """
    if executor == "local":
        return run_local(work, items, workers=1 if workers is None else workers, threads=threads, retries=retries)
    return run_ray(work, items, address=address, workers=workers, cpus=threads, gpus=gpus, retries=retries)
