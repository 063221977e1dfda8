"""Whether a set of images fits the model and the job."""

from __future__ import annotations

from debackdoor.errors import DataError, TooFewError
from debackdoor.types import CleanSet

MIN_IMAGES = 20
"""Below this a quarter, held out, has fewer than five images, and each moves accuracy by more than 20 points."""


def check_labels(clean: CleanSet, num_classes: int) -> None:
    """Checks that every label is one of the model's classes, and that no named class is missing.

    Raises:
        DataError: if a label is ``num_classes`` or more, or fewer classes are named: then their numbers are not the
            model's.
    """
    if 0 < len(clean.class_names) < num_classes:
        raise DataError(
            f"{clean.source}: expected {num_classes} named classes for a model of so many, got "
            f"{len(clean.class_names)}, which are numbered without those that are missing; call the folders by their "
            "labels (0, 1, 2, ...), or add those that are missing"
        )
    wrong = (clean.y >= num_classes).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{clean.source}: expected labels of 0 to {num_classes - 1} for a model of {num_classes} classes, "
            f"got {int(clean.y[row])} for image {row} of those drawn; check the labels and --num-classes"
        )


def check_test_set(test: CleanSet, train: CleanSet, num_classes: int) -> None:
    """Checks that the labels of test images mean what those of the training images do.

    Raises:
        DataError: if a label is ``num_classes`` or more, or both name their classes, and other ones.
    """
    check_labels(test, num_classes)
    pairs = enumerate(zip(train.class_names, test.class_names, strict=False))
    other = next((found for found in pairs if found[1][0] != found[1][1]), None)
    if other is not None:
        label, (wanted, got) = other
        raise DataError(
            f"{test.source}: expected the classes of the training images, of which {label} is {wanted!r}, got {got!r}; "
            "give both parts the same folders or names"
        )


def check_clean_set(clean: CleanSet, num_classes: int) -> None:
    """Checks that a clean set is enough to work with (that it is not empty, the set itself ensures).

    Raises:
        DataError: if a label is out of range.
        TooFewError: if all images share one class, or there are fewer than ``MIN_IMAGES``.
    """
    check_labels(clean, num_classes)
    if clean.num_classes_seen < 2:
        raise TooFewError(
            f"{clean.source}: expected clean images of at least 2 classes, got only class {int(clean.y[0])}; "
            "add images of the other classes"
        )
    if len(clean) < MIN_IMAGES:
        raise TooFewError(
            f"{clean.source}: expected at least {MIN_IMAGES} clean images, got {len(clean)}; add images "
            "or raise the limit (500 is the default)"
        )
