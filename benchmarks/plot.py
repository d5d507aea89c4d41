"""How does latency grow with the batch, and how do peers compare? Two pictures of one result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .common import COMPILED, COPY, OURS, PLAIN, REFERENCE
from .engine import FORWARD
from .peers import OODEEL, PYTORCH_OOD

COLOURS = {OURS: "C0", REFERENCE: "C1", COMPILED: "C2", COPY: "0.6", FORWARD: "C3", PYTORCH_OOD: "C4", OODEEL: "C5"}


def draw(rows: Sequence[Mapping[str, Any]], folder: Path, stem: str) -> None:
    """Write `<stem>-latency.png` and `<stem>-methods.png`; a picture without a row is left out."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "median_ms" in row]
    score = [row for row in timed if (row["subject"], row["workload"], row.get("layout")) == ("score", "R50", "rows")]
    score += [row for row in timed if row["provider"] == FORWARD]
    methods = [row for row in timed if row["case"].startswith("test_methods") and row["provider"] in COLOURS]
    for name, fill, found in (("latency", _latency, score), ("methods", _methods, methods)):
        if found:
            figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
            fill(axes, found)
            axes.legend()
            figure.savefig(folder / f"{stem}-{name}.png", dpi=100, metadata={"Software": None})
            pyplot.close(figure)


def _latency(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Medians against N, of the single pass at a ResNet-50's sizes and of the forward before it."""
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((row["samples"], row["median_ms"]) for row in rows if row["provider"] == provider)
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS.get(provider, "0.4"), label=provider)
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="ms a call", title="score, ResNet-50: map to all scores")


def _methods(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time relative to plain products, a method a group of bars."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for index, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        found = [row for row in rows if row["provider"] == provider]
        places = [cases.index(row["case"]) + 0.25 * (index - 1) for row in found]
        axes.barh(places, [row["ratio"] for row in found], height=0.25, color=COLOURS[provider], label=provider)
    axes.set_yticks(range(len(cases)), [case.partition("[")[2].rstrip("]") for case in cases], fontsize=7)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set(xscale="log", xlabel=f"time a sample, in units of {PLAIN}")
    axes.invert_yaxis()
