"""What the pictures of a benchmark share: who has which colour, titles that say something, axes in round numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.report.curves import LINE_COLOURS
from ..evaluation.report.figures import BOLD, GRID, SOFT_INK, _text
from ..evaluation.report.files import require
from .cases import OURS
from .rivals import AUTOGRAD, COMPILED, LIBRARY, REFERENCE, VMAP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "ALIKE",
    "GRAPH",
    "NothingToShowError",
    "duration",
    "factor",
    "log_axis",
    "name_axes",
    "size_axis",
    "style_of",
    "times_as_fast",
    "titled",
]

Row = Mapping[str, Any]

GRAPH = ", CUDA graph"
ALIKE = 1.05
"""Ratio below which two figures are called the same in words."""

_COLOURS = dict(zip((OURS, REFERENCE, COMPILED, LIBRARY, AUTOGRAD, VMAP), LINE_COLOURS, strict=False))
_MARKERS = dict(zip((OURS, REFERENCE, COMPILED, LIBRARY, AUTOGRAD, VMAP), "osD^vP", strict=True))


class NothingToShowError(ValueError):
    """A picture whose rows are missing; the message names them."""


def style_of(provider: str) -> dict[str, Any]:
    """Colour, marker and line of a provider; what replays a CUDA graph is dashed."""
    base = provider.removesuffix(GRAPH)
    return {
        "color": _COLOURS.get(base, SOFT_INK),
        "marker": _MARKERS.get(base, "x"),
        "linestyle": "-" if base == provider else (0, (4, 2)),
        "linewidth": 2.4 if base == OURS else 1.5,
        "markersize": 5,
        "zorder": 3 if base == OURS else 2,
    }


def titled(panel: Axes, message: str, details: str) -> None:
    """What the picture says, and below it what was measured."""
    _text(panel.set_title(message, loc="left", pad=20, **BOLD))
    style: dict[str, Any] = {"fontsize": 7.5, "color": SOFT_INK}
    _text(panel.annotate(details, (0, 1), (0, 6), "axes fraction", "offset points", **style))


def name_axes(panel: Axes, horizontal: str, vertical: str) -> None:
    """Names and units of both axes."""
    panel.set_xlabel(horizontal, fontsize=8, color=SOFT_INK)
    panel.set_ylabel(vertical, fontsize=8, color=SOFT_INK)


def log_axis(axis: Any, *, by: str = "") -> None:
    """Logarithmic with plain numbers at the powers of ten, and between them where there are few of these.

    Args:
        axis: of a panel.
        by: is written behind every number.
    """
    ticker = require("matplotlib.ticker")
    axis._set_axes_scale("log")
    low, high = sorted(axis.get_view_interval())
    steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(ticker.LogLocator(base=10, subs=steps, numticks=12))
    axis.set_major_formatter(
        ticker.FuncFormatter(lambda value, _: f"{value:,.0f}{by}" if value >= 100 else f"{value:g}{by}")
    )
    axis.set_minor_locator(ticker.NullLocator())
    axis.grid(color=GRID, linewidth=0.7)
    axis.axes.set_axisbelow(True)


def size_axis(panel: Axes, sizes: Sequence[int]) -> None:
    """Logarithmic, with a tick at every size, as far as they do not collide."""
    panel.set_xscale("log")
    shown: list[int] = []
    for size in sorted(set(sizes)):
        if not shown or size >= 1.7 * shown[-1]:
            shown.append(size)
    panel.set_xticks(shown, [f"{size:,}" for size in shown])
    panel.set_xticks([], minor=True)


def duration(milliseconds: float) -> str:
    """Such as "12 µs", "3.4 ms" or "1.2 s"."""
    for unit, length in (("s", 1000.0), ("ms", 1.0)):
        if milliseconds >= length:
            return f"{_rounded(milliseconds / length)} {unit}"
    return f"{_rounded(1000 * milliseconds)} µs"


def factor(value: float) -> str:
    """Such as "0.45", "3.2" or "1,200"."""
    return f"{_rounded(value)}"


def times_as_fast(ours: float, theirs: float) -> str:
    """Such as "5.1 × as fast as", or the other way round "1.2 × as slow as"."""
    ratio = max(ours, theirs) / min(ours, theirs)
    if ratio < ALIKE:
        return "as fast as"
    return f"{factor(ratio)} × as {'fast' if ours < theirs else 'slow'} as"


def _rounded(value: float) -> str:
    """Two digits."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"
