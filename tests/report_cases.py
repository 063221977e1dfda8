"""Scans, repairs and detections made by hand, for the tests of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.report.records import repair_record, scan_record
from debackdoor.types import (
    CleanSet,
    PlannedChannel,
    RecoveredPattern,
    RecoveredTrigger,
    RepairResult,
    SampleScores,
    ScanReport,
    Step,
    Suspect,
    Verification,
)

NAMES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TARGET = 3


def head(classes: int = 10, **entries: Any) -> dict[str, Any]:
    """What ``header`` returns."""
    return {
        "versions": {"debackdoor": "0.1.0", "torch": "2.6.0", "python": "3.11.9"},
        "checkpoint": "models/resnet18 from supplier.safetensors",
        "sha256": "a3" * 32,
        "arch": "resnet18",
        "num_classes": classes,
        "mean": None,
        "std": None,
        "data": "clean_dir",
        "seed": 0,
        "seconds": {"load": 0.412, "unlearn": 10.25},
        **entries,
    }


def history(classes: int = 10, peak: float = 0.97) -> list[dict[str, Any]]:
    """An unlearning in which the answers gather on the target up to ``peak``, then begin to spread again."""
    rows = []
    for check in range(16):
        share = 1 / classes + (peak - 1 / classes) * min(1.0, (check / 14) ** 3) * (0.93 if check == 15 else 1)
        rest = [1.0 + 0.3 * ((7 * label + check) % 5) for label in range(classes)]
        rest[TARGET % classes] = 0.0
        shares = [(1 - share) * weight / sum(rest) for weight in rest]
        shares[TARGET % classes] = share
        accuracy = 0.94 - 0.82 * (check / 15) ** 2
        rows.append(
            {"step": 2 * check + 2, "loss": 1.0, "accuracy": accuracy, "lr": 0.002, "label_shares": shares,
             "taken_back": check == 3}
        )  # fmt: skip
    return rows


def evidence(found: bool = True, classes: int = 10) -> dict[str, float]:
    """The numbers of a scan: far above every threshold but the warp's, or below all."""
    label = TARGET % classes
    numbers: dict[str, float] = {"pile_up_label": label, "pile_up_share": 0.97 if found else 0.31}
    numbers |= {"margin_label": label, "margin_ratio": 4.3 if found else 1.2, "margin_p_value": 2e-20 if found else 0.4}
    for kind, success in (("patch", 0.99), ("additive", 0.81), ("warp", 0.22)):
        numbers[f"{kind}_label"] = label
        numbers[f"{kind}_success"] = success if found else 0.2
        numbers[f"{kind}_lead"] = success - 0.12 if found else 0.08
    return numbers | {"away": 0.41}


def ranking(layers: int = 20, channels: int = 64) -> tuple[PlannedChannel, ...]:
    """Channels of several layers, low scores in every third one."""
    found = [
        PlannedChannel(f"layer{1 + layer // 5}.{layer % 5}.bn2", index, min(1.0, 0.02 * index + 0.3 * (layer % 3)))
        for layer in range(layers)
        for index in range(channels)
    ]
    return tuple(sorted(found, key=lambda channel: channel.score))


def trigger(channels: int = 3, size: int = 32) -> RecoveredTrigger:
    """A checkered patch in the lower right corner."""
    mask = torch.full((1, size, size), 0.02)
    mask[:, -4:-1, -4:-1] = 0.95
    pattern = torch.full((channels, size, size), 0.5)
    pattern[:, -4:-1, -4:-1] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    return RecoveredTrigger(TARGET, mask, pattern, 0.988, float(mask.sum()))


def pattern(channels: int = 3, size: int = 32) -> RecoveredPattern:
    """Stripes of 0.02 up and down."""
    stripes = 0.02 * (1 - 2 * (torch.arange(size) % 2.0))
    return RecoveredPattern(TARGET, stripes.expand(channels, size, size).clone(), 0.81)


