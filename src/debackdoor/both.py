"""A scan and a repair that begin with the same look at the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from debackdoor.case import open_case
from debackdoor.defenses.rnp import RNP
from debackdoor.errors import check_fraction
from debackdoor.memory import DEFAULT
from debackdoor.repair import BUDGET, handed_back, repair_case
from debackdoor.scan import scan_case
from debackdoor.types import CleanSet, Progress, RepairResult, ScanReport


def scan_and_repair(
    model: nn.Module,
    clean: CleanSet,
    budget: float = BUDGET,
    *,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    memory: float = DEFAULT,
    keep: str | Path | None = None,
    progress: Progress | None = None,
    scanned: Callable[[ScanReport], object] | None = None,
) -> tuple[ScanReport, RepairResult]:
    """What ``scan`` and ``repair`` return for the same arguments; what both begin with is done once.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples.
        budget: how far accuracy on clean images may fall in the repair, a fraction.
        seed: of the split, the order of the samples and the searches.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        memory: GiB that may be taken.
        keep: a folder that finished stages are kept in and, with the same arguments, taken from; None keeps none.
        progress: called from inside long loops.
        scanned: called with the scan's report, as soon as there is one.

    Raises:
        DataError: if the clean set is too small, holds one class only, or has labels the model does not know.
        ModelError: if the model's answers do not depend on the image, or are no better than chance.
    """
    check_fraction(budget=budget)
    case = open_case(model, clean, RNP(seed=seed, precision=precision), device, progress, memory=memory, keep=keep)
    with case.within_memory():
        exposure = case.expose()
        evidence = case.evidence(exposure)
        report = scan_case(case, exposure, evidence)
        if scanned is not None:
            scanned(report)
        result = repair_case(case, exposure, evidence, budget)
    return report, handed_back(result, model)
