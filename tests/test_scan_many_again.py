"""scan-many run again over the same folder, with a stand-in for the scan: what is kept, and what is done again."""

from __future__ import annotations

from typing import Any

import pytest

from debackdoor.bench.manifest import read_manifest
from debackdoor.bench.scan_store import Settings, Store, hash_of
from scan_many_cases import MODULE, Registry, StandIn, registry, run, stand_in

__all__ = ["registry", "stand_in"]


def test_a_rerun_scans_nothing_again(registry: Registry, stand_in: StandIn) -> None:
    entries = registry.entries([registry.model("a", "suspicious"), registry.broken("b"), "none.pt"])
    first = run(registry, entries)
    before = {path: path.stat().st_mtime_ns for path in registry.out.rglob("*.json")}
    second = run(registry, entries)
    assert len(stand_in.scans) == 1
    assert all(result.kept for result in second.values())
    assert {name: (r.verdict, r.error, r.seconds) for name, r in first.items()} == {
        name: (r.verdict, r.error, r.seconds) for name, r in second.items()
    }
    assert {path: path.stat().st_mtime_ns for path in registry.out.rglob("*.json")} == before


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"limit": 40}, {"device": "cpu"}, {"precision": "fp32"}, {"memory": 3.0}],
    ids=lambda change: next(iter(change)),
)
def test_other_options_are_another_scan(registry: Registry, stand_in: StandIn, change: dict[str, Any]) -> None:
    entries = registry.entries([registry.model("a")])
    run(registry, entries)
    run(registry, entries, **change)
    assert len(stand_in.scans) == 2
    assert registry.record("a")["options"] | change == registry.record("a")["options"]


def test_another_file_is_another_scan(registry: Registry, stand_in: StandIn) -> None:
    entries = registry.entries([registry.model("a"), registry.model("b")])
    run(registry, entries)
    registry.model("b", "backdoored")
    results = run(registry, entries)
    assert [(result.verdict, result.kept) for result in results.values()] == [("clean", True), ("backdoored", False)]
    registry.broken("b")
    results = run(registry, entries)
    assert results["b"].error
    assert registry.files() == {"records/a.json", "errors/b.json"}
    registry.model("b", "suspicious")
    assert run(registry, entries)["b"].verdict == "suspicious"
    assert registry.files() == {"records/a.json", "records/b.json"}


def test_an_error_with_other_options_takes_no_scan_away(registry: Registry, stand_in: StandIn) -> None:
    """A mistyped option or manifest."""
    entries = registry.entries([registry.model("a", "backdoored")])
    run(registry, entries)
    (wrong,) = read_manifest(registry.manifest([{"path": registry.model("a", "backdoored"), "clean": "none.npz"}]))
    assert run(registry, [wrong])["a"].error
    assert registry.files() == {"records/a.json", "errors/a.json"}
    result = run(registry, entries)["a"]
    assert (result.verdict, result.kept) == ("backdoored", True)
    assert len(stand_in.scans) == 1


def test_a_file_that_is_away_for_once_takes_no_scan_away(registry: Registry, stand_in: StandIn) -> None:
    entries = registry.entries([registry.model("a", "backdoored")])
    run(registry, entries)
    path = registry.folder / "a.safetensors"
    path.rename(registry.folder / "away")
    assert run(registry, entries)["a"].error
    (registry.folder / "away").rename(path)
    result = run(registry, entries)["a"]
    assert (result.verdict, result.kept, len(stand_in.scans)) == ("backdoored", True, 1)


def test_what_counts_as_a_finding_needs_no_other_scan(registry: Registry, stand_in: StandIn) -> None:
    entries = registry.entries([registry.model("a", "suspicious")])
    run(registry, entries)
    run(registry, entries, fail_on="backdoored")
    assert len(stand_in.scans) == 1
    assert registry.record("a")["fail_on"] == "backdoored"


def test_errors_are_tried_again_on_request(registry: Registry, stand_in: StandIn) -> None:
    rows = [{"path": registry.model("a"), "clean": "later.npz"}, {"path": registry.model("b")}]
    entries = read_manifest(registry.manifest(rows))
    assert run(registry, entries)["a"].error
    (registry.folder / "later.npz").write_bytes((registry.folder / "clean.npz").read_bytes())
    assert run(registry, entries)["a"].error
    results = run(registry, entries, retry_failed=True)
    assert [(result.verdict, result.kept) for result in results.values()] == [("clean", True), ("clean", False)]
    assert (list(results), registry.files()) == (["b", "a"], {"records/a.json", "records/b.json"})
    assert len(stand_in.scans) == 2


def test_of_both_records_that_fit_the_scan_counts(registry: Registry, stand_in: StandIn) -> None:
    """Both are there where a run was killed between writing the one and removing the other."""
    entries = registry.entries([registry.model("a", "backdoored")])
    run(registry, entries)
    store = Store(registry.out, Settings())
    kept = (registry.out / "records" / "a.json").read_bytes()
    store.write_error(entries[0], store.error_record(entries[0], "the worker process was lost", hash_of(entries[0])))
    (registry.out / "records" / "a.json").write_bytes(kept)
    assert run(registry, entries)["a"].verdict == "backdoored"
    registry.broken("a")
    assert "truncated" in str(run(registry, entries)["a"].error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema": "debackdoor/scan/1"}',
        '{"schema": "debackdoor/repair/1"}',
        '{"schema": []}',
        "\ud800",
    ],
)
def test_what_is_no_record_is_scanned_again(registry: Registry, stand_in: StandIn, text: str) -> None:
    entries = registry.entries([registry.model("a")])
    run(registry, entries)
    (registry.out / "records" / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert not run(registry, entries)["a"].kept
    assert registry.record("a")["verdict"] == "clean"


def test_what_was_found_in_a_checkpoint_that_is_replaced_meanwhile_stands(
    registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run scans what is there by then."""
    entries = registry.entries([registry.model("a")])
    run(registry, entries)
    registry.model("a", "backdoored")

    def replaced(*arguments: Any, **options: Any) -> Any:
        report = stand_in(*arguments, **options)
        registry.model("a", "suspicious")
        return report

    monkeypatch.setattr(MODULE, "scan", replaced)
    (result,) = run(registry, entries).values()
    assert (result.verdict, result.error, result.kept) == ("backdoored", None, False)
    assert registry.files() == {"records/a.json"}
    monkeypatch.setattr(MODULE, "scan", stand_in)
    (result,) = run(registry, entries).values()
    assert (result.verdict, result.kept) == ("suspicious", False)


def test_a_file_that_was_still_being_copied_is_tried_again(
    registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = registry.entries([registry.broken("a")])

    def complete(*_: object) -> None:
        registry.model("a", "backdoored")
        raise RuntimeError("truncated")

    with monkeypatch.context() as first:
        first.setattr(MODULE, "_scan", complete)
        assert run(registry, entries)["a"].error == "RuntimeError: truncated"
    assert run(registry, entries)["a"].verdict == "backdoored"


def test_a_verdict_in_an_error_outlives_the_run(registry: Registry, stand_in: StandIn) -> None:
    entries = registry.entries([registry.model("a")])
    store = Store(registry.out, Settings())
    store.make()
    store.write_error(
        entries[0],
        store.error_record(entries[0], "verdict backdoored, but ...", hash_of(entries[0]), 1.5, "backdoored"),
    )
    (result,) = run(registry, entries).values()
    assert (result.kept, result.verdict, result.kind, result.seconds) == (True, "backdoored", "backdoored", 1.5)
