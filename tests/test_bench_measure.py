"""Measuring one cell of a bench: what its record holds, that it is the same again, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench_cases import SECONDS
from debackdoor.bench import measure as measuring
from debackdoor.bench.cells import Cell
from debackdoor.bench.measure import Settings, failed, measure
from debackdoor.defenses import FineTuning
from debackdoor.errors import DataError, DebackdoorError
from debackdoor.types import CleanSet, RepairResult
from debackdoor.zoo import read_card


def test_weights_that_are_not_those_of_the_card_are_refused(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    (tmp_path / "zoo" / "patch.safetensors").write_bytes((zoo / "clean-1.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"expected SHA-256 [0-9a-f]{64} as on its card, got .*; build the model again"):
        measure(Settings(tmp_path / "zoo", "cpu"), Cell("patch", "ft-0.01", 0, 120))


def test_other_images_than_those_of_the_card_are_refused(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    card = tmp_path / "zoo" / "patch.json"
    hashes = json.loads(card.read_text())["data_sha256"]
    card.write_text(card.read_text().replace(hashes["test"], "0" * 64))
    with pytest.raises(DataError, match=rf"digits: expected the test images that patch was .* got {hashes['test']};"):
        measure(Settings(tmp_path / "zoo", "cpu"), Cell("patch", "ft-0.01", 0, 120))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DebackdoorError("it diverged"), "it diverged"),
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
    ],
)
def test_a_fine_tuning_that_fails_takes_nothing_from_the_defence(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    class Diverging(FineTuning):
        def __call__(self, model: nn.Module, clean: CleanSet, **_: Any) -> RepairResult:
            raise error

    monkeypatch.setattr(measuring, "FineTuning", Diverging)
    found = measure(Settings(zoo, "cpu", fine_tune=True), Cell("patch", "ft-0.01", 0, 60))
    assert (found["error"], found["fine_tuning_error"]) == (None, said)
    assert set(found["clean_accuracy"]) == {"before", "after"}
    assert found["der"] > 0


def test_a_record_has_what_was_measured(zoo: Path) -> None:
    """Before the defence the rates are those on the card; the DER follows from them."""
    card = read_card(zoo / "patch.json")
    found = measure(Settings(zoo, "cpu", fine_tune=True, commit="abc"), Cell("patch", "ft-0.05", 1, 120))
    assert found["schema"] == "debackdoor/bench/1"
    assert (found["model"], found["attack"], found["defense"], found["blind"]) == ("patch", "badnets", "ft-0.05", True)
    assert (found["seed"], found["clean_images"], found["error"]) == (1, 120, None)
    assert found["defense_parameters"]["lr"] == 0.05
    assert "seed" not in found["defense_parameters"]
    rates = [found[name] for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy")]
    assert [rate["before"] for rate in rates] == pytest.approx(
        [card.clean_accuracy, card.attack_success_rate, card.robust_accuracy]
    )
    assert all(set(rate) == {"before", "after", "fine_tuned"} for rate in rates)
    removed = max(0.0, rates[1]["before"] - rates[1]["after"])
    assert found["der"] == pytest.approx((removed - max(0.0, rates[0]["before"] - rates[0]["after"]) + 1) / 2)
    assert found["seconds"] > 0
    assert 50 < found["peak_memory_mib"] < 20_000
    assert [step["name"] for step in found["steps"]] == ["fine-tune"]
    assert (found["device"], found["commit"]) == ("cpu", "abc")
    assert found["data_sha256"] == card.data_sha256
    assert json.loads(json.dumps(found)) == found
    error = failed(card, Cell("patch", "ft-0.05", 1, 120), "why")
    assert set(error) == set(found)
    assert error["error"] == "why"


def test_a_clean_model_has_no_rates_of_triggers_and_no_der(zoo: Path) -> None:
    found = measure(Settings(zoo, "cpu"), Cell("clean-1", "ft-0.01", 0, 120))
    assert found["attack_success_rate"] == found["robust_accuracy"] == {"before": None, "after": None}
    assert found["der"] is None
    assert 0.5 < found["clean_accuracy"]["after"] <= 1


def test_a_record_is_the_same_again_but_for_the_time(zoo: Path) -> None:
    records = [measure(Settings(zoo, "cpu"), Cell("patch", "ft-0.01", 3, 60)) for _ in range(2)]
    first, second = ({**found, **dict.fromkeys(SECONDS)} for found in records)
    assert first == second


def test_the_model_is_measured_once_before_all_defences(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring._rates_before.cache_clear()
    calls = []
    evaluate = measuring.evaluate

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given)
        return evaluate(*given, **more)

    monkeypatch.setattr(measuring, "evaluate", counted)
    for seed in (0, 1):
        measure(Settings(zoo, "cpu"), Cell("patch", "ft-0.01", seed, 30))
    assert len(calls) == 3  # once before, and once after each


def test_too_few_images_are_an_error_of_the_cell(zoo: Path) -> None:
    with pytest.raises(DataError, match=r"digits: expected 100000 clean images, got \d+; ask for fewer"):
        measure(Settings(zoo, "cpu"), Cell("patch", "ft-0.01", 0, 100_000))


def test_nobody_elses_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a repository that does not track this package, as outside of any, there is none to name."""
    monkeypatch.setattr(measuring, "__file__", str(tmp_path / "measure.py"))
    assert measuring.commit() is None


def test_peak_memory_is_that_of_the_work_alone() -> None:
    """Of 200 MB that were there and are gone again nothing is left in it; of 100 MB in between it has them."""
    from debackdoor.bench.memory import PeakMemory

    def peak(megabytes: int) -> int:
        memory = PeakMemory(torch.device("cpu"))
        torch.ones(megabytes, 250_000)
        found = memory.record()["peak_memory_mib"]
        assert found is not None
        return found

    before = peak(1)
    assert peak(200) > before + 150
    assert peak(100) < before + 150
