"""The command repair: exit codes, what goes to which stream, records, and files that are left alone."""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import debackdoor
import report_cases
from cli_cases import Shell
from debackdoor.files import sha256_of
from debackdoor.report.records import SCAN_SCHEMA
from debackdoor.types import CleanSet, PlannedChannel, RepairResult, ScanReport, Step, Verification


class StandIn:
    """Takes the place of the repair: sets one weight to zero and returns a made-up result."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.passed = self.conclusive = True
        self.changed = True

    def __call__(self, model: nn.Module, clean: CleanSet, budget: float = 0.02, **options: Any) -> RepairResult:
        self.given = {"images": len(clean), "budget": budget, **options}
        options["progress"]("unlearn", 1, 2, {"accuracy": 0.5})
        options["progress"]("recover", 2, 2, {"accuracy": 0.75})
        if self.error is not None:
            raise self.error
        if self.changed:
            with torch.no_grad():
                model.get_parameter("0.weight")[0] = 0
        return RepairResult(
            model=model,
            plan=(PlannedChannel("1", 0, 0.25),) if self.changed else (),
            clean_accuracy={"before": 0.9, "after": 0.875},
            verification=Verification(
                self.passed, 3, {"ease_after": float("inf")}, "the check says this", self.conclusive
            ),
            history={},
            steps=(Step("prune", "one channel is enough", {"channels": 1}),),
            changed=self.changed,
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(importlib.import_module("debackdoor.repair"), "repair", made)
    return made


def repair_of(shell: Shell, *more: object) -> list[object]:
    return ["repair", shell.checkpoint(), "--arch", shell.arch, "--clean", "digits", *more]


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
    monkeypatch.setattr(importlib.import_module("debackdoor.cli.output"), "atomic_write_text", _full)
    ran = shell(*repair_of(shell, "--out", out, "--overwrite", "--scan-json", scanned))
    assert (ran.code, "scan.json was not written: No space left on device" in ran.err) == (2, True)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


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


def test_a_full_disk_is_one_sentence(shell: Shell, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
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


def test_weights_in_whole_numbers_are_refused(shell: Shell, stand_in: StandIn) -> None:
    weight = load_file(shell.checkpoint())["0.weight"]
    shell.checkpoint(**{"0.weight": (100 * weight).to(torch.int8)})
    words = ["repair", shell.folder / "model.safetensors", "--arch", shell.arch, "--clean", "digits"]
    ran = shell(*words, "--out", shell.folder / "out.safetensors")
    assert (ran.code, stand_in.given) == (2, {})
    assert "expected floating-point weights, got torch.int8 in '0.weight'; dequantise them first" in ran.err


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
