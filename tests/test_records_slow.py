"""A few records of the zoo's repairs and scans, measured again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from debackdoor.errors import DataError
from debackdoor.zoo import Card, read_card
from debackdoor.zoo.card import card_of

ROOT = Path(__file__).parent.parent
RESULTS, ZOO = ROOT / "benchmarks" / "results", ROOT / "zoo" / "slim"
MODELS = ("vgg11-badnets", "vgg11_bn-blend", "vgg11-clean")
"""The quickest; one without batch normalisation, and one without a backdoor."""

pytestmark = pytest.mark.slow


def old_and_new(folder: str, script: str, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], ...]:
    """The record of a model and the first choice of clean images, and one made now."""
    if not card_of(ZOO, name).is_file():
        pytest.skip(f"{ZOO} does not hold {name}; debackdoor zoo build makes it")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module: ModuleType = importlib.import_module(script)
    card: Card = read_card(card_of(ZOO, name))
    try:
        new = module.measure(card, ZOO, 0, 500)
    except DataError as error:
        pytest.skip(str(error))
    return json.loads((RESULTS / folder / f"{name}-seed0-n500.json").read_text()), new


@pytest.mark.parametrize("name", MODELS)
def test_a_repair_is_what_its_record_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = old_and_new("repair", "repair_zoo", name, monkeypatch)
    assert new["changed"] == old["changed"] == ("clean" not in name)
    assert new["clean_accuracy"]["after"] == pytest.approx(old["clean_accuracy"]["after"], abs=0.02)
    if old["der"] is not None:
        assert new["der"] == pytest.approx(old["der"], abs=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_a_scan_is_what_its_record_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = old_and_new("scan", "scan_zoo", name, monkeypatch)
    assert new["verdict"] == old["verdict"]
    assert [suspect["label"] for suspect in new["suspects"]] == [suspect["label"] for suspect in old["suspects"]]
    assert new["score"] == pytest.approx(old["score"], rel=0.1)
