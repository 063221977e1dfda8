"""Copies of what detect lets pass, and where it writes: what it may not replace, and what no failure hides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cli_cases import Shell, full_disk
from cli_detect_cases import StandIn, detect_of, stand_in

__all__ = ["stand_in"]


@pytest.mark.parametrize("exists", [False, True])
def test_what_passes_is_copied_and_nothing_is_deleted(shell: Shell, stand_in: StandIn, exists: bool) -> None:
    arguments, out = detect_of(shell), shell.folder / "out"
    if exists:
        out.mkdir()
    before = {path: path.read_bytes() for path in shell.files() if path.is_file()}
    ran = shell(*arguments, "--clean-out", out)
    assert (ran.code, ran.err) == (1, "")
    assert ran.out.endswith(f"copied 2 images that pass to {out}\n")
    copies = {path.name: path.read_bytes() for path in out.iterdir()}
    assert copies == {name: (shell.folder / "pile" / name).read_bytes() for name in ("0.png", "1.png")}
    after = {path: path.read_bytes() for path in shell.files() if path.is_file() and out not in path.parents}
    assert after == before


def test_images_of_a_data_file_pass_as_png_files(shell: Shell, stand_in: StandIn) -> None:
    arguments = detect_of(shell, "--clean-out", shell.folder / "out")
    arguments[7] = shell.images([0, 1, 0, 1])
    assert "flagged: row 3, which" in shell(*arguments).out
    assert sorted(path.name for path in (shell.folder / "out").iterdir()) == ["row-0.png", "row-1.png"]


@pytest.mark.parametrize(("p_value", "code"), [(1e-6, 1), (1.0, 2)])
def test_no_finding_is_hidden_by_a_full_disk(
    shell: Shell, stand_in: StandIn, p_value: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.p_value = p_value
    record, copies = (detect_of(shell, option, shell.folder / "out") for option in ("--json", "--clean-out"))
    for place, name, arguments in ((os, "replace", record), (Path, "mkdir", copies)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full_disk)
            ran = shell(*arguments, "--quiet")
        assert (ran.code, ran.out) == (code, "")
        assert "No space left on device" in ran.err
        assert ("the finding stands" in ran.err) == (code == 1)
        assert not (shell.folder / "out").exists()


@pytest.mark.parametrize(("p_value", "code"), [(1e-6, 1), (1.0, 2)])
def test_a_record_that_cannot_be_written_takes_no_copy_along(
    shell: Shell, stand_in: StandIn, p_value: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.p_value = p_value
    arguments = detect_of(shell, "--json", shell.folder / "a.json", "--clean-out", shell.folder / "out")
    monkeypatch.setattr(os, "replace", full_disk)
    ran = shell(*arguments)
    assert (ran.code, "a.json was not written: No space left" in ran.err) == (code, True)
    assert sorted(path.name for path in (shell.folder / "out").iterdir()) == ["0.png", "1.png"]


def _existing(shell: Shell) -> list[object]:
    (shell.folder / "out").mkdir()
    (shell.folder / "out" / "old.png").write_text("mine")
    return ["--clean-out", shell.folder / "out"]


def _record_inside(shell: Shell) -> list[object]:
    (shell.folder / "out").mkdir()
    return ["--clean-out", shell.folder / "out", "--json", shell.folder / "out" / "a.json"]


def _file(shell: Shell) -> list[object]:
    (shell.folder / "out").write_text("mine")
    return ["--clean-out", shell.folder / "out"]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (_existing, "out: expected an empty folder or none, got one with files in it; give another"),
        (_file, "out: expected an empty folder or none, got a file; give another"),
        (lambda shell: ["--clean-out", shell.folder / "pile"], "pile: expected a place outside of"),
        (lambda shell: ["--clean-out", shell.folder / "pile" / "passed"], "passed: expected a place outside of"),
        (lambda shell: ["--clean-out", shell.folder / "a", "--json", shell.folder / "a"], "expected a record outside"),
        (_record_inside, "a.json: expected a record outside of"),
        (lambda shell: ["--clean-out", shell.folder / "no" / "out"], "expected a folder to write to, got none; make"),
        (lambda shell: ["--json", shell.folder / "no" / "out.json"], "expected a folder to write to, got none; make"),
        (lambda shell: ["--json", shell.folder / "model.safetensors"], "expected a file of its own to write"),
        (lambda shell: ["--json", shell.images([0, 1])], "expected a file of its own to write"),
        (lambda shell: ["--json", shell.folder], "expected a file to write, got a folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_the_work(
    shell: Shell, stand_in: StandIn, outputs: Any, message: str
) -> None:
    arguments = detect_of(shell, *outputs(shell))
    if (shell.folder / "images.npz").exists():
        arguments[7] = shell.folder / "images.npz"
    before = {path: path.read_bytes() for path in shell.files() if path.is_file()}
    ran = shell(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert message in ran.err
    assert stand_in.given == {}
    assert {path: path.read_bytes() for path in shell.files() if path.is_file()} == before


@pytest.mark.parametrize("kind", ["the current one", "a mount"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    shell: Shell, stand_in: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shell.folder / "out"
    out.mkdir()
    if kind == "a mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    else:
        monkeypatch.chdir(out)
    ran = shell(*detect_of(shell, "--clean-out", out))
    assert (ran.code, ran.out, stand_in.given) == (2, "", {})
    assert f"out: expected a folder that can be replaced, got {kind}; give a new one in it" in ran.err
