"""The folder of a finished attack: the model, its trigger, and the record of how it was made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from debackdoor.attacks.resume import remove_state
from debackdoor.attacks.train import BackdooredModel
from debackdoor.attacks.trigger_io import describe, save_trigger
from debackdoor.checkpoint import write_checkpoint
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write_text, sha256_of
from debackdoor.models import state_dict_of
from debackdoor.runtime import versions

SCHEMA = "debackdoor/attack/1"


def write_victim(victim: BackdooredModel, out: str | Path, rates: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``model.safetensors``, the folder ``trigger`` (not for a clean model) and, last, ``record.json``.

    Files of those names are replaced, each in one step. The kept state of the training is deleted in the end.

    Args:
        victim: what ``train`` returned.
        out: the folder, made where it is missing.
        rates: an evaluation's record or any other numbers, such as ``clean_accuracy``; they go into this record.

    Returns:
        The record.

    Raises:
        DebackdoorError: if a file cannot be written.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_checkpoint(out / "model.safetensors", state_dict_of(victim.model), overwrite=True)
        shutil.rmtree(out / "trigger", ignore_errors=True)
        if victim.attack is not None:
            save_trigger(victim.attack, out / "trigger")
        record = {
            "schema": SCHEMA,
            **describe(victim.attack),
            **asdict(victim.recipe),
            "dataset": victim.source,
            **{name: value for name, value in rates.items() if name != "schema"},
            "seconds": victim.seconds,
            "history": victim.history,
            "sha256": sha256_of(out / "model.safetensors"),
            "versions": versions(),
        }
        atomic_write_text(out / "record.json", json.dumps(record, indent=2) + "\n")
        remove_state(out)
    except OSError as error:
        raise DebackdoorError(
            f"{out}: not written: {error.strerror or error}; check the folder and the disk"
        ) from error
    return record
