"""How does latency grow with the batch, and how do peers compare? Two pictures of one result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import COMPILED, COPY, OURS, PLAIN, REFERENCE
from .engine import FORWARD
from .peers import METHODS
from .targets import pick, sizes_of

__all__ = ["draw"]

COLOURS = {OURS: "C0", REFERENCE: "C1", PLAIN: "C1", COMPILED: "C2", COPY: "0.6", FORWARD: "C3"}
COLOURS |= dict(zip(METHODS, ("C4", "C5"), strict=True))


def draw(rows: Sequence[Mapping[str, Any]], folder: Path, stem: str) -> list[Path]:
    """Write `<stem>-latency.png` and `<stem>-methods.png`; a picture without a row is left out."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    written = []
    for name, fill in (("latency", _latency), ("methods", _methods)):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        if fill(axes, rows):
            written.append(folder / f"{stem}-{name}.png")
            figure.savefig(written[-1], dpi=100, metadata={"Software": None})
        pyplot.close(figure)
    return written


def _latency(axes: Any, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Medians and minima against N, of the single pass at a ResNet-50's sizes and of the forward before it."""
    score = [row for row in pick(rows, subject="score", workload="R50") if row["layout"] == "rows"]
    score += pick(rows, subject="engine around a forward", provider=FORWARD)
    for provider in dict.fromkeys(row["provider"] for row in score):
        points = sorted((sizes_of(row)["N"], row["median_ms"]) for row in score if row["provider"] == provider)
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS.get(provider, "0.4"), label=provider)
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="ms a call", title="score, ResNet-50: map to all scores")
    if score:
        axes.legend()
    return bool(score)


def _methods(axes: Any, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Time relative to plain products, a method a group of bars."""
    timed = [row for row in pick(rows) if row["case"].startswith("test_methods")]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    providers = [name for name in (OURS, *METHODS) if any(row["provider"] == name for row in timed)]
    for index, provider in enumerate(providers):
        found = [(cases.index(row["case"]), row["ratio"]) for row in timed if row["provider"] == provider]
        places, ratios = zip(*((place + 0.25 * (index - 1), ratio) for place, ratio in found), strict=True)
        axes.barh(places, ratios, height=0.25, color=COLOURS[provider], label=provider)
    axes.set_yticks(range(len(cases)), [case.partition("[")[2].rstrip("]") for case in cases], fontsize=7)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set(xscale="log", xlabel=f"time a sample, in units of {PLAIN}")
    axes.invert_yaxis()
    if timed:
        axes.legend()
    return bool(timed)
