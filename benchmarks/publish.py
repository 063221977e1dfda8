"""What all benchmarks need for their records and for the pages that show them."""

from __future__ import annotations

from pathlib import Path

import typer

from debackdoor.bench.measure import commit as commit_now
from debackdoor.files import atomic_write_text

_COMMIT = commit_now()  # when the code is loaded: what is committed while it runs is not what is measured


def commit() -> str | None:
    """The commit that is measured, marked where files were changed since; None outside the repository."""
    return _COMMIT


def replace_between(page: Path, marker: str, text: str) -> None:
    """Puts ``text`` between the page's lines ``<!-- marker -->`` and ``<!-- /marker -->``."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = page.read_text().partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise typer.BadParameter(f"{page}: expected a line '{start}' and a line '{end}', got none; add them")
    atomic_write_text(page, f"{head}{start}\n{text}\n{end}{tail}")
