"""What the searches find, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from debackdoor.detectors.evidence import Evidence

REASONS = {
    "pile-up": "the answers that gather on it while the clean task is forgotten",
    "margin": "its largest margin",
    "additive": "a faint universal pattern",
    "patch": "a small universal patch",
    "warp": "a slight universal warp",
    "square": "a plain square",
}
"""What speaks against a label, by the name that evidence has for it."""


def findings(evidence: Evidence) -> list[str]:
    """One clause a suspect label, and one where a patch leads away from all."""
    found = [f"label {label} stands out by {_listed(why)}" for label, why in evidence.reasons.items()]
    if evidence.all_to_all:
        share = f"{evidence.shortcuts.away:.0%}"
        found.append(f"a small patch leads at least {share} of the images away from their labels, to many")
    return found


def disagreement(evidence: Evidence) -> str:
    """The clause for a model whose model-wide signs name different labels."""
    return f"{'; '.join(findings(evidence))}; such signs of one model should name one label"


def nothing_found(evidence: Evidence) -> str:
    """The clause for a model in which no sign reaches its threshold."""
    gathered = ""
    if evidence.pile_up is not None:
        gathered = (
            f"no more than {evidence.pile_up.share:.0%} of the answers gather on one label whatever part of the clean "
            "task is forgotten, "
        )
    return (
        f"nothing is exposed: {gathered}the largest margin is {evidence.margins.ratio:.1f} times the others', and no "
        "small patch, pattern, warp or plain square leads far more often to one label than to others"
    )


def near(evidence: Evidence) -> str:
    """The clause for a model whose strongest sign comes near to its threshold."""
    what = "a patch that leads away to many labels" if evidence.nearest is None else f"label {evidence.nearest}"
    return f"{what} comes near to standing out, further than is usual without a backdoor"


def _listed(reasons: Sequence[str]) -> str:
    *most, last = (REASONS[reason] for reason in reasons)
    return f"{', '.join(most)} and {last}" if most else last
