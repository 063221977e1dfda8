"""Errors that a user can act on: each message says what was expected, what was got, and what to do."""

from __future__ import annotations


class DebackdoorError(Exception):
    """Base of every error this package raises on purpose. The command line prints it and exits with 2 or, rarely, 3."""


class CheckpointError(DebackdoorError, ValueError):
    """A checkpoint file is missing, damaged, unsafe, or does not fit the architecture."""


class DataError(DebackdoorError, ValueError):
    """Images or labels are missing, unreadable, or out of range."""


class ModelError(DebackdoorError, ValueError):
    """An architecture is unknown, or a model does not behave like an image classifier."""


class UnsupportedError(ModelError):
    """A network that works but cannot be examined. The command line exits with 3, as where nothing can be told."""


class ChanceError(ModelError):
    """A model is no better than chance on the clean images, so that nothing can be told of it: exit code 3."""


class TooFewError(DataError):
    """There are too few clean images, or too few classes among them, to tell anything: exit code 3."""


class TriggerError(DebackdoorError, ValueError):
    """A saved trigger is missing, damaged, or does not fit the images."""


class MissingDependencyError(DebackdoorError, ImportError):
    """An optional library is not installed or does not import."""


def in_one_line(error: BaseException) -> str:
    """An error for a record: its own sentence where it is one of this package, else with its class in front."""
    text = " ".join(str(error).split())
    if isinstance(error, DebackdoorError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_positive(**settings: float | None) -> None:
    """Checks hyper-parameters by name; None stands for one that is switched off.

    Raises:
        DebackdoorError: if one is not above 0.
    """
    for name, value in settings.items():
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise DebackdoorError(f"expected {name} above 0, got {value!r}; correct it")


def check_count(zero: bool = False, /, **settings: int | None) -> None:
    """Checks counts by name; None stands for one that is switched off.

    Args:
        zero: whether 0 is one, too.
        settings: the counts.

    Raises:
        DebackdoorError: if one is not a whole number above 0, or of at least 0.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if not isinstance(value, int):
            raise DebackdoorError(f"expected {name} to be a whole number, got {value!r}; correct it")
        if value < (0 if zero else 1):
            raise DebackdoorError(f"expected {name} {'of at least' if zero else 'above'} 0, got {value}; correct it")


def check_between(**settings: float) -> None:
    """Checks fractions by name that may be neither nothing nor all.

    Raises:
        DebackdoorError: if one is not above 0 and below 1.
    """
    for name, value in settings.items():
        if not (isinstance(value, (int, float)) and 0.0 < value < 1.0):
            raise DebackdoorError(f"expected {name} above 0 and below 1, got {value!r}; give a fraction such as 0.25")


def check_fraction(**settings: float | None) -> None:
    """Checks fractions by name; None stands for one that is not given.

    Raises:
        DebackdoorError: if one is not from 0 to 1.
    """
    for name, value in settings.items():
        if value is not None and not (isinstance(value, (int, float)) and 0.0 <= value <= 1.0):
            raise DebackdoorError(f"expected {name} from 0 to 1, got {value!r}; give a fraction such as 0.02")
