"""Files that repair writes: what they may not replace, and what becomes of those that cannot be written."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cli_cases import Shell, full_disk
from cli_repair_cases import StandIn, repair_of, stand_in
from debackdoor.types import RepairResult

__all__ = ["stand_in"]


def _existing(shell: Shell) -> list[object]:
    (shell.folder / "old.safetensors").write_text("mine")
    return ["--out", shell.folder / "old.safetensors"]


def _input(shell: Shell) -> list[object]:
    return ["--out", shell.folder / "model.safetensors"]


def _input_by_another_name(shell: Shell) -> list[object]:
    shell.checkpoint()
    os.link(shell.folder / "model.safetensors", shell.folder / "same.safetensors")
    return ["--out", shell.folder / "same.safetensors"]


def _folder(shell: Shell) -> list[object]:
    return ["--out", shell.folder, "--overwrite"]


def _no_folder(shell: Shell) -> list[object]:
    return ["--out", shell.folder / "nowhere" / "out.safetensors"]


def _json_without_folder(shell: Shell) -> list[object]:
    return ["--out", shell.folder / "out.safetensors", "--json", shell.folder / "nowhere" / "out.json"]


def _json_over_input(shell: Shell) -> list[object]:
    return ["--out", shell.folder / "out.safetensors", "--overwrite", "--json", shell.folder / "model.safetensors"]


def _json_over_output_by_a_detour(shell: Shell) -> list[object]:
    (shell.folder / "sub").mkdir()
    out = shell.folder / "out.safetensors"
    return ["--out", out, "--json", shell.folder / "sub" / ".." / "out.safetensors"]


def _json_over_output_by_a_link(shell: Shell) -> list[object]:
    out, link = shell.folder / "out.safetensors", shell.folder / "link.json"
    link.symlink_to(out)
    return ["--out", out, "--json", link]


def _json_over_network(shell: Shell) -> list[object]:
    return ["--out", shell.folder / "out.safetensors", "--json", shell.folder / "net.py"]


def _model_over_network(shell: Shell) -> list[object]:
    return ["--out", shell.folder / "net.py", "--overwrite"]


def _scan_to_stdout(shell: Shell) -> list[object]:
    return ["--out", shell.folder / "out.safetensors", "--scan-json", "-"]


def _json_over_output(shell: Shell) -> list[object]:
    return ["--out", shell.folder / "out.safetensors", "--json", shell.folder / "out.safetensors"]


@pytest.mark.parametrize(
    "outputs",
    [
        _existing,
        _input,
        _input_by_another_name,
        _folder,
        _no_folder,
        _json_without_folder,
        _json_over_input,
        _json_over_output,
        _json_over_output_by_a_detour,
        _json_over_output_by_a_link,
        _json_over_network,
        _model_over_network,
        _scan_to_stdout,
    ],
)
def test_outputs_that_cannot_be_are_refused_before_the_work(
    shell: Shell, stand_in: StandIn, outputs: Callable[[Shell], list[object]]
) -> None:
    arguments = repair_of(shell, *outputs(shell))
    before = {path: path.read_bytes() for path in shell.files() if path.is_file()}
    ran = shell(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert stand_in.given == {}
    assert {path: path.read_bytes() for path in shell.files() if path.is_file()} == before


@pytest.mark.parametrize("outputs", [_existing, _input])
def test_overwrite(shell: Shell, stand_in: StandIn, outputs: Callable[[Shell], list[object]]) -> None:
    out = outputs(shell)
    assert shell(*repair_of(shell, *out, "--overwrite")).code == 0
    assert not load_file(str(out[1]))["0.weight"][0].any()


def test_a_full_disk_is_one_sentence(shell: Shell, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full_disk)
    out = shell.folder / "out.safetensors"
    ran = shell(*repair_of(shell, "--out", out, "--quiet"))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "No space left on device" in ran.err
    ran = shell(*repair_of(shell, "--out", out, "--json", shell.folder / "out.json", "--quiet"))
    record, model = ran.err.splitlines()  # neither error takes the other's place
    assert (ran.code, "out.json" in record, "out.safetensors" in model) == (2, True, True)
    stand_in.passed = False
    ran = shell(*repair_of(shell, "--out", out, "--quiet"))
    assert ran.code == 1  # a later error hides no finding
    warning, sentence, stands = ran.err.splitlines()
    assert "the check says this" in warning
    assert "No space left on device" in sentence
    assert "the finding stands" in stands
    assert not out.exists()


def test_an_image_is_not_replaced_by_a_record_but_a_record_beside_it_is(shell: Shell, stand_in: StandIn) -> None:
    folder = shell.folder / "images"
    folder.mkdir()
    (folder / "photo.png").write_text("mine")
    (folder / "old.json").write_text("{}")
    words = ["repair", shell.checkpoint(), "--arch", shell.arch, "--clean", folder, "--out", shell.folder / "o.pt"]
    ran = shell(*words, "--json", folder / "photo.png")
    assert (ran.code, (folder / "photo.png").read_text()) == (2, "mine")
    assert "expected a file of its own to write" in ran.err
    assert "expected a file of its own to write" not in shell(*words, "--json", folder / "old.json").err


@pytest.fixture
def gone(shell: Shell, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that vanishes during the work."""
    folder, work = shell.folder / "gone", StandIn.__call__
    folder.mkdir()

    def vanish(self: StandIn, *given: Any, **options: Any) -> RepairResult:
        folder.rmdir()
        return work(self, *given, **options)

    monkeypatch.setattr(StandIn, "__call__", vanish)
    return folder


