"""The command scan: exit codes, what goes to which stream, and the forms that its finding is written in."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import save_file
from torch import nn

import report_cases
from cli_cases import Shell
from debackdoor.data import load_clean
from debackdoor.files import sha256_of
from debackdoor.report import load_schema
from debackdoor.types import CleanSet, ScanReport


class StandIn:
    """Takes the place of the scan: returns a made-up report."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.report: ScanReport = report_cases.report("clean")

    def __call__(self, model: nn.Module, clean: CleanSet, **options: Any) -> ScanReport:
        self.given = {"model": model, "images": len(clean), **options}
        options["progress"]("unlearn", 1, 2, {"accuracy": 0.5})
        if self.error is not None:
            raise self.error
        return self.report


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(importlib.import_module("debackdoor.scan"), "scan", made)
    return made


def scan_of(shell: Shell, *more: object) -> list[object]:
    return ["scan", shell.checkpoint(), "--arch", shell.arch, "--clean", "digits", *more]


def valid(text: str) -> Any:
    """The record, if it is as its schema says."""
    record = json.loads(text)
    Draft202012Validator(load_schema("scan")).validate(record)
    return record


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
    more = ("--seed", 3, "--limit", 60, "--device", "cpu", "--all-triggers", "--fail-on", "backdoored")
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
    }
    record = valid(target.read_text())
    assert record["seconds"] == {stage: round(value, 3) for stage, value in stages.seconds.items()}
    assert list(stages.seconds) == ["load", "unlearn"]
    wanted = {
        "checkpoint": str(checkpoint), "sha256": sha256_of(checkpoint), "arch": shell.arch, "num_classes": 10,
        "data": "digits", "seed": 3, "clean_images": 60, "fail_on": "backdoored", "verdict": "backdoored",
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


def test_every_form_is_written(shell: Shell, stand_in: StandIn) -> None:
    stand_in.report = report_cases.report("backdoored")
    page, log = shell.folder / "out.html", shell.folder / "out.sarif"
    log.write_text("of an earlier scan")
    arguments = scan_of(shell, "--html", page, "--sarif", log, "--quiet")
    ran = shell(*arguments)
    assert (ran.code, ran.out, ran.err) == (1, "", "")
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert "Backdoored" in html
    assert f"debackdoor scan {arguments[1]} --arch {shell.arch} --clean digits" in html
    (run,) = json.loads(log.read_text())["runs"]
    assert [result["ruleId"] for result in run["results"]] == ["DBD001"]
    assert run["properties"]["verdict"] == "backdoored"


def test_quiet_says_nothing(shell: Shell, stand_in: StandIn) -> None:
    ran = shell(*scan_of(shell, "--quiet"))
    assert (ran.code, ran.out, ran.err) == (0, "", "")


FORMS = ("--json", "--html", "--sarif")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verdict", ["backdoored", "suspicious", "clean", "inconclusive"])
def test_no_finding_is_hidden_by_a_full_disk(
    shell: Shell, stand_in: StandIn, form: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stand_in.report = report_cases.report(verdict)
    arguments = scan_of(shell, form, shell.folder / "out", "--quiet")
    monkeypatch.setattr(os, "replace", fail)
    ran = shell(*arguments)
    finding = verdict in ("backdoored", "suspicious")
    assert (ran.code, ran.out) == (1 if finding else 2, "")
    assert "No space left on device; check" in ran.err
    assert ("the finding stands" in ran.err) == finding
    assert "Traceback" not in ran.err
    assert not (shell.folder / "out").exists()


def test_no_finding_is_hidden_by_a_reader_that_left(shell: Shell) -> None:
    """In a process of its own, whose end must not fail either."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import importlib, report_cases; "
        "from debackdoor.cli import main; "
        "importlib.import_module('debackdoor.scan').scan = lambda *_, **__: report_cases.report('backdoored'); "
        "sys.exit(main(sys.argv[1:]))"
    )
    tests = str(Path(__file__).parent)
    arguments = [str(argument) for argument in scan_of(shell, "--json", "-", "--quiet")]
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-c", code, tests, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "debackdoor: the finding stands\n")


IN_A_PROCESS = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import importlib, report_cases; from debackdoor.cli import main; "
    "from dataclasses import replace; found = report_cases.report('backdoored'); "
    "found = replace(found, suspects=(replace(found.suspects[0], name='\u732b'),)); "
    "importlib.import_module('debackdoor.scan').scan = lambda *_, **__: found; sys.exit(main(sys.argv[1:]))"
)


def test_a_terminal_of_few_letters_hides_no_finding(shell: Shell) -> None:
    arguments = [str(argument) for argument in scan_of(shell, "--json", shell.folder / "out.json")]
    ran = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, str(Path(__file__).parent), *arguments],
        env=os.environ | {"PYTHONIOENCODING": "latin-1:strict"},
        capture_output=True,
        check=False,
    )
    assert (ran.returncode, b"Traceback" in ran.stderr) == (1, False)
    assert b"(\\u732b)" in ran.stdout
    assert valid((shell.folder / "out.json").read_text())["suspect_labels"][0]["name"] == "\u732b"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_words_that_cannot_be_written_hide_no_finding(shell: Shell) -> None:
    arguments = [str(argument) for argument in scan_of(shell, "--json", shell.folder / "out.json")]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS, str(Path(__file__).parent), *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (ran.returncode, "Traceback" in ran.stderr) == (1, False), ran.stderr
    assert valid((shell.folder / "out.json").read_text())["verdict"] == "backdoored"


def test_a_form_that_cannot_be_written_takes_no_other_along(
    shell: Shell, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importlib.import_module("debackdoor.cli.scan"), "write_text", fail)
    ran = shell(*scan_of(shell, "--sarif", shell.folder / "a.sarif", "--html", shell.folder / "a.html"))
    assert (ran.code, (shell.folder / "a.html").exists()) == (2, True)


@pytest.mark.parametrize("form", ["--html", "--sarif"])
def test_standard_output_is_for_json_alone(shell: Shell, stand_in: StandIn, form: str) -> None:
    ran = shell(*scan_of(shell, form, "-"))
    assert (ran.code, stand_in.given) == (2, {})
    assert "expected a file to write, got '-', standard output; give a file name" in ran.err


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["model.safetensors", "same.safetensors", "images.npz", "", "nowhere/out"])
def test_outputs_that_cannot_be_are_refused_before_the_work(
    shell: Shell, stand_in: StandIn, form: str, place: str
) -> None:
    arguments = scan_of(shell, form, shell.folder / place)
    arguments[5] = shell.images([0, 1] * 20)
    os.link(shell.folder / "model.safetensors", shell.folder / "same.safetensors")
    before = {path: path.read_bytes() for path in shell.files() if path.is_file()}
    ran = shell(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "expected a fil" in ran.err or "expected a folder" in ran.err
    assert stand_in.given == {}
    assert {path: path.read_bytes() for path in shell.files() if path.is_file()} == before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["file", "module", "package", "transformers", "word"])
def test_no_form_takes_the_place_of_a_network_or_named_images(
    shell: Shell, stand_in: StandIn, form: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ``--arch`` and ``--clean`` stand for is read, under whatever name."""
    folder = shell.folder
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DEBACKDOOR_DATA", str(folder))
    for place in ("cifar10/0/0.png", "nets/own.py", "vit/config.json"):
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_text("mine")
    arch, clean, target = {
        "file": (shell.arch, "digits", "net.py"),
        "module": ("net:make", "digits", "net.py"),
        "package": ("nets.own:make", "digits", "nets/own.py"),
        "transformers": ("hf:vit", "digits", "vit/config.json"),
        "word": (shell.arch, "cifar10", "cifar10/0/0.png"),
    }[kind]
    before = (folder / target).read_bytes()
    ran = shell("scan", shell.checkpoint(), "--arch", arch, "--clean", clean, form, folder / target)
    assert (ran.code, stand_in.given) == (2, {})
    assert "expected a file of its own to write" in ran.err
    assert (folder / target).read_bytes() == before


@pytest.mark.parametrize("forms", [("--json", "--html"), ("--json", "--sarif"), ("--html", "--sarif")])
def test_no_form_takes_the_place_of_another(shell: Shell, stand_in: StandIn, forms: tuple[str, str]) -> None:
    ran = shell(*scan_of(shell, *(item for form in forms for item in (form, shell.folder / "out"))))
    assert (ran.code, stand_in.given) == (2, {})
    assert "expected a file of its own to write, got that of another use; give another file" in ran.err
