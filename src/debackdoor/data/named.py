"""Words that stand for folders of a user's data folder."""

from __future__ import annotations

import os
from pathlib import Path

from debackdoor.errors import DataError

VARIABLE = "DEBACKDOOR_DATA"
FOLDERS = ("cifar10", "gtsrb")


def named_folder(word: str) -> Path:
    """The folder ``word`` inside the one that the environment variable ``DEBACKDOOR_DATA`` names.

    Raises:
        DataError: if the variable is not set, or the folder does not exist.
    """
    place = os.environ.get(VARIABLE)
    if not place:
        raise DataError(
            f"{word}: expected the environment variable {VARIABLE}, got none; set it to the folder that holds {word}, "
            f"or write ./{word} for a folder of that name"
        )
    base = Path(place)
    if not (base / word).is_dir():
        raise DataError(
            f"{word}: expected a folder {base / word}, got none; set the environment variable {VARIABLE} "
            f"to the folder that holds {word}"
        )
    return base / word
