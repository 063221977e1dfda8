"""Images and labels from files: every form of DATA becomes a :class:`~debackdoor.types.CleanSet`."""

from __future__ import annotations

from debackdoor.data.checks import check_clean_set, check_labels, check_test_set
from debackdoor.data.load import load_clean, load_dataset
from debackdoor.data.pile import Pile, load_pile, write_images
from debackdoor.data.sampling import split_clean

__all__ = [
    "Pile",
    "check_clean_set",
    "check_labels",
    "check_test_set",
    "load_clean",
    "load_dataset",
    "load_pile",
    "split_clean",
    "write_images",
]
