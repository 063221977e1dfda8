"""The command detect: exit codes, what goes to which stream, and its record."""

from __future__ import annotations

import pytest

from cli_cases import Shell
from cli_detect_cases import StandIn, detect_of, stand_in, valid
from debackdoor.cli.detect import OWN, Method, On
from debackdoor.detect import DETECTORS, MODELS
from debackdoor.detect import OWN as LIBRARY_OWN
from debackdoor.detectors.shift import REPAIR_SHIFT

__all__ = ["stand_in"]


@pytest.mark.parametrize(("p_value", "code"), [(1e-6, 1), (0.00099, 1), (0.001, 0), (1.0, 0)])
def test_exit_codes(shell: Shell, stand_in: StandIn, p_value: float, code: int) -> None:
    stand_in.p_value = p_value
    ran = shell(*detect_of(shell))
    assert (ran.code, ran.err) == (code, "")
    assert ran.out.splitlines() == [
        "flagged: sub/3.png, which the model calls 7 (score 13)",
        "flagged: 2.png, which the model calls 7 (score 12)",
        "2 of 4 images are flagged, by a stand-in; of clean images it would be at most about 1.0%",
    ]


def test_of_many_flagged_images_ten_are_named(shell: Shell, stand_in: StandIn) -> None:
    stand_in.flagged = list(range(13))
    lines = shell(*detect_of(shell, count=14)).out.splitlines()
    assert [line.split()[1] for line in lines[:10]] == [f"{index:02}.png," for index in range(12, 2, -1)]
    assert lines[10] == "... and 3 more, which --json names"
    assert lines[11].startswith("13 of 14 images")


def test_the_record_holds_the_settings_and_every_image(shell: Shell, stand_in: StandIn) -> None:
    target = shell.folder / "out.json"
    more = ("--fpr", 0.05, "--method", "strip", "--on", "original", "--seed", 3, "--limit", 60, "--device", "cpu")
    assert shell(*detect_of(shell, "--json", target, *more)).code == 1
    stages, pile = stand_in.given.pop("progress"), stand_in.given.pop("pile")
    assert [round(float(image[0, 0, 0]) * 255) for image in pile] == [0, 1, 2, 3]
    assert stand_in.given == {
        "images": 60, "method": "strip", "on": "original", "false_positive_rate": 0.05, "seed": 3, "device": "cpu",
        "precision": "auto", "memory": 6.0, "keep": None,
    }  # fmt: skip
    record = valid(target.read_text())
    assert list(record["seconds"]) == list(stages.seconds) == ["load", "unlearn"]
    assert (record["clean_images"], record["suspect_images"], record["flagged"]) == (60, 4, 2)
    assert (record["threshold"], record["false_positive_rate"], record["p_value"]) == (10.0, 0.05, 1e-6)
    assert [(row["image"], row["score"], row["flagged"], row["answer"]) for row in record["samples"]] == [
        ("0.png", 0.0, False, 7), ("1.png", 1.0, False, 7), ("2.png", 12.0, True, 7), ("sub/3.png", 13.0, True, 7)
    ]  # fmt: skip


def test_json_on_stdout_stands_alone_and_quiet_says_nothing(shell: Shell, stand_in: StandIn) -> None:
    ran = shell(*detect_of(shell, "--json", "-", "--clean-out", shell.folder / "out"))
    assert valid(ran.out)["method"] == "a stand-in"
    assert "copied 2 images" in ran.err
    ran = shell(*detect_of(shell, "--quiet"))
    assert (ran.code, ran.out, ran.err) == (1, "", "")


def test_a_file_name_cannot_forge_a_line_or_reach_the_terminal(shell: Shell, stand_in: StandIn) -> None:
    arguments = detect_of(shell)
    (shell.folder / "pile" / "2.png").rename(shell.folder / "pile" / "2\x1b[2J\nflagged: x.png")
    ran = shell(*arguments)
    assert "flagged: 2\ufffd[2J flagged: x.png, which the model calls 7 (score 12)" in ran.out.splitlines()
    (shell.folder / "pile" / "1.png").rename(shell.folder / "pile" / "1\x1b[2J\n.png")
    (shell.folder / "pile" / "1\x1b[2J\n.png").write_bytes(b"no image")
    ran = shell(*arguments)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "1\ufffd[2J .png" in ran.err


def test_the_methods_are_those_of_the_library() -> None:
    assert tuple(Method) == (REPAIR_SHIFT, *DETECTORS)
    assert tuple(On) == MODELS
    assert OWN == LIBRARY_OWN


@pytest.mark.parametrize("method", [(), ("--method", "exposed-margin")])
def test_the_original_model_is_for_published_methods(shell: Shell, stand_in: StandIn, method: tuple[str, ...]) -> None:
    """A wrong usage, before any file is read."""
    ran = shell("detect", "no.pt", "--arch", "no", "--clean", "no", "--suspects", "no", "--on", "original", *method)
    assert (ran.code, ran.out, ran.err.count("\n")) == (4, "", 1)
    assert (
        "--on: expected exposed for repair-shift and exposed-margin, got original; choose another --method" in ran.err
    )
    assert stand_in.given == {}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "debackdoor: interrupted\n"),
        (RuntimeError("mat1 and mat2\ncannot be multiplied"), 2, "unexpected RuntimeError: mat1 and mat2; --debug"),
    ],
)
def test_errors_from_within(shell: Shell, stand_in: StandIn, error: BaseException, code: int, message: str) -> None:
    stand_in.error = error
    ran = shell(*detect_of(shell, "--clean-out", shell.folder / "out"))
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1)
    assert message in ran.err
    assert not (shell.folder / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "expected suspect images"),
        (("--suspects", "nowhere"), "nowhere: expected a folder"),
    ],
)
def test_bad_input_is_one_sentence(shell: Shell, more: tuple[str, ...], message: str) -> None:
    """Nothing stands in here; the images of the pile are of another size than the digits."""
    ran = shell(*detect_of(shell, *more, "--limit", 100))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert message.replace("suspect images", "images of shape (3, 32, 32)") in ran.err


@pytest.mark.parametrize(
    ("limit", "message"), [(19, "expected at least 20 clean images, got 19"), (100, "no better than chance")]
)
def test_where_a_scan_would_be_inconclusive_no_file_is_written(shell: Shell, limit: int, message: str) -> None:
    """Nothing stands in here: a network with random weights is at chance."""
    arguments = detect_of(shell, "--json", shell.folder / "a.json", "--clean-out", shell.folder / "out")
    arguments[7] = "digits"
    before = shell.files()
    ran = shell(*arguments, "--limit", limit)
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert message in ran.err
    assert shell.files() == before
