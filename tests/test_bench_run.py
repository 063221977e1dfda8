"""Running a bench: one record a cell, and what becomes of a bench that is stopped, killed, or has cells that fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import debackdoor.bench.run as bench_run
from bench_cases import SECONDS, fake, record
from debackdoor.bench.cells import Cell, Matrix
from debackdoor.bench.executors import Outcome
from debackdoor.bench.measure import Settings, failed
from debackdoor.bench.run import Finished, run
from debackdoor.errors import DataError, DebackdoorError, in_one_line
from debackdoor.zoo import read_card


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are worked on in this process, which is faster; an interrupt may come from any of them."""

    def execute(work: Callable[[Cell], None], items: Sequence[Cell], **_: Any) -> Iterator[Outcome[Cell]]:
        for item in items:
            try:
                work(item)
                yield Outcome(item, None)
            except Exception as error:
                yield Outcome(item, in_one_line(error))

    monkeypatch.setattr(bench_run, "execute", execute)


def matrix(zoo: Path, **given: Any) -> Matrix:
    return Matrix(zoo=zoo, **{"models": ["patch"], "defenses": ["ft-0.01"], "seeds": [0, 1, 2, 3]} | given)


def told(finished: Sequence[Finished]) -> dict[int, tuple[bool, bool]]:
    """For every seed whether its record was there, and whether it is an error."""
    return {item.cell.seed: (item.kept, item.record["error"] is not None) for item in finished}


def test_a_worker_killed_in_the_middle_loses_nothing(zoo: Path, tmp_path: Path) -> None:
    """Seed 1's is killed once and tried again; seed 2's twice, which is an error in its record."""
    (tmp_path / "kills-1").write_text("x")
    (tmp_path / "kills-2").write_text("xx")
    out = tmp_path / "out"
    done = list(run(matrix(zoo), out, workers=2, measure=partial(fake, tmp_path)))
    assert dict(sorted(told(done).items())) == {
        0: (False, False),
        1: (False, False),
        2: (False, True),
        3: (False, False),
    }
    assert [(item.number, item.total) for item in done] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == [Path("ft-0.01") / f"patch-seed{seed}-n500.json" for seed in range(4)]
    lost = json.loads((out / files[2]).read_text())
    assert lost["error"].startswith("the worker process was lost: it was ended by SIGKILL")
    assert lost["clean_accuracy"] == {"before": None, "after": None}


@pytest.mark.usefixtures("here")
def test_a_bench_goes_on_where_it_was(zoo: Path, tmp_path: Path) -> None:
    work, out = partial(fake, tmp_path), tmp_path / "out"
    for item in run(matrix(zoo), out, measure=work):
        if item.cell.seed == 1:
            break
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert len(first) == 2
    assert told(list(run(matrix(zoo), out, measure=work))) == {seed: (seed < 2, False) for seed in range(4)}
    assert {path: path.stat().st_mtime_ns for path in first} == first
    done = list(run(matrix(zoo), out, measure=work))
    assert [(item.kept, item.number, item.total) for item in done] == [(True, number, 4) for number in (1, 2, 3, 4)]


@pytest.mark.usefixtures("here")
def test_failed_cells_are_recorded_and_tried_again_on_request(zoo: Path, tmp_path: Path) -> None:
    work, out, fails = partial(fake, tmp_path), tmp_path / "out", tmp_path / "fails-1"
    fails.touch()
    cells = matrix(zoo, seeds=[0, 1])
    assert told(list(run(cells, out, measure=work))) == {0: (False, False), 1: (False, True)}
    fails.unlink()
    done = list(run(cells, out, measure=work))
    assert told(done) == {0: (True, False), 1: (True, True)}
    found = done[1].record
    assert found["error"] == "RuntimeError: it did not work"
    assert (found["der"], found["seconds"], found["attack"]) == (None, None, "badnets")
    assert told(list(run(cells, out, retry_failed=True, measure=work))) == {0: (True, False), 1: (False, False)}
    assert told(list(run(cells, out, measure=work))) == {0: (True, False), 1: (True, False)}


