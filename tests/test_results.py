"""Published numbers: the table in the docs is the one that the run records give."""

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "repair"


def git(*arguments: str) -> str:
    """What git prints; nothing where there is no git, or no repository."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.skipif(git("rev-parse", "--is-shallow-repository") != "false", reason="needs the whole history")
def test_every_commit_that_a_record_names_is_in_the_history() -> None:
    named = {
        commit
        for path in (ROOT / "benchmarks" / "results").rglob("*.json")
        for commit in re.findall(r'"commit": "([0-9a-f]{7,40})', path.read_text())
    }
    assert len(named) > 1
    assert named - set(git("rev-list", "HEAD").split()) == set()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("repair_tables")


def test_the_docs_show_what_the_records_say(benchmark: ModuleType) -> None:
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    usual = [record for record in records if record["clean_images"] == 500]
    table, summary = benchmark.render(usual), benchmark.summary(usual)
    assert f"<!-- repair -->\n{table}\n<!-- /repair -->" in (ROOT / "docs" / "results.md").read_text()
    by_images = benchmark.by_images(records)
    assert f"<!-- repair-images -->\n{by_images}\n<!-- /repair-images -->" in (ROOT / "docs" / "results.md").read_text()
    assert f"<!-- repair-summary -->\n{summary}\n<!-- /repair-summary -->" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("module", "kind", "marker", "function", "page"),
    [
        ("scan_tables", "scan", "scan", "render", "docs/results.md"),
        ("scan_tables", "scan", "scan-calibration", "calibration", "docs/results.md"),
        ("scan_tables", "scan", "scan-summary", "summary", "README.md"),
        ("sample_tables", "samples", "samples", "render", "docs/results.md"),
        ("repair_tables", "checks", "checks", "checked", "docs/results.md"),
        ("sample_tables", "samples", "samples-summary", "summary", "README.md"),
    ],
)
def test_the_other_tables_follow_from_their_records(
    module: str, kind: str, marker: str, function: str, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    paths = sorted((ROOT / "benchmarks" / "results" / kind).glob("*.json"))
    table = getattr(importlib.import_module(module), function)([json.loads(path.read_text()) for path in paths])
    assert f"<!-- {marker} -->\n{table}\n<!-- /{marker} -->" in (ROOT / page).read_text()


@pytest.mark.parametrize(
    ("marker", "folders", "defenses"),
    [
        (
            "compare",
            [
                f"bench/{name}"
                for name in (
                    "rnp-published-0.2",
                    "rnp-checked-0.2",
                    "rnp-published-0.7",
                    "rnp-checked-0.7",
                    "ft-0.01",
                    "ft-0.05",
                )
            ],
            None,
        ),
        ("ablations", ["ablations"], None),
        ("ablations-pruning", ["ablations"], ["repair", "repair-without-pruning"]),
    ],
)
def test_defences_side_by_side_follow_from_their_records(
    marker: str, folders: list[str], defenses: list[str] | None, benchmark: ModuleType
) -> None:
    places = [RECORDS, *(RECORDS.parent / name for name in folders)]
    records = [json.loads(path.read_text()) for folder in places for path in sorted(folder.glob("*.json"))]
    chosen = [record for record in records if defenses is None or record["defense"] in defenses]
    table = benchmark.compare_defenses(chosen)
    assert f"<!-- {marker} -->\n{table}\n<!-- /{marker} -->" in (ROOT / "docs" / "results.md").read_text()


def test_times_follow_from_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (ROOT / "docs" / "performance.md").read_text()
    records = {
        kind: [json.loads(path.read_text()) for path in sorted((RECORDS.parent / kind).glob("*.json"))]
        for kind in ("speed", "speed-avx512", "gpu")
    }
    tables = importlib.import_module("speed_tables")
    shown = tables.render(records["speed"])
    shown["gpu"] = importlib.import_module("gpu").render(records["gpu"])
    assert {"speed-whole", "speed-loops", "speed-large", "gpu"} == set(shown)
    shown |= {f"{name}-avx512": text for name, text in tables.render(records["speed-avx512"]).items()}
    assert {"speed-whole-avx512", "speed-loops-avx512"} <= set(shown)
    times = importlib.import_module("zoo_times")
    shown["zoo-times"] = times.render(times.timed(RECORDS))
    shown["startup"] = importlib.import_module("startup").render(
        json.loads((RECORDS.parent / "startup.json").read_text())
    )
    for name, text in shown.items():
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in page


def test_costs_follow_from_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page, folder = (ROOT / "docs" / "scaling.md").read_text(), RECORDS.parent / "scaling"
    points = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    assert {point["grows"] for point in points} == {"images", "parameters", "classes"}
    workers = json.loads((folder / "workers.json").read_text())
    for name, text in importlib.import_module("scaling_tables").render(points, workers).items():
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in page


def test_the_matrix_follows_from_its_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shown = [ROOT / "docs" / "results.md", ROOT / "README.md", ROOT / "docs" / "matrix.html"]
    made = [tmp_path / path.name for path in shown]
    for path, copy in zip(shown[:2], made[:2], strict=True):
        copy.write_text(path.read_text())
    folders = [RECORDS, RECORDS.parent / "bench"]
    importlib.import_module("matrix").publish(folders, *made)
    assert [path.read_text() for path in made] == [path.read_text() for path in shown]


def test_der_of_every_record_follows_from_its_rates() -> None:
    """(removed success - lost accuracy + 1) / 2, nothing below zero."""
    for path in RECORDS.glob("*.json"):
        record = json.loads(path.read_text())
        if record["attack"] == "clean":
            assert record["der"] is None
            continue
        success, clean = record["attack_success_rate"], record["clean_accuracy"]
        removed = max(0.0, success["before"] - success["after"])
        lost = max(0.0, clean["before"] - clean["after"])
        assert record["der"] == pytest.approx((removed - lost + 1) / 2), path.name


def test_a_row_gives_mean_and_range(benchmark: ModuleType) -> None:
    record = json.loads(next(RECORDS.glob("badnets*.json")).read_text())
    low, high = dict(record, der=0.5, seconds=10.0), dict(record, der=0.9, seconds=20.0)
    row = benchmark.row([low, high])
    assert "| 0.700 (0.500 to 0.900) |" in row
    assert row.endswith("| 15 (10 to 20) |")


def test_defenses_stand_side_by_side_on_what_all_were_tried_on(benchmark: ModuleType) -> None:
    ours = json.loads(next(RECORDS.glob("badnets-seed*.json")).read_text())
    other = dict(ours, defense="ft-0.05", der=0.5, verification=None)
    more = dict(ours, model="blend")
    lines = benchmark.compare_defenses([ours, more, other]).splitlines()
    assert lines[0] == "| model | repair | ft-0.05 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| badnets", "| **mean**", "| **worst DER**"]
    assert lines[-1].endswith("| 0.500 |")
    assert benchmark.row([other]).count("| - |") == 1


def test_the_checks_table_counts_what_was_rejected(benchmark: ModuleType) -> None:
    def record(part: str, after: float, passed: bool) -> dict[str, object]:
        rates, check = {"before": 1.0, "after": after}, {"passed": passed}
        names = {"model": "cl", "seed": 0, "defense": f"repair-without-{part}"}
        return names | {"attack_success_rate": rates, "verification": check}

    found = benchmark.checked([record("triggers", 0.1, True), record("all", 1.0, False), record("pruning", 0.3, True)])
    assert found.splitlines()[2:] == [
        "| cl | 0 | all | 100.0% | 100.0% | rejected |",
        "| cl | 0 | pruning | 100.0% | 30.0% | passed |",
        "| cl | 0 | triggers | 100.0% | 10.0% | passed |",
        "",
        "With an ASR above 10% the check rejects 1 of 2, with less 0 of 1.",
    ]
    with pytest.raises(ValueError, match="expected records with a check, got none for cl"):
        benchmark.checked([record("all", 1.0, False) | {"verification": None}])
