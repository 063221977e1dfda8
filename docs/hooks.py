"""Links of a page to files of the repository outside ``docs`` become the file's path; one to nowhere is a warning."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]*)\)")
_log = logging.getLogger("mkdocs.hooks.repository")


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """The page without such links; the site holds ``docs`` alone."""

    def plain(link: re.Match[str]) -> str:
        text, target = link[1], os.path.normpath(Path("docs", page.file.src_uri).parent / link[2])
        if not (ROOT / target).exists():
            _log.warning("%s links to %s, which is not in the repository", page.file.src_uri, target)
        return text if text.strip("`") in (target, Path(target).name) else f"{text} (`{target}`)"

    return _LINK.sub(plain, markdown)
