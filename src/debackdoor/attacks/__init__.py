"""Attacks: what makes backdoored models to test defences with."""

from debackdoor.attacks.adaptive_blend import AdaptiveBlend
from debackdoor.attacks.awp import AWP
from debackdoor.attacks.badnets import BadNets
from debackdoor.attacks.base import Attack, Poison
from debackdoor.attacks.blend import Blend
from debackdoor.attacks.dfst import DFST
from debackdoor.attacks.dynamic import Dynamic
from debackdoor.attacks.feature_collision import FeatureCollision
from debackdoor.attacks.label_consistent import LabelConsistent
from debackdoor.attacks.lira import LIRA
from debackdoor.attacks.record import write_victim
from debackdoor.attacks.registry import ATTACKS, make_attack
from debackdoor.attacks.sig import SIG
from debackdoor.attacks.train import BackdooredModel, Recipe, train
from debackdoor.attacks.trigger_io import load_trigger, save_trigger
from debackdoor.attacks.trojan import Trojan
from debackdoor.attacks.wanet import WaNet

__all__ = [
    "ATTACKS",
    "AWP",
    "DFST",
    "LIRA",
    "SIG",
    "AdaptiveBlend",
    "Attack",
    "BackdooredModel",
    "BadNets",
    "Blend",
    "Dynamic",
    "FeatureCollision",
    "LabelConsistent",
    "Poison",
    "Recipe",
    "Trojan",
    "WaNet",
    "load_trigger",
    "make_attack",
    "save_trigger",
    "train",
    "write_victim",
]
