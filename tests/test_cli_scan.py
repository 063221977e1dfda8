"""The command scan: exit codes, what goes to which stream, what its record holds, and what ends it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import report_cases
from cli_cases import Shell
from cli_scan_cases import StandIn, scan_of, stand_in, valid
from debackdoor.data import load_clean
from debackdoor.files import sha256_of
from debackdoor.types import ScanReport

__all__ = ["stand_in"]


@pytest.mark.parametrize(
    ("verdict", "fail_on", "code"),
    [
        ("clean", None, 0),
        ("suspicious", None, 1),
        ("backdoored", None, 1),
        ("inconclusive", None, 3),
        ("clean", "suspicious", 0),
        ("suspicious", "suspicious", 1),
        ("backdoored", "suspicious", 1),
        ("inconclusive", "suspicious", 3),
        ("clean", "backdoored", 0),
        ("suspicious", "backdoored", 0),
        ("backdoored", "backdoored", 1),
        ("inconclusive", "backdoored", 3),
    ],
)
def test_exit_codes(shell: Shell, stand_in: StandIn, verdict: str, fail_on: str | None, code: int) -> None:
    stand_in.report = report_cases.report(verdict)
    ran = shell(*scan_of(shell, *(("--fail-on", fail_on) if fail_on else ())))
    assert (ran.code, ran.err) == (code, "")
    assert ran.out.splitlines()[:2] == [f"verdict: {verdict}", stand_in.report.message]


def test_the_same_numbers_on_request(shell: Shell, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")

    def look(*given: Any, **options: Any) -> ScanReport:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return stand_in(*given, **options)

    monkeypatch.setattr(importlib.import_module("debackdoor.scan"), "scan", look)
    for more in ((), ("--deterministic",)):
        assert shell(*scan_of(shell, *more)).code == 0
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_said_of_a_backdoor(shell: Shell, stand_in: StandIn) -> None:
    found = report_cases.report(
        history={"triggers": [{"label": 0, "l1": 31.25, "success_rate": 0.5}]}, trigger=report_cases.trigger()
    )
    stand_in.report = found
    ran = shell(*scan_of(shell, "--limit", 60))
    assert "3 (cat)" in ran.out
    assert "pile-up, margin, patch, additive" in ran.out
    assert "margin ratio 4.3" in ran.out
    assert f"a trigger of {found.trigger.l1:.1f} pixels leads 99% of held-out images to label 3\n" in ran.out
    assert "towards label 0 the smallest trigger found takes 31.2 pixels and works on 50%\n" in ran.out
    assert "the strongest sign is 2.56 times its threshold; 60 clean images were used\n" in ran.out


def test_the_record_holds_the_settings_and_what_was_found(shell: Shell, stand_in: StandIn) -> None:
    stand_in.report = report_cases.report("backdoored")
    checkpoint, target = shell.checkpoint(), shell.folder / "out.json"
    before = checkpoint.read_bytes()
    more = ("--seed", 3, "--limit", 60, "--device", "cpu", "--all-triggers", "--fail-on", "backdoored",
            "--mean", "0.5,0.25,0.125", "--std", "1,1,0.5")  # fmt: skip
    assert shell(*scan_of(shell, "--json", target, *more)).code == 1
    assert checkpoint.read_bytes() == before
    stages, model = stand_in.given.pop("progress"), stand_in.given.pop("model")
    assert isinstance(model, nn.Module)
    assert stand_in.given == {
        "images": 60,
        "all_triggers": True,
        "seed": 3,
        "device": "cpu",
        "precision": "auto",
        "memory": 6.0,
        "keep": None,
    }
    record = valid(target.read_text())
    assert record["seconds"] == {stage: round(value, 3) for stage, value in stages.seconds.items()}
    assert list(stages.seconds) == ["load", "unlearn"]
    wanted = {
        "checkpoint": str(checkpoint), "sha256": sha256_of(checkpoint), "arch": shell.arch, "num_classes": 10,
        "mean": [0.5, 0.25, 0.125], "std": [1.0, 1.0, 0.5], "data": "digits", "seed": 3, "clean_images": 60,
        "fail_on": "backdoored", "verdict": "backdoored",
        "score": 2.56, "all_to_all": False,
    }  # fmt: skip
    assert {name: record[name] for name in wanted} == wanted
    assert [(item["label"], item["name"]) for item in record["suspect_labels"]] == [(3, "cat")]


@pytest.mark.parametrize("verdict", ["clean", "suspicious", "backdoored", "inconclusive"])
def test_json_on_stdout_stands_alone(shell: Shell, stand_in: StandIn, verdict: str) -> None:
    stand_in.report = report_cases.report(verdict)
    ran = shell(*scan_of(shell, "--json", "-"))
    assert valid(ran.out)["verdict"] == verdict
    assert f"verdict: {verdict}\n" in ran.err


def test_what_a_network_prints_is_not_in_the_json(shell: Shell, stand_in: StandIn) -> None:
    stand_in.report = report_cases.report("clean")
    with open(shell.folder / "net.py", "a") as file:
        file.write("\nprint('importing')\n")
    ran = shell(*scan_of(shell, "--json", "-"))
    assert valid(ran.out)["verdict"] == "clean"
    assert "importing\n" in ran.err
    assert "importing" in shell(*scan_of(shell)).out


def test_a_scan_that_told_nothing_has_a_record_too(shell: Shell) -> None:
    """Nothing stands in here: a network with random weights is at chance."""
    ran = shell(*scan_of(shell, "--json", "-", "--limit", 100, "--quiet"))
    assert (ran.code, ran.err) == (3, "")
    record = valid(ran.out)
    assert (record["verdict"], record["suspect_labels"], record["trigger"]) == ("inconclusive", [], None)
    assert "no better than chance" in record["message"]


def test_quiet_says_nothing(shell: Shell, stand_in: StandIn) -> None:
    ran = shell(*scan_of(shell, "--quiet"))
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_code_that_ends_the_program_is_no_verdict(shell: Shell, stand_in: StandIn) -> None:
    """Neither that of the network, nor any other."""
    arguments = scan_of(shell)
    (shell.folder / "other.py").write_text("import sys\n\n\ndef make():\n    sys.exit(0)\n")
    arguments[3] = f"{shell.folder / 'other.py'}:make"
    ran = shell(*arguments)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "failed to build a network: SystemExit: 0; correct the factory" in ran.err
    stand_in.error = SystemExit(0)
    assert shell(*scan_of(shell)).code == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "debackdoor: interrupted\n"),
        (RuntimeError("mat1 and mat2\ncannot be multiplied"), 2, "unexpected RuntimeError: mat1 and mat2; --debug"),
    ],
)
def test_errors_from_within(shell: Shell, stand_in: StandIn, error: BaseException, code: int, message: str) -> None:
    stand_in.error = error
    ran = shell(*scan_of(shell, "--json", shell.folder / "out.json"))
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1)
    assert message in ran.err
    assert not (shell.folder / "out.json").exists()
    assert "Traceback" in shell(*scan_of(shell, "--debug")).err


def test_a_network_that_cannot_be_examined_is_exit_code_3(shell: Shell) -> None:
    """One that works: the class means of the digits are its only layer."""
    (shell.folder / "flat.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    digits = load_clean("digits")
    means = torch.stack([digits.x[digits.y == label].flatten(1).mean(0) for label in range(10)])
    weights = {"1.weight": means, "1.bias": -means.square().sum(1) / 2}
    save_file(weights, shell.folder / "flat.safetensors")
    arch = f"{shell.folder / 'flat.py'}:make"
    ran = shell("scan", shell.folder / "flat.safetensors", "--arch", arch, "--clean", "digits", "--limit", 100)
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert "no channel that can be masked" in ran.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: "nowhere.safetensors"}, "nowhere.safetensors"),
        ({3: "no-such-network"}, "no-such-network"),
        ({5: "nowhere"}, "nowhere: expected a folder, .*got a path that does not exist"),
    ],
)
def test_bad_input_is_one_sentence(shell: Shell, stand_in: StandIn, change: dict[int, str], message: str) -> None:
    arguments = scan_of(shell)
    for place, value in change.items():
        arguments[place] = value
    ran = shell(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert message.partition(".*")[0] in ran.err
    assert stand_in.given == {}
