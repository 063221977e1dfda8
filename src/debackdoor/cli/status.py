"""Exit codes, and the one sentence that goes with each error."""

from __future__ import annotations

import os
import sys
import traceback
from typing import IO, cast

import typer

from debackdoor.errors import ChanceError, DebackdoorError, TooFewError, UnsupportedError
from debackdoor.text import visible

OK = 0
BACKDOORED = 1
ERROR = 2
INCONCLUSIVE = 3
USAGE = 4
INTERRUPTED = 130

_NOTHING_TOLD = (UnsupportedError, ChanceError, TooFewError)
"""What a scan is inconclusive for, or would be if it took the network."""

# typer has moved click's UsageError about; its public child's parent is the same class in every version.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])


def status_of(error: BaseException, debug: bool = False) -> int:
    """Reports an error on stderr, with its traceback if ``debug``, and returns the exit code that it stands for."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, _UsageError):
        command = error.ctx.command_path if error.ctx is not None else "debackdoor"
        complain(f"{error.format_message().rstrip('. ')}; see {command} --help")
        return USAGE
    if isinstance(error, BrokenPipeError):
        discard(sys.stdout)
        return ERROR
    if debug:
        traceback.print_exception(error)
    complain(_sentence(error))
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return INCONCLUSIVE if isinstance(error, _NOTHING_TOLD) else ERROR


def complain(text: str) -> None:
    """One line on stderr, whatever line breaks and terminal codes the text has."""
    tell(f"debackdoor: {visible(' '.join(text.split()))}")


def tell(line: str) -> None:
    """A line on stderr; where nobody reads it or the disk is full it is lost, and the work goes on."""
    try:
        typer.echo(line, err=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: IO[str]) -> None:
    """Sends what is still to be printed nowhere: to a closed pipe, Python would fail to print it again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _sentence(error: BaseException) -> str:
    if isinstance(error, DebackdoorError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the disk"
    first = (str(error).strip().splitlines() or ["no message"])[0].rstrip(". ")
    return f"unexpected {type(error).__name__}: {first}; --debug shows where"
