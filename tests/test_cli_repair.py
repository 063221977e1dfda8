"""The command repair: exit codes, what goes to which stream, and what the repaired model and its records hold."""

from __future__ import annotations

import errno
import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import debackdoor
import report_cases
from cli_cases import Shell, full_disk
from cli_repair_cases import StandIn, repair_of, stand_in
from debackdoor.files import sha256_of
from debackdoor.report.records import SCAN_SCHEMA
from debackdoor.types import RepairResult, ScanReport

__all__ = ["stand_in"]


def test_the_scans_record_comes_from_the_same_look(
    shell: Shell, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(*given: Any, scanned: Callable[[ScanReport], object], **options: Any) -> tuple[ScanReport, RepairResult]:
        scanned(report := report_cases.report("backdoored"))
        return report, stand_in(*given, **options)

    monkeypatch.setattr(importlib.import_module("debackdoor.both"), "scan_and_repair", both)
    out, scanned = shell.folder / "out.safetensors", shell.folder / "scan.json"
    ran = shell(*repair_of(shell, "--out", out, "--scan-json", scanned, "--seed", 4))
    assert ran.code == 0
    assert out.exists()
    assert stand_in.given["seed"] == 4
    record = json.loads(scanned.read_text())
    assert (record["schema"], record["verdict"], record["seed"]) == (SCAN_SCHEMA, "backdoored", 4)
    ran = shell(*repair_of(shell, "--out", shell.folder / "two.safetensors", "--scan-json", out))
    assert ran.code == 0  # a file that nothing else uses may be replaced
    ran = shell(*repair_of(shell, "--out", out, "--overwrite", "--scan-json", out))
    assert (ran.code, "expected a file of its own to write" in ran.err) == (2, True)
    scanned.unlink()
    stand_in.error = RuntimeError("out of memory")
    ran = shell(*repair_of(shell, "--out", shell.folder / "three.safetensors", "--scan-json", scanned))
    assert (ran.code, json.loads(scanned.read_text())["verdict"]) == (1, "backdoored")
    assert "unexpected RuntimeError: out of memory" in ran.err
    assert ran.err.endswith("debackdoor: the finding stands\n")
    stand_in.error = None
    monkeypatch.setattr(importlib.import_module("debackdoor.cli.output"), "atomic_write_text", full_disk)
    ran = shell(*repair_of(shell, "--out", out, "--overwrite", "--scan-json", scanned))
    assert (ran.code, "scan.json was not written: No space left on device" in ran.err) == (2, True)
    stand_in.error = RuntimeError("out of memory")
    ran = shell(*repair_of(shell, "--out", out, "--overwrite", "--scan-json", scanned))
    assert (ran.code, "out of memory" in ran.err) == (1, True)
    assert "scan.json was not written: No space left on device" in ran.err


def test_repair_writes_the_model_and_its_record(shell: Shell, stand_in: StandIn) -> None:
    checkpoint, out, record_file = shell.checkpoint(), shell.folder / "out.safetensors", shell.folder / "out.json"
    before = checkpoint.read_bytes()
    more = ("--out", out, "--json", record_file, "--budget", 0.05, "--seed", 3, "--limit", 60, "--device", "cpu")
    ran = shell(*repair_of(shell, *more))
    assert ran.code == 0
    assert ran.err == ""
    assert "90.0% before, 87.5% after" in ran.out
    assert "one channel is enough (channels 1)" in ran.out
    assert f"wrote {out}\n" in ran.out
    stages = stand_in.given.pop("progress")
    assert stand_in.given == {
        "images": 60,
        "budget": 0.05,
        "seed": 3,
        "device": "cpu",
        "precision": "auto",
        "memory": 6.0,
        "keep": None,
    }
    assert checkpoint.read_bytes() == before

    old, new = load_file(checkpoint), load_file(out)
    assert {name: (value.shape, value.dtype) for name, value in new.items()} == {
        name: (value.shape, value.dtype) for name, value in old.items()
    }
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["0.weight"]

    record = json.loads(record_file.read_text())
    assert record.pop("seconds") == {stage: round(value, 3) for stage, value in stages.seconds.items()}
    assert list(stages.seconds) == ["load", "unlearn", "recover"]
    assert record == {
        "schema": "debackdoor/repair/1",
        "versions": record["versions"],
        "checkpoint": str(checkpoint),
        "sha256": sha256_of(checkpoint),
        "arch": shell.arch,
        "num_classes": 10,
        "mean": None,
        "std": None,
        "data": "digits",
        "seed": 3,
        "clean_images": 60,
        "budget": 0.05,
        "changed": True,
        "clean_accuracy": {"before": 0.9, "after": 0.875},
        "plan": [{"layer": "1", "index": 0, "score": 0.25}],
        "steps": [{"name": "prune", "reason": "one channel is enough", "numbers": {"channels": 1}}],
        "verification": {
            "passed": True,
            "label": 3,
            "evidence": {"ease_after": None},  # JSON has no infinity
            "message": "the check says this",
            "conclusive": True,
        },
    }
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["debackdoor"] == debackdoor.__version__


def test_a_check_that_could_not_tell_is_exit_code_3(shell: Shell, stand_in: StandIn) -> None:
    stand_in.passed = stand_in.conclusive = stand_in.changed = False
    ran = shell(*repair_of(shell, "--out", shell.folder / "out.pt", "--quiet"))
    assert (ran.code, ran.out) == (3, "")
    assert "the check says this" in ran.err


def test_a_backdoor_that_is_left_is_exit_code_1(shell: Shell, stand_in: StandIn) -> None:
    stand_in.passed = False
    out, record = shell.folder / "out.pt", shell.folder / "out.json"
    ran = shell(*repair_of(shell, "--out", out, "--json", record, "--quiet"))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "debackdoor: warning: the check says this; do not use the model\n"
    assert not torch.load(out, weights_only=True)["0.weight"][0].any()
    assert json.loads(record.read_text())["verification"]["passed"] is False


def test_a_model_left_as_it_is_comes_out_bit_for_bit(shell: Shell, stand_in: StandIn) -> None:
    stand_in.changed = False
    out = shell.folder / "out.safetensors"
    ran = shell(*repair_of(shell, "--out", out))
    assert ran.code == 0
    assert "a copy with the same tensors" in ran.out
    old, new = load_file(shell.checkpoint()), load_file(out)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_json_on_stdout_stands_alone(shell: Shell, stand_in: StandIn) -> None:
    ran = shell(*repair_of(shell, "--out", shell.folder / "out.safetensors", "--json", "-"))
    assert ran.code == 0
    assert json.loads(ran.out)["schema"] == "debackdoor/repair/1"
    assert "wrote" in ran.err


def test_quiet_says_nothing(shell: Shell, stand_in: StandIn) -> None:
    ran = shell(*repair_of(shell, "--out", shell.folder / "out.safetensors", "--quiet"))
    assert (ran.code, ran.out, ran.err) == (0, "", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "debackdoor: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (RuntimeError("mat1 and mat2\ncannot be multiplied"), 2, "unexpected RuntimeError: mat1 and mat2; --debug"),
        (EOFError(), 2, "unexpected EOFError"),
    ],
)
def test_errors_from_within(shell: Shell, stand_in: StandIn, error: BaseException, code: int, message: str) -> None:
    stand_in.error = error
    out = shell.folder / "out.safetensors"
    ran = shell(*repair_of(shell, "--out", out))
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.count("\n") == 1
    assert message in ran.err
    assert not out.exists()
    assert "Traceback" in shell(*repair_of(shell, "--out", out, "--debug")).err


