"""Shared style of the matplotlib figures, PNG for files and SVG for the HTML page; names are drawn verbatim."""

from __future__ import annotations

import io
import re
import warnings
from html import escape
from typing import TYPE_CHECKING, Any

from .evaluation import printable
from .extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BOLD",
    "GRID",
    "ID_COLOUR",
    "INK",
    "LINE_COLOURS",
    "OOD_COLOUR",
    "SOFT_INK",
    "legend",
    "new_panel",
    "new_panels",
    "png",
    "shortened",
    "svg",
    "verbatim",
]

INK, SOFT_INK, GRID = "#1D2530", "#5F6670", "#E3E6EA"
# The colour-blind-safe palette of Okabe and Ito, without yellow, which is illegible on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", SOFT_INK)
ID_COLOUR, OOD_COLOUR = LINE_COLOURS[:2]
BOLD: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "color": INK}
DOTS_PER_INCH = 150
VARIABLES = {"ink": INK, "soft": SOFT_INK, "grid": GRID} | {
    f"line-{number}": colour for number, colour in enumerate(LINE_COLOURS[:-1], 1)
}
"""CSS variable of the page → colour in a figure."""


def new_panels(n_rows: int, n_columns: int, width: float, height: float, margin: float = 1.2) -> tuple[Figure, Any]:
    """A figure and its axes [n_rows, n_columns] of about width × height inches each, with a margin for a legend."""
    size = (width * n_columns + margin, height * n_rows + 0.7)
    figure = require("matplotlib.figure").Figure(figsize=size, facecolor="white", layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for panel in axes.flat:
        _style(panel)
    return figure, axes


def new_panel(size: tuple[float, float], box: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """A figure with a single panel, for the HTML page.

    Args:
        size: width and height in inches.
        box: left, bottom, width and height of the panel, as fractions of the figure.
    """
    figure = require("matplotlib.figure").Figure(figsize=size)
    panel = figure.add_axes(box)
    figure.patch.set_visible(False)
    panel.patch.set_visible(False)
    _style(panel)
    return figure, panel


def _style(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GRID)
    panel.tick_params(labelsize=7, colors=SOFT_INK, color=GRID, length=2)
    panel.xaxis.get_offset_text().set(fontsize=7, color=SOFT_INK)
    for axis in (panel.xaxis, panel.yaxis):
        axis.label.set(fontsize=8, color=SOFT_INK)


def legend(figure: Figure, entries: dict[str, Any], **where: Any) -> None:
    """Add a legend with verbatim names of patches and of the styles of lines.

    matplotlib alone would parse `$` as mathematics and may drop `_name`.
    """
    line, placeholders = require("matplotlib.lines").Line2D, ["name"] * len(entries)
    handles = [line([], [], **entry) if isinstance(entry, dict) else entry for entry in entries.values()]
    drawn = figure.legend(handles, placeholders, frameon=False, fontsize=8, labelcolor=INK, **where)
    for text, name in zip(drawn.get_texts(), entries, strict=True):
        verbatim(text).set_text(shortened(name))


def verbatim(text: Any) -> Any:
    """Disable mathematics in a text of a figure, and return it."""
    text.set_parse_math(False)
    return text


def shortened(name: str, longest: int = 32) -> str:
    """A name in printable characters, truncated to fit a figure."""
    name = printable(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from (current )?font")
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight")
    return buffer.getvalue()


def svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element, deterministic for a figure and label.

    Colours are CSS variables of the surrounding page, and ids are unique to the label.

    Args:
        figure: a figure without names.
        label: text for screen readers; escaped here.
    """
    buffer, label = io.BytesIO(), printable(label)
    with require("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue().decode()
    # A style sheet before the first group would apply to the whole page.
    text = text[text.index("<g id=") : text.rindex("</svg>")]
    used = set(re.findall(r'href="#(\w+)"', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0].replace("\n", "")), text)
    for variable, colour in VARIABLES.items():
        text = text.replace(f": {colour.lower()}", f": var(--{variable})")
    width, height = (72 * side for side in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{text}</svg>'
