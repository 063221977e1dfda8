"""Puts a trained model into a zoo: weights in half precision, the trigger, and a card that was measured on both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debackdoor.attacks import Attack, BackdooredModel, Recipe, load_trigger, save_trigger
from debackdoor.attacks.registry import count_classes
from debackdoor.attacks.trigger_io import describe
from debackdoor.checkpoint import write_checkpoint
from debackdoor.errors import DebackdoorError
from debackdoor.evaluation import accuracy, evaluate
from debackdoor.files import sha256_of
from debackdoor.models import load_model, state_dict_of
from debackdoor.runtime import resolve_device, versions
from debackdoor.types import CleanSet
from debackdoor.zoo.card import Card, card_of, trigger_of, weights_of, write_card
from debackdoor.zoo.data import Splits
from debackdoor.zoo.manifest import Entry


def store(
    entry: Entry,
    victim: BackdooredModel,
    splits: Splits,
    folder: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
) -> Card:
    """Writes ``NAME.safetensors``, the folder ``NAME.trigger`` (not for a clean model) and, last, ``NAME.json``.

    The rates on the card are those of the files, read again.

    Args:
        entry: what the manifest says of the model.
        victim: the model, from ``train`` or :func:`read_victim`; not changed.
        splits: the entry's images.
        folder: the tier's, made where it is missing.
        device: where to measure.
        precision: how to measure.

    Raises:
        DebackdoorError: if the victim is not what the entry describes, its weights do not fit half precision, or a
            file cannot be written.
    """
    folder = Path(folder)
    _check_is(entry, victim, splits.train)
    half = to_half(state_dict_of(victim.model))
    weights, trigger = weights_of(folder, entry.name), trigger_of(folder, entry.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a card says is true at any moment: the old one goes before the files do.
        card_of(folder, entry.name).unlink(missing_ok=True)
        write_checkpoint(weights, half, overwrite=True)
        shutil.rmtree(trigger, ignore_errors=True)
        if victim.attack is not None:
            save_trigger(victim.attack, trigger)
        attack = None if victim.attack is None else load_trigger(trigger)
        card = Card(
            name=entry.name,
            **_attack(attack),
            clean_model=entry.clean_model,
            dataset=entry.dataset,
            **{name: getattr(victim.recipe, name) for name in ("arch", "seed", "epochs", "batch_size", "lr", "flip")},
            samples=len(splits.train),
            **_measured(weights, attack, entry.arch, splits, device, precision),
            seconds=round(victim.seconds, 3),
            versions=versions(),
            data_sha256=dict(splits.sha256),
            sha256=sha256_of(weights),
            notes=entry.notes,
        )
        write_card(card, folder)
    except OSError as error:
        raise DebackdoorError(
            f"{folder}: {entry.name} was not written: {error.strerror or error}; check the folder and the disk"
        ) from error
    return card


def read_victim(folder: str | Path) -> BackdooredModel:
    """The model in a folder that ``debackdoor attack`` wrote, as training returned it but on the CPU.

    Raises:
        DebackdoorError: if a file is missing or damaged, or the record that of another model.
    """
    folder = Path(folder)
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        recipe = Recipe(**{item.name: record[item.name] for item in fields(Recipe)})
        if not isinstance(recipe.arch, str):
            raise TypeError(recipe.arch)
        rest = {"source": record["dataset"], "history": record["history"], "seconds": record["seconds"]}
        clean = record["attack"] == "clean"
        if sha256_of(folder / "model.safetensors") != record["sha256"]:  # a run was killed while it replaced them
            raise ValueError(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DebackdoorError(
            f"{path}: expected the record of an attack and of model.safetensors, got none or another"
        ) from error
    model = load_model(folder / "model.safetensors", recipe.arch, mean=recipe.mean, std=recipe.std)
    return BackdooredModel(model, None if clean else load_trigger(folder / "trigger"), recipe, **rest)


def to_half(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its floating-point tensors in float16, on the CPU; integers stay as they are.

    Raises:
        DebackdoorError: if a number is too large for float16.
    """
    weights = {name: value.detach().cpu() for name, value in state_dict.items()}
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    for name, value in half.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise DebackdoorError(
                f"expected weights of at most {torch.finfo(torch.float16).max:g} for half precision, got "
                f"{float(weights[name].abs().max()):g} in {name!r}; train with a smaller learning rate"
            )
    return half


def check_same(name: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Whether a model's settings are those of the manifest; ``name`` is the model's.

    Raises:
        DebackdoorError: naming the first setting that differs.
    """
    for setting in {**wanted, **found}:
        if wanted.get(setting) != found.get(setting):
            raise DebackdoorError(
                f"{name}: expected a model with {setting} {wanted.get(setting)!r} as the manifest says, got one with "
                f"{found.get(setting)!r}; correct the manifest, or delete the model to train it again"
            )


def settings_of(attack: Attack | None) -> dict[str, Any]:
    """An attack's name, label rule and parameters, for :func:`check_same`."""
    said = describe(attack)
    return {"attack": said.pop("attack"), **said.pop("parameters"), **said}


def _check_is(entry: Entry, victim: BackdooredModel, data: CleanSet) -> None:
    """Whether the victim is what the entry describes, up to the precision of its training."""
    recipe = entry.recipe(victim.recipe.precision)
    check_same(
        entry.name, {"dataset": entry.dataset, **asdict(recipe)}, {"dataset": victim.source, **asdict(victim.recipe)}
    )
    attack = entry.make_attack(data.x.shape[1:], count_classes(data))
    check_same(entry.name, settings_of(attack), settings_of(victim.attack))


def _attack(attack: Attack | None) -> dict[str, Any]:
    said = describe(attack)
    return {"attack_parameters": said.pop("parameters")} | {name: said[name] for name in ("attack", "target", "mode")}


def _measured(
    weights: Path, attack: Attack | None, arch: str, splits: Splits, device: str, precision: str
) -> dict[str, Any]:
    model = load_model(weights, arch, count_classes(splits.train)).to(resolve_device(device))
    if attack is not None:
        found = evaluate(model, splits.test, attack, precision=precision).record()
        return {name: value for name, value in found.items() if name != "schema"}
    nothing = dict.fromkeys(("attack_success_rate", "robust_accuracy", "triggered_images"))
    share = accuracy(model, splits.test, precision=precision)
    return nothing | {"clean_accuracy": share, "clean_images": len(splits.test)}
