"""Where the results of many scans are: of every model the record of its scan, or of why it could not be scanned.

After an error with other options, or of a file that was away, there are both; :meth:`Store.find` tells which holds.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debackdoor.bench.manifest import Entry
from debackdoor.files import atomic_write_text, sha256_of
from debackdoor.memory import DEFAULT
from debackdoor.report import to_json
from debackdoor.report.records import SCAN_SCHEMA, plain
from debackdoor.runtime import versions

ERROR_SCHEMA = "debackdoor/scan-error/1"

RECORDS, ERRORS = "records", "errors"
"""The folders of records: of scans, and of models that could not be scanned."""

# What there is to read in a record of either kind.
_KEPT = {"sha256", "options", "verdict", "seconds"}
_NEEDED = {SCAN_SCHEMA: {*_KEPT, "fail_on", "score", "suspect_labels", "message"}, ERROR_SCHEMA: {*_KEPT, "error"}}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How all models are scanned; an entry's own limit and seed come first.

    Attributes:
        limit: as many clean images, class-balanced; None takes all.
        seed: of the choice of images, their split and the searches.
        device, precision, memory: as ``scan`` takes them.
        deterministic: whether a GPU is to compute the same numbers in every run.
        fail_on: the verdict from which on a model counts as a finding, ``suspicious`` or ``backdoored``.
    """

    limit: int | None = 500
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    memory: float = DEFAULT
    deterministic: bool = False
    fail_on: str = "suspicious"

    def options(self, entry: Entry) -> dict[str, Any]:
        """All that decides a model's result beside its checkpoint, in JSON's own types."""
        found = {
            "arch": entry.arch,
            "clean": entry.clean,
            "num_classes": entry.num_classes,
            "mean": None if entry.mean is None else list(entry.mean),
            "std": None if entry.std is None else list(entry.std),
            "limit": self.limit if entry.limit is None else entry.limit,
            "seed": self.seed if entry.seed is None else entry.seed,
            "device": self.device,
            "precision": self.precision,
            "memory": self.memory,
            "deterministic": self.deterministic,
        }
        return {name: plain(value) for name, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a model.

    Attributes:
        name: of the model.
        path, arch: as the manifest has them.
        verdict: of its scan; None where it could not be scanned.
        score: the strongest sign as a multiple of its threshold; None without a scan.
        suspect_labels: those that something speaks against, the most suspect first.
        message: one sentence about the verdict; None without a scan.
        seconds: that its scan took, or that passed until the error; None where the worker process was lost.
        error: one sentence about why there is no record of a scan; None where there is one.
        sha256: of the checkpoint; None where it cannot be read.
        kept: whether it is from an earlier run.
    """

    name: str
    path: str
    arch: str
    verdict: str | None
    score: float | None
    suspect_labels: tuple[int, ...]
    message: str | None
    seconds: float | None
    error: str | None
    sha256: str | None
    kept: bool = False

    @property
    def kind(self) -> str:
        """What it is counted as: its verdict, or ``error`` where there is none."""
        return self.verdict or "error"

    @property
    def record(self) -> str:
        """Its record's path below the folder of all."""
        return f"{RECORDS if self.error is None else ERRORS}/{self.name}.json"


@dataclass(frozen=True)
class Store:
    """The folder that the records are in.

    Attributes:
        folder: absolute.
        settings: of the scans that are wanted.
    """

    folder: Path
    settings: Settings

    def make(self) -> None:
        """Makes the folders that are not there.

        Raises:
            OSError: if that cannot be done.
        """
        for kind in (RECORDS, ERRORS):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)

    def write(self, entry: Entry, record: Mapping[str, Any]) -> None:
        """Writes the record of a scan, in place of any other of the model.

        Raises:
            OSError: if it cannot be written.
        """
        named = {**record, "name": entry.name, "options": self.settings.options(entry)}
        atomic_write_text(self._file(RECORDS, entry), to_json(named))
        self._file(ERRORS, entry).unlink(missing_ok=True)

    def write_error(self, entry: Entry, error: Mapping[str, Any]) -> None:
        """Writes what :meth:`error_record` returned, in place of the scan of another file with the same options.

        A scan with other options stays, and so does that of a file that is not there: a mistyped option, or a disk that
        is away for once, would else cost all scans that were made before.

        Raises:
            OSError: if it cannot be written.
        """
        atomic_write_text(self._file(ERRORS, entry), to_json(error))
        scanned = _read(self._file(RECORDS, entry))
        if scanned is None or (scanned["options"] == error["options"] and error["sha256"] is not None):
            self._file(RECORDS, entry).unlink(missing_ok=True)

    def error_record(
        self,
        entry: Entry,
        error: str,
        sha256: str | None,
        seconds: float | None = None,
        verdict: str | None = None,
    ) -> dict[str, Any]:
        """Why a model could not be scanned.

        Args:
            entry: the model.
            error: one sentence.
            sha256: of the checkpoint that it is about, as :func:`hash_of` gives it.
            seconds: that passed until then, or None.
            verdict: of a scan whose record could not be written.
        """
        return {
            "schema": ERROR_SCHEMA,
            "versions": versions(),
            "name": entry.name,
            "checkpoint": entry.path,
            "sha256": sha256,
            "error": error,
            "verdict": verdict,
            "seconds": None if seconds is None else round(seconds, 3),
            "options": self.settings.options(entry),
        }

    def find(self, entry: Entry, errors: bool = True) -> Result | None:
        """The result of a model that fits its checkpoint's SHA-256 and its options, if there is one.

        Args:
            entry: the model.
            errors: whether an error is a result, too.
        """
        stored = {kind: _read(self._file(kind, entry)) for kind in (RECORDS, ERRORS)}
        if not any(stored.values()):
            return None  # and the checkpoint need not be read
        wanted = (hash_of(entry), self.settings.options(entry))
        # Killed between writing one record and removing the other, a run leaves both, too. Of two that fit, the scan's
        # is the later one.
        for kind, record in stored.items():
            if record is not None and (record.get("sha256"), record.get("options")) == wanted:
                if kind == ERRORS and not errors:
                    return None
                self._fail_on(kind, entry, record)
                return result_of(entry, record)
        return None

    def latest(self, entry: Entry) -> Result | None:
        """The last result with these options, of whatever the checkpoint was then."""
        for kind in (RECORDS, ERRORS):
            record = _read(self._file(kind, entry))
            if record is not None and record["options"] == self.settings.options(entry):
                return result_of(entry, record)
        return None

    def _fail_on(self, kind: str, entry: Entry, record: dict[str, Any]) -> None:
        """What counts as a finding needs no other scan, but stands in its record."""
        if kind == RECORDS and record["fail_on"] != self.settings.fail_on:
            with contextlib.suppress(OSError):  # the verdict is the same
                atomic_write_text(self._file(kind, entry), to_json({**record, "fail_on": self.settings.fail_on}))

    def _file(self, kind: str, entry: Entry) -> Path:
        return self.folder / kind / f"{entry.name}.json"


def result_of(entry: Entry, record: Mapping[str, Any]) -> Result:
    """What a record of either kind comes to."""
    seconds = record["seconds"]
    path, arch = entry.as_given
    return Result(
        name=entry.name,
        path=path,
        arch=arch,
        verdict=record["verdict"],
        score=record.get("score"),
        suspect_labels=tuple(item["label"] for item in record.get("suspect_labels", ())),
        message=record.get("message"),
        seconds=sum(seconds.values()) if isinstance(seconds, dict) else seconds,
        error=record.get("error"),
        sha256=record["sha256"],
    )


def _read(path: Path) -> dict[str, Any] | None:
    """A record of either kind; None where there is none, or something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    schema = record.get("schema") if isinstance(record, dict) else None
    needed = _NEEDED.get(schema) if isinstance(schema, str) else None
    return record if needed is not None and needed <= record.keys() else None


def hash_of(entry: Entry) -> str | None:
    """The SHA-256 of a model's checkpoint; None where it cannot be read, or is no file."""
    try:
        # A device would be read for ever.
        return sha256_of(entry.path) if os.path.isfile(entry.path) else None
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
