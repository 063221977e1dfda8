"""Writing files and folders so that a killed run leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: str | Path, data: bytes) -> None:
    """Replaces the file at ``path`` by ``data``, as :func:`atomic_file` does.

    Raises:
        OSError: if the folder does not exist or cannot be written to, or the disk is full.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of that at ``path`` in one step, and is on disk, when the context ends.

    A symbolic link stays a link: the file that it points to is replaced. A new file gets the permissions that the
    user's umask gives, one that replaces another those of the other. After any failure the old file is as it was and
    no temporary file is left.

    Raises:
        OSError: if the folder does not exist or cannot be written to, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Mode "x" rather than tempfile: mkstemp's 0600 would make the result unreadable to others.
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # before the data, which may be for its owner alone
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """:func:`atomic_write` of ``text`` in UTF-8."""
    atomic_write(path, text.encode("utf-8"))


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets the name ``path`` in one step when the context ends.

    An empty folder of that name makes way for it, and gives it its permissions. After any failure nothing has changed
    under that name, and nothing is left beside it; a killed run leaves a hidden folder beside it.

    Raises:
        OSError: if there is something of that name, or the folder around it cannot be written to.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if target.is_dir():
            shutil.copymode(target, temporary)
            target.rmdir()  # not every system renames a folder to one that exists; a full one stays, and is an error
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 in hexadecimal.

    Raises:
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; only POSIX systems let a program open a folder for this."""
    if os.name != "posix":
        return
    # The file is there all the same where a folder cannot be read, or its file system has nothing of the kind.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
