"""The command scan-many: exit codes, what goes to which stream, the files at the end, and what is refused at once."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from typing import Any

import pyarrow.parquet as pq
import pytest

from cli_cases import Ran, Shell
from debackdoor.bench import overview
from debackdoor.bench.executors import Outcome
from debackdoor.errors import MissingDependencyError
from scan_many_cases import MODULE, Registry, StandIn, registry, serial, stand_in

__all__ = ["registry", "stand_in"]


def ran(shell: Shell, registry: Registry, verdicts: list[str], *more: object) -> Ran:
    """A run over one model a verdict; ``error`` stands for a broken file."""
    paths = [
        registry.broken(f"m{at}") if verdict == "error" else registry.model(f"m{at}", verdict)
        for at, verdict in enumerate(verdicts)
    ]
    manifest = registry.manifest([{"path": path} for path in paths])
    return shell("scan-many", manifest, "--out", registry.out, *more)


@pytest.mark.parametrize(
    ("verdicts", "fail_on", "code"),
    [
        (["clean", "clean"], None, 0),
        (["clean", "inconclusive"], None, 3),
        (["inconclusive", "error", "clean"], None, 2),
        (["error", "suspicious", "inconclusive", "error"], None, 1),
        (["backdoored", "error"], None, 1),
        (["suspicious", "clean"], "backdoored", 0),
        (["suspicious", "inconclusive"], "backdoored", 3),
        (["suspicious", "error", "inconclusive"], "backdoored", 2),
        (["error", "backdoored", "suspicious"], "backdoored", 1),
    ],
)
def test_the_worst_decides(
    shell: Shell, registry: Registry, stand_in: StandIn, verdicts: list[str], fail_on: str | None, code: int
) -> None:
    more = ("--fail-on", fail_on) if fail_on else ()
    assert ran(shell, registry, verdicts, *more).code == code
    again = ran(shell, registry, verdicts, *more)
    assert (again.code, len(stand_in.scans)) == (code, sum(verdict != "error" for verdict in verdicts))
    assert f"{len(verdicts)} of them from an earlier run" in again.out


def test_a_path_that_cannot_be_looked_up_stops_nothing(shell: Shell, registry: Registry, stand_in: StandIn) -> None:
    manifest = registry.manifest([{"path": 300 * "x", "name": "long"}, {"path": registry.model("a")}])
    done = shell("scan-many", manifest, "--out", registry.out)
    assert (done.code, registry.files()) == (2, {"errors/long.json", "records/a.json"})
    assert "long: error, " in done.out


def test_what_is_said_and_written(shell: Shell, registry: Registry, stand_in: StandIn) -> None:
    verdicts = ["clean", "error", "backdoored", "clean", "error", "suspicious"]
    target = registry.folder / "all.json"
    done = ran(shell, registry, verdicts, "--json", target, "--limit", 40, "--seed", 2)
    assert (done.code, done.err) == (1, "")
    lines = done.out.splitlines()
    assert [line.partition(",")[0] for line in lines[:4]] == [
        "m1: error", "m2: backdoored", "m4: error", "m5: suspicious",
    ]  # fmt: skip
    assert lines[4:] == [
        "6 models: 1 backdoored, 1 suspicious, 2 errors, 2 clean",
        f"wrote {registry.out / 'index.html'} and {registry.out / 'scan.parquet'}",
    ]
    record = json.loads(target.read_text())
    settings = ["limit", "seed", "device", "precision", "memory", "deterministic", "fail_on"]
    assert list(record)[:9] == ["schema", "versions", *settings]
    assert (record["schema"], record["limit"], record["seed"]) == ("debackdoor/scan-many/1", 40, 2)
    assert record["counts"] == {"backdoored": 1, "suspicious": 1, "error": 2, "inconclusive": 0, "clean": 2}
    assert [model["name"] for model in record["models"]] == [f"m{at}" for at in range(6)]
    assert [(registry.out / model["record"]).is_file() for model in record["models"]] == [True] * 6
    rows = pq.read_table(registry.out / "scan.parquet").to_pylist()
    assert rows == [{key: value for key, value in model.items() if key != "record"} for model in record["models"]]
    assert all(name in (registry.out / "index.html").read_text() for name in ("m0", "m5", "--limit 40"))
    assert stand_in.scans[0]["seed"] == 2


def test_json_on_stdout_stands_alone(shell: Shell, registry: Registry, stand_in: StandIn) -> None:
    done = ran(shell, registry, ["suspicious"], "--json", "-")
    assert json.loads(done.out)["counts"]["suspicious"] == 1
    assert "1 model: 1 suspicious\n" in done.err


def test_quiet_says_nothing(shell: Shell, registry: Registry, stand_in: StandIn) -> None:
    done = ran(shell, registry, ["backdoored", "suspicious"], "--quiet")
    assert (done.code, done.out, done.err) == (1, "", "")


def test_quiet_says_errors(shell: Shell, registry: Registry, stand_in: StandIn) -> None:
    done = ran(shell, registry, ["clean", "error"], "--quiet")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert ": error, " in done.err


def test_retry(shell: Shell, registry: Registry, stand_in: StandIn) -> None:
    manifest = registry.manifest([{"path": registry.model("a"), "clean": "later.npz"}])
    arguments = ("scan-many", manifest, "--out", registry.out)
    assert shell(*arguments).code == 2
    (registry.folder / "later.npz").write_bytes((registry.folder / "clean.npz").read_bytes())
    assert [shell(*arguments, *more).code for more in ((), ("--retry-failed",), ())] == [2, 0, 0]


@pytest.mark.parametrize(("verdict", "code"), [("backdoored", 1), ("suspicious", 1), ("clean", 2), ("inconclusive", 2)])
@pytest.mark.parametrize("what", ["overview", "json", "executor"])
def test_no_finding_is_hidden_by_a_later_error(
    shell: Shell,
    registry: Registry,
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    verdict: str,
    code: int,
    what: str,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def breaks(work: Any, items: Any, **_: object) -> Any:
        work(items[0])
        yield Outcome(items[0], None)
        raise RuntimeError("the cluster is gone")

    if what == "executor":
        monkeypatch.setattr(MODULE, "execute", breaks)
    else:
        place = overview if what == "overview" else import_module("debackdoor.cli.output")
        monkeypatch.setattr(place, "atomic_write" if what == "overview" else "atomic_write_text", full)
    done = ran(shell, registry, [verdict, "clean"], "--quiet", "--json", registry.folder / "all.json")
    assert (done.code, done.out) == (code, "")
    assert ("No space left on device; check" in done.err) == (what != "executor")
    assert ("the finding stands" in done.err) == (code == 1)
    assert "Traceback" not in done.err


def test_an_interrupted_run_goes_on(
    shell: Shell, registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(work: Any, items: Any, **_: object) -> Any:
        yield from serial(work, items[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULE, "execute", interrupted)
    done = ran(shell, registry, ["clean", "backdoored", "clean"])
    assert (done.code, done.err) == (130, "debackdoor: interrupted\n")
    monkeypatch.setattr(MODULE, "execute", serial)
    done = ran(shell, registry, ["clean", "backdoored", "clean"])
    assert (done.code, len(stand_in.scans)) == (1, 3)
    assert "3 models: 1 backdoored, 2 clean; 2 of them from an earlier run" in done.out


def test_the_executor_gets_what_was_asked_for(
    shell: Shell, registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    given: list[dict[str, Any]] = []

    def noted(work: Any, items: Any, **resources: Any) -> Any:
        given.append(resources)
        return serial(work, items)

    monkeypatch.setattr(MODULE, "execute", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for at, more in enumerate(
        ((), ("--workers", 2), ("--workers", 99), ("--executor", "ray", "--workers", 2, "--device", "cuda"),
         ("--executor", "ray", "--address", "auto"), ("--executor", "ray", "--address", "auto", "--workers", 7))
    ):  # fmt: skip
        assert ran(shell, registry, ["clean"] * 3, *more, "--seed", at).code == 0
    nothing = {"address": None, "gpus": 0}
    assert given == [
        {"executor": "local", "workers": 1, "threads": 8, **nothing},
        {"executor": "local", "workers": 2, "threads": 4, **nothing},
        {"executor": "local", "workers": 3, "threads": 2, **nothing},
        {"executor": "ray", "workers": 2, "threads": 4, "address": None, "gpus": 1},
        {"executor": "ray", "workers": None, "threads": 1, "address": "auto", "gpus": 0},
        {"executor": "ray", "workers": 7, "threads": 1, "address": "auto", "gpus": 0},
    ]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--address", "auto"), 4, "expected --address with --executor ray, got it without"),
        (("--workers", "0"), 4, "--workers"),
        (("--executor", "slurm"), 4, "--executor"),
        (("--fail-on", "clean"), 4, "--fail-on"),
        (("--out", "models.csv"), 2, "models.csv: expected a folder to write to, got a file; give another"),
        (("--json", "models.csv"), 2, "expected a file of its own to write, got that of another use"),
        (("--json", "m0.safetensors"), 2, "expected a file of its own to write, got that of another use"),
        (("--json", "clean.npz"), 2, "expected a file of its own to write, got that of another use"),
        (("--json", "out/scan.parquet"), 2, "expected a file of its own to write, got that of another use"),
        (("--json", "out/records/m0.json"), 2, "expected a file of its own to write, got that of another use"),
        (("--json", "out/errors/m0.json"), 2, "expected a file of its own to write, got that of another use"),
        (("--json", "none/all.json"), 2, "expected a folder to write to, got none; make it first"),
    ],
)
def test_what_is_refused_before_the_work(
    shell: Shell,
    registry: Registry,
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(registry.folder)
    done = ran(shell, registry, ["clean"], *more)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert (stand_in.scans, registry.out.exists()) == ([], False)


def test_what_is_read_is_never_replaced(shell: Shell, registry: Registry, stand_in: StandIn) -> None:
    registry.out.mkdir()
    for name in ("scan.parquet", "index.html"):
        manifest = registry.manifest([{"path": f"out/{name}", "name": "a"}])
        (registry.out / name).write_bytes(b"a model")
        done = shell("scan-many", manifest, "--out", registry.out)
        assert (done.code, (registry.out / name).read_bytes()) == (2, b"a model")
        assert "expected a file of its own to write, got that of another use" in done.err
        (registry.out / name).unlink()
    assert stand_in.scans == []


def test_bad_manifests_are_one_sentence(shell: Shell, registry: Registry, stand_in: StandIn) -> None:
    manifest = registry.manifest([{"path": "a.pt"}, {"path": "b.pt", "seed": "one"}])
    for path, message in ((manifest, "row 2, column seed: expected a whole number"), ("none.csv", "got no such file")):
        done = shell("scan-many", path, "--out", registry.out)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert message in done.err
    assert not registry.out.exists()


def test_without_the_library_for_the_page(
    shell: Shell, registry: Registry, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = ran(shell, registry, ["clean"])
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "pip install 'debackdoor[bench]'" in done.err
    assert (stand_in.scans, registry.out.exists()) == ([], False)
    with pytest.raises(MissingDependencyError):
        overview.check_libraries()


def test_without_ray(shell: Shell, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = ran(shell, registry, ["clean"], "--executor", "ray")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "expected the library ray" in done.err
    assert "pip install 'debackdoor[bench]'" in done.err


def test_help_waits_for_nothing_large() -> None:
    code = (
        "import sys; from debackdoor.cli import main; codes = [main(['--help']), main(['scan-many', '--help'])]; "
        "sys.exit(any(codes) or any(name in sys.modules for name in ('torch', 'ray', 'pyarrow', 'jinja2')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("scan-many", "--retry-failed", "--executor", "--address"))
