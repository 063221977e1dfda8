"""Progress on stderr: bars on a terminal, now and then a line elsewhere; and the seconds each stage takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from debackdoor.cli.status import tell
from debackdoor.cli.words import numbers_in_words

_LINE_EVERY = 10.0


class _Display(AbstractContextManager["_Display"], Protocol):
    def update(self, stage: str, new: bool, done: int, total: int, numbers: Mapping[str, float]) -> None: ...


class Stages(AbstractContextManager["Stages"]):
    """A ``debackdoor.types.Progress`` callback that shows the stages of a command and measures them.

    A call ``stages(stage, 0, 0, {})`` begins a stage of unknown length. The time since the call before belongs to the
    stage that a call reports, except that a call with nothing done yet only begins its stage.

    Attributes:
        seconds: what each stage took so far; complete after the context has ended.
    """

    def __init__(self, show: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._done = "", 0
        self._since = time.perf_counter()
        self._display = _display() if show else None
        self._stack = ExitStack()

    def __enter__(self) -> Stages:
        if self._display is not None:
            self._stack.enter_context(self._display)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._add_time(self._stage)

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        self._add_time(stage if done else self._stage)
        # The same stage from its beginning is another one, whose speed is its own.
        new = stage != self._stage or done < self._done
        self._stage, self._done = stage, done
        if self._display is not None:
            self._display.update(stage, new, done, total, numbers)

    def begin(self, stage: str) -> None:
        """Begins a stage of unknown length."""
        self(stage, 0, 0, {})

    def _add_time(self, stage: str) -> None:
        now = time.perf_counter()
        if stage:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def _display() -> _Display:
    if not sys.stderr.isatty():
        return _Lines()
    # Imported here because rich takes longer to import than help takes to print.
    from debackdoor.cli.bars import Bars

    return Bars()


class _Lines(AbstractContextManager["_Lines"]):
    """A line every few seconds, so that a log tells a slow run from a stuck one."""

    def __init__(self) -> None:
        self._began = self._printed = time.perf_counter()
        self._first = 0

    def __exit__(self, *_: object) -> None: ...

    def update(self, stage: str, new: bool, done: int, total: int, numbers: Mapping[str, float]) -> None:
        now = time.perf_counter()
        if new:
            self._began, self._first = now, done
        if now - self._printed < _LINE_EVERY or done == self._first:
            return
        self._printed = now
        left = (now - self._began) / (done - self._first) * (total - done)
        tell(f"{stage}: {done} of {total}, about {left:.0f} s left, {numbers_in_words(numbers)}")
