"""Manifests: which models a zoo holds, and how each of them is made."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from debackdoor.attacks import ATTACKS, Attack, Recipe
from debackdoor.attacks.base import ALL_TO_ONE
from debackdoor.attacks.registry import attack_class
from debackdoor.attacks.registry import build as make
from debackdoor.errors import DebackdoorError

CLEAN = "clean"
TIERS = ("slim", "full")
"""The manifests that come with the package."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_KINDS: Mapping[str, type] = {
    "name": str,
    "attack": str,
    "dataset": str,
    "arch": str,
    "epochs": int,
    "batch_size": int,
    "lr": float,
    "flip": bool,
    "seed": int,
    "limit": int,
    "target": int,
    "mode": str,
    "parameters": dict,
    "clean_model": str,
    "notes": str,
}
_OWN = ("name", "attack", "parameters", "clean_model", "notes")
_ELSEWHERE = ("target", "mode", "num_classes", "image_shape")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model to be.

    Attributes:
        name: unique in its manifest, and the name of its files.
        attack: a name of ``ATTACKS``, or ``clean`` for none.
        dataset: images to train and test on, in any form that ``load_dataset`` takes.
        arch: as ``build_model`` takes it.
        epochs, batch_size, lr, flip: the recipe, see ``train``.
        seed: of the training, and of the attack unless ``parameters`` has another.
        limit: train on at most this many images, class-balanced; None takes all.
        target, mode: the attack's label rule; without effect for a clean model.
        parameters: the attack's other hyper-parameters, where they are not its defaults.
        clean_model: the name of a clean model in the same manifest, for attacks that work with one.
        notes: what is worth knowing, for the card.
    """

    name: str
    attack: str
    dataset: str
    arch: str
    epochs: int
    batch_size: int
    lr: float
    flip: bool = True
    seed: int = 0
    limit: int | None = None
    target: int = 0
    mode: str = ALL_TO_ONE
    parameters: Mapping[str, Any] = field(default_factory=dict)
    clean_model: str | None = None
    notes: str = ""

    def recipe(self, precision: str) -> Recipe:
        """How the model is trained.

        Raises:
            DebackdoorError: if a setting is out of range.
        """
        return Recipe(
            arch=self.arch,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self.seed,
            flip=self.flip,
            mean=None,
            std=None,
            precision=precision,
        )

    def make_attack(self, image_shape: Sequence[int], num_classes: int) -> Attack | None:
        """The attack for images of this shape (C, H, W) and so many classes; None for a clean model.

        Raises:
            TriggerError: if a hyper-parameter is unknown or out of range.
        """
        if self.attack == CLEAN:
            return None
        rule = {"seed": self.seed, "target": self.target, "mode": self.mode}
        images = {"image_shape": tuple(image_shape), "num_classes": num_classes}
        return make(attack_class(self.attack), rule | images | dict(self.parameters))


@dataclass(frozen=True)
class Manifest:
    """The models of one tier.

    Attributes:
        tier: its name, and the name of its folder.
        entries: at least one.
    """

    tier: str
    entries: tuple[Entry, ...]

    def wanted(self, names: Collection[str] = ()) -> tuple[Entry, ...]:
        """The entries of these names (of all without any) and the clean models they need, each after its own.

        Raises:
            DebackdoorError: if there is no such name.
        """
        by_name = {entry.name: entry for entry in self.entries}
        for name in names:
            if name not in by_name:
                raise DebackdoorError(
                    f"expected models out of {', '.join(by_name)} in the tier {self.tier}, got '{name}'; choose of them"
                )
        found: dict[str, Entry] = {}
        for entry in self.entries:
            if entry.name in (names or by_name):
                if entry.clean_model is not None:
                    found[entry.clean_model] = by_name[entry.clean_model]
                found[entry.name] = entry
        return tuple(found.values())


def built_in_manifest(tier: str) -> Manifest:
    """The manifest that the package has for a tier out of ``TIERS``.

    Raises:
        DebackdoorError: if there is none.
    """
    if tier not in TIERS:
        raise DebackdoorError(
            f"expected a tier out of {', '.join(TIERS)}, got '{tier}'; choose one, or give a manifest"
        )
    file = files("debackdoor.zoo") / f"{tier}.toml"
    return parse_manifest(file.read_text(encoding="utf-8"), f"{tier}.toml")


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in a TOML file.

    Its tables: ``tier`` names it, ``[defaults]`` holds settings that several models share, and each ``[[model]]`` has
    the attributes of an :class:`Entry`. What a model leaves out comes from its attack's ``recipe``, then the defaults.

    Raises:
        DebackdoorError: if the file cannot be read, or is not as above. The message names the file and the model.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise DebackdoorError(f"{path}: expected a manifest, got an error ({why}); check the path") from error
    return parse_manifest(text, str(path))


def parse_manifest(text: str, source: str) -> Manifest:
    """The manifest in a TOML text; ``source`` is what messages call it. See :func:`read_manifest`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DebackdoorError(f"{source}: expected TOML, got an error ({error}); correct the file") from error
    tier, defaults, models = table.pop("tier", None), table.pop("defaults", {}), table.pop("model", None)
    if table:
        raise DebackdoorError(
            f"{source}: expected tier, [defaults] and [[model]], got '{next(iter(table))}'; remove it"
        )
    if not isinstance(tier, str) or not _NAME.fullmatch(tier):
        raise DebackdoorError(
            f"{source}: expected tier as a name of letters, digits, - and _, got {tier!r}; correct it"
        )
    if not isinstance(models, list) or not models or not all(isinstance(model, dict) for model in models):
        raise DebackdoorError(f"{source}: expected at least one [[model]] table, got none; add one")
    _check_keys(defaults, [name for name in _KINDS if name not in _OWN], f"{source} [defaults]")
    entries = tuple(_entry(model, defaults, source, number) for number, model in enumerate(models, 1))
    _check_together(entries, source)
    return Manifest(tier, entries)


