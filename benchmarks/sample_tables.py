"""What the records of sample detection say, as a table and in one sentence."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from debackdoor.detectors.clustering import ActivationClustering
from debackdoor.detectors.cognitive_distillation import CognitiveDistillation
from debackdoor.detectors.samples import ExposedMargin
from debackdoor.detectors.shift import REPAIR_SHIFT
from debackdoor.detectors.spectral import SpectralSignatures
from debackdoor.detectors.strip import STRIP

Record = Mapping[str, Any]

BASELINES = (STRIP, CognitiveDistillation, SpectralSignatures, ActivationClustering)
WAYS: dict[str, tuple[str, ...]] = {
    **{kind.name: ("original", "exposed") for kind in BASELINES},
    ExposedMargin.name: ("exposed", "several exposed"),
    REPAIR_SHIFT: ("repaired",),
}
"""By the detector's name: the models that it is tried with."""

PAIRS = tuple((name, which) for name, models in WAYS.items() for which in models)
"""Every detector with every model that it is tried with."""


def summary(records: Sequence[Record]) -> str:
    """The default detector's AUROC beside that of the best published one, on the models that both were given."""
    by_model = _by_model(records)
    complete = [found for found in by_model.values() if all(_means([found], name, which) for name, which in PAIRS)]
    ways = {pair: _means(complete, *pair) for pair in PAIRS}
    ours = ways.pop((REPAIR_SHIFT, "repaired"))
    published = {pair: values for pair, values in ways.items() if pair[0] != ExposedMargin.name}
    name, which = max(published, key=lambda pair: statistics.mean(published[pair]))
    return (
        f"In piles of which half the images are triggered, of {len(complete)} models, these are told apart with a mean "
        f"AUROC of {statistics.mean(ours):.3f}, the worst being {min(ours):.3f}. The best published detector, {name} "
        f"on the {which} model, has a mean of {statistics.mean(published[name, which]):.3f} and a worst of "
        f"{min(published[name, which]):.3f}."
    )


def _by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record["model"]].append(record)
    return found


def render(records: Sequence[Record]) -> str:
    """One row a model; in each cell the AUROC with each of the models that the detector was tried with."""
    by_model = _by_model(records)
    detectors = list(dict.fromkeys(name for record in records for name in record["aurocs"]))
    lines = ["| model | " + " | ".join(detectors) + " |", "|---" * (len(detectors) + 1) + "|"]
    lines += [row(model, found, detectors) for model, found in by_model.items()]
    for name, summarise in (("mean", statistics.mean), ("worst", min)):
        cells = (_cell(list(by_model.values()), detector, summarise) for detector in detectors)
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def row(model: str, records: Sequence[Record], detectors: Sequence[str]) -> str:
    """One model: means over its records."""
    cells = (_cell([records], detector, statistics.mean) for detector in detectors)
    return f"| {model} | " + " | ".join(cells) + " |"


def _cell(models: Sequence[Sequence[Record]], detector: str, summarise: Callable[[Sequence[float]], float]) -> str:
    """A number a model that was looked at, in the order of ``WAYS``: summaries over means over the records."""
    parts = [means for which in WAYS[detector] if (means := _means(models, detector, which))]
    return " / ".join(f"{summarise(means):.3f}" for means in parts) or "-"


def _means(models: Sequence[Sequence[Record]], detector: str, which: str) -> list[float]:
    """A mean AUROC a model, over its records that have one; models that have none are left out."""
    values = [[record["aurocs"].get(detector, {}).get(which) for record in records] for records in models]
    return [statistics.mean(found) for row in values if (found := [value for value in row if value is not None])]
