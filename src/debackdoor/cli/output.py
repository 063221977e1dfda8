"""What a command says, and where: words, progress, JSON; and whether a file may be written."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from debackdoor.cli.progress import Stages
from debackdoor.cli.status import BACKDOORED, complain, discard, status_of
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write_text
from debackdoor.text import visible_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

_STDOUT = "-"
_RECORDS = (".json", ".html", ".sarif", ".md", ".csv")
"""What a folder of images may hold beside them, and may be written again."""


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
        stream = sys.stderr if self._json_to == _STDOUT else sys.stdout
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
            if self._json_to == _STDOUT:
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
        if self._json_to not in (None, _STDOUT):
            check_file(Path(str(self._json_to)), inputs, overwrite=True, protect=True)

    def write_json(self, record: Mapping[str, Any]) -> None:
        """Writes the record, where one was asked for.

        Raises:
            DebackdoorError: if it cannot be written.
        """
        if self._json_to is None:
            return
        from debackdoor.report import to_json

        if self._json_to == _STDOUT:
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


def paths_among(*names: str) -> list[Path]:
    """What of the DATA and ARCH that a user names is a file or a folder."""
    # Not Path.exists, which raises where a folder may not be looked into.
    return [path for name in names if name for path in _places(name) if os.path.exists(path)]


def _places(name: str) -> Iterator[Path]:
    """Where the DATA or ARCH of that name may lie."""
    from debackdoor.data.named import FOLDERS, VARIABLE

    if name in FOLDERS:
        yield Path(os.environ.get(VARIABLE, ""), name)
        return
    if name != "digits":
        yield Path(name)
    library, _, folder = name.partition(":")
    code = name.rpartition(":")[0]  # FILE.py:factory or MODULE:factory
    if library == "hf":
        yield Path(folder, "config.json")
    elif code.strip("."):
        yield Path(code)
        *packages, module = code.split(".")
        yield from (Path(root, *packages, f"{module}.py") for root in ("", *sys.path))  # of "./", too, which is none


def check_file(path: Path, inputs: Iterable[Path], overwrite: bool, protect: bool = False) -> None:
    """Checks, before any work, that a file can be written to ``path``.

    Args:
        path: the file to be.
        inputs: files that the work reads, and folders whose files it reads.
        overwrite: whether an existing file may be replaced.
        protect: whether ``inputs`` are kept even then.

    Raises:
        DebackdoorError: if it exists, is no file, or its folder does not exist or cannot be written to.
    """
    if path == Path(_STDOUT):
        raise DebackdoorError("expected a file to write, got '-', standard output; give a file name")
    if path.exists() and not path.is_file():
        raise DebackdoorError(f"{path}: expected a file to write, got a folder or device; give a file name")
    if any(_is_same(path, source) for source in inputs) and (protect or not overwrite):
        hint = "give another file" if protect else "give another file, or --overwrite to replace it"
        raise DebackdoorError(f"{path}: expected a file of its own to write, got that of another use; {hint}")
    if os.path.lexists(path) and not overwrite:
        raise DebackdoorError(f"{path} exists; give another file, or --overwrite to replace it")
    # A link is written through, so it is the folder of its target that counts.
    check_folder(Path(os.path.realpath(path)).parent)


def check_more(taken: list[Path], *outputs: Path | None) -> None:
    """Checks the files of further outputs, those that are wanted, and adds each to the paths that are taken.

    Raises:
        DebackdoorError: if one is not a file of its own that can be written.
    """
    for path in outputs:
        if path is not None:
            check_file(path, taken, overwrite=True, protect=True)
            taken.append(path)


def check_new_folder(folder: Path, inputs: Iterable[Path], json_to: str | None) -> None:
    """Checks, before any work, that ``folder`` can be made, or is empty and a new one can take its place.

    Args:
        folder: gets files.
        inputs: folders that are read: files inside them would be read the next time.
        json_to: where the record goes, as ``Output`` takes it.

    Raises:
        DebackdoorError: if it is of another kind, or inside of what is read, or the record would lie in it.
    """
    check_outside(folder, inputs)
    here = Path(os.path.realpath(folder))
    if json_to not in (None, _STDOUT) and Path(os.path.realpath(str(json_to))).is_relative_to(here):
        raise DebackdoorError(f"{json_to}: expected a record outside of {folder}, which is to be empty; give another")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        got = "one with files in it" if folder.is_dir() else "a file"
        raise DebackdoorError(f"{folder}: expected an empty folder or none, got {got}; give another")
    if folder.is_dir():
        check_folder(folder)
        if os.path.ismount(folder) or folder.samefile(os.curdir):
            got = "a mount" if os.path.ismount(folder) else "the current one"
            raise DebackdoorError(f"{folder}: expected a folder that can be replaced, got {got}; give a new one in it")
    check_folder(here.parent)


def check_outside(path: Path, folders: Iterable[Path]) -> None:
    """Checks that ``path`` is none of those of ``folders`` that are some, whose files are read, nor inside of one.

    Raises:
        DebackdoorError: if it is.
    """
    here = Path(os.path.realpath(path))
    for folder in filter(os.path.isdir, folders):
        if here.is_relative_to(os.path.realpath(folder)):
            raise DebackdoorError(f"{path}: expected a place outside of {folder}, which is read; give another")


def check_kept(folder: Path | None, inputs: Iterable[Path], *outputs: str | Path | None) -> None:
    """Checks, before any work, that finished stages can be kept in ``folder``, where there is to be one.

    Raises:
        DebackdoorError: if not, or if it is inside of one of ``inputs`` that are folders, or among ``outputs``.
    """
    if folder is None:
        return
    check_to_be_folder(folder)
    check_outside(folder, inputs)
    here = Path(os.path.realpath(folder))
    if any(path is not None and here.is_relative_to(os.path.realpath(path)) for path in outputs):
        raise DebackdoorError(f"{folder}: expected a folder of its own for stages, got an output's; give another")


def check_to_be_folder(folder: Path) -> None:
    """Checks that ``folder`` can be written to, or made.

    Raises:
        DebackdoorError: if not.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise DebackdoorError(f"{folder}: expected a folder to write to, got a file; give another")
    check_folder(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()))


def check_folder(folder: Path) -> None:
    """Checks that ``folder`` exists and can be written to.

    Raises:
        DebackdoorError: if not.
    """
    if not folder.is_dir():
        got = "a file; give another" if folder.exists() else "none; make it first"
        raise DebackdoorError(f"{folder}: expected a folder to write to, got {got}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DebackdoorError(f"{folder}: expected a folder to write to, got one without permission; choose another")


def _is_same(path: Path, other: Path) -> bool:
    """Whether writing ``path`` would replace ``other``, which may be yet to be written, or a file inside of it."""
    here, there = Path(os.path.realpath(path)), Path(os.path.realpath(other))
    if os.path.isdir(other):
        return path.exists() and here.is_relative_to(there) and here.suffix.lower() not in _RECORDS
    return here == there or (path.exists() and other.exists() and path.samefile(other))
