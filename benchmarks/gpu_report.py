"""Hold the results of a GPU run to the targets, write the verdicts into its file, and draw them.

python benchmarks/gpu_report.py FILE [--stages TABLE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "kernels")]

from benchmarks.gpu_results import write_json  # noqa: E402
from benchmarks.gpu_roofline import (  # noqa: E402
    BANDWIDTH_SHARE,
    COMPILED,
    GRAPH,
    ONE_CALL,
    REFERENCE,
    RESNET,
    ROOFLINE_FACTOR,
    TRITON,
    evaluate,
)
from ood_engine.bench.measure import print_table  # noqa: E402

Row = Mapping[str, Any]

MOST_BARS = 40
INK, MUTED, GRID, TARGET = "#222222", "#666666", "#dddddd", "#b2182b"
LINES = {
    ("score", REFERENCE): ("plain torch", "#e08214", "o"),
    ("score", COMPILED): ("torch.compile", "#8073ac", "D"),
    ("score", TRITON): ("kernels, call by call", "#92c5de", "s"),
    ("score", TRITON + GRAPH): ("kernels, CUDA graph", "#2166ac", "^"),
    ("score", TRITON + ONE_CALL): ("kernels, a CUDA graph a call", "#01665e", "v"),
    (RESNET, "eager"): ("ResNet-50 forward", MUTED, "X"),
}
PRECISION_COLUMNS = {
    "precision": "precision of g_low, R50",
    "max_error": "largest error",
    "rms_error": "rms error",
    "p50_ms": "p50 ms",
}
VERDICT_COLUMNS = {"target": "target", "where": "case", "figure": "figure", "verdict": "verdict"}


def read_stages(table: Path) -> list[dict[str, Any]]:
    """Lines "name, seconds, limit, exit code, note" with tabs between them, as gpu.sh writes them."""
    lines = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    return [
        {"name": name, "seconds": int(seconds), "limit_seconds": int(limit), "exit_code": int(code), "note": note}
        for name, seconds, limit, code, note in lines
    ]


def describe(machine: Mapping[str, Any]) -> str:
    commit = str(machine.get("commit"))[:7]
    return f"{machine.get('gpu')}, torch {machine.get('torch')}, triton {machine.get('triton')}, commit {commit}"


def precision_rows(rows: Sequence[Row]) -> list[Row]:
    """Error of the dual projection for each precision of its products, from operands in fp32."""
    wanted = {"subject": "project dual", "workload": "R50", "dtype": "float32", "samples": 256}
    rows = [row for row in rows if row["provider"] == TRITON + GRAPH and row["max_error"] is not None]
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return list({row["precision"]: row for row in found}.values())


def draw(content: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Three pictures from the results; those without a row to show are left out."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK})
    rows, caption = content["rows"], describe(content["machine"])
    in_graph = [row for row in rows if row["provider"] == TRITON + GRAPH and row["p50_ms"] is not None]
    pool = [row for row in in_graph if row["share_of_copy"] is not None and row["samples"] >= 256]
    score = [row for row in in_graph if row["subject"] == "score" and row["times_roofline"] is not None]
    written = []
    pictures = {
        "bandwidth": lambda: _bars(
            plt, pool, "share_of_copy", BANDWIDTH_SHARE, "pool_nap: share of the copy bandwidth", "{:.0%}"
        ),
        "roofline": lambda: _bars(
            plt, score, "times_roofline", ROOFLINE_FACTOR, "score: time in multiples of its roofline", "{:.2f}"
        ),
        "latency": lambda: _latency(plt, rows),
    }
    for name, picture in pictures.items():
        figure = picture()
        if figure is None:
            continue
        below = 0.25 / figure.get_figheight()
        figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
        figure.text(0.01, 0.005, caption, fontsize=7, color=MUTED)
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)
        written.append(path)
    return written


def _label(row: Row) -> str:
    precision = f", {row['precision']}" if row["precision"] else ""
    return f"{row['case']}{precision}"


def _bars(plt: Any, rows: Sequence[Row], field: str, target: float, title: str, form: str) -> Any:
    if not rows:
        return None
    if len(rows) > MOST_BARS:
        title += f" (the first {MOST_BARS} of {len(rows)} cases)"
        rows = rows[:MOST_BARS]
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.3 * len(rows)), layout="constrained")
    values = [row[field] for row in rows]
    bars = axes.barh([_label(row) for row in rows], values, color="#2166ac", height=0.65)
    for bar, value in zip(bars, values, strict=True):
        middle = bar.get_y() + bar.get_height() / 2
        axes.annotate(form.format(value), (0, middle), (4, 0), textcoords="offset points", color="white", va="center")
    axes.axvline(target, color=TARGET, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"target {form.format(target)}",
        (target, 1),
        (3, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=TARGET,
        fontsize=9,
    )
    axes.set_xlim(0, 1.15 * max(*values, target))
    axes.xaxis.set_major_formatter(lambda value, _: form.format(value))
    axes.set_title(title, loc="left", pad=18)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    return figure


def _latency(plt: Any, rows: Sequence[Row]) -> Any:
    """Time of one call against N, for the R50 dtype and layout with most batch sizes."""
    r50 = [row for row in rows if row["workload"] == "R50" and row["p50_ms"] is not None]
    known = [row for row in r50 if (row["subject"], row["provider"]) in LINES]
    ours = [row for row in known if row["subject"] == "score"]
    if not ours:
        return None
    sizes: dict[tuple[str, str], set[int]] = {}
    for row in ours:
        sizes.setdefault((row["dtype"], row["layout"]), set()).add(row["samples"])
    dtype, layout = max(sizes, key=lambda key: len(sizes[key]))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (subject, provider), (label, color, marker) in LINES.items():
        points = {
            row["samples"]: row["p50_ms"]
            for row in known
            if (row["subject"], row["provider"], row["dtype"], row["layout"]) == (subject, provider, dtype, layout)
        }
        if points:
            batch = sorted(points)
            axes.plot(batch, [1000 * points[size] for size in batch], marker, linestyle="-", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel="samples in a batch", ylabel="µs a batch, median")
    axes.set_xticks(sorted(sizes[dtype, layout]), [str(size) for size in sorted(sizes[dtype, layout])])
    axes.minorticks_off()
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"score, ResNet-50's last layers, {dtype}, {layout}", loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where there are no results; a missed target is told and does not count as a failure."""
    parser = argparse.ArgumentParser(description="Verdicts and pictures of a GPU run.")
    parser.add_argument("results", type=Path, help="file that gpu_kernels.py wrote")
    parser.add_argument("--stages", type=Path, help="what gpu.sh noted about its stages")
    options = parser.parse_args(argv)
    if not options.results.exists():
        print(f"gpu_report.py: no results to report on: {options.results.name} is missing", file=sys.stderr)
        return 1
    content = json.loads(options.results.read_text(encoding="utf-8"))
    verdicts = [verdict._asdict() for verdict in evaluate(content["rows"])]
    if options.stages:
        content["stages"] = read_stages(options.stages)
    content = {"machine": content["machine"], **content, "targets": verdicts}
    write_json(options.results, content)
    print(describe(content["machine"]))
    if errors := precision_rows(content["rows"]):
        print_table(errors, PRECISION_COLUMNS)
    for row in content["rows"]:
        if row["error"]:
            print(f"REFUSED {_label(row)}: {row['subject']}, {row['provider']}: {row['error']}")
    if content["left_out"]:
        print(f"no time was left for {len(content['left_out'])} cases, the first of them {content['left_out'][0]}")
    print_table(verdicts, VERDICT_COLUMNS)
    try:
        pictures = draw(content, options.results.parent, options.results.stem)
    except ModuleNotFoundError as error:
        print(f"SKIPPED the pictures: {error.name} is not installed")
    else:
        print("pictures:", ", ".join(path.name for path in pictures) or "none, for want of rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
