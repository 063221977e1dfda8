"""The documentation: links and pictures are there, commands parse, Python compiles and names what exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
import typer
import yaml

import debackdoor
from debackdoor.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_BEFORE = {"do", "then", "else", "!", "if", "time"}
_COMMAND = typer.main.get_command(app)


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in _FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(block: str) -> Iterator[list[str]]:
    """The words after every ``debackdoor`` that stands where a shell looks for a command."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("- "), posix=True, punctuation_chars="();<>|&{}")
        lexer.whitespace_split = True
        words = list(lexer)
        starts = [at for at, word in enumerate(words) if word == "debackdoor" and _begins(words[:at])]
        for start in starts:
            rest = words[start + 1 :]
            stop = next((at for at, word in enumerate(rest) if set(word) <= set("();<>|&")), len(rest))
            yield rest[:stop]


def _begins(before: list[str]) -> bool:
    return not before or before[-1] in _BEFORE or set(before[-1]) <= set("();|&{") or before[-1] == "run:"


def parse(words: list[str]) -> None:
    """Parses as the program does, and runs nothing."""
    command, context = _COMMAND, None
    while hasattr(command, "commands"):
        context = command.make_context("debackdoor", words[:1] if context is None else words, parent=context)
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words), parent=context)


def targets(page: Path) -> list[str]:
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in _LINK.findall(prose) if not re.match(r"[a-z]+:", link)]


def in_nav(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
        return
    assert isinstance(entry, (list, dict))
    for item in entry.values() if isinstance(entry, dict) else entry:
        yield from in_nav(item)


def test_every_page_is_in_the_nav_and_every_entry_of_it_exists() -> None:
    nav = list(in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert all((DOCS / name).is_file() for name in nav), nav
    assert {page.name for page in PAGES} <= set(nav)
    assert {"results.md", "gallery.html"} <= set(nav)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_and_pictures_resolve(page: Path) -> None:
    missing = [link for link in targets(page) if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_commands_parse(page: Path) -> None:
    for block in blocks(page, "bash", "yaml", ""):
        for words in commands(block):
            try:
                parse(words)
            except Exception as error:
                pytest.fail(f"debackdoor {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_python_compiles_and_names_what_is_public(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
        for path in re.findall(r"\bdb\.([A-Za-z_][\w.]*)", block):
            assert reduce(getattr, path.split("."), debackdoor) is not None


def test_what_a_test_of_commands_would_miss() -> None:
    found = [words for page in TEXTS for block in blocks(page, "bash", "yaml", "") for words in commands(block)]
    assert {words[0] for words in found} >= {"scan", "repair", "detect", "attack", "evaluate", "zoo"}
    pipe = 'for f in *; do\n  debackdoor scan "$f" --seed 1 \\\n  --json - | jq . || { debackdoor zoo list; }\ndone'
    assert list(commands(pipe)) == [["scan", "$f", "--seed", "1", "--json", "-"], ["zoo", "list"]]
    assert list(commands("- run: debackdoor demo # all of it\nname: debackdoor\npip install debackdoor")) == [["demo"]]
    with pytest.raises(Exception, match="no-such-option"):
        parse(["scan", "m.pt", "--arch", "resnet18", "--clean", "digits", "--no-such-option"])
    with pytest.raises(Exception, match="clean"):
        parse(["scan", "m.pt", "--arch", "resnet18"])
