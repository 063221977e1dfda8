"""The zoo in the repository: its cards say what is measured again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from debackdoor.attacks import load_trigger
from debackdoor.data import load_dataset
from debackdoor.errors import DataError
from debackdoor.evaluation import accuracy, evaluate
from debackdoor.models import load_model
from debackdoor.zoo import CLEAN, list_cards, trigger_of, weights_of

FOLDER = Path(__file__).parent.parent / "zoo" / "slim"
TOLERANCE = 0.002


@pytest.mark.slow
def test_three_cards_are_measured_again() -> None:
    cards = list_cards(FOLDER) if FOLDER.is_dir() else []
    if len(cards) < 3:
        pytest.skip(f"{FOLDER} does not hold three models; debackdoor zoo build makes them")
    for card in random.Random().sample(cards, 3):
        try:
            test = load_dataset(card.dataset, "test")
        except DataError as error:
            pytest.skip(str(error))
        model = load_model(weights_of(FOLDER, card.name), card.arch)
        if card.attack == CLEAN:
            assert accuracy(model, test) == pytest.approx(card.clean_accuracy, abs=TOLERANCE), card.name
            continue
        found = evaluate(model, test, load_trigger(trigger_of(FOLDER, card.name)))
        for rate in ("clean_accuracy", "attack_success_rate", "robust_accuracy"):
            assert getattr(found, rate) == pytest.approx(getattr(card, rate), abs=TOLERANCE), f"{card.name} {rate}"
