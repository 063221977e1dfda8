"""The command line of the bench: run and table, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import debackdoor.bench.run as bench_run
from bench_cases import record
from cli_cases import Shell, full_disk
from debackdoor.bench.executors import Outcome
from debackdoor.cli import output
from debackdoor.errors import in_one_line

Zoo = tuple[Path, Path]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Cells are measured in this process; the list has what was given, and what it begins with is raised instead."""
    given: list[Any] = []

    def execute(work: Callable[[Any], None], items: Sequence[Any], **settings: Any) -> Iterator[Outcome[Any]]:
        for item in items:
            if given and isinstance(given[0], BaseException):
                raise given[0]
            given.append(settings)
            try:
                work(item)
                yield Outcome(item, None)
            except Exception as error:
                yield Outcome(item, in_one_line(error))

    monkeypatch.setattr(bench_run, "execute", execute)
    return given


def test_run_and_table(shell: Shell, small_zoo: Zoo, here: list[Any]) -> None:
    """Asked for too many clean images, half of the cells fail."""
    out, matrix = shell.folder / "out", shell.folder / "matrix.toml"
    matrix.write_text(f'zoo = "{small_zoo[0] / "tiny"}"\nmodels = ["patch", "clean-1"]\ndefenses = ["ft-0.01"]\n')
    command = ("bench", "run", matrix, "--out", out, "--clean-images", 60, "--threads", 3, "--device", "cpu")
    ran = shell(*command)
    assert ran.code == 0, ran
    first, second, last = ran.out.splitlines()
    assert first.startswith("1 of 2: clean-1, ft-0.01, seed 0, 60 images: CA ")
    assert "ASR" not in first
    assert second.startswith("2 of 2: patch, ft-0.01, seed 0, 60 images: CA ")
    assert ", DER 0." in second
    assert last == "2 cells: 2 measured now, 0 were there, 0 failed"
    assert here[0] == {"executor": "local", "workers": 1, "threads": 3, "address": None, "gpus": 0}
    ran = shell(*command, "--clean-images", 100_000)
    assert ran.code == 1
    assert "4 cells: 2 measured now, 2 were there, 2 failed; --retry-failed measures those again" in ran.out
    assert "failed: patch, ft-0.01, seed 0, 100000 images: digits: expected 100000 clean images, got " in ran.out
    quiet = shell(*command, "--clean-images", 100_000, "--quiet")
    assert (quiet.code, quiet.out, quiet.err.count("failed: ")) == (1, "", 2)
    files = [shell.folder / name for name in ("table.md", "table.csv", "table.html")]
    ran = shell("bench", "table", out, "--markdown", files[0], "--csv", files[1], "--html", files[2])
    assert ran.code == 0, ran
    assert ran.out == files[0].read_text()
    assert "| ft-0.01 | yes | 1 | " in ran.out
    assert "1 backdoored model, 1 seed, 60 clean images. 2 cells failed and left out." in ran.out
    assert files[1].read_text().startswith("defense,blind,cells,der_mean,")
    assert files[2].read_text().startswith("<!doctype html>")


