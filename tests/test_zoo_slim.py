"""The repository's slim tier: every card's files are there, and its victims are real ones or say why not."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

from debackdoor.attacks import load_trigger
from debackdoor.files import sha256_of
from debackdoor.zoo import CLEAN, Card, built_in_manifest, list_cards, trigger_of, weights_of

SLIM = Path(__file__).parent.parent / "zoo" / "slim"

pytestmark = pytest.mark.skipif(not SLIM.is_dir(), reason="zoo/slim is not part of this distribution")


@pytest.fixture(scope="module")
def cards() -> list[Card]:
    return list_cards(SLIM)


def test_weights_and_triggers_are_those_of_the_cards(cards: list[Card]) -> None:
    for card in cards:
        assert sha256_of(weights_of(SLIM, card.name)) == card.sha256, card.name
        if card.attack == CLEAN:
            assert not trigger_of(SLIM, card.name).exists()
        else:
            trigger = load_trigger(trigger_of(SLIM, card.name))
            assert (trigger.name, trigger.mode) == (card.attack, card.mode)


def test_the_manifest_describes_every_card(cards: list[Card]) -> None:
    entries = {entry.name: entry for entry in built_in_manifest("slim").entries}
    for card in cards:
        entry = entries[card.name]
        for name in ("attack", "dataset", "arch", "epochs", "batch_size", "lr", "flip", "seed", "clean_model", "notes"):
            assert getattr(card, name) == getattr(entry, name), f"{card.name}: {name}"


def test_victims_are_real_or_say_what_they_lack(cards: list[Card]) -> None:
    """Accuracy within 2 points of the clean models' mean, and at least 90 % success (all-to-all: 70 %)."""
    clean = defaultdict(list)
    for card in cards:
        if card.attack == CLEAN:
            clean[card.dataset, card.arch].append(card.clean_accuracy)
    for card in cards:
        if card.attack == CLEAN or card.notes:
            continue
        assert card.clean_accuracy >= mean(clean[card.dataset, card.arch]) - 0.02, card.name
        assert card.attack_success_rate is not None
        assert card.attack_success_rate >= (0.7 if card.mode == "all-to-all" else 0.9), card.name
