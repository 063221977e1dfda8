"""What a command says, and where: words, progress, JSON."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from debackdoor.cli.places import STDOUT, check_file
from debackdoor.cli.progress import Stages
from debackdoor.cli.status import BACKDOORED, complain, discard, status_of
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write_text
from debackdoor.text import visible_lines

if TYPE_CHECKING:
    from rich.console import RenderableType


class Output:
    """Sends words to stdout (to stderr where JSON takes stdout), progress to stderr, and JSON where it is wanted.

    Args:
        quiet: leave out words and progress.
        json_to: a file for the record, ``-`` for stdout, or None.
    """

    def __init__(self, quiet: bool, json_to: str | None = None) -> None:
        self._quiet = quiet
        self._json_to = json_to

    def say(self, text: str, style: str = "") -> None:
        """Prints lines, on a terminal in a style of rich's; terminal codes in them do nothing."""
        text = visible_lines(text)
        if style:
            from rich.text import Text

            self.show(Text(text, style))
            return
        if not self._quiet:
            with self._words() as stream:
                typer.echo(text, file=stream)

    def say_error(self, text: str, style: str = "") -> None:
        """Prints lines on what failed: where words are left out, on stderr."""
        if self._quiet:
            complain(text)
        else:
            self.say(text, style)

    def show(self, what: RenderableType) -> None:
        """Prints anything that rich can: colours on a terminal, plain text elsewhere."""
        if self._quiet:
            return
        from rich.console import Console

        class Lasting(Console):
            def on_broken_pipe(self) -> None:
                """Goes on without readers, where rich would close stdout and end the program."""
                raise BrokenPipeError

        with self._words() as stream:
            console = Lasting(file=stream, highlight=False)
            if not console.is_terminal:
                console = Lasting(file=stream, highlight=False, width=max(console.width, 160))
            console.print(what)

    @contextmanager
    def _words(self) -> Iterator[IO[str]]:
        """The stream that words go to.

        They may be lost, since nobody reads them (as after ``| head``) or the disk is full: the work goes on. What the
        terminal has no sign for becomes an escape.
        """
        stream = sys.stderr if self._json_to == STDOUT else sys.stdout
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        try:
            yield stream
        except OSError:
            discard(stream)

    @contextmanager
    def stages(self) -> Iterator[Stages]:
        """A progress callback for the whole command, whose seconds are complete when the context has ended.

        Where JSON takes stdout, what the user's own network prints meanwhile goes to stderr.
        """
        with ExitStack() as stack:
            if self._json_to == STDOUT:
                stack.enter_context(redirect_stdout(sys.stderr))
            stages = stack.enter_context(Stages(show=not self._quiet))
            yield stages
        from debackdoor.stages import TAKEN

        if TAKEN in stages.seconds:
            self.say("finished stages were taken from the folder that keeps them")

    def check_json(self, inputs: Iterable[Path]) -> None:
        """Checks, before any work, that the record can be written and takes the place of none of ``inputs``.

        Raises:
            DebackdoorError: if not.
        """
        if self._json_to not in (None, STDOUT):
            check_file(Path(str(self._json_to)), inputs, overwrite=True, protect=True)

    def write_json(self, record: Mapping[str, Any]) -> None:
        """Writes the record, where one was asked for.

        Raises:
            DebackdoorError: if it cannot be written.
        """
        if self._json_to is None:
            return
        from debackdoor.report import to_json

        if self._json_to == STDOUT:
            _to_stdout(to_json(record))
            return
        write_text(self._json_to, to_json(record))


def _to_stdout(text: str) -> None:
    try:
        typer.echo(text, nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise DebackdoorError(f"standard output was not written: {error.strerror or error}; check the disk") from error


def write_text(path: str | Path, text: str) -> None:
    """Writes a file in one step.

    Raises:
        DebackdoorError: if it cannot be written.
    """
    try:
        atomic_write_text(path, text)
    except OSError as error:
        reason = error.strerror or error
        raise DebackdoorError(f"{path} was not written: {reason}; check the folder and the disk") from error


def each_of(steps: Iterable[Callable[[], object]]) -> None:
    """Takes every step, also after one that failed; says all errors but the first, which it raises then."""
    errors = []
    for step in steps:
        try:
            step()
        except Exception as error:
            errors.append(error)
    for later in errors[1:]:
        complain(str(later))
    if errors:
        raise errors[0]


@contextmanager
def finding_stands(status: int, debug: bool) -> Iterator[None]:
    """Where ``status`` is a finding's, an error inside is said on stderr and hides it no more than that."""
    try:
        yield
    except Exception as error:
        if status != BACKDOORED:
            raise
        status_of(error, debug)
        complain("the finding stands")
