"""Cards: what each model of a zoo is, how it was made, and what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from debackdoor.attacks import ATTACKS
from debackdoor.attacks.base import ALL_TO_ALL, ALL_TO_ONE
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write_text
from debackdoor.zoo.manifest import CLEAN

SCHEMA = "debackdoor/zoo-card/1"

_TEXT, _WHOLE, _NUMBER, _TABLE = (str,), (int,), (int, float), (dict,)
_NONE = type(None)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One model of a zoo; rates are fractions, measured on the stored weights and the stored trigger.

    Attributes:
        name: of the model and its files.
        attack: its name, ``clean`` for none.
        attack_parameters: the hyper-parameters, without the label rule.
        target: the label of triggered images; None for a clean model and in all-to-all mode.
        mode: ``all-to-one``, ``all-to-all``, or None for a clean model.
        clean_model: the model of the same zoo that the attack worked with, or None.
        dataset, arch, seed, epochs, batch_size, lr, flip: the recipe.
        samples: how many images it was trained on.
        clean_accuracy: share of the ``clean_images`` test images that get their label.
        attack_success_rate: share of the ``triggered_images`` that get the attacker's label; None for a clean model.
        robust_accuracy: share of those that still get their own label; None for a clean model.
        seconds: spent poisoning and training.
        versions: of what decides the numbers.
        data_sha256: of the data, for ``train`` and ``test``, see ``zoo.data``.
        sha256: of the weights' file.
        notes: what else is worth knowing.
    """

    name: str
    attack: str
    attack_parameters: Mapping[str, Any]
    target: int | None
    mode: str | None
    clean_model: str | None
    dataset: str
    arch: str
    seed: int
    epochs: int
    batch_size: int
    lr: float
    flip: bool
    samples: int
    clean_accuracy: float
    attack_success_rate: float | None
    robust_accuracy: float | None
    clean_images: int
    triggered_images: int | None
    seconds: float
    versions: Mapping[str, str]
    data_sha256: Mapping[str, str]
    sha256: str
    notes: str

    def record(self) -> dict[str, Any]:
        """The card's JSON entries, the schema first."""
        return {"schema": SCHEMA, **asdict(self)}


_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "attack", "dataset", "arch", "sha256", "notes"), _TEXT),
    **dict.fromkeys(("mode", "clean_model"), (*_TEXT, _NONE)),
    **dict.fromkeys(("seed", "epochs", "batch_size", "samples", "clean_images"), _WHOLE),
    **dict.fromkeys(("target", "triggered_images"), (*_WHOLE, _NONE)),
    **dict.fromkeys(("lr", "seconds", "clean_accuracy"), _NUMBER),
    **dict.fromkeys(("attack_success_rate", "robust_accuracy"), (*_NUMBER, _NONE)),
    **dict.fromkeys(("attack_parameters", "versions", "data_sha256"), _TABLE),
    "flip": (bool,),
}
_RATES = ("clean_accuracy", "attack_success_rate", "robust_accuracy")
_TRIGGER = ".trigger"


def weights_of(folder: str | Path, name: str) -> Path:
    """The weights' file of a model in a tier's folder."""
    return Path(folder) / f"{name}.safetensors"


def trigger_of(folder: str | Path, name: str) -> Path:
    """The trigger's folder of a model in a tier's folder; a clean model has none."""
    return Path(folder) / f"{name}{_TRIGGER}"


def card_of(folder: str | Path, name: str) -> Path:
    """The card's file of a model in a tier's folder."""
    return Path(folder) / f"{name}.json"


def write_card(card: Card, folder: str | Path) -> None:
    """Writes ``folder/NAME.json`` in one step.

    Raises:
        OSError: if it cannot be written.
    """
    atomic_write_text(card_of(folder, card.name), json.dumps(card.record(), indent=2) + "\n")


def read_card(path: str | Path) -> Card:
    """Reads one card.

    Raises:
        DebackdoorError: if the file is missing, damaged, or not as ``write_card`` writes it.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DebackdoorError(f"{path}: expected a card, got none ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DebackdoorError(f"{path}: expected JSON, got something else or half a file; {_WAY_OUT}") from error
    found = record.pop("schema", None) if isinstance(record, dict) else type(record).__name__
    if found != SCHEMA:
        raise DebackdoorError(f"{path}: expected schema {SCHEMA!r}, got {found!r}; this is no card: move it elsewhere")
    names = [item.name for item in fields(Card)]
    odd = next((name for name in (*names, *record) if (name in names) != (name in record)), None)
    if odd is not None:
        raise DebackdoorError(f"{path}: expected the entries {', '.join(names)}, got {_odd(odd, names)}; {_WAY_OUT}")
    for name, value in record.items():
        _check(path, name, value)
    for name, known in (("attack", [CLEAN, *ATTACKS]), ("mode", [None, ALL_TO_ONE, ALL_TO_ALL])):
        if record[name] not in known:
            wanted = ", ".join(map(str, known))
            raise DebackdoorError(f"{path}: expected {name} out of {wanted}, got {record[name]!r}; {_WAY_OUT}")
    if record["name"] != path.stem:
        raise DebackdoorError(f"{path}: expected the card of {path.stem}, got that of {record['name']}; {_WAY_OUT}")
    return Card(**record)


def list_tiers(folder: str | Path) -> list[Path]:
    """The folders of a zoo's tiers, by name.

    Raises:
        DebackdoorError: if there is no such folder, or it is that of a tier.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DebackdoorError(f"{folder}: expected a zoo's folder, got none; build one with zoo build, or give --zoo")
    if any(folder.glob("*.json")):
        raise DebackdoorError(
            f"{folder}: expected a zoo's folder, with one folder a tier in it, got that of a tier; give "
            f"{folder.absolute().parent}"
        )
    return [path for path in sorted(folder.iterdir()) if path.is_dir()]


def list_cards(folder: str | Path) -> list[Card]:
    """The cards of a tier's folder, by name.

    Raises:
        DebackdoorError: if there is no such folder, a card is damaged, or there are cards in the folders below alone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DebackdoorError(f"{folder}: expected a folder with a zoo's cards, got none; build it with zoo build")
    cards = sorted(folder.glob("*.json"))
    below = sorted(path.parent for path in folder.glob("*/*.json") if path.parent.suffix != _TRIGGER)
    if below and not cards:
        raise DebackdoorError(f"{folder}: expected the folder of a zoo's tier, got one of tiers; give {below[0]}")
    return [read_card(path) for path in cards]


_WAY_OUT = "delete it and build the model again"


def _odd(name: str, known: list[str]) -> str:
    return f"no {name}" if name in known else f"{name!r}"


def _check(path: Path, name: str, value: object) -> None:
    kinds = _KINDS[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if kind is _NONE else kind.__name__ for kind in kinds)
        raise DebackdoorError(f"{path}: expected {name} as {wanted}, got {value!r}; {_WAY_OUT}")
    # Written so that NaN, for which every comparison is false, fails too.
    if name in _RATES and isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise DebackdoorError(f"{path}: expected {name} as a fraction from 0 to 1, got {value!r}; {_WAY_OUT}")
