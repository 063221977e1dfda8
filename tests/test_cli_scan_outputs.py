"""The forms that scan writes: what they may not replace, and findings that no failure to write hides."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pytest

import report_cases
from cli_cases import Shell, full_disk
from cli_scan_cases import StandIn, scan_of, stand_in, valid

__all__ = ["stand_in"]


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


FORMS = ("--json", "--html", "--sarif")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verdict", ["backdoored", "suspicious", "clean", "inconclusive"])
def test_no_finding_is_hidden_by_a_full_disk(
    shell: Shell, stand_in: StandIn, form: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.report = report_cases.report(verdict)
    arguments = scan_of(shell, form, shell.folder / "out", "--quiet")
    monkeypatch.setattr(os, "replace", full_disk)
    ran = shell(*arguments)
    finding = verdict in ("backdoored", "suspicious")
    assert (ran.code, ran.out) == (1 if finding else 2, "")
    assert "No space left on device; check" in ran.err
    assert ("the finding stands" in ran.err) == finding
    assert "Traceback" not in ran.err
    assert not (shell.folder / "out").exists()


def test_no_finding_is_hidden_by_a_reader_that_left(shell: Shell) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = in_a_process(scan_of(shell, "--json", "-", "--quiet"), stdout=write)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "debackdoor: the finding stands\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_takes_no_file_along(shell: Shell, stream: str) -> None:
    """What is printed in a style goes through rich, which by itself would end the program."""
    record, page = shell.folder / "out.json", shell.folder / "out.html"
    read, write = os.pipe()
    os.close(read)
    ran = in_a_process(scan_of(shell, "--json", record, "--html", page), **{stream: write})
    os.close(write)
    assert (ran.returncode, ran.stderr or "") == (1, ""), ran
    assert valid(record.read_text())["verdict"] == "backdoored"
    assert page.exists()


IN_A_PROCESS = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import importlib, report_cases; from debackdoor.cli import main; "
    "from dataclasses import replace; found = report_cases.report('backdoored'); "
    "found = replace(found, suspects=(replace(found.suspects[0], name='\u732b'),)); "
    "importlib.import_module('debackdoor.scan').scan = lambda *_, **__: found; sys.exit(main(sys.argv[1:]))"
)


def in_a_process(arguments: Sequence[object], **streams: int | IO[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, whose end must not fail either; scan finds a backdoor."""
    command = [sys.executable, "-c", IN_A_PROCESS, str(Path(__file__).parent), *map(str, arguments)]
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(command, **given, text=True, check=False)


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
    with open("/dev/full", "w") as full:
        ran = in_a_process(scan_of(shell, "--json", shell.folder / "out.json"), stdout=full)
    assert (ran.returncode, "Traceback" in ran.stderr) == (1, False), ran.stderr
    assert valid((shell.folder / "out.json").read_text())["verdict"] == "backdoored"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("missing", [False, True])
