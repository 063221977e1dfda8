"""One cell to one record: a defence repairs a model, which is measured before and after.

The defence gets the model and the clean images alone; the trigger is used on the finished model.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from debackdoor.attacks import load_trigger
from debackdoor.bench.cells import Cell
from debackdoor.bench.memory import PeakMemory
from debackdoor.bench.methods import METHODS
from debackdoor.bench.records import RATES, SCHEMA
from debackdoor.data import load_clean, load_dataset
from debackdoor.defenses import FineTuning
from debackdoor.errors import DataError, in_one_line
from debackdoor.evaluation import Evaluation, accuracy, defence_effectiveness, evaluate
from debackdoor.files import sha256_of
from debackdoor.models import load_model
from debackdoor.runtime import device_name, resolve_device, versions
from debackdoor.types import CleanSet, RepairResult
from debackdoor.zoo import CLEAN, Card, read_card, trigger_of, weights_of
from debackdoor.zoo.data import data_sha256

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all cells of a bench have in common.

    Attributes:
        zoo: the folder of the models.
        device: ``auto``, ``cpu`` or ``cuda``.
        fine_tune: whether a repaired model is fine-tuned by its new owner and measured again.
        commit: of this package's source when the bench began, see :func:`commit`.
    """

    zoo: Path
    device: str = "auto"
    fine_tune: bool = False
    commit: str | None = None


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Repairs one model and measures it before and after.

    Raises:
        DebackdoorError: if a file is missing, there are too few images, or the method does not suit the model.
    """
    card = read_card(settings.zoo / f"{cell.model}.json")
    device = resolve_device(settings.device)
    _check_images(card)
    clean = load_clean(card.dataset, limit=cell.clean_images, seed=cell.seed).to(device)
    if len(clean) < cell.clean_images:
        raise DataError(f"{card.dataset}: expected {cell.clean_images} clean images, got {len(clean)}; ask for fewer")
    before = _rates_before(settings, cell.model)
    model = _model(settings, card).to(device)
    memory = PeakMemory(device)
    started, worked = time.perf_counter(), time.process_time()
    result = METHODS[cell.defense].run(model, clean, cell.seed)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    used = memory.record()
    rates = {"before": before, "after": _rates(result.model, settings, card)}
    tuning_error = None
    if settings.fine_tune and result.changed:
        try:
            tuned = FineTuning(lr=0.01, epochs=20, seed=cell.seed)(result.model, clean)
            rates["fine_tuned"] = _rates(tuned.model, settings, card)
        except Exception as error:  # what the defence reached stands
            tuning_error = in_one_line(error)
    return {
        **_head(cell, card),
        **{rate: {when: getattr(found, rate) for when, found in rates.items()} for rate in RATES},
        "der": _effectiveness(before, rates["after"]),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        **used,
        **_said(result),
        **_made_by(device, settings.commit),
        **({} if tuning_error is None else {"fine_tuning_error": tuning_error}),
        "error": None,
    }


def failed(card: Card, cell: Cell, error: str, commit: str | None = None) -> dict[str, Any]:
    """The record of a cell that could not be measured: everything that would have been is null."""
    nothing = {rate: {"before": None, "after": None} for rate in RATES}
    numbers = ("der", "seconds", "cpu_seconds", "peak_memory_mib", "peak_gpu_memory_mib", "changed", "channels_pruned")
    return {
        **_head(cell, card),
        **nothing,
        **dict.fromkeys(numbers),
        "steps": [],
        "verification": None,
        **_made_by(None, commit),
        "error": error,
    }


@dataclass(frozen=True)
class _CleanRates:
    """What there is to measure of a model without a backdoor."""

    clean_accuracy: float
    attack_success_rate: None = None
    robust_accuracy: None = None


def _rates(model: nn.Module, settings: Settings, card: Card) -> Evaluation | _CleanRates:
    test = _test_images(card.dataset)
    if card.attack == CLEAN:
        return _CleanRates(accuracy(model, test))
    return evaluate(model, test, load_trigger(trigger_of(settings.zoo, card.name)))


def _effectiveness(before: Evaluation | _CleanRates, after: Evaluation | _CleanRates) -> float | None:
    if isinstance(before, Evaluation) and isinstance(after, Evaluation):
        return defence_effectiveness(before, after)
    return None


# Each process keeps what its next cells need again; they come model by model.
@lru_cache(maxsize=1)
def _test_images(dataset: str) -> CleanSet:
    return load_dataset(dataset, "test")


def _check_images(card: Card) -> None:
    """Checks that the test images are those of the card: others under the same name make other numbers.

    Raises:
        DataError: if they are others.
    """
    expected, found = card.data_sha256.get("test"), _test_sha256(card.dataset)
    if found != expected:
        raise DataError(
            f"{card.dataset}: expected the test images that {card.name} was measured on, SHA-256 {expected}, got "
            f"{found}; give those, or build the zoo anew with these"
        )


@lru_cache(maxsize=1)
def _test_sha256(dataset: str) -> str:
    return data_sha256(dataset, "test", _test_images(dataset))


@lru_cache
def _rates_before(settings: Settings, name: str) -> Evaluation | _CleanRates:
    card = read_card(settings.zoo / f"{name}.json")
    return _rates(_model(settings, card).to(resolve_device(settings.device)), settings, card)


def _model(settings: Settings, card: Card) -> nn.Module:
    path = weights_of(settings.zoo, card.name)
    found = sha256_of(path)
    if found != card.sha256:
        raise DataError(f"{path}: expected SHA-256 {card.sha256} as on its card, got {found}; build the model again")
    return load_model(path, card.arch)


def _head(cell: Cell, card: Card) -> dict[str, Any]:
    """What is known before anything is measured."""
    method = METHODS[cell.defense]
    return {
        "schema": SCHEMA,
        "model": card.name,
        **{name: getattr(card, name) for name in ("attack", "dataset", "arch", "target", "mode", "sha256")},
        "defense": cell.defense,
        "defense_parameters": dict(method.parameters),
        "blind": method.blind,
        "seed": cell.seed,
        "clean_images": cell.clean_images,
        "data_sha256": dict(card.data_sha256),
    }


def _said(result: RepairResult) -> dict[str, Any]:
    """What the defence says of its own work."""
    return {
        "changed": result.changed,
        "channels_pruned": len(result.plan),
        "steps": [asdict(step) for step in result.steps],
        "verification": None if result.verification is None else asdict(result.verification),
    }


def _made_by(device: torch.device | None, commit: str | None) -> dict[str, Any]:
    """What measured; None where that was a process that is lost, perhaps on another machine."""
    made = {"versions": versions(), "commit": commit}
    if device is None:
        return {"device": None, "threads": None, **made}
    return {"device": device_name(device), "threads": torch.get_num_threads(), **made}


def commit() -> str | None:
    """The git commit of this package's source, marked where that was changed since; None outside its repository."""
    folder = Path(__file__).parent
    # An installed package may lie in a folder of someone else's repository, which does not track it.
    for command in (("ls-files", "--error-unmatch", "measure.py"), ("describe", "--always", "--dirty", *_WHOLE)):
        try:
            ran = subprocess.run(("git", *command), cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    return ran.stdout.strip()


_WHOLE = ("--abbrev=40", "--exclude=*")
