"""The state of a training, kept on disk so that a killed run goes on: the poison once, all else after every epoch."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.attacks.base import Attack, Poison
from debackdoor.attacks.control import Control
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write
from debackdoor.types import CleanSet

STATE_FILE = "training.pt"
_POISON_FILE = "poison.pt"
CLEAN_FOLDER = ".clean_model"
"""Hidden, so that it is no folder of the user's."""


class TrainingState:
    """A model, its optimiser and schedule, what the attacker learns, and the epochs done so far.

    Args:
        model: on its device; trained in place.
        control: what runs the steps.
        lr: the one-cycle schedule's largest learning rate.
        total_steps: optimiser steps of the whole training.
        run: plain JSON values that tell this run from others.
        folder: where the state is kept, or None to keep it in memory alone.

    Raises:
        DebackdoorError: if the folder holds the state of another run, or one that is damaged.
    """

    def __init__(
        self,
        model: nn.Module,
        control: Control,
        lr: float,
        total_steps: int,
        run: Mapping[str, Any],
        folder: str | Path | None,
    ) -> None:
        self.model = model
        self.control = control
        self.history: list[dict[str, float]] = []
        self._run = json.dumps(run, sort_keys=True)
        self._path = None if folder is None else Path(folder) / STATE_FILE
        self._optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        # Of five steps a fifth would end with the first, and torch divide by zero.
        rising = 0.4 if total_steps == 5 else 0.2
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, lr, total_steps=total_steps, pct_start=rising, cycle_momentum=False
        )
        if self._path is not None and self._path.exists():
            self._restore(self._path)

    def step(self, loss: Tensor) -> None:
        """One optimiser step on the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._schedule.step()

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Adds a row to the history and, where there is a folder, puts the state on disk."""
        self.history.append(row)
        if self._path is None:
            return
        _save(
            self._path,
            {
                "run": self._run,
                "history": self.history,
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "control": self.control.state(),
            },
        )

    def _restore(self, path: Path) -> None:
        saved = _load(path, self._run)
        try:
            self.model.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self._schedule.load_state_dict(saved["schedule"])
            self.control.restore(saved["control"])
            self.history = saved["history"]
        except (RuntimeError, ValueError, KeyError) as error:  # the file that --arch names may have changed
            raise DebackdoorError(
                f"{path}: expected the state of this network, got that of another; delete it, or give another folder"
            ) from error


def keep_poison(
    attack: Attack,
    data: CleanSet,
    clean_model: nn.Module | None,
    run: Mapping[str, Any],
    folder: str | Path | None,
    precision: str = "auto",
) -> tuple[Poison, float]:
    """``attack.poison`` and the seconds it took, from the folder where an earlier run has left what is slow to make.

    Raises:
        DebackdoorError: if the attack does not fit, or the folder holds another run's poison, or one that is damaged.
    """
    started = time.perf_counter()
    if folder is None or not attack.needs_clean_model:
        return attack.poison(data, clean_model, precision), time.perf_counter() - started
    path, name = Path(folder) / _POISON_FILE, json.dumps(run, sort_keys=True)
    if path.exists():
        saved = _load(path, name)
        attack.tensors.update(saved["tensors"])
        return Poison(saved["indices"], saved["x"], saved["y"]), saved["seconds"]
    poison = attack.poison(data, clean_model, precision)
    seconds = time.perf_counter() - started
    entries = {"indices": poison.indices, "x": poison.x, "y": poison.y, "tensors": attack.tensors}
    _save(path, {"run": name, "seconds": seconds} | entries)
    return poison, seconds


def data_hash(data: CleanSet) -> str:
    """A SHA-256, in hexadecimal, that tells a set from others: of all its labels, and about a hundred of its images."""
    digest = hashlib.sha256()
    for values in (data.y, data.x[:: max(1, len(data) // 100)]):
        digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """A SHA-256, in hexadecimal, that tells a model's weights from others."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def remove_state(folder: str | Path) -> None:
    """Deletes the state of a training whose results are safe."""
    shutil.rmtree(Path(folder) / CLEAN_FOLDER, ignore_errors=True)
    for file in (_POISON_FILE, STATE_FILE):
        (Path(folder) / file).unlink(missing_ok=True)


def _save(path: Path, state: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        raise DebackdoorError(f"{path} was not written: {error.strerror or error}; check the disk") from error


def _load(path: Path, run: str) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["run"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise DebackdoorError(f"{path}: expected the state of a training, got a damaged file; delete it") from error
    if found != run:
        raise DebackdoorError(
            f"{path}: expected the state of this training, got that of one with other settings or images; "
            "delete it, or give another folder"
        )
    return saved
