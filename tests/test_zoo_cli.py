"""The command line of the zoo: build, list and show."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli_cases import Shell
from zoo_cases import write_manifest

Zoo = tuple[Path, Path]


def test_build_says_what_is_there(shell: Shell, small_zoo: Zoo) -> None:
    zoo, manifest = small_zoo
    ran = shell("zoo", "build", "patch", "clean-1", "--manifest", manifest, "--zoo", zoo)
    card = json.loads((zoo / "tiny" / "patch.json").read_text())
    rates = f"clean accuracy {card['clean_accuracy']:.1%}, attack success rate {card['attack_success_rate']:.1%}"
    assert ran.code == 0, ran
    first, second, last = ran.out.splitlines()
    assert first.startswith("1 of 2: clean-1, was there, clean accuracy ")
    assert "success" not in first
    assert second == f"2 of 2: patch, was there, {rates}"
    assert last == f"wrote {zoo / 'tiny'}"
    assert shell("zoo", "build", "--manifest", manifest, "--zoo", zoo, "--quiet").out == ""


def test_build_trains_what_is_not(shell: Shell) -> None:
    manifest = write_manifest(shell.folder, '[[model]]\nname = "c"\nattack = "clean"\n', epochs=1)
    ran = shell("zoo", "build", "--manifest", manifest, "--zoo", shell.folder / "zoo", "--device", "cpu")
    assert ran.code == 0, ran
    assert ran.out.startswith("1 of 1: c, trained in ")
    assert (shell.folder / "zoo" / "tiny" / "c.json").exists()


def test_list(shell: Shell, small_zoo: Zoo) -> None:
    zoo = small_zoo[0]
    ran = shell("zoo", "list", "--zoo", zoo, "--json", shell.folder / "list.json")
    assert ran.code == 0, ran
    cards = {name: json.loads((zoo / "tiny" / f"{name}.json").read_text()) for name in ("clean-1", "patch", "shifted")}
    heading, _, *rows = (line.split() for line in ran.out.splitlines())
    assert heading == ["tier", "name", "attack", "data", "network", "target", "CA", "ASR", "RA"]
    found = {row[1]: row for row in rows if row[0] == "tiny"}
    assert list(found) == list(cards)
    assert found["patch"][2:4] == ["badnets", "digits"]
    assert found["patch"][-4] == "3"
    rates = ("clean_accuracy", "attack_success_rate", "robust_accuracy")
    assert found["patch"][-3:] == [f"{cards['patch'][rate]:.1%}" for rate in rates]
    assert found["clean-1"][-4:] == ["-", f"{cards['clean-1']['clean_accuracy']:.1%}", "-", "-"]
    assert found["shifted"][-6:-3] == ["y", "+", "1"]
    record = json.loads((shell.folder / "list.json").read_text())
    assert record == {"schema": "debackdoor/zoo-list/1", "tiers": {"tiny": list(cards.values())}}
    assert shell("zoo", "list", "--zoo", zoo, "--tier", "tiny").out == ran.out


def test_show_one_card(shell: Shell, small_zoo: Zoo) -> None:
    zoo = small_zoo[0]
    model = ("--zoo", zoo, "--tier", "tiny")
    card = json.loads((zoo / "tiny" / "patch.json").read_text())
    ran = shell("zoo", "show", "patch", *model)
    assert ran.code == 0
    lines = dict(line.split(": ", 1) for line in ran.out.splitlines())
    assert lines["attack parameters"] == "poison_rate 0.3, seed 0"
    assert lines["clean model"] == "-"
    assert lines["attack success rate"] == str(card["attack_success_rate"])
    ran = shell("zoo", "show", "patch", *model, "--json", "-")
    assert json.loads(ran.out) == card


def test_show_a_page(shell: Shell, small_zoo: Zoo) -> None:
    page = shell.folder / "page.html"
    ran = shell("zoo", "show", "--html", page, "--zoo", small_zoo[0], "--tier", "tiny")
    assert (ran.code, ran.out) == (0, f"wrote {page}\n")
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("target", ["patch.json", "clean-1.safetensors", "patch.trigger/trigger.json"])
@pytest.mark.parametrize(
    "command", [("list", "--json"), ("show", "patch", "--tier", "tiny", "--json"), ("show", "--tier", "tiny", "--html")]
)
def test_nothing_takes_the_place_of_a_part_of_the_zoo(
    shell: Shell, small_zoo: Zoo, command: tuple[str, ...], target: str
) -> None:
    path = small_zoo[0] / "tiny" / target
    before = path.read_bytes()
    ran = shell("zoo", *command, path, "--zoo", small_zoo[0])
    assert (ran.code, ran.out) == (2, "")
    assert "expected a file of its own to write" in ran.err
    assert path.read_bytes() == before


def test_a_page_beside_the_models_is_written_again(shell: Shell, small_zoo: Zoo, tmp_path: Path) -> None:
    zoo = shutil.copytree(small_zoo[0], tmp_path / "copy")
    for _ in range(2):
        ran = shell("zoo", "show", "--tier", "tiny", "--html", zoo / "tiny" / "page.html", "--zoo", zoo)
        assert ran.code == 0, ran


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 4, "Missing command"),
        (("build", "--tier", "fat"), 4, "'--tier'"),
        (("build", "--tier", "slim", "--manifest", "a.toml"), 4, "expected --tier or --manifest, got both"),
        (("build", "--manifest", "no.toml"), 2, "no.toml: expected a manifest, got an error"),
        (("build", "patch-2", "--manifest", "MANIFEST"), 2, "expected models out of clean-1, patch, shifted"),
        (("build", "--zoo", "/dev/null/zoo", "--manifest", "MANIFEST"), 2, "expected a folder to write to"),
        (("list", "--zoo", "TIER"), 2, "with one folder a tier in it, got that of a tier; give "),
        (("show", "patch", "--zoo", "ZOO", "--tier", "."), 2, "expected the folder of a zoo's tier, got one of tiers"),
        (("list", "--zoo", "nowhere"), 2, "nowhere: expected a zoo's folder, got none"),
        (("list", "--zoo", "ZOO", "--tier", "fat"), 2, "fat: expected a folder with a zoo's cards, got none"),
        (("show",), 4, "expected a NAME or --html FILE"),
        (("show", "patch", "--html", "a.html"), 4, "expected a NAME or --html FILE"),
        (("show", "--html", "a.html", "--json", "-"), 4, "expected --json with a NAME"),
        (("show", "patch", "--test", "digits"), 4, "expected --test with --html"),
        (("show", "patch", "--zoo", "ZOO"), 2, "slim: expected a folder with a zoo's cards"),
        (("show", "stain", "--zoo", "ZOO", "--tier", "tiny"), 2, "out of clean-1, patch, shifted, got 'stain'"),
        (("show", "--html", "/nowhere/a.html", "--zoo", "ZOO", "--tier", "tiny"), 2, "expected a folder to write to"),
    ],
)
def test_errors(shell: Shell, small_zoo: Zoo, arguments: tuple[str, ...], code: int, message: str) -> None:
    words = {"ZOO": small_zoo[0], "TIER": small_zoo[0] / "tiny", "MANIFEST": small_zoo[1]}
    ran = shell("zoo", *(words.get(argument, argument) for argument in arguments))
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from debackdoor.cli import main; main(['zoo', 'build', '--help']); "
    ran = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules or 'rich.table' in sys.modules)"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ran.returncode == 0
    assert "time left" in ran.stdout


@pytest.mark.parametrize("arguments", [("list",), ("show", "patch", "--tier", "tiny")])
@pytest.mark.parametrize("place", ["list.json", "tiny/other.json"])
def test_no_record_is_put_among_the_cards(shell: Shell, small_zoo: Zoo, arguments: tuple[str, ...], place: str) -> None:
    """It would be taken for one of them the next time."""
    zoo, _ = small_zoo
    before = {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()}
    ran = shell("zoo", *arguments, "--zoo", zoo, "--json", zoo / place)
    assert (ran.code, ran.out) == (2, "")
    assert f"expected a place outside of {zoo}, which is read; give another" in ran.err
    assert {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()} == before


def test_brackets_in_names_are_listed(shell: Shell, small_zoo: Zoo) -> None:
    shutil.copytree(small_zoo[0] / "tiny", shell.folder / "zoo" / "t[old]")
    ran = shell("zoo", "list", "--zoo", shell.folder / "zoo")
    assert ran.code == 0, ran
    assert ran.out.split().count("t[old]") == 3
