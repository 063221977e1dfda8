"""Defences: each takes its hyper-parameters in the constructor and the model and clean set in the call."""

from __future__ import annotations

from debackdoor.defenses.base import Defense
from debackdoor.defenses.finetune import FineTuning
from debackdoor.defenses.rnp import RNP

__all__ = ["RNP", "Defense", "FineTuning"]
