"""The zoo: real victims and clean models to judge defences with, each with a card that says what it is."""

from debackdoor.zoo.build import Built, build
from debackdoor.zoo.card import Card, list_cards, list_tiers, read_card, trigger_of, weights_of
from debackdoor.zoo.data import load_splits
from debackdoor.zoo.manifest import CLEAN, TIERS, Entry, Manifest, built_in_manifest, read_manifest
from debackdoor.zoo.store import read_victim, store

__all__ = [
    "CLEAN",
    "TIERS",
    "Built",
    "Card",
    "Entry",
    "Manifest",
    "build",
    "built_in_manifest",
    "list_cards",
    "list_tiers",
    "load_splits",
    "read_card",
    "read_manifest",
    "read_victim",
    "store",
    "trigger_of",
    "weights_of",
]