@pytest.mark.usefixtures("here")
def test_a_card_that_is_gone_stops_nothing(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    cells = run(matrix(tmp_path / "zoo", seeds=[0, 1]), tmp_path / "out", measure=partial(fake, tmp_path))
    assert next(cells).record["error"] is None
    (tmp_path / "zoo" / "patch.json").unlink()
    (rest,) = cells
    assert "patch.json" in rest.record["error"]
    assert (rest.record["model"], rest.record["attack"]) == ("patch", "badnets")


@pytest.mark.usefixtures("here")
def test_cells_without_the_rates_after_fine_tuning_are_measured_again(zoo: Path, tmp_path: Path) -> None:
    """Not those of models that were left alone, which are never fine-tuned."""

    def work(settings: Settings, cell: Cell) -> dict[str, Any]:
        made = fake(tmp_path, settings, cell) | {"changed": cell.seed != 1}
        tuned = {"fine_tuned": 0.8} if settings.fine_tune and made["changed"] else {}
        return made | {"clean_accuracy": {**made["clean_accuracy"], **tuned}}

    cells = matrix(zoo, seeds=[0, 1])
    for fine_tune, kept in ((False, False), (False, True), (True, False), (True, True), (False, True)):
        done = list(run(cells, tmp_path / "out", fine_tune=fine_tune, measure=work))
        assert told(done)[0] == (kept, False)
    assert told(done)[1] == (True, False)


@pytest.mark.usefixtures("here")
def test_fine_tunings_that_failed_are_tried_again_on_request(zoo: Path, tmp_path: Path) -> None:
    def work(settings: Settings, cell: Cell) -> dict[str, Any]:
        return fake(tmp_path, settings, cell) | {"changed": True, "fine_tuning_error": "it diverged"}

    cells, out = matrix(zoo, seeds=[0]), tmp_path / "out"
    for retry_failed, kept in ((False, False), (False, True), (True, False)):
        (item,) = run(cells, out, fine_tune=True, retry_failed=retry_failed, measure=work)
        assert (item.kept, item.record["error"]) == (kept, None)


@pytest.mark.usefixtures("here")
def test_a_failure_where_only_the_fine_tuned_rates_were_wanting(zoo: Path, tmp_path: Path) -> None:
    """It is told, and the rates that there are stay."""

    def work(settings: Settings, cell: Cell) -> dict[str, Any]:
        if settings.fine_tune:
            raise DataError("expected more, got less")
        return fake(tmp_path, settings, cell) | {"changed": True}

    cells, out = matrix(zoo, seeds=[0]), tmp_path / "out"
    (before,) = run(cells, out, measure=work)
    (item,) = run(cells, out, fine_tune=True, measure=work)
    assert (item.kept, item.record["error"]) == (False, "expected more, got less")
    assert list(run(cells, out, measure=work)) == [replace(before, kept=True)]


def test_a_record_that_no_worker_wrote_here(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of a cluster that does not share the folder is an error of its cell, and stops nothing."""
    monkeypatch.setattr(bench_run, "execute", lambda _, items, **__: (Outcome(item, None) for item in items))
    done = list(run(matrix(zoo, seeds=[0, 1]), tmp_path / "out", measure=partial(fake, tmp_path)))
    assert told(done) == {0: (False, True), 1: (False, True)}
    assert all("give a folder that all workers share" in item.record["error"] for item in done)


def test_an_error_takes_no_record_away(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two benches may work on one folder, and the second run out of memory; or a process is lost after it wrote."""
    cells, done = matrix(zoo, seeds=[0]), tmp_path / "done"

    def lost(work: Callable[[Cell], None], items: Sequence[Cell], **_: Any) -> Iterator[Outcome[Cell]]:
        for item in items:
            if done.exists():
                work(item)
            yield Outcome(item, "the worker process was lost")

    monkeypatch.setattr(bench_run, "execute", lost)
    assert told(list(run(cells, tmp_path / "first", measure=partial(fake, tmp_path)))) == {0: (False, True)}
    done.touch()
    assert told(list(run(cells, tmp_path / "second", measure=partial(fake, tmp_path)))) == {0: (False, False)}


def test_a_cluster_may_have_the_device_that_this_machine_has_not(zoo: Path, tmp_path: Path) -> None:
    work = partial(fake, tmp_path)
    with pytest.raises(DebackdoorError, match="expected a CUDA device"):
        run(matrix(zoo), tmp_path / "out", device="cuda", measure=work)
    pytest.importorskip("ray", reason="the library ray is not installed")
    run(matrix(zoo), tmp_path / "out", device="cuda", executor="ray", address="127.0.0.1:1", measure=work).close()
    assert failed(read_card(zoo / "patch.json"), Cell("patch", "ft-0.01", 0, 60), "lost")["device"] is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "other"}, "expected a record with sha256 '[0-9a-f]{64}', got one with 'other'; delete it"),
        ({"defense_parameters": {"lr": 9}}, "expected a record with defense_parameters"),
        ({"seed": 1}, "expected a record with seed 0, got one with 1"),
        ({"schema": "debackdoor/scan/1"}, "expected schema 'debackdoor/bench/1', got 'debackdoor/scan/1'"),
    ],
)
def test_a_record_of_something_else_is_never_taken(
    zoo: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    cells = matrix(zoo, seeds=[0])
    path = tmp_path / cells.cells()[0].file
    path.parent.mkdir()
    sha256 = read_card(zoo / "patch.json").sha256
    path.write_text(json.dumps(record("patch", "ft-0.01", 0.9, sha256=sha256)))
    assert told(list(run(cells, tmp_path))) == {0: (True, False)}
    path.write_text(json.dumps(record("patch", "ft-0.01", 0.9, sha256=sha256) | change))
    with pytest.raises(DebackdoorError, match=message):
        run(cells, tmp_path)
    path.write_text('{"schema": "debackd')
    with pytest.raises(DebackdoorError, match="expected JSON, got something else or half a file"):
        run(cells, tmp_path)


@pytest.mark.slow
def test_ray_gives_the_same_records_as_this_machine(zoo: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the library ray is not installed")
    cells = Matrix(zoo=zoo, models=["patch", "clean-1"], defenses=["ft-0.01"], seeds=[0], clean_images=[60])
    found = []
    for executor, workers in (("local", 1), ("ray", 2)):
        out = tmp_path / f"{executor}-{workers}"
        done = list(run(cells, out, executor=executor, workers=workers, device="cpu"))  # type: ignore[arg-type]
        assert all(item.record["error"] is None for item in done)
        found.append({item.cell: {**item.record, **dict.fromkeys(SECONDS)} for item in done})
    assert found[0] == found[1]
    assert len(found[0]) == 2
    again = list(run(replace(cells, seeds=[0]), tmp_path / "ray-2"))
    assert all(item.kept for item in again)