@pytest.mark.parametrize("more", [(), ("--scan-json",)])
@pytest.mark.parametrize(
    ("limit", "message"), [(19, "expected at least 20 clean images, got 19"), (100, "no better than chance")]
)
def test_where_a_scan_would_be_inconclusive_no_file_is_written(
    shell: Shell, more: tuple[str, ...], limit: int, message: str
) -> None:
    """Nothing stands in here: a network with random weights is at chance."""
    folder = shell.folder
    arguments = repair_of(shell, "--out", folder / "out.pt", "--json", folder / "out.json", "--limit", limit)
    before = shell.files()
    ran = shell(*arguments, *(item for option in more for item in (option, folder / "scan.json")))
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert message in ran.err
    assert shell.files() == before


def test_weights_in_whole_numbers_are_refused(shell: Shell, stand_in: StandIn) -> None:
    weight = load_file(shell.checkpoint())["0.weight"]
    shell.checkpoint(**{"0.weight": (100 * weight).to(torch.int8)})
    words = ["repair", shell.folder / "model.safetensors", "--arch", shell.arch, "--clean", "digits"]
    ran = shell(*words, "--out", shell.folder / "out.safetensors")
    assert (ran.code, stand_in.given) == (2, {})
    assert "expected floating-point weights, got torch.int8 in '0.weight'; dequantise them first" in ran.err
