"""The matrix of a bench: which models, defences, seeds and numbers of clean images; and its cells."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from debackdoor.bench.methods import METHODS
from debackdoor.errors import DebackdoorError
from debackdoor.zoo import Card, list_cards


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        model: the name of its card.
        defense: a name of ``METHODS``.
        seed: of the clean images and the defence.
        clean_images: as many the defence gets.
    """

    model: str
    defense: str
    seed: int
    clean_images: int

    @property
    def file(self) -> Path:
        """Where its record is, in the folder of a bench."""
        return Path(self.defense) / f"{self.model}-seed{self.seed}-n{self.clean_images}.json"

    def __str__(self) -> str:
        return f"{self.model}, {self.defense}, seed {self.seed}, {self.clean_images} images"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What is to be measured: everything with everything.

    Attributes:
        zoo: the folder of a zoo's tier.
        models: names of its cards, or patterns such as ``gtsrb-*``.
        defenses: names of ``METHODS``.
        seeds: each at least 0.
        clean_images: each at least 1.
    """

    zoo: Path = Path("zoo/slim")
    models: Sequence[str] = ("*",)
    defenses: Sequence[str] = tuple(METHODS)
    seeds: Sequence[int] = (0,)
    clean_images: Sequence[int] = (500,)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, Path) and len(value) == 0:
                raise DebackdoorError(f"expected at least one entry in {item.name}, got none; add one or leave it out")
        check_known("defenses", self.defenses, METHODS)
        for name, least in (("seeds", 0), ("clean_images", 1)):
            low = min(getattr(self, name))
            if low < least:
                raise DebackdoorError(f"expected {name} of at least {least}, got {low}; correct it")

    def replaced(self, **given: Any) -> Matrix:
        """The same but for what is given; None stands for what is not."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def cards(self) -> list[Card]:
        """The cards of the models, by name.

        Raises:
            DebackdoorError: if the folder is no zoo's, or a name or pattern fits none of its models.
        """
        cards = list_cards(self.zoo)
        for pattern in self.models:
            if not any(fnmatchcase(card.name, pattern) for card in cards):
                known = ", ".join(card.name for card in cards) or "none"
                raise DebackdoorError(f"{self.zoo}: expected models out of {known}, got {pattern!r}; choose of them")
        return [card for card in cards if any(fnmatchcase(card.name, pattern) for pattern in self.models)]

    def cells(self) -> list[Cell]:
        """All cells, those of a model together, since what is known of it is then kept."""
        return [
            Cell(card.name, defense, seed, number)
            for card in self.cards()
            for number in dict.fromkeys(self.clean_images)
            for seed in dict.fromkeys(self.seeds)
            for defense in dict.fromkeys(self.defenses)
        ]


_KINDS: Mapping[str, type] = {"models": str, "defenses": str, "seeds": int, "clean_images": int}


def read_matrix(path: str | Path) -> Matrix:
    """The matrix in a TOML file, whose keys are the attributes of :class:`Matrix`; those left out keep their defaults.

    Raises:
        DebackdoorError: if the file cannot be read, or is not as above. The message names the file.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise DebackdoorError(f"{path}: expected a matrix, got an error ({why}); check the path") from error
    except tomllib.TOMLDecodeError as error:
        raise DebackdoorError(f"{path}: expected TOML, got an error ({error}); correct the file") from error
    try:
        check_known("keys", table, [item.name for item in fields(Matrix)])
        for name, value in table.items():
            _check_kind(name, value)
        zoo = table.pop("zoo", None)
        return Matrix(**table).replaced(zoo=None if zoo is None else Path(zoo))
    except DebackdoorError as error:
        raise DebackdoorError(f"{path}: {error}") from error


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Checks names.

    Raises:
        DebackdoorError: if one is not among ``known``.
    """
    for name in names:
        if name not in known:
            raise DebackdoorError(f"expected {what} out of {', '.join(known)}, got {name!r}; choose of them")


def _check_kind(name: str, value: object) -> None:
    if name == "zoo":
        if not isinstance(value, str):
            raise DebackdoorError(f"expected zoo as the path of a folder, got {value!r}; correct it")
        return
    kind = _KINDS[name]
    words = "names" if kind is str else "whole numbers"
    fits = isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    if not fits:
        raise DebackdoorError(f"expected {name} as a list of {words}, got {value!r}; correct it")
