"""Settings that no method can work with are refused where they are given, in one sentence that names them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from debackdoor.bench.executors import execute
from debackdoor.defenses import (
    ANP,
    FTSAM,
    IBAU,
    MCR,
    NAD,
    ULRL,
    ABLUnlearning,
    FinePruning,
    FineTuning,
    NCUnlearning,
)
from debackdoor.defenses.lesson import RelearnSettings
from debackdoor.detectors.clustering import ActivationClustering
from debackdoor.detectors.cognitive_distillation import CognitiveDistillation
from debackdoor.detectors.margin import MarginSettings
from debackdoor.detectors.spectral import SpectralSignatures
from debackdoor.detectors.strip import STRIP
from debackdoor.detectors.trigger import SearchSettings
from debackdoor.errors import DebackdoorError, check_between, check_count
from debackdoor.rnp.recover import RecoverSettings
from debackdoor.rnp.unlearn import UnlearnSettings
from prune_cases import clean_images

ABL = partial(ABLUnlearning, poisoned=clean_images(4))

COUNTS: dict[Callable[..., Any], tuple[str, ...]] = {
    ABL: ("epochs", "batch_size"),
    ActivationClustering: ("components", "batch_size"),
    CognitiveDistillation: ("steps", "batch_size"),
    MarginSettings: ("steps", "starts", "batch_size"),
    STRIP: ("overlays", "batch_size"),
    SpectralSignatures: ("batch_size",),
    ANP: ("iterations", "batch_size", "ascents"),
    FinePruning: ("epochs", "batch_size"),
    FineTuning: ("epochs", "batch_size"),
    FTSAM: ("epochs", "batch_size"),
    SearchSettings: ("steps", "patience", "batch_size"),
    IBAU: ("rounds", "batch_size", "search_passes", "fixed_point_steps"),
    MCR: ("epochs", "tuning_epochs"),
    NAD: ("epochs", "teacher_epochs"),
    NCUnlearning: ("search_steps", "epochs", "batch_size"),
    RecoverSettings: ("passes", "batch_size"),
    RelearnSettings: ("steps", "batch_size", "tries"),
    ULRL: ("epochs", "most"),
    UnlearnSettings: ("max_passes", "batch_size", "check_every", "checked"),
    partial(execute, print, [1]): ("workers", "threads"),
}
FROM_ZERO: dict[Callable[..., Any], tuple[str, ...]] = {
    RelearnSettings: ("triggered", "head_start"),
    UnlearnSettings: ("least_steps",),
}
FRACTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    ABL: ("momentum", "weight_decay"),
    NCUnlearning: ("momentum", "weight_decay"),
    RecoverSettings: ("momentum", "shift"),
    RelearnSettings: ("weight_decay", "shift"),
    SearchSettings: ("success",),
    UnlearnSettings: (
        "momentum", "weight_decay", "shift", "stop_accuracy", "past_peak", "largest_fall"
    ),
}  # fmt: skip
INSIDE: dict[Callable[..., Any], tuple[str, ...]] = {ANP: ("holdout",), RelearnSettings: ("warm_up",)}


def _each(table: dict[Callable[..., Any], tuple[str, ...]]) -> list[Any]:
    def named(kind: Any) -> str:
        return str(getattr(kind, "func", kind).__name__)

    return [pytest.param(kind, name, id=f"{named(kind)}-{name}") for kind, names in table.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), _each(COUNTS) + _each(FROM_ZERO))
@pytest.mark.parametrize("value", [2.5, 1e1, float("nan"), "3"], ids=str)
def test_counts_are_whole_numbers(kind: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {name} to be a whole number, got {value!r}; correct it"):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), _each(COUNTS))
def test_counts_are_above_0(kind: Callable[..., Any], name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {name} above 0, got 0; correct it"):
        kind(**{name: 0})


@pytest.mark.parametrize(("kind", "name"), _each(FROM_ZERO))
def test_some_counts_may_be_0(kind: Callable[..., Any], name: str) -> None:
    kind(**{name: 0})
    with pytest.raises(DebackdoorError, match=f"expected {name} of at least 0, got -1; correct it"):
        kind(**{name: -1})


@pytest.mark.parametrize(("kind", "name"), _each(FRACTIONS))
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "a"], ids=str)
def test_fractions_are_from_0_to_1(kind: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {name} from 0 to 1, got {value!r}"):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), _each(INSIDE))
@pytest.mark.parametrize("value", [0.0, 1, 1.0, -0.5, float("nan"), "a"], ids=str)
def test_some_fractions_are_neither_nothing_nor_all(kind: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {name} above 0 and below 1, got {value!r}; give a fraction"):
        kind(**{name: value})


def test_nesterov_momentum_is_not_0() -> None:
    with pytest.raises(DebackdoorError, match="expected momentum above 0, got 0"):
        RelearnSettings(momentum=0)


def test_what_is_right_is_let_through() -> None:
    check_count(a=1, b=None)
    check_count(True, a=0)
    check_between(a=1e-9, b=0.999)
