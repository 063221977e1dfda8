"""Attacks by the name that the command line and saved triggers give them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from debackdoor.attacks.adaptive_blend import AdaptiveBlend
from debackdoor.attacks.awp import AWP
from debackdoor.attacks.badnets import BadNets
from debackdoor.attacks.base import Attack
from debackdoor.attacks.blend import Blend
from debackdoor.attacks.dfst import DFST
from debackdoor.attacks.dynamic import Dynamic
from debackdoor.attacks.feature_collision import FeatureCollision
from debackdoor.attacks.label_consistent import LabelConsistent
from debackdoor.attacks.lira import LIRA
from debackdoor.attacks.sig import SIG
from debackdoor.attacks.trojan import Trojan
from debackdoor.attacks.wanet import WaNet
from debackdoor.errors import DataError, TriggerError
from debackdoor.types import CleanSet

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        BadNets,
        Blend,
        SIG,
        WaNet,
        AdaptiveBlend,
        AWP,
        DFST,
        Trojan,
        LabelConsistent,
        FeatureCollision,
        Dynamic,
        LIRA,
    )
}


def attack_class(name: str) -> type[Attack]:
    """The class of that name.

    Raises:
        TriggerError: if there is none.
    """
    if name not in ATTACKS:
        raise TriggerError(f"expected an attack out of {', '.join(ATTACKS)}, got '{name}'; choose one of them")
    return ATTACKS[name]


def make_attack(name: str, data: CleanSet, /, **parameters: Any) -> Attack:
    """The attack of that name for images and classes like those of ``data``.

    Args:
        name: a key of ``ATTACKS``.
        data: the training set, which gives ``image_shape`` and ``num_classes``.
        parameters: the attack's other hyper-parameters; its defaults otherwise.

    Raises:
        TriggerError: if the attack or a hyper-parameter is unknown or out of range.
    """
    channels, height, width = data.x.shape[1:]
    fitted = {"image_shape": (channels, height, width), "num_classes": count_classes(data)}
    return build(attack_class(name), fitted | parameters)


def build(kind: type[Attack], parameters: dict[str, Any]) -> Attack:
    """``kind(**parameters)`` with a message of its own for an unknown hyper-parameter.

    Raises:
        TriggerError: if a hyper-parameter is unknown or out of range.
    """
    known = [item.name for item in fields(kind) if item.init]
    for name in parameters:
        if name not in known:
            raise TriggerError(
                f"expected parameters of {kind.name} out of {', '.join(known)}, got '{name}'; correct it"
            )
    return kind(**parameters)


def count_classes(data: CleanSet) -> int:
    """How many classes a labelled set has: as many as it names, and at least one more than its largest label.

    Raises:
        DataError: if that is far more than there are labels: they are no numbers from 0 on.
    """
    count, seen = max(len(data.class_names), int(data.y.max()) + 1), data.num_classes_seen
    if count > max(1000, 10 * seen):
        raise DataError(
            f"{data.source}: expected labels numbered 0, 1, 2, ..., got {seen} of them up to {count - 1}; number them "
            "anew"
        )
    return count
