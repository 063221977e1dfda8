"""A page that shows what every attack of a zoo does to images."""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from debackdoor import __version__
from debackdoor.attacks import ATTACKS, Attack, load_trigger
from debackdoor.attacks.base import ALL_TO_ALL
from debackdoor.attacks.registry import count_classes
from debackdoor.data import load_dataset
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write_text
from debackdoor.report import figures
from debackdoor.report.templates import template
from debackdoor.types import CleanSet
from debackdoor.zoo import CLEAN, Card, trigger_of

_SHOWN = 4
_LOADED = 16
"""Images of as many classes as there are, so that enough of them are not of the target class."""
_ENLARGED = 10


@dataclass(frozen=True)
class _Picture:
    """One image of one row: what it shows, and a data URI."""

    label: str
    uri: str


@dataclass(frozen=True)
class _Row:
    """One attack on the page."""

    card: Card
    title: str
    citation: str
    link: str
    target: str
    parameters: str
    strips: Mapping[str, Sequence[_Picture]]


@dataclass(frozen=True)
class _CleanModels:
    """The clean models of one data set and network."""

    dataset: str
    arch: str
    accuracies: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)


def write_gallery(
    path: str | Path, cards: Sequence[Card], folder: str | Path, tier: str, test: str | None = None
) -> None:
    """Writes one self-contained page: no script, and nothing that a browser would have to fetch.

    For each attack, test images are shown clean, with the trigger, and their difference ten times enlarged around
    mid-grey; beside them stands what the card says.

    Args:
        path: the HTML file; replaced in one step where it exists.
        cards: of the models, at least one.
        folder: where the models' triggers are.
        tier: the tier's name, for the title.
        test: test images, in any form that ``load_dataset`` takes, for the models that have as many classes; the
            others, and all without it, are shown on test images of their own data set.

    Raises:
        MissingDependencyError: if jinja2 does not import.
        DebackdoorError: if there is no card, images or a trigger cannot be read, or the file cannot be written.
    """
    if not cards:
        raise DebackdoorError(f"{folder}: expected models to show, got none; build them with zoo build")
    images = _Images(test)
    cards = _in_order(cards)
    rows = [_row(card, Path(folder), images) for card in cards if card.attack != CLEAN]
    clean = [card for card in cards if card.attack == CLEAN]
    page = _template().render(
        tier=tier,
        groups=[(kind, list(group)) for kind, group in groupby(rows, lambda row: _kind(row.card))],
        clean=[
            _CleanModels(*kind, [card.clean_accuracy for card in group]) for kind, group in groupby(clean, key=_kind)
        ],
        enlarged=_ENLARGED,
        version=__version__,
    )
    try:
        atomic_write_text(path, page)
    except OSError as error:
        raise DebackdoorError(
            f"{path} was not written: {error.strerror or error}; check the folder and the disk"
        ) from error


class _Images:
    """A few test images for each trigger.

    Args:
        given: a source that takes the place of a model's own data set, where it has as many classes; or None.
    """

    def __init__(self, given: str | None) -> None:
        self._given = None if given is None else load_dataset(given, "test")
        self._own: dict[str, CleanSet] = {}

    def of(self, dataset: str, attack: Attack) -> CleanSet:
        given = self._given
        if given is not None and count_classes(given) == attack.num_classes:
            return given
        if dataset not in self._own:
            self._own[dataset] = load_dataset(dataset, "test", _LOADED)
        return self._own[dataset]


def _kind(card: Card) -> tuple[str, str]:
    return card.dataset, card.arch


def _in_order(cards: Sequence[Card]) -> list[Card]:
    """The data set and network with most models first, each with its attacks as they are listed."""
    count = Counter(map(_kind, cards))
    names = [*ATTACKS, CLEAN]
    return sorted(cards, key=lambda card: (-count[_kind(card)], _kind(card), names.index(card.attack), card.name))


def _row(card: Card, folder: Path, images: _Images) -> _Row:
    attack = load_trigger(trigger_of(folder, card.name))
    test = images.of(card.dataset, attack)
    wanted = range(len(test)) if attack.mode == ALL_TO_ALL else (test.y != attack.target).nonzero()[:, 0].tolist()
    shown = list(wanted)[:_SHOWN]
    clean = test.x[shown]
    triggered = attack.apply(clean)
    labels = [_name(test, int(label)) for label in test.y[shown]]
    strips = {
        "clean": clean,
        "triggered": triggered,
        f"difference × {_ENLARGED}": (0.5 + _ENLARGED * (triggered - clean)).clamp(0, 1),
    }
    citation, link = _paper(type(attack))
    return _Row(
        card=card,
        title=type(attack).__name__,
        citation=citation,
        link=link,
        target="the next label (y + 1)" if attack.mode == ALL_TO_ALL else _name(test, attack.target),
        parameters=", ".join(f"{name} {_short(value)}" for name, value in card.attack_parameters.items()),
        strips={
            name: [_Picture(label, figures.png(image)) for label, image in zip(labels, strip, strict=True)]
            for name, strip in strips.items()
        },
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _name(data: CleanSet, label: int) -> str:
    names = data.class_names
    return f"{label} ({names[label]})" if label < len(names) and names[label] != str(label) else str(label)


def _paper(kind: type[Attack]) -> tuple[str, str]:
    """Citation and link, which stand on top of every attack's module."""
    text = sys.modules[kind.__module__].__doc__ or ""
    link = re.search(r"https?://\S+", text)
    return " ".join(text.split("\n\n")[0].split()), link[0] if link else ""


def _template() -> Any:
    percent = {"percent": lambda rate: "-" if rate is None else f"{rate:.1%}".replace("%", " %")}
    return template("debackdoor.report", "gallery.html.jinja", percent)
