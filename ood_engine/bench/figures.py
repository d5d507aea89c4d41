"""The pictures of a run: one message each, computed from the rows; a picture whose rows are missing is left out and named."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.report.curves import LINE_COLOURS
from ..evaluation.report.figures import GRID, INK, SOFT_INK, _legend, _panels, _png, _text
from ..evaluation.report.files import require, write_atomically
from .cases import OURS
from .curves import bases, latency, memory
from .drawing import NothingToShowError, duration, factor, log_axis, name_axes, times_as_fast, titled
from .limits import COPY
from .rivals import REFERENCE
from .rows import KEY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["overhead", "peers", "roofline", "write_figures"]

Row = Mapping[str, Any]

FORWARD, SCORES_ALONE = "forward alone", f"{OURS}, scores alone"
PEERS = ("pytorch-ood", "oodeel", "scikit-learn")
STEPS = {
    "pool_nap": "activation pass",
    "masked_energy": "head pass",
    "project dual": "projection, dual",
    "project explicit": "projection, explicit",
    "project factored": "projection, factored",
    "score": "single pass",
    "latency": "single pass",
}
"""Subject → its name in the roofline; all others are the last one."""
OTHERS = "other methods"

_CASE = tuple(name for name in KEY if name != "provider")
_COMPUTE_BOUND = 0.99
_CACHES = 1.3
_LONG_RANGE = 20
_MOST_BARS = 30


def write_figures(document: Mapping[str, Any], folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Write a PNG a picture.

    Args:
        document: of `ood_engine.bench.rows`.
        folder: where to.

    Returns:
        The files, and for every picture that was left out its name and the reason.

    Raises:
        OodEngineError: matplotlib is not installed, or the folder cannot be written.
    """
    makers = {
        "roofline.png": roofline,
        "latency.png": latency,
        "bases.png": bases,
        "memory.png": memory,
        "overhead.png": overhead,
        "peers.png": peers,
    }
    written, left_out = [], {}
    for name, make in makers.items():
        try:
            written.append(write_atomically(folder / name, _png(make(document["rows"]))))
        except NothingToShowError as error:
            left_out[name] = str(error)
    return written, left_out


def roofline(rows: Sequence[Row]) -> Figure:
    """Every row of ood-engine and of the reference under the measured bandwidth and product rate, in the dtype of most rows."""
    known = [row for row in rows if row["share_of_limit"] and row["flops"] and row["provider"] in (OURS, REFERENCE)]
    if not known:
        raise NothingToShowError(f"no rows of {OURS} with a limit")
    dtype = Counter(row["dtype"] for row in known).most_common(1)[0][0]
    known = [row for row in known if row["dtype"] == dtype]
    copies = {_case(row): row for row in rows if row["provider"] == COPY and row["gb_per_s"]}
    rate = _product_rate(known, copies)
    figure, axes = _panels(1, 1, width=5.6, height=4.0, margin=1.7)
    panel = axes[0][0]
    entries = _draw_points(panel, known) | _draw_roof(panel, known, list(copies.values()), rate)
    both = [row for case in _by_case(known, (OURS, REFERENCE)) for row in case.values()]
    message = f"{OURS} reaches {_median_share(both or known, OURS)} of what the machine can do"
    message += f", the reference {_median_share(both, REFERENCE)}" if both else ""
    where = f"{dtype}, {known[0]['device']}; above the line where operands lie in the caches"
    details = f"medians over {len(both) // 2 or len(known)} cases, {where}"
    titled(panel, message, details)
    log_axis(panel.xaxis)
    log_axis(panel.yaxis)
    name_axes(panel, "arithmetic by least traffic [flop/byte]", "arithmetic reached [GFLOP/s]")
    _legend(figure, entries, loc="outside center right", ncols=1)
    return figure


