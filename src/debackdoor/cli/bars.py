"""Progress as a bar with the time left, for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from debackdoor.cli.words import numbers_in_words


class Bars(AbstractContextManager["Bars"]):
    """One bar, which every stage in turn uses, and which is gone in the end."""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            # On a narrow terminal the numbers take a second line; the times are never cut.
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("gone,"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            TextColumn("{task.fields[numbers]}", table_column=Column()),
            console=Console(stderr=True),
            transient=True,
            # Otherwise what is said meanwhile goes to stderr, also where stdout is a file.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bars.add_task("", total=None, numbers="")

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, stage: str, new: bool, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if new:
            # Not reset: that cannot go back to an unknown length.
            self._bars.remove_task(self._task)
            self._task = self._bars.add_task(stage, total=total or None, numbers="")
        self._bars.update(self._task, completed=done, total=total or None, numbers=numbers_in_words(numbers))
