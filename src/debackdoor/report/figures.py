"""The figures of the report: charts as inline SVG that takes the page's colours, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from debackdoor.errors import MissingDependencyError
from debackdoor.text import visible

TOP_LABELS = 10
"""As many labels have a bar of their own."""

TOP_LAYERS = 16
"""As many layers have a bar of their own."""

LARGEST = 224
"""Pictures are at most this wide and high; larger ones are shrunk, since a page holds dozens."""

_WIDTH = 4.6
"""Of a chart in inches: 331 points, about the width of a phone, so that text there is as large as it is given here."""

_SIZE = 10.5
"""Of letters, in points."""

_INK, _SOFT, _LINE, _TONE, _ACCENT = "#010101", "#020202", "#030303", "#040404", "#050505"
_THEME = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)", _TONE: "var(--bad)", _ACCENT: "var(--accent)"}
"""Stand-ins that matplotlib draws with, and the page's colours that take their place, in light and in dark."""


def text(value: object, longest: int | None = None) -> str:
    """Text of somebody else's for a page: without control and direction characters, shortened in the middle.

    Args:
        value: a class name, a path, a message.
        longest: how many characters there is room for; None keeps all.
    """
    shown = visible(value)
    if longest is None or len(shown) <= longest:
        return shown
    tail = longest // 2 - 1
    return f"{shown[: longest - tail - 1]}…{shown[len(shown) - tail :]}"


def figure_class() -> Any:
    """Matplotlib's class of figures.

    Raises:
        MissingDependencyError: if matplotlib does not import.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"expected the library matplotlib for a page, got an error ({error}); pip install 'debackdoor[report]'"
        ) from error
    return Figure


def share_bars(shares: Sequence[float], names: Sequence[str], suspects: Sequence[int], alt: str) -> str:
    """The labels with the largest shares of answers as horizontal bars, and the share of an even spread as a line.

    Args:
        shares: K fractions.
        names: what the K labels are called.
        suspects: labels that are marked, by colour and bold letters.
        alt: what the chart says, for who does not see it.
    """
    order = sorted(range(len(shares)), key=lambda label: (-shares[label], label))[:TOP_LABELS]
    shown = [text(names[label], 20) for label in order]
    figure, axes = _axes(0.62 + 0.26 * len(order), left=_room(shown), right=0.7, bottom=0.45)
    axes.axvline(100 / len(shares), color=_SOFT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    bars = [100 * shares[label] for label in order]
    axes.barh(range(len(order)), bars, height=0.62, color=[_TONE if x in suspects else _ACCENT for x in order])
    for row, label in enumerate(order):
        weight = "bold" if label in suspects else "normal"
        _write(axes, 102, row, f"{bars[row]:.1f}\u00a0%", color=_INK, va="center", fontweight=weight)
        _write(axes, -2, row, shown[row], color=_INK, ha="right", va="center", fontweight=weight)
    axes.set_ylim(len(order) - 0.4, -0.6)
    _percent_axis(axes, "x", "share of the answers; dotted: an even spread")
    return _svg(figure, "bars", alt)


def share_lines(rows: Sequence[Mapping[str, Any]], suspects: Sequence[int], alt: str) -> str:
    """Shares of answers and accuracy over the steps of unlearning.

    Args:
        rows: of a record's ``unlearning``, at least one.
        suspects: labels that are drawn thick; of the others the five with the largest shares are drawn.
        alt: what the chart says, for who does not see it.
    """
    figure, axes = _axes(3.2, left=0.55, right=0.2, bottom=0.78)
    steps = [row["step"] for row in rows]
    count = len(rows[0]["label_shares"])
    peak = [max(row["label_shares"][label] for row in rows) for label in range(count)]
    others = sorted((x for x in range(count) if x not in suspects), key=lambda label: -peak[label])[: TOP_LABELS // 2]
    style = {"marker": "o", "markersize": 3} if len(rows) < 3 else {}
    handles = {}

    def draw(name: str, values: Sequence[float | None], **look: Any) -> None:
        percent = [float("nan") if value is None else 100 * value for value in values]
        (handles[name],) = axes.plot(steps, percent, **look, **style)

    rest = "other labels" if suspects else "labels"
    for label in others:
        draw(rest, [row["label_shares"][label] for row in rows], color=_SOFT, linewidth=0.9)
    draw("clean accuracy", [row["accuracy"] for row in rows], color=_ACCENT, linewidth=1.6, linestyle=(0, (4, 2)))
    for label in suspects:
        draw("suspect label", [row["label_shares"][label] for row in rows], color=_TONE, linewidth=2.4)
    axes.set_ylim(0, 103)
    axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
    axes.xaxis.set_major_locator(_integers())
    _percent_axis(axes, "y", "")
    axes.set_xlabel("steps of unlearning", color=_SOFT, fontsize=_SIZE)
    names = [name for name in ("suspect label", "clean accuracy", rest) if name in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="lower left", bbox_to_anchor=(0.02, 0.0), ncols=3, frameon=False,
        fontsize=_SIZE, labelcolor=_INK, handlelength=1.8, columnspacing=1.0, borderpad=0,
    )  # fmt: skip
    return _svg(figure, "lines", alt)


def layer_bars(layers: Sequence[Mapping[str, Any]], alt: str) -> str:
    """How many channels of each layer score low, in the order of the layers' names.

    Args:
        layers: of a record, the one with most low scores first; of these the first are drawn.
        alt: what the chart says, for who does not see it.
    """
    shown = sorted(layers[:TOP_LAYERS], key=lambda row: natural(row["layer"]))
    names = [text(row["layer"], 22) for row in shown]
    figure, axes = _axes(0.3 + 0.26 * len(shown), left=_room(names), right=1.05, bottom=0.12)
    most = max(1, *(row["low"] for row in shown))
    axes.barh(range(len(shown)), [row["low"] for row in shown], height=0.62, color=_ACCENT)
    for index, row in enumerate(shown):
        _write(axes, row["low"] + most / 60, index, f"{row['low']} of {row['channels']}", color=_INK, va="center")
        _write(axes, -most / 50, index, names[index], color=_INK, ha="right", va="center")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, most)
    axes.set_xticks([])
    return _svg(figure, "layers", alt)


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which ``layer10`` comes after ``layer9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def png(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1] as a data URI: grey for one channel, colours for three, else the channels' mean."""
    image = image.detach().float().cpu().clamp(0, 1)
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    pixels = (image * 255).round().byte()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _axes(height: float, *, left: float, right: float, bottom: float) -> tuple[Any, Any]:
    """A figure of its own, with margins in inches; pyplot would keep it, and choose a backend for the process."""
    figure = figure_class()(figsize=(_WIDTH, height))
    width = _WIDTH - left - right
    axes = figure.add_axes((left / _WIDTH, bottom / height, width / _WIDTH, (height - bottom - 0.1) / height))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_yticks([])
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _room(names: Sequence[str]) -> float:
    """The margin in inches that the names take, in letters of usual width."""
    return 0.2 + 0.085 * max(map(len, names))


