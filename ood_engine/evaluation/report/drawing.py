"""Pictures by matplotlib in one style: as PNG for a README, as SVG for a page; names are shown as they are."""

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
# The colour-blind safe palette of Okabe and Ito, without its yellow, which is lost on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", SOFT_INK)
ID_COLOUR, OOD_COLOUR = LINE_COLOURS[:2]
BOLD: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "color": INK}
DOTS_PER_INCH = 150
VARIABLES = {"ink": INK, "soft": SOFT_INK, "grid": GRID} | {
    f"line-{number}": colour for number, colour in enumerate(LINE_COLOURS[:-1], 1)
}
"""CSS variable of a page → the colour it stands for in a picture."""


def new_panels(n_rows: int, n_columns: int, width: float, height: float, margin: float = 1.2) -> tuple[Figure, Any]:
    """A figure with a grid of panels, axes [n_rows, n_columns] of about width × height inches, and a margin for a legend."""
    size = (width * n_columns + margin, height * n_rows + 0.7)
    figure = require("matplotlib.figure").Figure(figsize=size, facecolor="white", layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for panel in axes.flat:
        _style(panel)
    return figure, axes


def new_panel(size: tuple[float, float], box: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """A figure of a page with one panel.

    Args:
        size: width and height in inches.
        box: left, bottom, width and height of the panel, as fractions of the size.
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


def legend(figure: Figure, entries: dict[str, Any], **where: Any) -> None:
    """A legend that shows names as they are; matplotlib by itself reads `$` as mathematics and may drop `_name`."""
    placeholders = ["name"] * len(entries)
    drawn = figure.legend(entries.values(), placeholders, frameon=False, fontsize=8, labelcolor=INK, **where)
    for text, name in zip(drawn.get_texts(), entries, strict=True):
        verbatim(text).set_text(shortened(name))


def verbatim(text: Any) -> Any:
    """The text of a picture, shown as it is."""
    text.set_parse_math(False)
    return text


def shortened(name: str, longest: int = 32) -> str:
    """A name in printable characters, cut where it is too long for a picture."""
    name = printable(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight")
    return buffer.getvalue()


def svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element, the same for the same figure and label.

    Colours are CSS variables of the page around it, and no id is that of a figure with another label.

    Args:
        figure: without names in it.
        label: what is read out instead; it is escaped.
    """
    buffer, label = io.BytesIO(), printable(label)
    with require("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue().decode()
    # A style sheet in front of the first group would be that of the whole page.
    text = text[text.index("<g id=") : text.rindex("</svg>")]
    used = set(re.findall(r'href="#(\w+)"', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0].replace("\n", "")), text)
    for variable, colour in VARIABLES.items():
        text = text.replace(f": {colour.lower()}", f": var(--{variable})")
    width, height = (72 * side for side in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{text}</svg>'
