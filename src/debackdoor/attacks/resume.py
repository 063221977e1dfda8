"""The state of a training, kept on disk after every epoch so that a killed run goes on from there."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write

STATE_FILE = "training.pt"


class TrainingState:
    """A model, its optimiser and schedule, and the epochs done so far.

    Args:
        model: on its device; trained in place.
        lr: the one-cycle schedule's largest learning rate.
        total_steps: optimiser steps of the whole training.
        run: plain JSON values that tell this run from others.
        folder: where the state is kept, or None to keep it in memory alone.

    Raises:
        DebackdoorError: if the folder holds the state of another run, or one that is damaged.
    """

    def __init__(
        self, model: nn.Module, lr: float, total_steps: int, run: Mapping[str, Any], folder: str | Path | None
    ) -> None:
        self.model = model
        self.history: list[dict[str, float]] = []
        self._run = json.dumps(run, sort_keys=True)
        self._path = None if folder is None else Path(folder) / STATE_FILE
        self._optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, lr, total_steps=total_steps, pct_start=0.2, cycle_momentum=False
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
        buffer = io.BytesIO()
        torch.save(
            {
                "run": self._run,
                "history": self.history,
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
            },
            buffer,
        )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._path, buffer.getvalue())
        except OSError as error:
            raise DebackdoorError(f"{self._path} was not written: {error.strerror or error}; check the disk") from error

    def _restore(self, path: Path) -> None:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            run = saved["run"]
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise DebackdoorError(f"{path}: expected the state of a training, got a damaged file; delete it") from error
        if run != self._run:
            raise DebackdoorError(
                f"{path}: expected the state of this training, got that of one with other settings; "
                "delete it, or give another folder"
            )
        self.model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._schedule.load_state_dict(saved["schedule"])
        self.history = saved["history"]


def remove_state(folder: str | Path) -> None:
    """Deletes the state of a training whose results are safe."""
    (Path(folder) / STATE_FILE).unlink(missing_ok=True)
