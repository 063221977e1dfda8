"""The command detect: exit codes, what goes to which stream, its record, and copies of what passes."""

from __future__ import annotations

import errno
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import Tensor, nn

from cli_cases import Shell
from data_cases import png
from debackdoor.cli.detect import OWN, Method, On
from debackdoor.detect import DETECTORS, MODELS
from debackdoor.detect import OWN as LIBRARY_OWN
from debackdoor.detectors.shift import REPAIR_SHIFT
from debackdoor.report import load_schema
from debackdoor.types import CleanSet, SampleScores


class StandIn:
    """Takes the place of the detection: scores are the images' numbers, and 10 more if flagged, so above 10."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.flagged, self.p_value = [2, 3], 1e-6

    def __call__(self, model: nn.Module, clean: CleanSet, images: Tensor, **options: Any) -> SampleScores:
        self.given = {"images": len(clean), "pile": images, **options}
        options["progress"]("unlearn", 1, 2, {"accuracy": 0.5})
        if self.error is not None:
            raise self.error
        flags = torch.tensor([index in self.flagged for index in range(len(images))])
        scores = torch.arange(float(len(images))) + 10 * flags
        answers = torch.full((len(images),), 7)
        return SampleScores(scores, 10.0, flags, answers, options["false_positive_rate"], self.p_value, "a stand-in")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(importlib.import_module("debackdoor.detect"), "detect_samples", made)
    return made


def pile_of(shell: Shell, count: int = 4) -> Path:
    """A folder of images 0.png, 1.png, ... of that red; the last is in a sub-folder."""
    folder = shell.folder / "pile"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        name = str(index).zfill(len(str(count - 1))) + ".png"
        (folder / ("sub" if index == count - 1 else "") / name).write_bytes(png((index, 0, 0)))
    return folder


def detect_of(shell: Shell, *more: object, count: int = 4) -> list[object]:
    return [
        "detect", shell.checkpoint(), "--arch", shell.arch, "--clean", "digits", "--suspects", pile_of(shell, count),
        *more,
    ]  # fmt: skip


def valid(text: str) -> Any:
    """The record, if it is as its schema says."""
    record = json.loads(text)
    Draft202012Validator(load_schema("detect")).validate(record)
    return record


@pytest.mark.parametrize(("p_value", "code"), [(1e-6, 1), (0.00099, 1), (0.001, 0), (1.0, 0)])
def test_exit_codes(shell: Shell, stand_in: StandIn, p_value: float, code: int) -> None:
    stand_in.p_value = p_value
    ran = shell(*detect_of(shell))
    assert (ran.code, ran.err) == (code, "")
    assert ran.out.splitlines() == [
        "flagged: sub/3.png, which the model calls 7 (score 13)",
        "flagged: 2.png, which the model calls 7 (score 12)",
        "2 of 4 images are flagged, by a stand-in; of clean images it would be at most about 1.0%",
    ]


def test_of_many_flagged_images_ten_are_named(shell: Shell, stand_in: StandIn) -> None:
    stand_in.flagged = list(range(13))
    lines = shell(*detect_of(shell, count=14)).out.splitlines()
    assert [line.split()[1] for line in lines[:10]] == [f"{index:02}.png," for index in range(12, 2, -1)]
    assert lines[10] == "... and 3 more, which --json names"
    assert lines[11].startswith("13 of 14 images")


def test_the_record_holds_the_settings_and_every_image(shell: Shell, stand_in: StandIn) -> None:
    target = shell.folder / "out.json"
    more = ("--fpr", 0.05, "--method", "strip", "--on", "original", "--seed", 3, "--limit", 60, "--device", "cpu")
    assert shell(*detect_of(shell, "--json", target, *more)).code == 1
    stages, pile = stand_in.given.pop("progress"), stand_in.given.pop("pile")
    assert [round(float(image[0, 0, 0]) * 255) for image in pile] == [0, 1, 2, 3]
    assert stand_in.given == {
        "images": 60, "method": "strip", "on": "original", "false_positive_rate": 0.05, "seed": 3, "device": "cpu",
        "precision": "auto", "memory": 6.0,
    }  # fmt: skip
    record = valid(target.read_text())
    assert list(record["seconds"]) == list(stages.seconds) == ["load", "unlearn"]
    assert (record["clean_images"], record["suspect_images"], record["flagged"]) == (60, 4, 2)
    assert (record["threshold"], record["false_positive_rate"], record["p_value"]) == (10.0, 0.05, 1e-6)
    assert [(row["image"], row["score"], row["flagged"], row["answer"]) for row in record["samples"]] == [
        ("0.png", 0.0, False, 7), ("1.png", 1.0, False, 7), ("2.png", 12.0, True, 7), ("sub/3.png", 13.0, True, 7)
    ]  # fmt: skip


def test_json_on_stdout_stands_alone_and_quiet_says_nothing(shell: Shell, stand_in: StandIn) -> None:
    ran = shell(*detect_of(shell, "--json", "-", "--clean-out", shell.folder / "out"))
    assert valid(ran.out)["method"] == "a stand-in"
    assert "copied 2 images" in ran.err
    ran = shell(*detect_of(shell, "--quiet"))
    assert (ran.code, ran.out, ran.err) == (1, "", "")


def test_a_file_name_cannot_forge_a_line_or_reach_the_terminal(shell: Shell, stand_in: StandIn) -> None:
    arguments = detect_of(shell)
    (shell.folder / "pile" / "2.png").rename(shell.folder / "pile" / "2\x1b[2J\nflagged: x.png")
    ran = shell(*arguments)
    assert "flagged: 2\ufffd[2J flagged: x.png, which the model calls 7 (score 12)" in ran.out.splitlines()
    (shell.folder / "pile" / "1.png").rename(shell.folder / "pile" / "1\x1b[2J\n.png")
    (shell.folder / "pile" / "1\x1b[2J\n.png").write_bytes(b"no image")
    ran = shell(*arguments)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "1\ufffd[2J .png" in ran.err


def test_the_methods_are_those_of_the_library() -> None:
    assert tuple(Method) == (REPAIR_SHIFT, *DETECTORS)
    assert tuple(On) == MODELS
    assert OWN == LIBRARY_OWN


@pytest.mark.parametrize("method", [(), ("--method", "exposed-margin")])
def test_the_original_model_is_for_published_methods(shell: Shell, stand_in: StandIn, method: tuple[str, ...]) -> None:
    """A wrong usage, before any file is read."""
    ran = shell("detect", "no.pt", "--arch", "no", "--clean", "no", "--suspects", "no", "--on", "original", *method)
    assert (ran.code, ran.out, ran.err.count("\n")) == (4, "", 1)
    assert (
        "--on: expected exposed for repair-shift and exposed-margin, got original; choose another --method" in ran.err
    )
    assert stand_in.given == {}


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
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stand_in.p_value = p_value
    record, copies = (detect_of(shell, option, shell.folder / "out") for option in ("--json", "--clean-out"))
    for place, name, arguments in ((os, "replace", record), (Path, "mkdir", copies)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            ran = shell(*arguments, "--quiet")
        assert (ran.code, ran.out) == (code, "")
        assert "No space left on device" in ran.err
        assert ("the finding stands" in ran.err) == (code == 1)
        assert not (shell.folder / "out").exists()


@pytest.mark.parametrize(("p_value", "code"), [(1e-6, 1), (1.0, 2)])
def test_a_record_that_cannot_be_written_takes_no_copy_along(
    shell: Shell, stand_in: StandIn, p_value: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stand_in.p_value = p_value
    arguments = detect_of(shell, "--json", shell.folder / "a.json", "--clean-out", shell.folder / "out")
    monkeypatch.setattr(os, "replace", fail)
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
        (lambda shell: ["--clean-out", shell.folder / "pile"], "pile: expected a folder outside of"),
        (lambda shell: ["--clean-out", shell.folder / "pile" / "passed"], "passed: expected a folder outside of"),
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


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "debackdoor: interrupted\n"),
        (RuntimeError("mat1 and mat2\ncannot be multiplied"), 2, "unexpected RuntimeError: mat1 and mat2; --debug"),
    ],
)
def test_errors_from_within(shell: Shell, stand_in: StandIn, error: BaseException, code: int, message: str) -> None:
    stand_in.error = error
    ran = shell(*detect_of(shell, "--clean-out", shell.folder / "out"))
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1)
    assert message in ran.err
    assert not (shell.folder / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "expected suspect images"),
        (("--suspects", "nowhere"), "nowhere: expected a folder"),
    ],
)
def test_bad_input_is_one_sentence(shell: Shell, more: tuple[str, ...], message: str) -> None:
    """Nothing stands in here; the images of the pile are of another size than the digits."""
    ran = shell(*detect_of(shell, *more, "--limit", 100))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert message.replace("suspect images", "images of shape (3, 32, 32)") in ran.err


@pytest.mark.parametrize(
    ("limit", "message"), [(19, "expected at least 20 clean images, got 19"), (100, "no better than chance")]
)
def test_where_a_scan_would_be_inconclusive_no_file_is_written(shell: Shell, limit: int, message: str) -> None:
    """Nothing stands in here: a network with random weights is at chance."""
    arguments = detect_of(shell, "--json", shell.folder / "a.json", "--clean-out", shell.folder / "out")
    arguments[7] = "digits"
    before = shell.files()
    ran = shell(*arguments, "--limit", limit)
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert message in ran.err
    assert shell.files() == before
