"""Words that stand for folders of a user's data folder."""

from __future__ import annotations

import os
from pathlib import Path

from debackdoor.errors import DataError

VARIABLE = "DEBACKDOOR_DATA"
FOLDERS = ("cifar10", "gtsrb")
_DEFAULT = Path("../shared/data")


def named_folder(word: str) -> Path:
    """The folder ``word`` inside the one that ``DEBACKDOOR_DATA`` names (default: ``../shared/data``).

    Raises:
        DataError: if it does not exist.
    """
    base = Path(os.environ.get(VARIABLE) or _DEFAULT)
    if not (base / word).is_dir():
        raise DataError(
            f"{word}: expected a folder {base / word}, got none; set the environment variable {VARIABLE} "
            f"to the folder that holds {word}"
        )
    return base / word
