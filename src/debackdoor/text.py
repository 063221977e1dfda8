"""Text of somebody else's, made fit to be shown: class names, file names and messages may hold anything."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def visible(value: object) -> str:
    """The text without line breaks, and with a sign in place of what would move a terminal's cursor or turn letters."""
    return "".join(map(_sign, str(value)))


def visible_lines(value: object) -> str:
    """The same, line by line."""
    return "\n".join(map(visible, str(value).split("\n")))


def _sign(character: str) -> str:
    if character in "\n\t":
        return " "
    hidden = unicodedata.category(character) in ("Cc", "Cs")
    return "\ufffd" if hidden or unicodedata.bidirectional(character) in _DIRECTIONS else character
