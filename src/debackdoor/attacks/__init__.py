"""Attacks: what makes backdoored models to test defences with."""

from debackdoor.attacks.badnets import BadNets
from debackdoor.attacks.base import Attack, Poison
from debackdoor.attacks.blend import Blend
from debackdoor.attacks.record import write_victim
from debackdoor.attacks.registry import ATTACKS, make_attack
from debackdoor.attacks.sig import SIG
from debackdoor.attacks.train import BackdooredModel, Recipe, train
from debackdoor.attacks.trigger_io import load_trigger, save_trigger
from debackdoor.attacks.wanet import WaNet

__all__ = [
    "ATTACKS",
    "SIG",
    "Attack",
    "BackdooredModel",
    "BadNets",
    "Blend",
    "Poison",
    "Recipe",
    "WaNet",
    "load_trigger",
    "make_attack",
    "save_trigger",
    "train",
    "write_victim",
]
