"""What many scans come to: a Parquet table, and one self-contained page."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from debackdoor import __version__
from debackdoor.bench.scan_store import Result
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write
from debackdoor.report.templates import template
from debackdoor.runtime import versions

SCHEMA = "debackdoor/scan-many/1"

TABLE, PAGE = "scan.parquet", "index.html"
"""The files of the overview."""

KINDS = ("backdoored", "suspicious", "error", "inconclusive", "clean")
"""What results are counted as, the worst first."""

_WORDS = {
    "backdoored": ("Backdoored", "bad"),
    "suspicious": ("Suspicious", "warn"),
    "error": ("Error", "failed"),
    "inconclusive": ("Inconclusive", "unknown"),
    "clean": ("No backdoor found", "good"),
}
_HEADLINES = {
    "backdoored": "hides a backdoor",
    "suspicious": "is suspicious",
    "error": "could not be scanned",
    "inconclusive": "could not be judged",
}
_PLURALS = {"hides a backdoor": "hide a backdoor", "is suspicious": "are suspicious"}

_COLUMNS = pa.schema(
    [
        ("name", pa.string()),
        ("path", pa.string()),
        ("arch", pa.string()),
        ("verdict", pa.string()),
        ("score", pa.float64()),
        ("suspect_labels", pa.list_(pa.int64())),
        ("message", pa.string()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
        ("sha256", pa.string()),
    ]
)


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many results there are of every kind, the worst kind first."""
    found = Counter(result.kind for result in results)
    return {kind: found[kind] for kind in KINDS}


def overview_record(results: Sequence[Result], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All results in one record, in the order of the manifest.

    Args:
        results: one a model.
        settings: of the scans, by name.
    """
    return {
        "schema": SCHEMA,
        "versions": versions(),
        **settings,
        "counts": counts(results),
        "models": [{**_row(result), "record": result.record} for result in results],
    }


def write_overview(folder: str | Path, results: Sequence[Result], *, command: str) -> None:
    """Writes ``scan.parquet``, one row a model in the order of the manifest, and ``index.html``, the worst first.

    Args:
        folder: the one that the records are in; files there are replaced, each in one step.
        results: one a model.
        command: the command line that was run.

    Raises:
        MissingDependencyError: if jinja2 does not import.
        DebackdoorError: if a file cannot be written.
    """
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([_row(result) for result in results], schema=_COLUMNS), table)
    for name, data in ((TABLE, table.getvalue()), (PAGE, _page(results, command).encode("utf-8"))):
        try:
            atomic_write(Path(folder) / name, data)
        except OSError as error:
            raise DebackdoorError(
                f"{Path(folder) / name} was not written: {error.strerror or error}; check the folder and the disk"
            ) from error


def check_libraries() -> None:
    """Checks, before any work, that what the page is made with is there.

    Raises:
        MissingDependencyError: if jinja2 does not import.
    """
    _template()


def by_weight(result: Result) -> tuple[int, float]:
    """Orders results, the worst first."""
    return KINDS.index(result.kind), -(result.score or 0.0)


def _row(result: Result) -> dict[str, Any]:
    row = {name: getattr(result, name) for name in _COLUMNS.names}
    # Parts of a file's name that are not text become escapes: Parquet has none but UTF-8.
    texts = {
        name: value.encode("utf-8", "backslashreplace").decode()
        for name, value in row.items()
        if isinstance(value, str)
    }
    return {**row, **texts, "suspect_labels": list(result.suspect_labels)}


def _page(results: Sequence[Result], command: str) -> str:
    found = counts(results)
    worst = next(kind for kind in KINDS if found[kind] or kind == "clean")
    script = (files("debackdoor.bench") / "overview.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return _template().render(
        headline=_headline(worst, found[worst], len(results)),
        tone=_WORDS[worst][1],
        counts=[(kind, *_WORDS[kind], number) for kind, number in found.items()],
        rows=[(rank, result, *_WORDS[result.kind]) for rank, result in enumerate(sorted(results, key=by_weight))],
        ranks={kind: rank for rank, kind in enumerate(KINDS)},
        command=command,
        script=script,
        digest=digest,
        table=TABLE,
        version=__version__,
    )


def _headline(worst: str, number: int, total: int) -> str:
    models = "model" if total == 1 else "models"
    if worst == "clean":
        return f"No backdoor found in {total} {models}"
    what = _HEADLINES[worst]
    return f"{number} of {total} {models} {_PLURALS.get(what, what) if number != 1 else what}"


def _template() -> Any:
    return template("debackdoor.bench", "overview.html.jinja", extra="bench")
