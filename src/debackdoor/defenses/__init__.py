"""Defences: each takes its hyper-parameters in the constructor and the model and clean set in the call."""

from __future__ import annotations

from debackdoor.defenses.abl import ABLUnlearning
from debackdoor.defenses.anp import ANP
from debackdoor.defenses.base import Defense
from debackdoor.defenses.bnp import BNP
from debackdoor.defenses.clp import CLP
from debackdoor.defenses.fine_pruning import FinePruning
from debackdoor.defenses.finetune import FineTuning
from debackdoor.defenses.ft_sam import FTSAM
from debackdoor.defenses.ibau import IBAU
from debackdoor.defenses.mcr import MCR
from debackdoor.defenses.nad import NAD
from debackdoor.defenses.nc_unlearning import NCUnlearning
from debackdoor.defenses.rnp import RNP
from debackdoor.defenses.ulrl import ULRL

__all__ = [
    "ANP",
    "BNP",
    "CLP",
    "FTSAM",
    "IBAU",
    "MCR",
    "NAD",
    "RNP",
    "ULRL",
    "ABLUnlearning",
    "Defense",
    "FinePruning",
    "FineTuning",
    "NCUnlearning",
]
