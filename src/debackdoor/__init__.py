"""Find out whether an image classifier hides a backdoor, and remove it, from the model and a few clean images alone."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from debackdoor import attacks, defenses, evaluation
    from debackdoor.both import scan_and_repair
    from debackdoor.data import load_clean
    from debackdoor.detect import detect_samples
    from debackdoor.models import load_model
    from debackdoor.repair import repair
    from debackdoor.scan import scan
    from debackdoor.types import CleanSet, RepairResult, SampleScores, ScanReport

__version__ = "0.1.0"

__all__ = [
    "CleanSet",
    "RepairResult",
    "SampleScores",
    "ScanReport",
    "__version__",
    "attacks",
    "defenses",
    "detect_samples",
    "evaluation",
    "load_clean",
    "load_model",
    "repair",
    "scan",
    "scan_and_repair",
]

_HOMES = {
    "CleanSet": "debackdoor.types",
    "RepairResult": "debackdoor.types",
    "SampleScores": "debackdoor.types",
    "ScanReport": "debackdoor.types",
    "detect_samples": "debackdoor.detect",
    "load_clean": "debackdoor.data",
    "load_model": "debackdoor.models",
    "scan_and_repair": "debackdoor.both",
}
_PACKAGES = ("attacks", "defenses", "evaluation")


class _Package(ModuleType):
    """Lets ``debackdoor.scan`` and ``repair`` be functions, though modules of those names would take their place."""

    @property
    def repair(self) -> Any:
        """The function of the module ``debackdoor.repair``."""
        return import_module("debackdoor.repair").repair

    @repair.setter
    def repair(self, module: ModuleType) -> None:
        """Where the import system would put the module, nothing is put."""

    @property
    def scan(self) -> Any:
        """The function of the module ``debackdoor.scan``."""
        return import_module("debackdoor.scan").scan

    @scan.setter
    def scan(self, module: ModuleType) -> None:
        """As for ``repair``."""


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: ``import debackdoor`` alone does not load torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"debackdoor.{name}")
    raise AttributeError(f"module 'debackdoor' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
