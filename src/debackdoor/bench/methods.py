"""The defences that the bench knows by name, each with its settings. A new one is one more line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from debackdoor.defenses import (
    ANP,
    BNP,
    CLP,
    FTSAM,
    IBAU,
    MCR,
    NAD,
    RNP,
    ULRL,
    Defense,
    FinePruning,
    FineTuning,
    NCUnlearning,
)
from debackdoor.repair import repair
from debackdoor.types import CleanSet, RepairResult

BUDGET = 0.02
"""How far accuracy on the clean images may fall, for every method that has a level to choose."""


@dataclass(frozen=True)
class Method:
    """A defence with its settings.

    Attributes:
        run: takes the suspect model, the clean set on its device, and a seed.
        parameters: the settings, for the record.
        blind: whether the clean set alone sets how far the method goes; False for a level that was published with it,
            since that was found with the trigger at hand.
    """

    run: Callable[[nn.Module, CleanSet, int], RepairResult]
    parameters: Mapping[str, Any]
    blind: bool = True


def _preset(defense: Defense, *, blind: bool = True) -> Method:
    """A defence as it is, but for the seed."""
    parameters = {name: value for name, value in asdict(defense).items() if name != "seed"}
    return Method(lambda model, clean, seed: replace(defense, seed=seed)(model, clean), parameters, blind)


def _repair(model: nn.Module, clean: CleanSet, seed: int) -> RepairResult:
    device = next((str(parameter.device.type) for parameter in model.parameters()), "cpu")
    return repair(model, clean, BUDGET, seed=seed, device=device)


def _checked(threshold: float) -> Method:
    """RNP as published, but its unlearning ends by a check after each pass: sooner, and often for the better."""
    published = RNP.published(threshold)
    return _preset(replace(published, unlearning=replace(published.unlearning, running=False)), blind=False)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "rnp": Method(_repair, {"budget": BUDGET}),
        "rnp-published-0.2": _preset(RNP.published(0.2), blind=False),
        "rnp-published-0.7": _preset(RNP.published(0.7), blind=False),
        "rnp-checked-0.2": _checked(0.2),
        "rnp-checked-0.7": _checked(0.7),
        "ft-0.01": _preset(FineTuning(lr=0.01)),
        "ft-0.05": _preset(FineTuning(lr=0.05)),
        "ft-sam": _preset(FTSAM()),
        "nad": _preset(NAD()),
        "mcr": _preset(MCR(t=None, budget=BUDGET)),
        "mcr-published-0.1": _preset(MCR(t=0.1), blind=False),
        "ulrl": _preset(ULRL()),
        "fine-pruning": _preset(FinePruning(budget=BUDGET)),
        "anp": _preset(ANP(budget=BUDGET)),
        "anp-published-0.2": _preset(ANP(threshold=0.2), blind=False),
        "clp": _preset(CLP(u=None, budget=BUDGET)),
        "clp-published-3": _preset(CLP(u=3.0), blind=False),
        "bnp": _preset(BNP(u=None, budget=BUDGET)),
        "bnp-published-3": _preset(BNP(u=3.0), blind=False),
        "i-bau": _preset(IBAU()),
        "nc-unlearning": _preset(NCUnlearning()),
    }
)
