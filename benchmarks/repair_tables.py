"""Markdown tables of repair records."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

HEADER = """\
| model | CA before | CA after | ASR before | ASR after | RA after | DER | label | check | pruned | seconds |
|---|---|---|---|---|---|---|---|---|---|---|"""


def render(records: Sequence[Record]) -> str:
    """The table of all records, one row a model, and what they come to together."""
    by_model: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_model[record["model"]].append(record)
    return "\n".join([HEADER, *(row(rows) for rows in by_model.values()), "", summary(records)])


def summary(records: Sequence[Record]) -> str:
    """One sentence on the backdoored models and one on the clean ones."""
    bad = [record for record in records if record["der"] is not None]
    clean = [record for record in records if record["der"] is None]
    parts = []
    if bad:
        ders = [record["der"] for record in bad]
        success = statistics.mean(record["attack_success_rate"]["after"] for record in bad)
        worst = min(bad, key=lambda record: record["der"])
        parts.append(
            f"{sum(map(_changed, bad))} of {len(bad)} repairs of backdoored models changed the model. Afterwards "
            f"{success:.1%} of the triggered images get the attacker's label on average, and accuracy is "
            f"{statistics.mean(map(_lost, bad)) * 100:.1f} points lower. The mean DER is {statistics.mean(ders):.3f}, "
            f"the worst {worst['der']:.3f} ({worst['model']})."
        )
        rates = [record["attack_success_rate"] for record in bad]
        if any("fine_tuned" in rate for rate in rates):
            kept = statistics.mean(map(_after_tuning, rates))
            parts.append(f"After another 20 epochs of fine-tuning on the clean images the mean ASR is {kept:.1%}.")
    if clean:
        parts.append(
            f"{len(clean) - sum(map(_changed, clean))} of {len(clean)} repairs of clean models left the model "
            f"unchanged; the most accuracy that any lost is {max(map(_lost, clean)) * 100:.1f} points."
        )
    return " ".join(parts)


LEFT = 0.1
"""ASR above which a repair has failed."""


def checked(records: Sequence[Record]) -> str:
    """One row a record by what is left of the backdoor, and how many of those that failed the check rejects."""
    unchecked = [record["model"] for record in records if record["verification"] is None]
    if unchecked:
        raise ValueError(f"expected records with a check, got none for {', '.join(unchecked)}; make them with --check")
    order = sorted(records, key=lambda record: -record["attack_success_rate"]["after"])
    lines = ["| model | seed | left out | ASR before | ASR after | check |", "|---" * 6 + "|"]
    for record in order:
        rates, said = record["attack_success_rate"], "passed" if record["verification"]["passed"] else "rejected"
        part = record["defense"].removeprefix("repair-without-")
        lines.append(
            f"| {record['model']} | {record['seed']} | {part} | {rates['before']:.1%} | {rates['after']:.1%} | {said} |"
        )
    failed = [record["attack_success_rate"]["after"] > LEFT for record in records]
    rejected = [not record["verification"]["passed"] for record in records]
    counts = Counter(zip(failed, rejected, strict=True))
    told = (
        f"With an ASR above {LEFT:.0%} the check rejects {counts[True, True]} of {sum(failed)}, with less "
        f"{counts[False, True]} of {len(failed) - sum(failed)}."
    )
    return "\n".join([*lines, "", told])


def by_images(records: Sequence[Record]) -> str:
    """One row a number of clean images and a seed, and one for all seeds: backdoored models, and clean ones touched."""
    names = ("clean images", "seed", "backdoored models", "mean DER", "worst DER", "mean ASR", "CA lost")
    lines = [f"| {' | '.join([*names, 'ASR after fine-tuning', 'clean models touched'])} |", "|---" * 9 + "|"]
    for count in sorted({record["clean_images"] for record in records}):
        some = [record for record in records if record["clean_images"] == count]
        seeds = sorted({record["seed"] for record in some})
        for seed in seeds:
            lines.append(_sum_up(count, str(seed), [record for record in some if record["seed"] == seed]))
        if len(seeds) > 1:
            lines.append(_sum_up(count, "all", some))
    return "\n".join(lines)


def _sum_up(count: int, seed: str, records: Sequence[Record]) -> str:
    bad = [record for record in records if record["der"] is not None]
    clean = [record for record in records if record["der"] is None]
    touched = f"{sum(map(_changed, clean))} of {len(clean)}" if clean else "-"
    if not bad:
        return f"| {' | '.join([str(count), seed, '0', *5 * '-', touched])} |"
    worst = min(bad, key=lambda record: record["der"])
    rates = [record["attack_success_rate"] for record in bad]
    means = [
        statistics.mean(values)
        for values in ([rate["after"] for rate in rates], map(_lost, bad), [_after_tuning(rate) for rate in rates])
    ]
    cells = [str(count), seed, str(len(bad)), f"{statistics.mean(record['der'] for record in bad):.3f}"]
    cells += [f"{worst['der']:.3f} ({worst['model']})", *(f"{mean * 100:.1f}" for mean in means)]
    return f"| {' | '.join([*cells, touched])} |"


def _after_tuning(rates: Mapping[str, float]) -> float:
    """A model that was left alone was not fine-tuned either; its backdoor is as it was."""
    return rates.get("fine_tuned", rates["after"])


def _lost(record: Record) -> float:
    return float(record["clean_accuracy"]["before"] - record["clean_accuracy"]["after"])


def _changed(record: Record) -> bool:
    return bool(record["changed"])


def row(records: Sequence[Record]) -> str:
    """One model: means over its records, with the range where there are several."""

    def percent(rate: str, when: str) -> str:
        return _spread([record[rate][when] * 100 for record in records], 1)

    cells = [records[0]["model"], percent("clean_accuracy", "before"), percent("clean_accuracy", "after")]
    if records[0]["der"] is None:
        cells += ["-"] * 4
    else:
        cells += [percent("attack_success_rate", "before"), percent("attack_success_rate", "after")]
        cells += [percent("robust_accuracy", "after"), _spread([record["der"] for record in records], 3)]
    cells += ["; ".join(dict.fromkeys(_label(record) for record in records))]
    cells += ["; ".join(dict.fromkeys(_check(record) for record in records))]
    cells += [_spread([record["channels_pruned"] for record in records], 0)]
    cells += [_spread([record["seconds"] for record in records], 0)]
    return "| " + " | ".join(cells) + " |"


def _label(record: Record) -> str:
    if record["verification"] is None:  # a bare defence does not check itself
        return "-"
    label = record["verification"]["label"]
    if label is None:
        return "many" if record["changed"] else "none"
    return f"{label}, right" if label == record["target"] else f"{label}, wrong"


def _check(record: Record) -> str:
    if record["verification"] is None:
        return "-"
    if not record["changed"]:
        return "left alone"
    return "passed" if record["verification"]["passed"] else "not passed"


def _spread(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if low == high else f"{mean} ({low} to {high})"


def compare_defenses(records: Sequence[Record]) -> str:
    """ASR after, accuracy lost and DER of every defence, on the backdoored models and seeds that all were tried on."""
    found: dict[str, dict[tuple[str, int, int], Record]] = defaultdict(dict)
    for record in records:
        if record["der"] is not None:
            found[record["defense"]][record["model"], record["seed"], record["clean_images"]] = record
    shared = sorted(set.intersection(*(set(rows) for rows in found.values())))
    lines = [
        "| model | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for model in dict.fromkeys(key[0] for key in shared):
        cells = ([rows[key] for key in shared if key[0] == model] for rows in found.values())
        lines.append(f"| {model} | " + " | ".join(map(_outcome, cells)) + " |")
    everything = [[rows[key] for key in shared] for rows in found.values()]
    worst = (f"{min(record['der'] for record in rows):.3f}" for rows in everything)
    lines.append("| **mean** | " + " | ".join(map(_outcome, everything)) + " |")
    lines.append("| **worst DER** | " + " | ".join(worst) + " |")
    return "\n".join(lines)


def _outcome(records: Sequence[Record]) -> str:
    """``DER (ASR after, accuracy lost)``, means."""
    der = statistics.mean(record["der"] for record in records)
    success = statistics.mean(record["attack_success_rate"]["after"] for record in records)
    lost = statistics.mean(map(_lost, records))
    return f"{der:.3f} ({success * 100:.1f}, {lost * 100:.1f})"