@pytest.mark.parametrize("passed", [True, False])
def test_a_record_that_cannot_be_written_takes_no_other_along(
    shell: Shell, stand_in: StandIn, gone: Path, passed: bool
) -> None:
    stand_in.passed = passed
    record, page, out = gone / "record.json", shell.folder / "page.html", shell.folder / "out.pt"
    ran = shell(*repair_of(shell, "--out", out, "--json", record, "--html", page, "--quiet"))
    assert ran.code == (2 if passed else 1)
    assert f"{record} was not written: No such file or directory; check the folder" in ran.err
    assert ("the finding stands" in ran.err) is not passed
    assert page.exists()
    assert out.exists()


def test_every_record_that_cannot_be_written_is_named(shell: Shell, stand_in: StandIn, gone: Path) -> None:
    stand_in.passed = False
    records = ("--json", gone / "record.json", "--html", gone / "page.html")
    ran = shell(*repair_of(shell, "--out", shell.folder / "out.pt", *records, "--quiet"))
    assert ran.code == 1
    assert "record.json" in ran.err
    assert "page.html" in ran.err


@pytest.mark.parametrize(
    ("place", "name", "written"), [("report", "repair_record", False), ("cli.repair", "_describe", True)]
)
@pytest.mark.parametrize("passed", [True, False])
def test_whatever_fails_after_the_repair_loses_no_model_and_hides_no_finding(
    shell: Shell, stand_in: StandIn, passed: bool, place: str, name: str, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no more memory")

    stand_in.passed = passed
    out, record = shell.folder / "out.pt", shell.folder / "record.json"
    arguments = repair_of(shell, "--out", out, "--json", record)
    monkeypatch.setattr(importlib.import_module(f"debackdoor.{place}"), name, fail)
    ran = shell(*arguments)
    assert (ran.code, out.exists(), record.exists()) == (2 if passed else 1, True, written)
    assert "no more memory" in ran.err
    assert ("the finding stands" in ran.err) is not passed


def test_html_shows_the_steps_and_takes_no_ones_place(shell: Shell, stand_in: StandIn) -> None:
    page = shell.folder / "page.html"
    out = shell.folder / "out.safetensors"
    ran = shell(*repair_of(shell, "--out", out, "--html", page))
    assert ran.code == 0
    text = page.read_text()
    assert "one channel is enough" in text
    assert "debackdoor repair" in text
    assert f"--html {page}" in text
    stand_in.given = {}
    again = shell(*repair_of(shell, "--out", shell.folder / "b.safetensors", "--html", shell.checkpoint()))
    assert (again.code, stand_in.given) == (2, {})
    assert "expected a file of its own to write" in again.err
