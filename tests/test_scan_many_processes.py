"""scan-many in processes of its own: real scans, workers that die, and a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_cases import Shell
from scan_many_cases import Registry, registry

__all__ = ["registry"]

TIMEOUT = 300.0
"""Seconds, on a machine that has much else to do."""


def scan_many(registry: Registry, *more: str) -> list[str]:
    return ["scan-many", str(registry.folder / "models.csv"), "--out", str(registry.out), "--workers", "2", *more]


def test_two_processes_scan_as_one_command_does(registry: Registry, shell: Shell) -> None:
    """A real scan, one that tells nothing, a model that takes its process along, and a broken file."""
    rows = [
        {"path": registry.model("deadly"), "arch": "nets/net.py:die"},
        {"path": registry.trained("trained")},
        {"path": registry.broken("cut")},
        {"path": registry.model("random")},
    ]
    registry.manifest(rows)
    done = shell(*scan_many(registry))
    assert done.code == 2, done.err
    assert "4 models: 2 errors, 1 inconclusive, 1 clean\n" in done.out
    assert registry.files() == {"errors/deadly.json", "errors/cut.json", "records/trained.json", "records/random.json"}
    error = registry.error("deadly")
    assert "the worker process was lost: it was ended by SIGKILL" in error["error"]
    assert (error["seconds"], error["sha256"] is None) == (None, False)
    assert (registry.folder / "nets" / "deaths").read_text() == "xx"
    assert "no better than chance" in registry.record("random")["message"]
    record = registry.record("trained")
    assert (record["verdict"], record["clean_images"]) == ("clean", 60)
    assert record["evidence"]
    alone = registry.folder / "alone.json"
    checkpoint, arch, data = (record[name] for name in ("checkpoint", "arch", "data"))
    assert shell("scan", checkpoint, "--arch", arch, "--clean", data, "--json", alone).code == 0
    same = json.loads(alone.read_text())
    apart = ("seconds", "name", "options")
    assert {key: value for key, value in record.items() if key not in apart} == {
        key: value for key, value in same.items() if key not in apart
    }


def test_a_killed_run_loses_only_what_was_under_way(registry: Registry, shell: Shell) -> None:
    """Two models are scanned, the two after them never end; the program is killed, and nothing of it lives on."""
    rows = [
        {"path": registry.model(f"m{at}"), "arch": f"nets/net.py:{'make' if at < 2 else 'wait'}"} for at in range(4)
    ]
    registry.manifest(rows)
    words = [sys.executable, "-m", "debackdoor", *scan_many(registry)]
    program = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = [registry.out / "records" / f"m{at}.json" for at in range(2)]
    try:
        _wait(lambda: all(path.exists() for path in first))
        children = _children(program.pid)
    finally:
        program.send_signal(signal.SIGKILL)
        program.wait(TIMEOUT)
    _wait(lambda: not any(_alive(child) for child in children))
    assert registry.files() == {"records/m0.json", "records/m1.json"}
    before = {path: path.read_bytes() for path in first}
    (registry.folder / "nets" / "go").touch()
    done = shell(*scan_many(registry))
    assert done.code == 3, done.err
    assert "4 models: 4 inconclusive; 2 of them from an earlier run\n" in done.out
    assert {path: path.read_bytes() for path in first} == before
    assert registry.files() == {f"records/m{at}.json" for at in range(4)}
    assert not list(registry.out.rglob("*.tmp"))


def test_ray_writes_the_same_records(registry: Registry, shell: Shell) -> None:
    pytest.importorskip("ray", reason="the library ray is not installed")
    registry.manifest([{"path": registry.trained("trained")}, {"path": registry.broken("cut")}])
    assert shell(*scan_many(registry)).code == 2
    local = registry.record("trained"), registry.error("cut")
    registry.out = registry.folder / "by ray"
    assert shell(*scan_many(registry, "--executor", "ray")).code == 2
    for one, other in zip(local, (registry.record("trained"), registry.error("cut")), strict=True):
        assert {**one, "seconds": None} == {**other, "seconds": None}


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    """The processes that a program started."""
    if not sys.platform.startswith("linux"):
        return []
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    """Whether it runs: one that has ended may wait for init to take note."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