def test_an_interrupted_run_says_how_far_it_is(shell: Shell, small_zoo: Zoo, here: list[Any]) -> None:
    zoo = small_zoo[0] / "tiny"
    command = ("bench", "run", "--out", shell.folder / "out", "--zoo", zoo, "--defense", "ft-0.01", "--model", "patch")
    assert shell(*command, "--clean-images", 30).code == 0
    here[:] = [KeyboardInterrupt()]
    ran = shell(*command, "--clean-images", 30, "--clean-images", 40)
    assert ran.code == 130
    assert ran.out == "1 of 2 cells have their record; the same command goes on from there\n"
    assert ran.err.splitlines()[-1] == "debackdoor: interrupted"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 4, "Missing command"),
        (("run",), 4, "'--out'"),
        (("run", "--out", "OUT", "--workers", "0"), 4, "'--workers'"),
        (("run", "--out", "OUT", "--executor", "slurm"), 4, "'--executor'"),
        (("run", "--out", "OUT", "--address", "auto"), 4, "expected --address with --executor ray, got it without"),
        (("run", "--out", "OUT", "--gpus", "1"), 4, "expected --gpus with --executor ray"),
        (("run", "--out", "/dev/null/out"), 2, "expected a folder to write to"),
        (("run", "no.toml", "--out", "OUT"), 2, "no.toml: expected a matrix, got an error"),
        (("run", "--out", "OUT", "--zoo", "nowhere"), 2, "nowhere: expected a folder with a zoo's cards, got none"),
        (("run", "--out", "OUT", "--zoo", "ZOO", "--model", "x"), 2, "expected models out of clean-1, patch, shifted"),
        (("run", "--out", "OUT", "--zoo", "ZOO", "--defense", "x"), 2, "expected defenses out of rnp"),
        (("run", "--out", "OUT", "--zoo", "ZOO", "--seed", "-1"), 2, "expected seeds of at least 0, got -1"),
        (("table",), 4, "'DIRS'"),
        (("table", "OUT"), 2, "expected a folder with records, got none"),
        (("table", "RECORDS", "--defense", "x"), 2, "expected defences out of ours, got 'x'"),
        (("table", "RECORDS", "--html", "/nowhere/a.html"), 2, "/nowhere: expected a folder to write to, got none"),
        (("run", "--zoo", "ZOO", "--out", __file__), 2, "expected a folder to write to, got a file; give another"),
    ],
)
def test_bad_input(shell: Shell, small_zoo: Zoo, arguments: tuple[str, ...], code: int, message: str) -> None:
    records = shell.folder / "records"
    records.mkdir()
    (records / "a.json").write_text(json.dumps(record("badnets", "ours", 0.9)))
    known = {"OUT": str(shell.folder / "out"), "ZOO": str(small_zoo[0] / "tiny"), "RECORDS": str(records)}
    ran = shell("bench", *(known.get(word, word) for word in arguments))
    assert ran.code == code, ran
    assert message in ran.err
    assert not (shell.folder / "out").exists()


def test_a_table_takes_the_place_of_no_record_and_of_no_other_form(shell: Shell) -> None:
    folder = shell.folder / "records"
    folder.mkdir()
    path = folder / "a.json"
    path.write_text(json.dumps(record("badnets", "ours", 0.9)))
    for outputs in (("--csv", path), ("--csv", shell.folder / "t", "--html", shell.folder / "t"), ("--html", "-")):
        ran = shell("bench", "table", folder, *outputs)
        assert (ran.code, ran.err.count("\n")) == (2, 1), ran
    assert json.loads(path.read_text())["model"] == "badnets"
    assert shell.files() == {folder, path, shell.folder / "net.py"}


def test_a_form_that_cannot_be_written_takes_no_other_along(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, csv = shell.folder / "records", shell.folder / "t.csv"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(record("badnets", "ours", 0.9)))
    written = output.atomic_write_text

    def full_for_markdown(path: Path, text: str) -> None:
        (full_disk if path.suffix == ".md" else written)(path, text)

    monkeypatch.setattr(output, "atomic_write_text", full_for_markdown)
    ran = shell("bench", "table", folder, "--markdown", shell.folder / "t.md", "--csv", csv)
    assert (ran.code, csv.exists()) == (2, True)
    assert f"{shell.folder / 't.md'} was not written: No space left on device" in ran.err


@pytest.mark.parametrize(("more", "workers"), [((), None), (("--workers", 3), 3)])
def test_a_cluster_gets_what_it_has_room_for(
    shell: Shell, small_zoo: Zoo, here: list[Any], more: tuple[object, ...], workers: int | None
) -> None:
    zoo, ray = small_zoo[0] / "tiny", ("--executor", "ray", "--address", "head:6379")
    shell("bench", "run", "--out", shell.folder / "out", "--zoo", zoo, "--model", "patch", "--seed", 0, *ray, *more)
    assert here[0]["workers"] == workers


def test_without_ray_one_sentence_says_so(shell: Shell, small_zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    out, zoo = shell.folder / "out", small_zoo[0] / "tiny"
    ran = shell("bench", "run", "--out", out, "--zoo", zoo, "--defense", "ft-0.01", "--executor", "ray")
    assert ran.code == 2
    assert ran.err.splitlines()[-1].endswith("pip install 'debackdoor[bench]'")


def test_help_needs_none_of_what_takes_long() -> None:
    script = (
        "import sys; from debackdoor.cli import main; main(['bench', 'run', '--help']); "
        "print([name for name in ('torch', 'ray', 'jinja2', 'pyarrow') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
