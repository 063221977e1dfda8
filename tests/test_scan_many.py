"""scan-many in one process, with a stand-in for the scan: what is written, what is told, and workers that fail."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest

from debackdoor.bench import scan_store
from debackdoor.bench.executors import Outcome
from debackdoor.bench.manifest import Entry, read_manifest
from debackdoor.bench.scan_many import scan_many, scan_one
from debackdoor.bench.scan_store import Settings, Store
from debackdoor.files import sha256_of
from scan_many_cases import MODULE, Registry, StandIn, registry, run, serial, stand_in

__all__ = ["registry", "stand_in"]


def test_thirty_models_with_three_broken_files(registry: Registry, stand_in: StandIn) -> None:
    whole = [registry.model(f"m{number:02}", "backdoored" if number == 7 else "clean") for number in range(27)]
    broken = [registry.broken("cut"), "text.pt", "pickle.pt"]
    (registry.folder / "text.pt").write_text("not a checkpoint")
    (registry.folder / "pickle.pt").write_bytes(pickle.dumps({"weight": os.getcwd}))
    results = run(registry, registry.entries([*whole[:9], *broken, *whole[9:]]))
    assert len(results) == 30
    assert {name for name, result in results.items() if result.error} == {"cut", "text", "pickle"}
    assert {name for name, result in results.items() if result.verdict == "backdoored"} == {"m07"}
    assert registry.files() == {f"records/m{number:02}.json" for number in range(27)} | {
        f"errors/{name}.json" for name in ("cut", "text", "pickle")
    }
    assert "truncated or damaged" in str(results["cut"].error)
    assert "expected a safetensors or torch checkpoint, got something else" in str(results["text"].error)
    assert "was refused: it pickles more than tensors" in str(results["pickle"].error)
    assert len(stand_in.scans) == 27


def test_a_record_holds_what_decides_it(registry: Registry, stand_in: StandIn) -> None:
    path = registry.model("a", "backdoored")
    row = {"path": path, "num_classes": 2, "mean": "0.1 0.2 0.3", "std": "1 1 1", "limit": 40, "seed": 5}
    (entry,) = read_manifest(registry.manifest([row]))
    (result,) = run(registry, [entry], limit=20, seed=1, device="cpu", precision="fp32").values()
    assert stand_in.scans == [{"images": 40, "seed": 5, "device": "cpu", "precision": "fp32", "memory": 6.0}]
    record = registry.record("a")
    assert (record["checkpoint"], record["sha256"]) == (entry.path, sha256_of(entry.path))
    assert (record["name"], record["data"], record["clean_images"]) == ("a", entry.clean, 40)
    assert record["options"] == {
        "arch": entry.arch, "clean": entry.clean, "num_classes": 2, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0],
        "limit": 40, "seed": 5, "device": "cpu", "precision": "fp32", "memory": 6.0, "deterministic": False,
    }  # fmt: skip
    assert (result.path, result.arch, result.verdict, result.score) == (path, "nets/net.py:make", "backdoored", 2.56)
    assert (result.suspect_labels, result.message, result.error) == ((1,), record["message"], None)
    assert (result.sha256, result.kept, result.record) == (record["sha256"], False, "records/a.json")
    assert result.seconds == pytest.approx(sum(record["seconds"].values()))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "none.pt"}, "none.pt: expected a checkpoint file, got no such file"),
        ({"path": "nul\0.pt", "name": "a"}, "got no such file"),
        ({"arch": "resnet81"}, "expected an architecture such as"),
        ({"arch": "none.py:make"}, "expected a Python file with a factory, got no file"),
        ({"arch": "nets/net.py:leave"}, "SystemExit: 3"),
        ({"arch": "timm:resnet18"}, "timm"),
        ({"clean": "none"}, "none: expected a folder, .* got a path that does not exist"),
        ({"num_classes": 10}, "expected 10 classes as asked for, got a last layer of 2"),
    ],
)
def test_what_cannot_be_scanned_is_a_record(
    registry: Registry, stand_in: StandIn, row: dict[str, Any], message: str
) -> None:
    paths = [registry.model("a"), registry.model("b")]
    entries = read_manifest(registry.manifest([{"path": paths[0], **row}, {"path": paths[1]}]))
    name = entries[0].name
    results = run(registry, entries)
    assert registry.files() == {f"errors/{name}.json", "records/b.json"}
    record, result = registry.error(name), results[name]
    assert record["schema"] == "debackdoor/scan-error/1"
    assert list(record) == [
        "schema", "versions", "name", "checkpoint", "sha256", "error", "verdict", "seconds", "options",
    ]  # fmt: skip
    assert (result.error, result.verdict, result.score, result.message) == (record["error"], None, None, None)
    assert (result.record, result.kind) == (f"errors/{name}.json", "error")
    assert record["sha256"] == (sha256_of(entries[0].path) if "path" not in row else None)
    assert re.search(message, record["error"])
    assert "\n" not in record["error"]


def test_images_are_loaded_once(registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[object, ...]] = []
    load = MODULE.load_clean
    monkeypatch.setattr(MODULE, "load_clean", lambda *what: loads.append(what) or load(*what))
    rows = [{"path": registry.model(name), "seed": seed} for name, seed in (("a", ""), ("b", ""), ("c", 4), ("d", ""))]
    run(registry, read_manifest(registry.manifest(rows)))
    clean = str(registry.folder / "clean.npz")
    assert loads == [(clean, 500, 0), (clean, 500, 4)]


def test_a_lost_worker_is_an_error(registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it had written its record before; one of an earlier checkpoint does not count."""

    def lost(work: Any, items: Sequence[Entry], **_: object) -> Any:
        for entry in items:
            if entry.name == "late":
                work(entry)
            yield Outcome(entry, "the worker process was lost: it was ended by SIGSEGV")

    entries = registry.entries([registry.model("early", "backdoored"), registry.model("late", "backdoored")])
    run(registry, entries[:1])
    registry.model("early")
    monkeypatch.setattr(MODULE, "execute", lost)
    results = run(registry, entries)
    assert (results["early"].verdict, results["early"].seconds) == (None, None)
    assert results["early"].error == "the worker process was lost: it was ended by SIGSEGV"
    assert (results["late"].verdict, results["late"].error) == ("backdoored", None)
    assert registry.files() == {"errors/early.json", "records/late.json"}


