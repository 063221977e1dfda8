"""Where a command may write: checked before any work, so that nothing that is read is lost and no work is in vain."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from debackdoor.errors import DebackdoorError

STDOUT = "-"
"""What stands for standard output in place of a file."""

_RECORDS = (".json", ".html", ".sarif", ".md", ".csv")
"""What a folder of images may hold beside them, and may be written again."""


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
    if path == Path(STDOUT):
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
    if json_to not in (None, STDOUT) and Path(os.path.realpath(str(json_to))).is_relative_to(here):
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
