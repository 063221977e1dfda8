"""What all benchmarks need for their records and for the pages that show them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import typer

from debackdoor.files import atomic_write_text


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def replace_between(page: Path, marker: str, text: str) -> None:
    """Puts ``text`` between the page's lines ``<!-- marker -->`` and ``<!-- /marker -->``."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = page.read_text().partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise typer.BadParameter(f"{page}: expected a line '{start}' and a line '{end}', got none; add them")
    atomic_write_text(page, f"{head}{start}\n{text}\n{end}{tail}")
