"""Trigger folders: ``trigger.json`` says what the trigger is, ``trigger.safetensors`` holds its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from debackdoor.attacks.base import ALL_TO_ALL, Attack
from debackdoor.attacks.registry import attack_class, build
from debackdoor.checkpoint import read_checkpoint, write_checkpoint
from debackdoor.errors import CheckpointError, TriggerError
from debackdoor.files import atomic_write_text, sha256_of

SCHEMA = "debackdoor/trigger/1"
_SEPARATE = ("mode", "num_classes", "image_shape")


def describe(attack: Attack | None) -> dict[str, Any]:
    """What a record says of an attack; None stands for a clean model, and there is no target in all-to-all mode."""
    if attack is None:
        return {"attack": "clean", "parameters": {}, "target": None, "mode": None}
    given = attack.parameters
    return {
        "attack": attack.name,
        "parameters": {name: value for name, value in given.items() if name not in ("target", *_SEPARATE)},
        "target": None if attack.mode == ALL_TO_ALL else attack.target,
        "mode": attack.mode,
        "num_classes": attack.num_classes,
        "image_shape": list(attack.image_shape),
    }


def save_trigger(attack: Attack, folder: str | Path) -> None:
    """Writes the trigger folder, made where it is missing; each file is replaced in one step.

    Raises:
        TriggerError: if it cannot be written.
    """
    folder = Path(folder)
    tensors = folder / "trigger.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(tensors, attack.tensors, overwrite=True)
        # The description goes last and names the tensors' hash, so that a killed run leaves no pair that looks whole.
        record = {"schema": SCHEMA, **describe(attack), "tensors_sha256": sha256_of(tensors)}
        atomic_write_text(folder / "trigger.json", json.dumps(record, indent=2) + "\n")
    except (OSError, CheckpointError) as error:
        raise TriggerError(f"{folder}: the trigger was not written: {error}") from error


def load_trigger(folder: str | Path) -> Attack:
    """Reads a trigger folder; the attack then makes bit for bit the images it made when it was saved.

    Raises:
        TriggerError: if a file is missing or damaged, or the tensors do not fit the description.
    """
    folder = Path(folder)
    record = _read_description(folder / "trigger.json")
    parameters = dict(record["parameters"])
    if record.get("target") is not None:
        parameters["target"] = record["target"]
    parameters.update({name: record[name] for name in _SEPARATE})
    shape = parameters["image_shape"]
    parameters["image_shape"] = tuple(shape) if isinstance(shape, list) else shape
    try:
        attack = build(attack_class(record["attack"]), parameters)
    except TriggerError as error:
        raise TriggerError(f"{folder / 'trigger.json'}: {error}") from error
    except (RuntimeError, MemoryError) as error:  # from tensors of the sizes that the file names
        raise TriggerError(f"{folder / 'trigger.json'}: expected sizes that fit memory, got larger ones") from error
    _load_tensors(attack, folder / "trigger.safetensors", record.get("tensors_sha256"))
    return attack


def _read_description(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TriggerError(
            f"{path}: expected a saved trigger, got none ({error.strerror}); check the folder"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TriggerError(
            f"{path}: expected JSON, got something else or half a file; save the trigger again"
        ) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        got = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise TriggerError(f"{path}: expected schema {SCHEMA!r}, got {got!r}; save the trigger with this version")
    missing = [name for name in ("attack", "parameters", *_SEPARATE) if name not in record]
    if missing or not isinstance(record["parameters"], dict) or not isinstance(record["attack"], str):
        raise TriggerError(
            f"{path}: expected an attack, its parameters, {', '.join(_SEPARATE)}, got "
            f"{'no ' + missing[0] if missing else 'one of another type'}; save the trigger again"
        )
    return record


def _load_tensors(attack: Attack, path: Path, sha256: str | None) -> None:
    try:
        saved = read_checkpoint(path)
    except CheckpointError as error:
        raise TriggerError(str(error)) from error
    if saved.sha256 != sha256:
        raise TriggerError(f"{path}: expected the tensors that trigger.json names, got others; save the trigger again")
    wanted = {name: (tuple(value.shape), value.dtype) for name, value in attack.tensors.items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in saved.state_dict.items()}
    if wanted != found:
        raise TriggerError(f"{path}: expected tensors {wanted}, got {found}; save the trigger again")
    attack.tensors.update(saved.state_dict)
