"""The report page: what it says for every verdict, what it refuses, and that nothing of a model's maker gets to run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import report_cases as cases
from debackdoor.detectors.evidence import PILED_UP
from debackdoor.errors import DebackdoorError, MissingDependencyError
from debackdoor.report.page import write_page
from debackdoor.report.pictures import Pictures
from debackdoor.report.records import to_json
from report_page_cases import EVIL, everything, page

__all__ = ["page"]


@pytest.mark.parametrize(
    ("verdict", "word", "tone", "next_step"),
    [
        ("backdoored", "Backdoored", "bad", "Do not put the model to use"),
        ("suspicious", "Suspicious", "warn", "Hold the model back"),
        ("inconclusive", "Inconclusive", "unknown", "Do not take the model for clean"),
        ("clean", "No backdoor found", "good", "the model may be used"),
    ],
)
def test_the_verdict_comes_first_then_what_to_do(page: Any, verdict: str, word: str, tone: str, next_step: str) -> None:
    record = cases.scan(verdict)
    found = page(record)
    assert found.elements[[tag for tag, _ in found.elements].index("body") + 2][1]["class"] == f"verdict {tone}"
    order = [word, record["message"], "What to do next", next_step, "The evidence", "How to reproduce this", "Limits"]
    places = [found.words.index(part, found.words.index("Verdict of the scan")) for part in order]
    assert places == sorted(places)
    assert "is no proof" in found.words
    assert len(found.all("h1")) == 1


def test_the_suspect_label_and_its_evidence(page: Any) -> None:
    words = page(cases.scan()).words
    assert "The suspect label: 3 (cat)" in words
    assert "What speaks against it: the answers that gather on it" in words
    assert "At the peak: 97.0 % of the answers on 3 (cat), after 30 steps." in words
    assert "97.0 % on 3 (cat) Counts ; the threshold is 40.0 %" in words
    assert "p = 2 × 10⁻²⁰, 4.3 times the others', for 3 (cat) Counts" in words
    assert "the threshold is p ≤ 1 × 10⁻⁹ and 2.5 times the others'" in words
    assert "99.0 % go to 3 (cat), 87 points above what is usual Counts" in words
    assert "22.0 % go to 3 (cat), 10 points above what is usual Does not count" in words
    assert "strongest sign is at 2.56 times its threshold" in words


def test_the_bars_stand_for_multiples_of_the_threshold(page: Any) -> None:
    numbers = cases.evidence() | {"pile_up_share": 0.1 + 1.5 * PILED_UP}
    widths = [item["style"] for item in page(cases.scan(evidence=numbers)).all("span") if item.get("style")]
    # One and a half times, more than twice, 0.87 / 0.5, 0.69 / 0.5, 0.1 / 0.5, each half as wide as the bar.
    assert widths == [f"width: {width}%" for width in ("75.0", 100, 87.0, 69.0, 10.0)]


def test_a_sign_above_its_threshold_need_not_count(page: Any) -> None:
    found = page(cases.scan("suspicious"))  # a pile-up tells nothing of a network without batch normalisation
    assert "97.0 % on 3 (cat) Above its threshold, but does not count here; the threshold is 40.0 %" in found.words
    meters = [item["class"] for item in found.all("span") if item.get("class", "").startswith("meter")]
    assert meters == ["meter", "meter over", "meter", "meter", "meter"]


def test_a_rare_margin_that_is_not_large_is_below_its_threshold(page: Any) -> None:
    found = page(cases.scan("clean", evidence={"margin_label": 3.0, "margin_p_value": 1e-18, "margin_ratio": 2.0}))
    assert [item["style"] for item in found.all("span") if item.get("style")] == ["width: 40.0%"]  # 2 / 2.5, halved
    assert "2.0 times the others'" in found.words


def test_what_was_not_measured_has_no_row(page: Any) -> None:
    words = page(cases.scan(evidence={"margin_label": 3.0, "margin_p_value": float("nan"), "away": 0.6})).words
    assert "60.0 % are led away" in words
    assert "Largest margin" not in words
    assert "margin_p_value not known" in words
    assert "No sign was measured." in page(cases.scan(evidence={})).words


def test_evidence_of_a_repair_is_read_too(page: Any) -> None:
    numbers = {f"{key}_before": value for key, value in cases.evidence().items()}
    assert "97.0 % on 3 (cat) Counts" in page(cases.scan(evidence=numbers)).words


def test_a_label_that_is_only_the_nearest_is_not_called_suspect(page: Any) -> None:
    nearest = replace(cases.report().suspects[0], reasons=())
    words = page(cases.scan("clean", suspects=(nearest,))).words
    assert "The label nearest to a finding: 3 (cat) Nothing counts against it." in words
    assert "suspect label" not in words


def test_several_suspect_labels(page: Any) -> None:
    one = cases.report().suspects[0]
    suspects = tuple(replace(one, label=label, name=None) for label in range(12))
    words = page(cases.scan(suspects=suspects)).words
    assert "The suspect labels 0 : the answers" in words
    assert "2 more suspect labels are in the JSON record." in words


def test_all_to_all(page: Any) -> None:
    words = page(cases.scan(all_to_all=True, suspects=(), evidence={"away": 0.9, "gathered": 0.2})).words
    assert "A backdoor to many labels" in words
    assert "90.0 % are led away, 20.0 % to one label Counts" in words


def test_nothing_but_a_verdict(page: Any) -> None:
    found = page(cases.scan("inconclusive", suspects=(), evidence={}, ranking=(), history={}))
    assert found.all("figure") == []
    assert "The recovered trigger" not in found.words
    assert "Channels that" not in found.words


def test_a_scan_and_the_repair_that_followed(page: Any) -> None:
    words = page(cases.scan(), repair=cases.repaired(), pictures=everything()).words
    assert words.index("Backdoored") < words.index("After the repair Repaired and verified") < words.index("What to do")
    assert "Clean accuracy before 94.4 % Clean accuracy after 93.5 %" in words
    assert "Channels pruned 12" in words
    assert "relearn : the clean task from labels, and triggers unlearned (lr 0.01, accuracy 0.935)" in words
    assert "A small patch threshold: 50 points 99.0 % go to 3 (cat), 87 points above what is usual 20.0 % go" in words
    assert "not measured again" in words  # the pile-up


@pytest.mark.parametrize("counts", [True, False])
def test_a_pile_up_that_cannot_tell_is_not_among_a_repairs_signs(page: Any, counts: bool) -> None:
    """As of a network with few batch norms, in which answers gather anywhere."""
    repair = cases.repaired(changed=False)
    evidence = {"pile_up_label": 3.0, "pile_up_share": 0.93, "margin_label_before": 1.0, "margin_p_value_before": 0.3}
    evidence |= {"pile_up_label_before": 3.0, "pile_up_share_before": 0.2} if counts else {}
    repair["verification"]["evidence"] = evidence
    words = page(repair).words
    assert "Largest margin threshold:" in words
    assert ("Pile-up of answers threshold:" in words) is counts


@pytest.mark.parametrize(("label", "told"), [(3.0, "more go to 3"), (None, "are led away")])
def test_what_led_the_model_and_leads_the_repaired_one(page: Any, label: float | None, told: str) -> None:
    repair = cases.repaired()
    title = "What led the model before, tried after"
    assert title not in page(repair).words
    evidence = repair["verification"]["evidence"]
    evidence |= {"carried_before": 0.97, "carried_after": 0.02}
    evidence |= {} if label is None else {"carried_label": label}
    words = page(repair).words
    assert f"{title} threshold: 25 points 97 points {told} 2 points {told}" in words, words[words.index(title) :][:120]


def test_a_search_that_was_not_made_again_says_so(page: Any) -> None:
    repair = cases.repaired()
    assert page(repair).words.count("not measured again") == 1
    del repair["verification"]["evidence"]["away_after"]
    words = page(repair).words
    assert words.count("not measured again") == 2
    assert "41.0 % are led away" in words


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({}, "Repaired and verified"),
        ({"passed": False}, "Still backdoored"),
        ({"conclusive": False}, "Inconclusive"),
        ({"changed": False}, "Nothing to repair"),
        ({"checked": False}, "Changed, not verified"),
    ],
)
def test_a_repair_alone(page: Any, state: dict[str, bool], word: str) -> None:
    found = page(cases.repaired(**state), unlearning=cases.history())
    assert f"Verdict of the repair {word}" in found.words
    assert "debackdoor repair 'models/resnet18 from supplier.safetensors'" in found.words
    assert len(found.all("figure")) == 2
    assert "The evidence" not in found.words


def test_how_to_reproduce(page: Any) -> None:
    words = page(cases.scan()).words
    model = "'models/resnet18 from supplier.safetensors' --arch resnet18 --num-classes 10"
    assert f"debackdoor scan {model} --clean clean_dir --limit 500 --seed 0" in words
    assert "--all-triggers" not in words
    assert "--mean" not in words
    assert "a3" * 32 in words
    assert "debackdoor 0.1.0, torch 2.6.0, python 3.11.9" in words
    assert "debackdoor scan x --mean 0" in page(cases.scan(), command="debackdoor scan x --mean 0").words


def test_every_command_has_the_normalisation_that_the_record_has(page: Any) -> None:
    """A record of before has no such entries."""
    words = page(cases.scan(top={"mean": [0.5, 0.25, 0.125], "std": [0.2, 0.2, 0.25]})).words
    assert "Network resnet18, 10 classes, mean 0.5, 0.25, 0.125, std 0.2, 0.2, 0.25" in words
    assert words.count("--num-classes 10 --mean 0.5,0.25,0.125 --std 0.2,0.2,0.25 --clean clean_dir") == 3
    rows = [{"label": 3, "success_rate": 0.9, "l1": 2.0}]
    assert "--seed 0 --all-triggers" in page(cases.scan(history={"triggers": rows})).words
    repair = cases.repaired()
    del repair["mean"], repair["std"]
    words = page(repair).words
    assert "--clean clean_dir --limit 500 --seed 0 --budget 0.02 --out FILE" in words


def test_text_of_others_stays_text(page: Any) -> None:
    names = (EVIL, *cases.NAMES[1:3], EVIL * 20, "line\nbreak \u202egnirts \x00", *cases.NAMES[5:])
    suspect = replace(cases.report().suspects[0], name=names[3])
    ranking = tuple(replace(channel, layer=EVIL) for channel in cases.ranking(1))
    record = cases.scan(
        top={"checkpoint": f"{EVIL}\udcff.pt", "data": EVIL, "arch": EVIL, "versions": {EVIL: EVIL}},
        message=EVIL, suspects=(suspect,), ranking=ranking, evidence=cases.evidence() | {EVIL: 1.0},
    )  # fmt: skip
    scores = replace(cases.sample_scores(), method=EVIL)
    pictures = Pictures(cases.trigger(), cases.clean_set(names=names), scores, cases.suspect_images())
    found = page(record, repair=cases.repaired(), pictures=pictures, command=EVIL)
    assert found.words.count("<script>alert('x')</script>") > 10
    assert "line break \ufffdgnirts \ufffd" in found.words
    assert f"{EVIL}\ufffd.pt" in found.words


def test_a_record_read_from_json_gives_the_same_page(tmp_path: Path) -> None:
    record = cases.scan(score=float("inf"))
    write_page(tmp_path / "a.html", record, pictures=everything())
    write_page(tmp_path / "b.html", json.loads(to_json(record)), pictures=everything())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", cases.scan(), pictures=everything())
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    for part in ("default-src 'none'; img-src data:; style-src 'unsafe-inline'", '<html lang="en">', 'name="viewport"',
                 "prefers-color-scheme: dark", "@media print"):  # fmt: skip
        assert part in text


def test_other_records_and_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    with pytest.raises(DebackdoorError, match="expected the record of a scan or a repair, got schema 'x'"):
        write_page(path, {"schema": "x"})
    with pytest.raises(DebackdoorError, match="expected the record of a repair, got schema 'debackdoor/scan/1'"):
        write_page(path, cases.scan(), repair=cases.scan())
    with pytest.raises(DebackdoorError, match="expected 24 suspect images, one a score, got 3"):
        Pictures(scores=cases.sample_scores(), suspects=torch.zeros(3, 3, 8, 8))
    with pytest.raises(DebackdoorError, match=r"expected clean images of the trigger's shape \(3, 8, 8\)"):
        Pictures(cases.trigger(size=8), cases.clean_set())
    with pytest.raises(DebackdoorError, match="was not written"):
        write_page(tmp_path / "missing" / "a.html", cases.scan())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["jinja2", "matplotlib.figure"])
def test_a_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'debackdoor\[report\]'"):
        write_page(tmp_path / "a.html", cases.scan())
    assert list(tmp_path.iterdir()) == []
