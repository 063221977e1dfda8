"""Runs a function on many items as Ray tasks, on this machine or a cluster: https://docs.ray.io."""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from debackdoor.bench.work import Outcome, check_retries, error_of
from debackdoor.errors import DebackdoorError, MissingDependencyError, check_count, check_positive, in_one_line

T = TypeVar("T")

_PATIENCE = 10.0
"""Seconds that a cluster gets to answer."""

_STARTS = 3
"""How often Ray is started: it gives itself half a minute, which on a busy machine may be too short."""

_IN_FLIGHT = 1000
"""As many tasks are with Ray at once where no number of workers is given."""


def run_ray(
    work: Callable[[T], None],
    items: Sequence[T],
    *,
    address: str | None = None,
    workers: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
    retries: int = 1,
) -> Generator[Outcome[T], None, None]:
    """Runs ``work`` on every item as Ray tasks.

    Every machine of the cluster needs this package, and the files that ``work`` reads and writes under the same paths.

    Args:
        work, items, retries: see :func:`execute`.
        address: of a cluster, as ``ray.init`` takes it; None starts one on this machine and stops it at the end.
        workers: as many tasks are under way at once; None leaves that to Ray.
        cpus, gpus: what Ray sets aside for each task, which gets as many threads as processors, and without a GPU
            sees none.
    """
    check_positive(cpus=cpus)
    check_count(workers=workers)
    check_retries(retries)
    if gpus < 0:
        raise DebackdoorError(f"expected gpus of at least 0, got {gpus}; correct it")
    return _run_ray(_import_ray(), pickle.dumps(work), items, address, workers, cpus, gpus, retries)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            f"expected the library ray, got an error ({error}); pip install 'debackdoor[bench]'"
        ) from error
    return ray


def _run_ray(
    ray: Any,
    pickled: bytes,
    items: Sequence[T],
    address: str | None,
    workers: int | None,
    cpus: float,
    gpus: float,
    retries: int,
) -> Generator[Outcome[T], None, None]:
    if not items:
        return
    started = not ray.is_initialized()
    if started:
        _start(ray, address, None if workers is None else math.ceil(workers * cpus), retries)
    waiting, running = deque(range(len(items))), dict[Any, int]()
    try:
        _check_resources(ray, cpus, gpus, may_grow=not started or address is not None)
        work = error_of if gpus else _error_on_processors
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(work)
        while waiting or running:
            while waiting and len(running) < (workers or _IN_FLIGHT):
                number = waiting.popleft()
                running[task.remote(pickled, max(1, int(cpus)), items[number])] = number
            for reference in ray.wait(list(running))[0]:
                number = running.pop(reference)
                try:
                    error = ray.get(reference)
                except ray.exceptions.RayError as lost:
                    error = f"the worker process was lost: {in_one_line(lost)}"
                yield Outcome(items[number], error)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _error_on_processors(pickled: bytes, threads: int, item: Any) -> str | None:
    """For tasks without a GPU: Ray lets them see those of their machine, and all of them would take the first."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return error_of(pickled, threads, item)


def _start(ray: Any, address: str | None, cpus: int | None, retries: int) -> None:
    """Connects to a cluster, or starts one; it says nothing on the terminal, and needs no network of its own."""
    own: dict[str, Any] = {} if address else {"num_cpus": cpus, "_system_config": {"task_oom_retries": retries}}
    tries = 1 if address else _STARTS
    for number in range(1, tries + 1):
        try:
            if address:
                _check_reached(address)
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own,
            )
            return
        except Exception as error:  # of many classes, by what failed
            ray.shutdown()
            if number == tries:
                where = f"a Ray cluster at {address}" if address else "Ray to start on this machine"
                way_out = "check the address" if address else "try again when the machine has less to do"
                raise DebackdoorError(f"expected {where}, got an error ({in_one_line(error)}); {way_out}") from error


def _check_reached(address: str) -> None:
    """Ray itself tries for minutes to reach a machine that does not answer.

    Raises:
        OSError: if none does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _check_resources(ray: Any, cpus: float, gpus: float, *, may_grow: bool) -> None:
    """Ray waits for a machine that is large enough, for ever if need be: says so where there is none yet.

    Raises:
        DebackdoorError: if there never will be one.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(found.get("CPU", 0) >= cpus and found.get("GPU", 0) >= gpus for found in machines):
        return
    if not may_grow:
        most = machines[0]
        raise DebackdoorError(
            f"expected {cpus:g} CPUs and {gpus:g} GPUs for each task, got {most.get('CPU', 0):g} and "
            f"{most.get('GPU', 0):g} on this machine; ask for less, or give the address of a cluster"
        )
    logging.getLogger(__name__).warning("waiting for a machine in the cluster with %g CPUs and %g GPUs", cpus, gpus)
