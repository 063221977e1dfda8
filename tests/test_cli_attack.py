"""The command line: attack, evaluate and demo, and progress."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_cases import Shell
from data_cases import make_folder
from debackdoor.attacks import BadNets, save_trigger
from debackdoor.cli.progress import Stages
from debackdoor.data import load_dataset
from debackdoor.files import sha256_of

# attack, evaluate and demo


def test_from_an_attack_to_a_repaired_model(shell: Shell) -> None:
    """The real thing, small: train, measure, repair, measure."""
    folder = shell.folder / "victim"
    digits = ("--data", "digits", "--test", "digits")
    trained = shell(
        "attack", "badnets", "--arch", shell.arch, *digits, "--epochs", 8, "--poison-rate", 0.3, "--out", folder
    )
    assert trained.code == 0, trained
    record = json.loads((folder / "record.json").read_text())
    assert (record["attack"], record["dataset"], record["epochs"], record["flip"]) == ("badnets", "digits", 8, False)
    assert record["clean_accuracy"] > 0.8
    assert f"clean accuracy {record['clean_accuracy']:.1%}" in trained.out

    def measure(model: Path) -> dict[str, Any]:
        ran = shell(
            "evaluate", model, "--arch", shell.arch, "--test", "digits", "--trigger", folder / "trigger", "--json", "-"
        )
        assert ran.code == 0, ran
        return json.loads(ran.out)

    before = measure(folder / "model.safetensors")
    assert (before["schema"], before["attack"]) == ("debackdoor/evaluate/1", "badnets")
    assert before["sha256"] == record["sha256"] == sha256_of(folder / "model.safetensors")
    for rate in ("clean_accuracy", "attack_success_rate", "robust_accuracy"):
        assert before[rate] == record[rate]
    assert (before["clean_images"], before["triggered_images"]) == (500, 450)
    assert set(before["seconds"]) == {"load", "evaluate"}

    repaired = folder / "repaired.safetensors"
    model = ("repair", folder / "model.safetensors", "--arch", shell.arch, "--clean", "digits")
    ran = shell(*model, "--out", repaired, "--limit", 100, "--json", folder / "repair.json")
    assert ran.code == 0, ran
    written = json.loads((folder / "repair.json").read_text())
    assert written["clean_images"] == 100
    assert written["verification"]["passed"] is (ran.code == 0)
    after = measure(repaired)
    assert after["clean_accuracy"] > 0.7
    assert before["attack_success_rate"] > 0.8
    assert after["attack_success_rate"] < 0.3

    again = shell("attack", "badnets", "--arch", shell.arch, *digits, "--out", folder)
    assert again.code == 2
    assert "--overwrite" in again.err


def test_a_clean_model_has_no_trigger_and_no_success_rate(shell: Shell) -> None:
    folder = shell.folder / "clean"
    data = ("--data", "digits", "--test", "digits", "--limit", 200, "--epochs", 1)
    ran = shell("attack", "clean", "--arch", shell.arch, *data, "--out", folder)
    assert ran.code == 0, ran
    assert "success" not in ran.out
    record = json.loads((folder / "record.json").read_text())
    assert (record["attack"], record["attack_success_rate"]) == ("clean", None)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "record.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clean", "--target", 3), "no parameters of an attack for a clean model, got target"),
        (("clean", "--set", "foo=1"), "no parameters of an attack for a clean model, got foo"),
        (("clean", "--clean-model", "x.pt"), "no --clean-model for clean, which needs none, got x.pt"),
        (("badnets", "--clean-model", "x.pt"), "no --clean-model for badnets, which needs none, got x.pt"),
    ],
)
def test_what_would_be_ignored_is_refused(shell: Shell, arguments: tuple[object, ...], message: str) -> None:
    data = ("--arch", shell.arch, "--data", "digits", "--test", "digits", "--limit", 200)
    ran = shell("attack", *arguments, *data, "--out", shell.folder / "out")
    assert (ran.code, message in ran.err) == (4, True), ran
    assert not (shell.folder / "out").exists()


def test_the_images_that_are_trained_on_are_no_test(shell: Shell) -> None:
    file = shell.folder / "digits.npz"
    digits = load_dataset("digits", limit=60)
    np.savez(file, x=(digits.x * 255).byte().permute(0, 2, 3, 1).numpy(), y=digits.y.numpy())
    ran = shell("attack", "clean", "--arch", shell.arch, "--data", file, "--test", file, "--out", shell.folder / "out")
    assert ran.code == 2
    assert "expected a training and a test part, got the same images for both" in ran.err
    assert not (shell.folder / "out").exists()


def test_a_folder_of_the_users_outlives_the_training(shell: Shell) -> None:
    kept = shell.folder / "out" / "clean_model" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"mine")
    data = ("--arch", shell.arch, "--data", "digits", "--test", "digits", "--limit", 200, "--epochs", 1)
    assert shell("attack", "badnets", *data, "--out", shell.folder / "out").code == 0
    assert kept.read_bytes() == b"mine"


def test_parameters_of_the_attack_are_set_by_name(shell: Shell) -> None:
    folder = shell.folder / "victim"
    data = ("--data", "digits", "--test", "digits", "--limit", 200, "--epochs", 1)
    arguments = ("attack", "blend", "--arch", shell.arch, *data, "--out", folder)
    assert shell(*arguments, "--set", "alpha=0.5", "--set", "seed=7").code == 0
    record = json.loads((folder / "record.json").read_text())
    assert record["parameters"] == {"poison_rate": 0.1, "seed": 7, "alpha": 0.5}
    unknown = shell(*arguments, "--overwrite", "--set", "shade=1")
    assert unknown.code == 2
    assert "got 'shade'" in unknown.err
    assert shell(*arguments, "--overwrite", "--set", "alpha").code == 4
    assert json.loads((folder / "record.json").read_text()) == record


def test_a_trigger_that_is_found_on_the_way_is_the_one_that_is_measured_and_saved(shell: Shell) -> None:
    data = ("--arch", shell.arch, "--data", "digits", "--test", "digits")
    assert shell("attack", "clean", *data, "--epochs", 3, "--seed", 1, "--out", shell.folder / "clean").code == 0
    folder, clean = shell.folder / "victim", shell.folder / "clean" / "model.safetensors"
    made = ("attack", "trojan", *data, "--epochs", 3, "--poison-rate", 0.3, "--out", folder, "--clean-model")
    assert shell(*made, clean).code == 0
    measured = ("--arch", shell.arch, "--test", "digits", "--trigger", folder / "trigger", "--json", "-")
    rates = json.loads(shell("evaluate", folder / "model.safetensors", *measured).out)
    record = json.loads((folder / "record.json").read_text())
    assert rates["attack_success_rate"] == record["attack_success_rate"] > 0.5
    other = shell(*made, folder / "none.safetensors", "--overwrite")
    assert other.code == 2
    assert "no such file" in other.err


def test_what_an_attack_reads_is_kept(shell: Shell) -> None:
    folder = shell.folder
    (folder / "clean").mkdir()
    clean = shell.checkpoint("clean/model.safetensors")
    photos = make_folder(folder / "photos", {"ant": 4, "trigger": 4})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    digits = ("--data", "digits", "--test", "digits")
    ran = shell(
        "attack",
        "trojan",
        "--arch",
        shell.arch,
        *digits,
        "--out",
        folder / "clean",
        "--overwrite",
        "--clean-model",
        clean,
    )
    assert (ran.code, "expected a file of its own to write" in ran.err) == (2, True)
    for out in (photos, photos / "victim"):
        ran = shell("attack", "badnets", "--arch", shell.arch, "--data", photos, "--test", "digits", "--out", out)
        assert (ran.code, f"expected a place outside of {photos}, which is read" in ran.err) == (2, True)
    words = ("--data", photos / "trigger", "--test", "digits", "--out", photos, "--overwrite")
    ran = shell("attack", "badnets", "--arch", shell.arch, *words)
    assert (ran.code, "expected a folder whose trigger is not read" in ran.err) == (2, True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_stopped_attack_goes_on(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shell.folder / "victim"
    module = importlib.import_module("debackdoor.attacks.train")
    epoch = module._one_epoch
    data = ("--data", "digits", "--test", "digits", "--limit", 200, "--epochs", 3)
    arguments = ("attack", "blend", "--arch", shell.arch, *data, "--out", folder)

    def stop_in_the_last(state: Any, batches: Any, number: int, *more: Any) -> dict[str, float]:
        if number == 2:
            raise KeyboardInterrupt
        return epoch(state, batches, number, *more)

    monkeypatch.setattr(module, "_one_epoch", stop_in_the_last)
    assert shell(*arguments).code == 130
    monkeypatch.setattr(module, "_one_epoch", epoch)
    assert shell(*arguments).code == 0
    assert len(json.loads((folder / "record.json").read_text())["history"]) == 3
    assert not (folder / "training.pt").exists()


def test_a_closed_pipe_loses_no_result(shell: Shell) -> None:
    """Prints to a pipe that nobody reads, as ``| true`` makes it: the record is written all the same."""
    folder, record = shell.folder, shell.folder / "record.json"
    save_trigger(BadNets(), folder / "trigger")
    arguments = ["--arch", shell.arch, "--test", "digits", "--trigger", folder / "trigger", "--json", record]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "debackdoor", "evaluate", shell.checkpoint(), *arguments]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert record.exists()


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_demo_ends_as_its_repair_does(shell: Shell, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def run(_: object, command: list[str]) -> int:
        if command[0] == "evaluate":
            rates = {"clean_accuracy": 0.9, "attack_success_rate": 0.5}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(rates))
        return code if command[0] == "repair" else 0

    monkeypatch.setattr(importlib.import_module("debackdoor.cli.demo"), "_run", run)
    assert shell("demo").code == code


@pytest.mark.slow
def test_demo(shell: Shell) -> None:
    ran = shell("demo", "--out", shell.folder / "demo")
    assert ran.code == 0, ran
    before, after = (json.loads((shell.folder / "demo" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before["attack_success_rate"] > 0.9
    assert after["attack_success_rate"] < 0.1
    assert after["clean_accuracy"] > before["clean_accuracy"] - 0.05
    scan = ("--arch", "resnet18-w16", "--clean", "digits", "--quiet")
    assert shell("scan", shell.folder / "demo" / "model.safetensors", *scan).code == 1
    first, second = ran.out.splitlines()[-2:]
    assert first.split() == [
        "before",
        "repair",
        f"{before['clean_accuracy']:.1%}",
        f"{before['attack_success_rate']:.1%}",
    ]
    assert second.split() == [
        "after",
        "repair",
        f"{after['clean_accuracy']:.1%}",
        f"{after['attack_success_rate']:.1%}",
    ]


# Progress.


class Clock:
    """A clock that tests wind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("debackdoor.cli.progress.time.perf_counter", lambda: self.now)


def test_seconds_belong_to_the_stage_that_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with Stages(show=False) as stages:
        stages.begin("load")
        clock.now += 2
        stages("unlearn", 0, 10, {})  # begins: what came before was loading
        clock.now += 3
        stages("unlearn", 10, 10, {})
        clock.now += 5
        stages("recover", 1, 4, {})  # has done something: what came before was recovering
        clock.now += 7
    assert stages.seconds == {"load": 2, "unlearn": 3, "recover": 12}


def test_lines_come_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Stages() as stages:
        for done in range(1, 23):
            clock.now += 1
            stages("train", done, 40, {"loss": 0.123456})
    assert capsys.readouterr().err.splitlines() == [
        "train: 10 of 40, about 30 s left, loss 0.1235",
        "train: 20 of 40, about 20 s left, loss 0.1235",
    ]


def test_a_bar_where_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Stages() as stages:
        stages.begin("load")
        stages("train", 3, 4, {"loss": 0.5})
    out, err = capsys.readouterr()
    assert out == ""
    assert "train" in err
    assert "loss 0.5" in err