def overhead(rows: Sequence[Row]) -> Figure:
    """What the default detectors add to a model's forward, a bar a batch size."""
    cases = _by_case(rows, (FORWARD, SCORES_ALONE))
    if not cases:
        raise NothingToShowError(f"no cases with {FORWARD!r} and {SCORES_ALONE!r}")
    cases.sort(key=lambda case: (-case[FORWARD]["D"], case[FORWARD]["N"]))
    shares = [100 * case[SCORES_ALONE]["p50_ms"] / case[FORWARD]["p50_ms"] for case in cases]
    figure, panel = _bar_panel(len(cases))
    models = [case[FORWARD]["workload"] for case in cases]
    colours = {model: LINE_COLOURS[index % len(LINE_COLOURS)] for index, model in enumerate(dict.fromkeys(models))}
    labels = [f"{case[FORWARD]['workload']}, N={case[FORWARD]['N']}" for case in cases]
    times = [
        f"{factor(share)} % ({duration(case[SCORES_ALONE]['p50_ms'])} by {duration(case[FORWARD]['p50_ms'])})"
        for share, case in zip(shares, cases, strict=True)
    ]
    is_log = max(shares) > _LONG_RANGE * min(shares)
    left = min(shares) / 3 if is_log else 0.0
    _draw_bars(panel, labels, shares, [colours[model] for model in models], times, left, is_log)
    largest = max(range(len(cases)), key=lambda index: cases[index][FORWARD]["p50_ms"])
    message = f"Scores cost {factor(shares[largest])} % of the forward of {models[largest]} at N={cases[largest][FORWARD]['N']}"
    titled(panel, message, f"medians of scores alone by forward alone, {cases[largest][FORWARD]['device']}")
    if is_log:
        log_axis(panel.xaxis, by=" %")
    panel.set_xlabel("time of the scores by that of the model's forward [%]", fontsize=8, color=SOFT_INK)
    return figure


def peers(rows: Sequence[Row]) -> Figure:
    """How many times as fast a sample as each peer, at the largest case that both have."""
    bars: dict[tuple[str, str], tuple[float, Row]] = {}
    for peer in PEERS:
        for case in _by_case(rows, (OURS, peer)):
            ours, theirs = case[OURS], case[peer]
            key = (ours["subject"], peer)
            if key not in bars or _size(ours) > _size(bars[key][1]):
                bars[key] = _each(theirs) / _each(ours), ours
    if not bars:
        raise NothingToShowError(f"no cases with {OURS} and one of {', '.join(PEERS)}")
    ordered = sorted(bars.items(), key=lambda item: -item[1][0])[:_MOST_BARS]
    ratios = [ratio for _, (ratio, _) in ordered]
    figure, panel = _bar_panel(len(ordered))
    colours = dict(zip(PEERS, LINE_COLOURS[1:], strict=False))
    labels = [f"{subject}, {row['workload']} {_shape(row)}" for (subject, _), (_, row) in ordered]
    _draw_bars(
        panel,
        labels,
        ratios,
        [colours[peer] for (_, peer), _ in ordered],
        [f"{factor(ratio)} ×" for ratio in ratios],
        left=1.0,
    )
    slower = sum(ratio < 1 for ratio in ratios)
    message = f"{OURS} is {times_as_fast(1.0, median(ratios))} its peers in the median of {len(ratios)} comparisons"
    told = f"from {factor(min(ratios))} × to {factor(max(ratios))} ×; slower than the peer in {slower}"
    titled(panel, message, f"time a sample, medians, {ordered[0][1][1]['device']}; {told}")
    log_axis(panel.xaxis, by=" ×")
    panel.axvline(1, color=INK, linewidth=1)
    panel.set_xlabel(
        f"time of the peer by that of {OURS} (log), to the right of 1: {OURS} is faster", fontsize=8, color=SOFT_INK
    )
    patch = require("matplotlib.patches").Patch
    present = [peer for peer in PEERS if any(peer == name for (_, name), _ in ordered)]
    _legend(figure, {peer: patch(facecolor=colours[peer]) for peer in present}, loc="outside lower right", ncols=3)
    return figure


def _draw_points(panel: Axes, known: Sequence[Row]) -> dict[str, Any]:
    """A point a row; returns the entries of the legend."""
    line = require("matplotlib.lines").Line2D
    names = [*dict.fromkeys(STEPS.values()), OTHERS]
    entries: dict[str, Any] = {}
    for name, colour in zip(names, LINE_COLOURS, strict=True):
        members = [row for row in known if STEPS.get(row["subject"], OTHERS) == name]
        for row in members:
            is_ours = row["provider"] == OURS
            panel.plot(
                row["flops"] / row["bytes"],
                row["flops"] / _milliseconds(row) / 1e6,
                marker="o",
                markersize=5.5 if is_ours else 4.5,
                color=colour if is_ours else "white",
                markeredgecolor="white" if is_ours else colour,
                markeredgewidth=0.4 if is_ours else 1.0,
                zorder=3 if is_ours else 2,
            )
        if members:
            entries[name] = line([], [], linestyle="", marker="o", markersize=6, color=colour)
    hollow = {"markerfacecolor": "white", "markeredgecolor": SOFT_INK}
    entries[f"filled: {OURS}"] = line([], [], linestyle="", marker="o", markersize=6, color=SOFT_INK)
    entries[f"hollow: {REFERENCE}"] = line([], [], linestyle="", marker="o", markersize=5, **hollow)
    return entries


