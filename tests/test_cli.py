"""The command line before any command: version, help, usage errors, choices."""

from __future__ import annotations

import subprocess
import sys

import pytest

import debackdoor
from cli_cases import Shell
from debackdoor.cli import options
from debackdoor.runtime import DEVICES, PRECISIONS


def test_version(shell: Shell) -> None:
    ran = shell("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"debackdoor {debackdoor.__version__}\n", "")


def test_help_names_every_command_and_no_more(shell: Shell) -> None:
    ran = shell("--help")
    assert ran.code == 0
    commands = [line.split()[0] for line in ran.out.partition("Commands:\n")[2].splitlines()]
    assert commands == ["scan", "scan-many", "repair", "detect", "evaluate", "attack", "demo", "zoo", "bench"]


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from debackdoor.cli import main; "
        "codes = [main([name, '--help']) for name in ('scan', 'repair', 'detect')]; "
        "sys.exit(any(codes) or 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert all(option in ran.stdout for option in ("--fail-on", "--all-triggers", "--budget", "--suspects", "--fpr"))


def test_entry_point() -> None:
    command = [sys.executable, "-m", "debackdoor", "repair", "model.safetensors"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr == "debackdoor: Missing option '--arch'; see debackdoor repair --help\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage: debackdoor"),
        (("mend",), "No such command 'mend'"),
        (("scan", "a", "--arch", "b"), "'--clean'"),
        (("scan", "a", "--arch", "b", "--clean", "c", "--fail-on", "clean"), "'--fail-on'"),
        (("detect", "a", "--arch", "b", "--clean", "c"), "'--suspects'"),
        (("detect", "a", "--arch", "b", "--clean", "c", "--suspects", "d", "--fpr", "2"), "'--fpr'"),
        (("detect", "a", "--arch", "b", "--clean", "c", "--suspects", "d", "--fpr", "nan"), "'--fpr'"),
        (("--loud",), "--loud"),
        (("repair", "a", "--arch", "b", "--clean", "c"), "'--out'"),
        (("repair", "a", "--arch", "b", "--clean", "c", "--out", "d", "--budget", "2"), "'--budget'"),
        (("repair", "a", "--arch", "b", "--clean", "c", "--out", "d", "--budget", "-0.1"), "'--budget'"),
        (("repair", "a", "--arch", "b", "--clean", "c", "--out", "d", "--budget", "nan"), "'--budget'"),
        (("repair", "a", "--arch", "b", "--clean", "c", "--out", "d", "--limit", "0"), "'--limit'"),
        (("repair", "a", "--arch", "b", "--clean", "c", "--out", "d", "--seed", "-1"), "'--seed'"),
        (("repair", "a", "--arch", "b", "--clean", "c", "--out", "d", "--device", "tpu"), "'--device'"),
        (("repair", "a", "--arch", "b", "--clean", "c", "--out", "d", "--mean", "0.5;0.5"), "0.49,0.48,0.45"),
        (("detect", "a", "--arch", "b", "--clean", "c", "--suspects", "d", "--method", "guess"), "'--method'"),
        (("detect", "a", "--arch", "b", "--clean", "c", "--suspects", "d", "--on", "both"), "'--on'"),
        (("evaluate", "a", "--arch", "b", "--test", "c"), "'--trigger'"),
        (("attack", "nets", "--arch", "b", "--data", "c", "--test", "d", "--out", "e"), "badnets, blend, sig, wanet"),
    ],
)
def test_usage_errors(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    ran = shell(*arguments)
    assert (ran.code, ran.out) == (4, "")
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_the_choices_are_those_of_the_library() -> None:
    assert tuple(options.Device) == DEVICES
    assert tuple(options.Precision) == PRECISIONS