def test_errors_that_cannot_be_told_change_no_exit_code(shell: Shell, missing: bool) -> None:
    """Python itself would end with 1, a finding's."""
    arguments = list(scan_of(shell, "--json", "-", "--quiet"))
    if missing:
        arguments[1] = "none.safetensors"
    with open("/dev/full", "w") as full:
        ran = in_a_process(arguments, stdout=full, stderr=full)
    assert ran.returncode == (2 if missing else 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_record_that_fills_the_disk_is_told_of(shell: Shell) -> None:
    with open("/dev/full", "w") as full:
        ran = in_a_process(scan_of(shell, "--json", "-", "--quiet"), stdout=full)
    why = "standard output was not written: No space left on device; check the disk"
    assert (ran.returncode, ran.stderr) == (1, f"debackdoor: {why}\ndebackdoor: the finding stands\n")


def test_a_form_that_cannot_be_written_takes_no_other_along(
    shell: Shell, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("debackdoor.cli.scan"), "write_text", full_disk)
    ran = shell(*scan_of(shell, "--sarif", shell.folder / "a.sarif", "--html", shell.folder / "a.html"))
    assert (ran.code, (shell.folder / "a.html").exists()) == (2, True)


@pytest.mark.parametrize(
    ("place", "name", "written"),
    [
        ("debackdoor.report", "header", False),
        ("debackdoor.report", "scan_record", False),
        ("debackdoor.cli.scan", "_describe", True),
    ],
)
def test_whatever_fails_after_the_verdict_hides_no_finding(
    shell: Shell, stand_in: StandIn, place: str, name: str, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no more memory")

    stand_in.report = report_cases.report("backdoored")
    target = shell.folder / "out.json"
    arguments = scan_of(shell, "--json", target)
    monkeypatch.setattr(importlib.import_module(place), name, fail)
    ran = shell(*arguments)
    assert (ran.code, target.exists()) == (1, written)
    assert ran.err.endswith("no more memory; --debug shows where\ndebackdoor: the finding stands\n")


@pytest.mark.parametrize("form", ["--html", "--sarif"])
def test_standard_output_is_for_json_alone(shell: Shell, stand_in: StandIn, form: str) -> None:
    ran = shell(*scan_of(shell, form, "-"))
    assert (ran.code, stand_in.given) == (2, {})
    assert "expected a file to write, got '-', standard output; give a file name" in ran.err


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


@pytest.mark.parametrize("form", FORMS)
def test_what_a_run_wrote_beside_a_network_of_transformers_is_replaced(
    shell: Shell, stand_in: StandIn, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = shell.folder / "vit", []
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    checkpoint = shell.checkpoint()
    monkeypatch.setattr("debackdoor.models.load.resolve_arch", lambda *_: given.append("opened") or 1 / 0)
    for _ in range(2):
        shell("scan", checkpoint, "--arch", f"hf:{folder}", "--clean", "digits", form, folder / "written")
        (folder / "written").write_text("of the first run")
    assert len(given) == 2


@pytest.mark.parametrize("arch", ["./:f", "../:x", "/:x", "a/../:f", "net.:f"])
def test_a_network_that_is_neither_file_nor_module_is_refused_in_one_sentence(shell: Shell, arch: str) -> None:
    ran = shell("scan", shell.checkpoint(), "--arch", arch, "--clean", "digits", "--json", shell.folder / "a.json")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"module {arch[:-2]!r} failed to import" in ran.err
    assert ran.err.endswith("; check its name and your path\n")


@pytest.mark.parametrize("forms", [("--json", "--html"), ("--json", "--sarif"), ("--html", "--sarif")])
def test_no_form_takes_the_place_of_another(shell: Shell, stand_in: StandIn, forms: tuple[str, str]) -> None:
    ran = shell(*scan_of(shell, *(item for form in forms for item in (form, shell.folder / "out"))))
    assert (ran.code, stand_in.given) == (2, {})
    assert "expected a file of its own to write, got that of another use; give another file" in ran.err


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("images", "expected a place outside of"),
        ("images/stages", "expected a place outside of"),
        ("file", "expected a folder to write to, got a file"),
        ("out.html", "expected a folder of its own for stages"),
        ("absent/stages", None),
    ],
)
def test_stages_are_kept_in_no_place_of_another_use(
    shell: Shell, stand_in: StandIn, place: str, told: str | None
) -> None:
    keep = shell.folder / place
    (shell.folder / "images").mkdir()
    (shell.folder / "file").write_text("taken")
    given = scan_of(shell, "--keep", keep, "--html", shell.folder / "out.html")
    if place.startswith("images"):
        given[given.index("digits")] = shell.folder / "images"
    ran = shell(*given)
    if told is None:
        assert ran.code == 0
        assert stand_in.given["keep"] == keep
        return
    assert ran.code == 2
    assert told in ran.err
    assert stand_in.given == {}
    assert not (shell.folder / "images" / "stages").exists()
