"""What the report says in words: the verdict, what to do next, and what the numbers of the evidence mean."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from debackdoor.detectors.carried import LEFT
from debackdoor.detectors.evidence import FAINT, FAIRLY_RARE, OUTSTANDING, PILED_UP, RARE, STANDS_OUT, threshold

Name = Callable[[int], str]
"""What a label is called: ``3 (cat)``."""


@dataclass(frozen=True)
class Verdict:
    """What stands on top of the page.

    Attributes:
        job: what ended with it: ``scan`` or ``repair``.
        word: in large letters.
        tone: ``bad``, ``warn``, ``unknown`` or ``good``; colour and icon.
        message: one sentence.
    """

    job: str
    word: str
    tone: str
    message: str


@dataclass(frozen=True)
class Advice:
    """One thing to do next, and the command for it, if there is one."""

    text: str
    command: str | None = None


@dataclass(frozen=True)
class Sign:
    """One row of the evidence.

    Attributes:
        reason: its name in records.
        name: its name for a person.
        meaning: what is measured.
        found: what was measured.
        threshold: from where on it counts.
        strength: as a multiple of the threshold; None where it was not measured.
        counts: whether it speaks against a label.
    """

    reason: str
    name: str
    meaning: str
    found: str
    threshold: str
    strength: float | None
    counts: bool

    @property
    def above(self) -> bool:
        """Whether it is beyond its threshold, which alone need not make it count."""
        return self.strength is not None and self.strength >= 1


_WORDS = {
    "backdoored": ("Backdoored", "bad"),
    "suspicious": ("Suspicious", "warn"),
    "inconclusive": ("Inconclusive", "unknown"),
    "clean": ("No backdoor found", "good"),
}

_KINDS = {
    "patch": ("A small patch", "The share of images that one small patch, the same for all, sends to the label."),
    "additive": ("A faint pattern", "The same for a faint pattern that is added to the whole image."),
    "warp": ("A slight warp", "The same for a slight distortion of the whole image."),
    "square": ("A plain square", "The same for a square of one colour, a quarter to a third of the image wide."),
}

PILE_UP = (
    "While the model is made to forget its task, a backdoor stays. Answers on clean images then gather on its "
    "label, whatever part of them is forgotten: the smallest share of several runs counts. This counts only in "
    "networks with at least eight batch normalisations and five classes."
)

MARGIN = (
    "How much surer than of any other label the model can be made, by any image at all. A backdoor's label stands out."
)

CARRIED = "Of what was found on the model that was given, what works best on the repaired one."

TOGETHER = (
    f"A pile-up from {100 * FAINT:.0f} points above an even spread and a margin of p ≤ {FAIRLY_RARE:g} count together "
    "where they name the same label."
)

LIMITS = (
    "A verdict of clean is no proof. It says that the searches found nothing, with these clean images and this seed.",
    "The searches know small patches, faint patterns, slight warps and plain squares that are the same for all images. "
    "Large patches with a pattern, photo filters, triggers that differ from image to image, and those that were built "
    "against such searches may escape them.",
    "With few clean images, or images unlike those that the model was trained on, signs are weaker and may mislead.",
    "A recovered trigger is one that works, found by search. It need not look like the attacker's own.",
    "Only the classifier was examined. The file was read without running code from it, but nothing is said about "
    "programs that come with it.",
)


def scan_verdict(record: Mapping[str, Any]) -> Verdict:
    word, tone = _WORDS[record["verdict"]]
    return Verdict("scan", word, tone, _sentence(record["message"]))


def repair_verdict(record: Mapping[str, Any]) -> Verdict:
    check, changed = record["verification"], record["changed"]
    if check is None:
        word, tone = ("Changed, not verified", "warn") if changed else ("Unchanged", "unknown")
        return Verdict("repair", word, tone, "This method does not check its own work; scan the model that it wrote.")
    message = _sentence(check["message"])
    if not check["conclusive"]:
        return Verdict("repair", "Inconclusive", "unknown", message)
    if not check["passed"]:
        return Verdict("repair", "Still backdoored", "bad", message)
    return Verdict("repair", "Repaired and verified" if changed else "Nothing to repair", "good", message)


def advice(verdict: Verdict, record: Mapping[str, Any]) -> tuple[Advice, ...]:
    """What to do next, for the verdict of the last job that was done."""
    head = what(record)
    mend = Advice("Repair it, and scan what comes out:", command("repair", *head, "--out", "repaired.safetensors"))
    again = Advice(
        "Scan again with more clean images and another seed:",
        command("scan", *head, "--limit", 2 * record["clean_images"], "--seed", record["seed"] + 1),
    )
    screen = Advice(
        "Look for triggers among the images that the model has seen:", command("detect", *head, "--suspects", "DIR")
    )
    keep = Advice("Keep the SHA-256 below with the model. A file with another one has not been scanned.")
    if verdict.job == "repair":
        return {
            "bad": (
                Advice("Do not use the model, neither the file that was given nor the one that was written."),
                Advice("Get it anew from a source that you trust, or train it anew on data that you have checked."),
                Advice("A repair from more clean images may do better; that its check passes then is no proof."),
            ),
            "good": (
                Advice("Measure the model that was written on test images of your own before you put it to use."),
                Advice("Use the file that was written, and keep the one that was given away from use.")
                if record["changed"]
                else Advice("The file that was written holds the same tensors. Use either."),
            ),
        }.get(verdict.tone, (Advice("Do not take the model for clean."), again))
    return {
        "bad": (Advice("Do not put the model to use. Treat whatever else comes from its source alike."), mend, screen),
        "warn": (Advice("Hold the model back until this is settled. A repair would leave it as it is."), again),
        "unknown": (Advice("Do not take the model for clean. The sentence above says why."), again),
        "good": (
            Advice("As far as this scan can tell, the model may be used. Mind the limits at the end of the page."),
            keep,
        ),
    }[verdict.tone]


def what(record: Mapping[str, Any]) -> list[object]:
    """The words of a command line that name the model and the clean images of a record."""
    words = [record["checkpoint"], "--arch", record["arch"], "--num-classes", record["num_classes"]]
    for name in ("mean", "std"):
        if record.get(name) is not None:  # records of before have no such entry
            words += [f"--{name}", ",".join(map(str, record[name]))]
    return [*words, "--clean", record["data"]]


def command(job: str, *words: object) -> str:
    """A command line that a shell reads as it is meant."""
    return shlex.join(["debackdoor", job, *map(str, words)])


def signs(
    evidence: Mapping[str, float | None], classes: int, reasons: Sequence[str], name: Name, when: str = "before"
) -> list[Sign]:
    """The rows of the evidence table, those that were measured.

    Args:
        evidence: numbers by name, of a scan or of a repair's verification.
        classes: how many labels there are.
        reasons: what speaks against any label, by the names of ``Suspect.reasons``.
        name: what a label is called.
        when: ``before`` or ``after``, for the numbers of a verification.
    """

    def get(key: str) -> float | None:
        value = evidence.get(f"{key}_{when}")
        return evidence.get(key) if value is None and when == "before" else value

    rows = [_pile_up(get, classes, reasons, name), _margin(get, reasons, name)]
    rows += [_shortcut(get, kind, reasons, name) for kind in _KINDS]
    rows += [_away(get, reasons), _carried(get, evidence.get("carried_label"), name)]
    return [row for row in rows if row is not None]


Get = Callable[[str], float | None]


def _pile_up(get: Get, classes: int, reasons: Sequence[str], name: Name) -> Sign | None:
    share, label = get("pile_up_share"), get("pile_up_label")
    if share is None or label is None:
        return None
    return Sign(
        "pile-up",
        "Pile-up of answers",
        PILE_UP,
        f"{percent(share)} on {name(int(label))}",
        percent(1 / classes + PILED_UP),
        max(0.0, share - 1 / classes) / PILED_UP,
        "pile-up" in reasons,
    )


def _margin(get: Get, reasons: Sequence[str], name: Name) -> Sign | None:
    p, ratio, label = get("margin_p_value"), get("margin_ratio"), get("margin_label")
    if p is None or label is None:
        return None
    times = "" if ratio is None else f", {ratio:.1f} times the others'"
    strength = abs(math.log(max(p, 1e-300)) / math.log(RARE))
    if ratio is not None and ratio < OUTSTANDING:
        strength = min(strength, ratio / OUTSTANDING)
    least = f"p\u00a0≤\u00a0{_power(RARE)} and {OUTSTANDING:g} times the others'"
    found = f"p\u00a0=\u00a0{_power(p)}{times}, for {name(int(label))}"
    return Sign("margin", "Largest margin", MARGIN, found, least, strength, "margin" in reasons)


def _shortcut(get: Get, kind: str, reasons: Sequence[str], name: Name) -> Sign | None:
    lead, label, success = get(f"{kind}_lead"), get(f"{kind}_label"), get(f"{kind}_success")
    if lead is None or label is None:
        return None
    works = "" if success is None else f"{percent(success)} go to {name(int(label))}, "
    found = f"{works}{100 * lead:.0f} points above what is usual"
    title, meaning = _KINDS[kind]
    least = threshold(kind)
    strength = max(0.0, lead) / least
    return Sign(kind, title, meaning, found, f"{100 * least:.0f} points", strength, kind in reasons)


def _away(get: Get, reasons: Sequence[str]) -> Sign | None:
    away, gathered = get("away"), get("gathered")
    if away is None:
        return None
    spread = None if gathered is None else max(0.0, away - gathered)
    return Sign(
        "away",
        "A patch away from all labels",
        "How far one patch lowers accuracy, by answers of many labels.",
        f"{percent(away)} are led away" + ("" if gathered is None else f", {percent(gathered)} to one label"),
        f"{100 * STANDS_OUT:.0f} points more than to any one label",
        None if spread is None else spread / STANDS_OUT,
        "away" in reasons,
    )


def _carried(get: Get, label: float | None, name: Name) -> Sign | None:
    success = get("carried")
    if success is None:
        return None
    where = "are led away" if label is None else f"more go to {name(int(label))}"
    found, least = f"{100 * success:.0f} points {where}", f"{100 * LEFT:.0f} points"
    return Sign("carried", "What led the model before, tried after", CARRIED, found, least, success / LEFT, False)


def _sentence(message: str) -> str:
    """The message as a sentence of its own; in records it is a part of one."""
    return message[:1].upper() + message[1:] + ("" if message.endswith((".", "!", "?")) else ".")


def percent(rate: float | None) -> str:
    return "not known" if rate is None else f"{100 * rate:.1f}\u00a0%"


def _power(value: float) -> str:
    """A small number as a person writes it: ``0.04``, or ``2 × 10⁻⁷``."""
    if not 0 < value < 1e-3:
        return f"{value:.2g}"
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}\u00a0×\u00a010{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
