"""The zoo's models that a benchmark is asked for, and whether the images are those that their cards speak of."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import typer

from debackdoor.zoo import Card, list_cards
from debackdoor.zoo.data import files_sha256


def chosen_cards(zoo: Path, names: Collection[str] | None) -> list[Card]:
    """The cards of that names, or of all models, in the order of their names.

    Raises:
        typer.BadParameter: if there is no such model, or the images are others than those of its card: records of
            other images cannot be compared.
        DataError: if they cannot be read.
    """
    cards = list_cards(zoo)
    if unknown := sorted(set(names or ()) - {card.name for card in cards}):
        raise typer.BadParameter(f"expected models of {zoo}, got {', '.join(unknown)}; correct the names")
    chosen = [card for card in cards if not names or card.name in names]
    hashes = {data: _hashes(data) for data in {card.dataset for card in chosen}}
    for card in chosen:
        if dict(card.data_sha256) != hashes[card.dataset]:
            raise typer.BadParameter(
                f"{card.dataset}: expected the images of {card.name}'s card, got others; give those, or build the zoo "
                "anew with these"
            )
    return chosen


def _hashes(dataset: str) -> dict[str, str | None]:
    return {split: files_sha256(dataset, split) for split in ("train", "test")}
