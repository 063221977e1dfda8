"""A scan of every model of a manifest: whatever becomes of one, the others are scanned, and nothing is done twice."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from debackdoor.bench.executors import Executor, Outcome, execute
from debackdoor.bench.manifest import Entry
from debackdoor.bench.scan_store import Result, Settings, Store, hash_of, result_of
from debackdoor.data import load_clean
from debackdoor.errors import DebackdoorError, in_one_line
from debackdoor.models import open_model
from debackdoor.report import header, scan_record
from debackdoor.runtime import deterministic_algorithms
from debackdoor.scan import scan
from debackdoor.types import CleanSet

_FOUND = re.compile(r"verdict (clean|suspicious|backdoored|inconclusive), but no record")
_HASHED_AT_ONCE = 8


def scan_many(
    entries: Sequence[Entry],
    folder: str | Path,
    settings: Settings,
    *,
    retry_failed: bool = False,
    executor: Executor = "local",
    workers: int | None = 1,
    threads: int = 1,
    address: str | None = None,
    gpus: float = 0,
) -> Generator[Result]:
    """Scans every model, and yields results as they come: first those of an earlier run that still hold.

    A result holds as long as the checkpoint's SHA-256 and the options are the same, that of a model that could not be
    scanned, too. Stopped at any time, this loses the scans under way alone.

    Args:
        entries: of the manifest.
        folder: gets ``records/NAME.json``, and ``errors/NAME.json`` for what could not be scanned; made if needed.
        settings: of all scans.
        retry_failed: try again what could not be scanned.
        executor, workers, threads, address, gpus: see ``execute``.

    Raises:
        OSError: if the folder cannot be made.
        DebackdoorError: if the executor cannot start.
    """
    store = Store(Path(folder).absolute(), settings)
    store.make()
    todo: list[Entry] = []
    pool = ThreadPoolExecutor(_HASHED_AT_ONCE)
    try:
        found = pool.map(partial(store.find, errors=not retry_failed), entries)
        for entry, result in zip(entries, found, strict=True):
            if result is None:
                todo.append(entry)
            else:
                yield replace(result, kept=True)
    finally:  # where the reader stops, no further checkpoint is read
        pool.shutdown(cancel_futures=True)
    if not todo:
        return
    before = {entry.name: store.latest(entry) for entry in todo}
    outcomes = execute(
        partial(scan_one, store=store),
        todo,
        executor=executor,
        workers=workers,
        threads=threads,
        address=address,
        gpus=gpus,
    )
    # Closed at once where the reader stops, so that no process goes on.
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            yield _result_of(outcome, store, before[outcome.item.name])


def scan_one(entry: Entry, store: Store) -> None:
    """Scans one model and writes its record, or that of its error.

    Raises:
        DebackdoorError: if neither can be written; the message has the verdict, or the error.
    """
    sha256 = hash_of(entry)  # before: a file that is still being copied is another one in the end
    began = time.perf_counter()
    try:
        record = _scan(entry, store.settings)
    except (Exception, SystemExit) as error:  # a file may be anything, and the user's own code may raise anything
        what = in_one_line(error)
        failure = store.error_record(entry, what, sha256, time.perf_counter() - began)
        if store.find(entry, errors=False) is not None:
            return  # another run, with more memory perhaps, has scanned it meanwhile
        with _told(what):
            store.write_error(entry, failure)
        return
    with _told(f"verdict {record['verdict']}"):
        store.write(entry, record)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Where a record cannot be written, what it was to say is in the error."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise DebackdoorError(f"{what}, but no record was written: {why}; check the folder and the disk") from error


def _scan(entry: Entry, settings: Settings) -> dict[str, Any]:
    limit, seed = (settings.options(entry)[name] for name in ("limit", "seed"))
    began = time.perf_counter()
    loaded = open_model(entry.path, entry.arch, entry.num_classes, entry.mean, entry.std)
    clean = _clean(entry.clean, limit, seed)
    ready = time.perf_counter()
    with deterministic_algorithms(settings.deterministic):
        report = scan(
            loaded.model,
            clean,
            seed=seed,
            device=settings.device,
            precision=settings.precision,
            memory=settings.memory,
        )
    seconds = {"load": ready - began, "scan": time.perf_counter() - ready}
    head = header(loaded, data=entry.clean, seed=seed, seconds=seconds)
    return scan_record(head, report, clean_images=len(clean), fail_on=settings.fail_on)


@lru_cache(maxsize=4)
def _clean(source: str, limit: int | None, seed: int) -> CleanSet:
    """Loaded once a process: nothing that scans changes the images."""
    return load_clean(source, limit, seed)


def _result_of(outcome: Outcome[Entry], store: Store, before: Result | None) -> Result:
    """What a worker wrote; or its error, where it could not. ``before`` is what was there of another checkpoint."""
    entry, error = outcome.item, outcome.error
    # A process that was lost may have written the record of its scan before.
    result = store.find(entry, errors=error is None)
    if result is not None:
        return result
    result = store.latest(entry)
    if result is not None and (before is None or result.sha256 != before.sha256):
        return result  # the checkpoint is another one by now; what was found in the one that was scanned stands
    found = _FOUND.match(error or "")
    missing = f"expected a record in {store.folder}, got none; give a folder that all workers share"
    verdict = found[1] if found else None
    record = store.error_record(entry, error or missing, hash_of(entry), verdict=verdict)
    if error is not None:
        with contextlib.suppress(OSError):  # it is told all the same, and the next run scans the model again
            store.write_error(entry, record)
    return result_of(entry, record)
