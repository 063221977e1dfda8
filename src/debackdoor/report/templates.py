"""What every page is rendered with: one jinja2 environment that trusts no text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from debackdoor.errors import MissingDependencyError
from debackdoor.report import figures


def environment(extra: str = "report") -> Any:
    """A jinja2 environment in which an unknown name is an error and all text is escaped, control characters too.

    Args:
        extra: of this package that brings jinja2 for the page at hand, for the message.

    Raises:
        MissingDependencyError: if jinja2 does not import.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise MissingDependencyError(
            f"expected the library jinja2 for a page, got an error ({error}); pip install 'debackdoor[{extra}]'"
        ) from error

    def shown(value: Any) -> Any:
        # Charts are markup; names, paths and messages may be anyone's.
        return figures.text(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value

    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=shown
    )


def template(
    package: str,
    name: str,
    filters: Mapping[str, Callable[[Any], Any]] | None = None,
    *,
    extra: str = "report",
) -> Any:
    """A page's template in an :func:`environment`.

    Args:
        package: whose folder the template lies in.
        name: of its file.
        filters: of this page, by name; None for none of its own.
        extra: as for :func:`environment`.

    Raises:
        MissingDependencyError: if jinja2 does not import.
    """
    pages = environment(extra)
    pages.filters.update(filters or {})
    return pages.from_string((files(package) / name).read_text(encoding="utf-8"))
