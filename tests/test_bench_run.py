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
import torch

import debackdoor.bench.run as bench_run
from bench_cases import fake, record
from debackdoor.bench import measure as measuring
from debackdoor.bench.cells import Cell, Matrix
from debackdoor.bench.executors import Outcome
from debackdoor.bench.measure import Settings, failed, measure
from debackdoor.bench.run import Finished, run
from debackdoor.bench.work import in_one_line
from debackdoor.errors import DataError, DebackdoorError
from debackdoor.zoo import read_card

Zoo = tuple[Path, Path]

SECONDS = ("seconds", "cpu_seconds", "peak_memory_mib")
"""What differs from one run to the next."""


@pytest.fixture
def zoo(small_zoo: Zoo) -> Path:
    return small_zoo[0] / "tiny"


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


def test_weights_that_are_not_those_of_the_card_are_refused(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    (tmp_path / "zoo" / "patch.safetensors").write_bytes((zoo / "clean-1.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"expected SHA-256 [0-9a-f]{64} as on its card, got .*; build the model again"):
        measure(Settings(tmp_path / "zoo", "cpu"), Cell("patch", "ft-0.01", 0, 120))


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


def test_a_record_has_what_was_measured(zoo: Path) -> None:
    """Before the defence the rates are those on the card; the DER follows from them."""
    card = read_card(zoo / "patch.json")
    found = measure(Settings(zoo, "cpu", fine_tune=True), Cell("patch", "ft-0.05", 1, 120))
    assert found["schema"] == "debackdoor/bench/1"
    assert (found["model"], found["attack"], found["defense"], found["blind"]) == ("patch", "badnets", "ft-0.05", True)
    assert (found["seed"], found["clean_images"], found["error"]) == (1, 120, None)
    assert found["defense_parameters"]["lr"] == 0.05
    assert "seed" not in found["defense_parameters"]
    rates = [found[name] for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy")]
    assert [rate["before"] for rate in rates] == pytest.approx(
        [card.clean_accuracy, card.attack_success_rate, card.robust_accuracy]
    )
    assert all(set(rate) == {"before", "after", "fine_tuned"} for rate in rates)
    removed = max(0.0, rates[1]["before"] - rates[1]["after"])
    assert found["der"] == pytest.approx((removed - max(0.0, rates[0]["before"] - rates[0]["after"]) + 1) / 2)
    assert found["seconds"] > 0
    assert 50 < found["peak_memory_mib"] < 20_000
    assert [step["name"] for step in found["steps"]] == ["fine-tune"]
    assert found["device"] == "cpu"
    assert json.loads(json.dumps(found)) == found
    error = failed(card, Cell("patch", "ft-0.05", 1, 120), "why")
    assert set(error) == set(found)
    assert error["error"] == "why"


def test_a_clean_model_has_no_rates_of_triggers_and_no_der(zoo: Path) -> None:
    found = measure(Settings(zoo, "cpu"), Cell("clean-1", "ft-0.01", 0, 120))
    assert found["attack_success_rate"] == found["robust_accuracy"] == {"before": None, "after": None}
    assert found["der"] is None
    assert 0.5 < found["clean_accuracy"]["after"] <= 1


def test_a_record_is_the_same_again_but_for_the_time(zoo: Path) -> None:
    records = [measure(Settings(zoo, "cpu"), Cell("patch", "ft-0.01", 3, 60)) for _ in range(2)]
    first, second = ({**found, **dict.fromkeys(SECONDS)} for found in records)
    assert first == second


def test_the_model_is_measured_once_before_all_defences(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring._rates_before.cache_clear()
    calls = []
    evaluate = measuring.evaluate

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given)
        return evaluate(*given, **more)

    monkeypatch.setattr(measuring, "evaluate", counted)
    for seed in (0, 1):
        measure(Settings(zoo, "cpu"), Cell("patch", "ft-0.01", seed, 30))
    assert len(calls) == 3  # once before, and once after each


def test_too_few_images_are_an_error_of_the_cell(zoo: Path) -> None:
    with pytest.raises(DataError, match=r"digits: expected 100000 clean images, got \d+; ask for fewer"):
        measure(Settings(zoo, "cpu"), Cell("patch", "ft-0.01", 0, 100_000))


def test_nobody_elses_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a repository that does not track this package, as outside of any, there is none to name."""
    measuring.commit.cache_clear()
    monkeypatch.setattr(measuring, "__file__", str(tmp_path / "measure.py"))
    assert measuring.commit() is None
    measuring.commit.cache_clear()


def test_peak_memory_is_that_of_the_work_alone() -> None:
    """Of 200 MB that were there and are gone again nothing is left in it; of 100 MB in between it has them."""
    from debackdoor.bench.memory import PeakMemory

    def peak(megabytes: int) -> int:
        memory = PeakMemory(torch.device("cpu"))
        torch.ones(megabytes, 250_000)
        found = memory.record()["peak_memory_mib"]
        assert found is not None
        return found

    before = peak(1)
    assert peak(200) > before + 150
    assert peak(100) < before + 150


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