def _entry(model: Mapping[str, Any], defaults: Mapping[str, Any], source: str, number: int) -> Entry:
    where = f"{source} model {model.get('name', number)}"
    _check_keys(model, list(_KINDS), where)
    attack = model.get("attack")
    if attack not in (*ATTACKS, CLEAN):
        raise DebackdoorError(f"{where}: expected an attack out of {', '.join((*ATTACKS, CLEAN))}, got {attack!r}")
    own = {} if attack == CLEAN else ATTACKS[attack].recipe
    settings = {**defaults, **own, **model}
    missing = [item.name for item in fields(Entry) if _required(item) and item.name not in settings]
    if missing:
        raise DebackdoorError(f"{where}: expected {missing[0]}, got none; add it there or to [defaults]")
    entry = Entry(**settings)
    if not _NAME.fullmatch(entry.name):
        raise DebackdoorError(f"{where}: expected a name of letters, digits, - and _, got {entry.name!r}; correct it")
    if entry.limit is not None and entry.limit < 1:
        raise DebackdoorError(f"{where}: expected a limit of at least 1 image, got {entry.limit}; correct it")
    _check_attack(entry, where)
    try:
        entry.recipe("auto")
    except DebackdoorError as error:
        raise DebackdoorError(f"{where}: {error}") from error
    return entry


def _required(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _check_keys(table: object, known: list[str], where: str) -> None:
    if not isinstance(table, dict):
        raise DebackdoorError(f"{where}: expected a table, got {type(table).__name__}; correct it")
    for name, value in table.items():
        if name not in known:
            raise DebackdoorError(f"{where}: expected settings out of {', '.join(known)}, got '{name}'; correct it")
        kind = _KINDS[name]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise DebackdoorError(f"{where}: expected {name} as {_WORDS[kind]}, got {value!r}; correct it")


def _check_attack(entry: Entry, where: str) -> None:
    """Whether the parameters and the clean model are of use to the attack."""
    twice = [name for name in entry.parameters if name in _ELSEWHERE]
    if twice:
        raise DebackdoorError(
            f"{where}: expected parameters of the attack alone, got {twice[0]}; target and mode go beside them"
        )
    kind = None if entry.attack == CLEAN else ATTACKS[entry.attack]
    if kind is None and entry.parameters:
        raise DebackdoorError(f"{where}: expected no parameters for a clean model, got some; remove them")
    if entry.clean_model is not None and (kind is None or not kind.needs_clean_model):
        raise DebackdoorError(f"{where}: expected no clean_model for {entry.attack}, got one; remove it")
    if kind is not None and kind.starts_from_clean_model and entry.clean_model is None:
        raise DebackdoorError(f"{where}: expected the clean_model that {entry.attack} starts from, got none; add it")


def _check_together(entries: tuple[Entry, ...], source: str) -> None:
    """Whether names differ, also where a file system does not tell a from A, and clean models fit."""
    by_name: dict[str, Entry] = {}
    for entry in entries:
        if entry.name.casefold() in {name.casefold() for name in by_name}:
            raise DebackdoorError(f"{source}: expected different names, got {entry.name!r} twice; rename one model")
        by_name[entry.name] = entry
    for entry in entries:
        if entry.clean_model is None:
            continue
        other = by_name.get(entry.clean_model)
        where = f"{source} model {entry.name}"
        if other is None or other.attack != CLEAN:
            got = "none" if other is None else f"one with {other.attack}"
            raise DebackdoorError(f"{where}: expected a clean model {entry.clean_model!r}, got {got}; correct the name")
        for name in ("dataset", "limit", "arch"):
            if getattr(other, name) != getattr(entry, name):
                raise DebackdoorError(
                    f"{where}: expected a clean_model with the same {name}, got {getattr(other, name)!r} where the "
                    f"model has {getattr(entry, name)!r}; name another"
                )