def test_an_error_of_one_run_takes_the_record_of_no_other(
    registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs share a folder, and the second is out of memory on a model that the first has scanned meanwhile."""
    entries = registry.entries([registry.model("a", "backdoored")])

    def overtaken(work: Any, items: Sequence[Entry], **_: object) -> Any:
        for entry in items:
            with monkeypatch.context() as first:
                first.setattr(MODULE, "scan", stand_in)
                work(entry)
            work(entry)
            yield Outcome(entry, None)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(MODULE, "execute", overtaken)
    monkeypatch.setattr(MODULE, "scan", fail)
    (result,) = run(registry, entries).values()
    assert (result.verdict, result.error) == ("backdoored", None)
    assert registry.files() == {"records/a.json"}


def test_without_a_limit_of_memory_records_are_found_again(registry: Registry, stand_in: StandIn) -> None:
    """JSON has no infinity."""
    entries, settings = registry.entries([registry.model("a", "backdoored")]), Settings(memory=float("inf"))
    for kept in (False, True):
        (result,) = scan_many(entries, registry.out, settings)
        assert (result.verdict, result.error, result.kept) == ("backdoored", None, kept)


def test_what_is_no_file_is_not_read(registry: Registry, stand_in: StandIn) -> None:
    """A pipe that nobody writes to would be read for ever."""
    os.mkfifo(registry.folder / "pipe.pt")
    results = run(registry, registry.entries(["pipe.pt", registry.model("a")]))
    assert "got a folder or device" in str(results["pipe"].error)
    assert results["a"].verdict == "clean"
    assert run(registry, registry.entries(["pipe.pt"]))["pipe"].kept


def test_a_full_disk_hides_no_finding(registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    entries = registry.entries([registry.model("a", "backdoored"), registry.broken("b"), registry.model("c")])
    monkeypatch.setattr(scan_store, "atomic_write_text", full)
    results = run(registry, entries)
    why = "but no record was written: No space left on device; check the folder and the disk"
    assert results["a"].error == f"verdict backdoored, {why}"
    assert (results["a"].verdict, results["a"].kind) == ("backdoored", "backdoored")
    assert "truncated or damaged" in str(results["b"].error)
    assert (results["b"].verdict, results["c"].verdict) == (None, "clean")
    assert registry.files() == set()
    monkeypatch.undo()
    monkeypatch.setattr(MODULE, "scan", stand_in)
    monkeypatch.setattr(MODULE, "execute", serial)
    assert [result.verdict for result in run(registry, entries).values()] == ["backdoored", None, "clean"]
    assert registry.files() == {"records/a.json", "errors/b.json", "records/c.json"}


def test_a_worker_that_writes_nothing_is_told_of(
    registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of an earlier checkpoint is none of this run."""
    entries = registry.entries([registry.model("a")])
    run(registry, entries)
    registry.model("a", "backdoored")
    monkeypatch.setattr(MODULE, "execute", lambda work, items, **_: iter(Outcome(item, None) for item in items))
    (result,) = run(registry, entries).values()
    assert "got none; give a folder that all workers share" in str(result.error)


def test_a_reader_that_leaves_ends_the_work(
    registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def endless(work: Any, items: Sequence[Entry], **_: object) -> Any:
        try:
            yield from serial(work, items)
        finally:
            ended.append(True)

    monkeypatch.setattr(MODULE, "execute", endless)
    found = scan_many(registry.entries([registry.model("a"), registry.model("b")]), registry.out, Settings())
    assert next(found).name == "a"
    found.close()
    assert ended == [True]
    assert len(stand_in.scans) == 1


def test_what_a_worker_is_given_pickles(registry: Registry) -> None:
    (entry,) = registry.entries(["a.pt"])
    store = Store(registry.out, Settings())
    assert pickle.loads(pickle.dumps((scan_one, entry, store))) == (scan_one, entry, store)
    assert json.loads(json.dumps(store.settings.options(entry))) == store.settings.options(entry)