def _write(axes: Any, x: float, y: float, words: str, **look: Any) -> None:
    # Class names and layer names are anyone's: a $ in them must not start a formula.
    axes.text(x, y, words, fontsize=_SIZE, parse_math=False, clip_on=False, **look)


def _percent_axis(axes: Any, which: str, title: str) -> None:
    ticks = [0, 25, 50, 75, 100]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks, [f"{tick}\u00a0%" if tick else "0" for tick in ticks])
    if which == "x":
        axes.set_xlim(0, 100)
        axes.set_xlabel(title, color=_SOFT, fontsize=_SIZE)
    axes.tick_params(length=0, colors=_SOFT, labelsize=_SIZE)
    axes.grid(axis=which, color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def _integers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True)


def _svg(figure: Any, prefix: str, alt: str) -> str:
    """The figure as an ``svg`` element for inside a page; words stay words, and names of parts are its own."""
    from markupsafe import escape
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Names in any script may be missing from the font that only measures them here; the browser has its own.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    found = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    found = re.sub(r"<[^>]*>", lambda tag: _fitted(tag[0], prefix), found[found.index("<svg") :])
    head, _, inside = found.partition(">")
    size = re.search(r'viewBox="[^"]*"', head)
    return f'<svg class="chart" {size[0] if size else ""} role="img" aria-label="{escape(text(alt))}">{inside}'


def _fitted(tag: str, prefix: str) -> str:
    """The tag with the page's colours, and with ids that no other figure on the page has."""
    for stand_in, colour in _THEME.items():
        tag = tag.replace(stand_in, colour)
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    return tag.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
