"""Executors: what becomes of items, of processes that die, and of those that are left when the reader stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import bench_works
from bench_works import devices, is_running, rest, threads, until, work
from debackdoor.bench.executors import Outcome, execute, run_local, run_ray
from debackdoor.errors import DebackdoorError, MissingDependencyError

ITEMS = ["one", "raise", "die-once", "two", "exit", "die-always", "three"]


def check_outcomes(outcomes: dict[str, Outcome[str]], folder: Path, lost: str) -> None:
    assert sorted(outcomes) == sorted(ITEMS)
    errors = {item: outcome.error for item, outcome in outcomes.items() if outcome.error is not None}
    assert sorted(errors) == ["die-always", "exit", "raise"]
    assert errors["raise"] == "ValueError: two lines"
    assert errors["exit"] == "SystemExit: 3"
    assert lost in str(errors["die-always"])
    assert {path.name for path in folder.iterdir() if not path.suffix} == {"one", "two", "three", "die-once"}
    assert {path.name: len(path.read_text()) for path in folder.glob("*.tries")} == {
        "die-once.tries": 2,
        "die-always.tries": 2,
    }
    assert {(folder / name).read_text().split()[1] for name in ("one", "two", "three")} == {"1"}


def test_a_process_that_dies_loses_no_more_than_its_item(tmp_path: Path) -> None:
    """Killed once, it is tried again; killed twice, it is an error; all others are done."""
    outcomes = {outcome.item: outcome for outcome in run_local(partial(work, tmp_path), ITEMS, workers=2)}
    check_outcomes(outcomes, tmp_path, "the worker process was lost: it was ended by SIGKILL")
    assert not is_running(int((tmp_path / "one").read_text().split()[0]))


def test_a_process_is_kept_for_the_next_item(tmp_path: Path) -> None:
    items = ["a", "b", "raise", "c"]
    outcomes = list(execute(partial(work, tmp_path), items, threads=2))
    assert [outcome.item for outcome in outcomes] == items  # one worker takes them in their order
    said = {(tmp_path / name).read_text() for name in "abc"}
    assert len(said) == 1
    assert said.pop().split()[1] == "2"


def test_torch_has_the_threads(tmp_path: Path) -> None:
    assert [outcome.error for outcome in run_local(partial(threads, tmp_path), ["a"], threads=2)] == [None]
    assert (tmp_path / "a").read_text() == "2"


def test_without_retries_one_death_is_an_error(tmp_path: Path) -> None:
    (outcome,) = run_local(partial(work, tmp_path), ["die-once"], retries=0)
    assert "SIGKILL" in str(outcome.error)
    assert (tmp_path / "die-once.tries").read_text() == "x"


def test_nothing_to_do() -> None:
    assert list(run_local(print, [])) == []


def test_a_reader_that_stops_ends_the_processes(tmp_path: Path) -> None:
    outcomes = run_local(partial(rest, tmp_path), [0, 1], workers=2)
    assert next(outcomes) == Outcome(0, None)
    until((tmp_path / "1.pid").exists)
    outcomes.close()
    assert not is_running(int((tmp_path / "1.pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C goes to the whole group, and only the first process says something; a kill goes to the first alone."""
    script = str(Path(bench_works.__file__))
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        pids = [tmp_path / f"{item}.pid" for item in (1, 2)]
        until(lambda: all(path.exists() and path.read_text() for path in pids))
        running = [int(path.read_text()) for path in pids]
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    until(lambda: not any(map(is_running, running)))
    assert said.count("Traceback") == (number == signal.SIGINT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "expected workers above 0, got 0"),
        ({"threads": 0}, "expected threads above 0, got 0"),
        ({"retries": -1}, "expected retries of at least 0, got -1"),
        ({"executor": "ray", "workers": 0}, "expected workers above 0, got 0"),
        ({"executor": "ray", "gpus": -1}, "expected gpus of at least 0, got -1"),
        ({"executor": "ray", "retries": -1}, "expected retries of at least 0, got -1"),
    ],
)
def test_numbers_are_checked_before_anything_is_started(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DebackdoorError, match=message):
        execute(print, [1], **settings)


def test_one_sentence_where_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"expected the library ray.*pip install 'debackdoor\[bench\]'$"):
        run_ray(print, [1])


@pytest.fixture
def found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray starts looks for modules where this process does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.mark.slow
@pytest.mark.usefixtures("found_by_workers")
def test_ray_does_the_same(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="the library ray is not installed")
    outcomes = {outcome.item: outcome for outcome in run_ray(partial(work, tmp_path), ITEMS, workers=2)}
    check_outcomes(outcomes, tmp_path, "the worker process was lost: WorkerCrashedError")
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.usefixtures("found_by_workers")
def test_a_task_without_a_gpu_sees_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the library ray is not installed")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [outcome.error for outcome in run_ray(partial(devices, tmp_path), ["a"])] == [None]
    assert (tmp_path / "a").read_text() == ""


def test_with_nothing_to_do_no_cluster_is_asked() -> None:
    pytest.importorskip("ray", reason="the library ray is not installed")
    assert list(run_ray(print, [], address="127.0.0.1:1")) == []


@pytest.mark.slow
def test_what_this_machine_will_never_have() -> None:
    pytest.importorskip("ray", reason="the library ray is not installed")
    with pytest.raises(DebackdoorError, match="expected 1 CPUs and 99 GPUs for each task, got 1 and"):
        next(run_ray(print, [1], workers=1, gpus=99))


@pytest.mark.slow
def test_an_address_without_a_cluster() -> None:
    pytest.importorskip("ray", reason="the library ray is not installed")
    with pytest.raises(DebackdoorError, match=r"expected a Ray cluster at 127\.0\.0\.1:1, got an error"):
        next(run_ray(print, [1], address="127.0.0.1:1"))