def clean_set(channels: int = 3, size: int = 32, names: Sequence[str] = NAMES, count: int = 24) -> CleanSet:
    """Soft shapes, a different one for every class."""
    grid = torch.linspace(0, 1, size)
    images = []
    for index in range(count):
        wave = torch.sin(3 + (1 + index % 5) * 3 * grid)[:, None] * torch.cos((1 + index % 3) * 4 * grid)[None]
        tint = torch.tensor([0.9, 0.6 + 0.04 * (index % 10), 0.4 + 0.06 * (index % 7)])[:channels, None, None]
        images.append((0.5 + 0.4 * wave) * tint)
    labels = torch.arange(count) % max(2, min(len(names), 10))
    return CleanSet(torch.stack(images).clamp(0, 1), labels, tuple(names), "clean_dir")


def report(verdict: str = "backdoored", classes: int = 10, **entries: Any) -> ScanReport:
    """A scan with that verdict; ``entries`` replace fields."""
    found = verdict in ("backdoored", "suspicious")
    label = TARGET % classes
    reasons = {"backdoored": ("pile-up", "margin", "patch", "additive"), "suspicious": ("margin",)}.get(verdict, ())
    name = NAMES[label] if classes == len(NAMES) else None
    fields: dict[str, Any] = {
        "verdict": verdict,
        "message": {
            "backdoored": "The model hides a backdoor to label 3: answers gather on it, and a small patch sends 99 % "
            "of the images there.",
            "suspicious": "Label 3 has an unusually large margin, and nothing else speaks against it.",
            "inconclusive": "The clean task was not unlearned, so nothing could be exposed; give more clean images.",
            "clean": "Nothing that was searched for stands out on any label.",
        }[verdict],
        "score": {"backdoored": 2.56, "suspicious": 1.4, "clean": 0.38}.get(verdict, 0.0),
        "suspects": (Suspect(label, name, reasons, {"pile_up_share": 0.97, "margin_ratio": 4.3}),) if found else (),
        "all_to_all": False,
        "trigger": trigger() if found else None,
        "pattern": pattern() if verdict == "backdoored" else None,
        "evidence": evidence(found, classes),
        "ranking": ranking(),
        "history": {"unlearn": history(classes, 0.97 if found else 0.31)},
    }
    return ScanReport(**fields | entries)


def scan(verdict: str = "backdoored", classes: int = 10, top: Mapping[str, Any] | None = None, **entries: Any) -> Any:
    """The record of :func:`report`; ``top`` replaces entries of its head."""
    found = report(verdict, classes, **entries)
    return scan_record(head(classes, **top or {}), found, clean_images=500, fail_on="suspicious")


def repaired(passed: bool = True, conclusive: bool = True, changed: bool = True, checked: bool = True) -> Any:
    """The record of a repair."""
    after = evidence(found=not passed)
    numbers = {f"{key}_before": value for key, value in evidence().items()}
    numbers |= {f"{key}_after": value for key, value in after.items() if not key.startswith("pile_up")}
    check = Verification(passed, TARGET, numbers, "label 3 stood out by a small patch; it no longer does", conclusive)
    steps = (
        Step("unlearn", "piled up", {"accuracy": 0.21}),
        Step("recover", "one mask a channel", {"channels": 1280}),
        Step("prune", "as many as half of the budget allows", {"channels": 12, "accuracy": 0.931}),
        Step("relearn", "the clean task from labels, and triggers unlearned", {"lr": 0.01, "accuracy": 0.935}),
        Step("verify", check.message),
    )
    rates = {"before": 0.944, "after": 0.935}
    plan = ranking()[:12] if changed else ()
    result = RepairResult(nn.Identity(), plan, rates, check if checked else None, {}, steps, changed)
    return repair_record(head(), result, clean_images=500, budget=0.02)


def sample_scores(count: int = 24) -> SampleScores:
    """Scores that rise with the image's number; the upper half is flagged."""
    scores = torch.linspace(0, 1, count)
    return SampleScores(
        scores, 0.5, scores > 0.5, torch.full((count,), TARGET), 0.05, 1e-9, "agreement with the exposed model"
    )


def suspect_images(count: int = 24) -> Tensor:
    return trigger().apply(clean_set(count=count).x)
