"""From a suspect model and a clean set to a verdict, the labels it points to, and the trigger.

Everything is chosen from the clean set alone: its fit part teaches, its hold-out part decides. The thresholds were
drawn from models of the zoo; ``docs/results.md`` says which, and how they carry over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from debackdoor.case import Case, open_case
from debackdoor.defenses.rnp import RNP, Exposure
from debackdoor.detectors.evidence import BACKDOORED, SUSPICIOUS, Evidence
from debackdoor.detectors.label import growth, largest_pile_up, peak_share
from debackdoor.detectors.shortcut import lead
from debackdoor.detectors.trigger import recover_trigger, search_triggers
from debackdoor.detectors.words import disagreement, findings, near, nothing_found
from debackdoor.errors import ChanceError, TooFewError, in_one_line
from debackdoor.fusing import fused
from debackdoor.memory import DEFAULT
from debackdoor.types import CleanSet, Progress, RecoveredPattern, RecoveredTrigger, ScanReport, Suspect


def scan(
    model: nn.Module,
    clean: CleanSet,
    *,
    all_triggers: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    memory: float = DEFAULT,
    keep: str | Path | None = None,
    progress: Progress | None = None,
) -> ScanReport:
    """Tells whether ``model`` hides a backdoor, to which label, and by what trigger.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples.
        all_triggers: search the suspect model for a trigger towards every label, too; its costs go into the history.
        seed: of the split, the order of the samples and the searches.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        memory: GiB that may be taken; where a step's images do not fit, they go through the model in parts, and batch
            normalisation takes statistics of these.
        keep: a folder that finished stages are kept in and, with the same arguments, taken from; None keeps none.
        progress: called from inside long loops.

    Returns:
        The verdict ``inconclusive`` where there are too few clean images, the model is at chance on them, the clean
        task could not be unlearned, or faint signs name different labels; the message tells what would settle it. A
        finding stands without a trigger where the search for that fails, and the message says why.

    Raises:
        DataError: if the clean set has labels the model does not know.
        ModelError: if the model does not take the images, or its answers do not depend on them.
    """
    try:
        case = open_case(model, clean, RNP(seed=seed, precision=precision), device, progress, memory=memory, keep=keep)
    except (ChanceError, TooFewError) as error:
        return ScanReport("inconclusive", f"nothing can be told: {error}", None, (), False, None, {}, (), {})
    with case.within_memory():
        exposure = case.expose()
        return scan_case(case, exposure, case.evidence(exposure), all_triggers=all_triggers)


def scan_case(case: Case, exposure: Exposure, evidence: Evidence, *, all_triggers: bool = False) -> ScanReport:
    """The same for a model that is exposed and examined already."""
    verdict, message = _judge(evidence, exposure)
    labels = list(evidence.reasons)
    if verdict == "suspicious" and evidence.nearest is not None:
        labels = [evidence.nearest]
    history: dict[str, list[dict[str, Any]]] = {
        "unlearn": exposure.unlearned.history,
        "recover": exposure.recovered.history,
    }
    trigger, failures = None, list[str]()
    if all_triggers:
        with _spared(verdict, "a trigger towards every label could not be searched for", failures):
            history["triggers"] = case.keep("all-triggers", partial(_all_triggers, case))
    if labels:
        with _spared(verdict, "its trigger could not be recovered", failures):
            trigger = case.keep(
                "trigger", partial(_recover, case, exposure, labels[0]), exposure.unlearned.model, labels[0]
            )
    suspects = tuple(_suspect(case, exposure, evidence, label) for label in labels)
    if trigger is not None:
        found = {"trigger_success": trigger.success_rate, "trigger_pixels": trigger.l1}
        suspects = (replace(suspects[0], evidence={**suspects[0].evidence, **found}), *suspects[1:])
    return ScanReport(
        verdict,
        "; ".join([message, *failures]),
        evidence.score,
        suspects,
        evidence.all_to_all,
        trigger,
        _numbers(evidence, exposure),
        exposure.ranking,
        history,
        _pattern(evidence, labels[0]) if labels else None,
    )


@contextmanager
def _spared(verdict: str, what: str, failures: list[str]) -> Iterator[None]:
    """An error inside loses no finding, which stands already: it is one more clause, after ``what`` failed."""
    try:
        yield
    except Exception as error:
        if verdict not in ("backdoored", "suspicious"):
            raise
        failures.append(f"{what}: {in_one_line(error)}")


def _judge(evidence: Evidence, exposure: Exposure) -> tuple[str, str]:
    """The verdict and the sentence that goes with it."""
    if evidence.score >= BACKDOORED:
        if evidence.disagree:
            return "inconclusive", f"{disagreement(evidence)}: scan again with more clean images or another seed"
        return "backdoored", "; ".join(findings(evidence))
    if not exposure.unlearned.forgot:
        return "inconclusive", (
            f"the clean task was not unlearned (accuracy {exposure.unlearned.accuracy:.0%}), so nothing could be "
            "exposed; give more clean images"
        )
    if evidence.score >= SUSPICIOUS:
        return "suspicious", f"{near(evidence)}; scan again with more clean images or another seed"
    return "clean", nothing_found(evidence)


def _recover(case: Case, exposure: Exposure, label: int) -> RecoveredTrigger:
    found = recover_trigger(
        case.suspect,
        exposure.unlearned.model,
        case.fit,
        case.holdout,
        label,
        seed=case.method.seed,
        precision=case.method.precision,
        progress=case.progress,
    )
    return replace(found, mask=found.mask.cpu(), pattern=found.pattern.cpu())


def _pattern(evidence: Evidence, label: int) -> RecoveredPattern | None:
    """The faint pattern towards the label, where it counts: below that it is what any model may answer to."""
    if "additive" not in evidence.reasons.get(label, ()):
        return None
    shortcuts = evidence.shortcuts
    return RecoveredPattern(label, shortcuts.patterns[label], shortcuts.rates["additive"][label])


def _all_triggers(case: Case) -> list[dict[str, Any]]:
    """What the smallest trigger towards every label costs on the suspect model."""
    found = search_triggers(
        fused(case.suspect, case.fit.x[:2]),
        case.fit,
        case.holdout,
        range(case.classes),
        seed=case.method.seed,
        precision=case.method.precision,
        progress=case.progress,
    )
    return [{"label": item.label, "success_rate": item.success_rate, "l1": item.l1} for item in found]


def _suspect(case: Case, exposure: Exposure, evidence: Evidence, label: int) -> Suspect:
    """A label with all numbers there are of it."""
    names, history = case.clean.class_names, exposure.unlearned.history
    numbers = {
        "unlearning_share": peak_share(history, label),
        "growth": growth(history, label),
        "margin": evidence.margins.values[label],
    }
    for kind, rates in evidence.rates.items():
        if label in rates:
            numbers |= {f"{kind}_success": rates[label], f"{kind}_lead": lead(rates, label)}
    name = names[label] if label < len(names) else None
    return Suspect(label, name, evidence.reasons.get(label, ()), numbers)


def _numbers(evidence: Evidence, exposure: Exposure) -> Mapping[str, float]:
    """The numbers of the whole model, without a word for when: a scan looks once."""
    pile_up = largest_pile_up(exposure.unlearned.history)
    numbers = {name.removesuffix("_before"): value for name, value in evidence.numbers("before").items()}
    return {
        "unlearned_accuracy": exposure.unlearned.accuracy,
        "pile_up_label": pile_up.label,
        "pile_up_share": pile_up.share,
        "pile_up_counts": float(evidence.pile_up is not None),
        **numbers,
    }