def _draw_roof(panel: Axes, known: Sequence[Row], copies: Sequence[Row], rate: float | None) -> dict[str, Any]:
    """The copy of the most bytes and the matrix product; dashed the fastest copy, of bytes that the caches hold."""
    intensities = [row["flops"] / row["bytes"] for row in known]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 3, 200)
    copied, cached = max(copies, key=lambda row: row["bytes"])["gb_per_s"], max(row["gb_per_s"] for row in copies)
    top = math.inf if rate is None else rate / 1e9
    styles: dict[str, tuple[float, dict[str, Any]]] = {
        f"copy in memory, {copied:,.0f} GB/s": (copied, {"color": INK, "linewidth": 1.6})
    }
    if cached > _CACHES * copied:
        dashed = {"color": SOFT_INK, "linewidth": 1, "linestyle": (0, (4, 2))}
        styles[f"copy in the caches, {cached:,.0f} GB/s"] = cached, dashed
    panel.set_xlim(x[0], x[-1])
    entries: dict[str, Any] = {
        name: panel.plot(x, np.minimum(bandwidth * x, top), zorder=1, **style)[0]
        for name, (bandwidth, style) in styles.items()
    }
    if rate is not None:
        note = f"matrix product, {top:,.0f} GFLOP/s"
        panel.annotate(note, (x[-1], top), (0, 4), textcoords="offset points", ha="right", fontsize=7.5, color=INK)
    return entries


def _median_share(rows: Sequence[Row], provider: str) -> str:
    return f"{100 * median(row['share_of_limit'] for row in rows if row['provider'] == provider):.0f} %"


def _product_rate(known: Sequence[Row], copies: Mapping[tuple[Any, ...], Row]) -> float | None:
    """Flops a second of the large matrix product: what the limit of a row that it bounds was made from; None without one."""
    rates = []
    for row in known:
        copied = copies.get(_case(row))
        if copied is not None and row["bytes"] / copied["gb_per_s"] / 1e6 < _COMPUTE_BOUND * row["limit_ms"]:
            rates.append(1000 * row["flops"] / row["limit_ms"])
    return median(rates) if rates else None


def _bar_panel(count: int) -> tuple[Figure, Axes]:
    figure, axes = _panels(1, 1, width=6.2, height=0.24 * count + 0.9, margin=0.4)
    return figure, axes[0][0]


def _draw_bars(
    panel: Axes,
    labels: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    notes: Sequence[str],
    left: float,
    is_log: bool = True,
) -> None:
    """Bars from `left` to each value, the first on top, each with its note beside it."""
    places = range(len(values))
    panel.barh(places, [value - left for value in values], left=left, color=colours, height=0.7)
    low, high = min(*values, left), max(*values, left)
    if is_log:
        panel.set_xscale("log")
        panel.set_xlim(low / (1.15 if low == left else 2.2), high * (high / low) ** 0.28 * 1.3)
    else:
        panel.set_xlim(left, high + 0.4 * (high - left))
    panel.set_ylim(len(values) - 0.4, -0.6)
    for place, value, note in zip(places, values, notes, strict=True):
        panel.annotate(
            note, (max(value, left), place), (3, 0), textcoords="offset points", va="center", fontsize=7, color=INK
        )
    panel.set_yticks(list(places))
    for text in panel.set_yticklabels(labels):
        _text(text)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color=GRID, linewidth=0.7)


def _by_case(rows: Sequence[Row], providers: Sequence[str]) -> list[dict[str, Row]]:
    """Cases in which all of the providers have a time: provider → row."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["provider"] in providers and row["p50_ms"] is not None:
            cases[_case(row)][row["provider"]] = row
    return [case for case in cases.values() if len(case) == len(providers)]


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _CASE)


def _size(row: Row) -> int:
    return math.prod(row[name] or 1 for name in ("N", "D", "C", "n"))


def _shape(row: Row) -> str:
    return " ".join(f"{name}={row[name]:,}" for name in ("N", "n", "K") if row[name])


def _each(row: Row) -> float:
    return float(row["ms_per_sample"] or row["p50_ms"])


def _milliseconds(row: Row) -> float:
    return float(row["device_p50_ms"] or row["p50_ms"])
