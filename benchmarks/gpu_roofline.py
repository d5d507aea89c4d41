"""What a GPU could do at best, and whether the targets were reached: arithmetic on result rows that needs no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ood_kernels.workloads import Cost, Workload

__all__ = ["Verdict", "annotate", "evaluate", "products", "rate", "roofline_ms", "score_roofline_ms"]

Product = tuple[int, int, int]
Row = Mapping[str, Any]

TRITON, REFERENCE, COMPILED, LIBRARY = "triton", "reference", "torch.compile", "library"
GRAPH, ONE_CALL = ", CUDA graph", ", a CUDA graph a call"
AUTOGRAD = "autograd, a sample at a time"
COPY, RESNET = "copy of the map", "ResNet-50 forward"

BANDWIDTH_SHARE, ROOFLINE_FACTOR, EAGER_FACTOR, COMPILED_FACTOR = 0.9, 1.25, 10.0, 1.5
AUTOGRAD_FACTOR, FORWARD_SHARE, LATENCY_US, WORKSPACE_MIB = 1000.0, 0.01, 30.0, 64.0


def products(workload: Workload, samples: int) -> dict[str, tuple[Product, ...]]:
    """The matrix products (M, N, K) in the steps of `score` with a dual basis; the pruned head repeats that of the head."""
    classes, channels, anchors = workload.classes, workload.channels, workload.anchors
    return {
        "head": ((samples, classes, channels),),
        "projection": (
            (samples, anchors, classes),
            (samples, anchors, channels),
            (samples, workload.components, anchors),
        ),
    }


def rate(shapes: Iterable[Product], product_ms: Mapping[Product, float]) -> float:
    """Flops a second at which the library runs these products, one after the other; KeyError where one was not measured."""
    shapes = list(shapes)
    flops = sum(2 * m * n * k for m, n, k in shapes)
    return 1000 * flops / sum(product_ms[shape] for shape in shapes)


def roofline_ms(cost: Cost, bytes_a_second: float, flops_a_second: float = math.inf) -> float:
    """The larger of the traffic's and the arithmetic's time, in milliseconds."""
    return 1000 * cost.seconds(flops_a_second, bytes_a_second)


def score_roofline_ms(
    costs: Mapping[str, Cost],
    shapes: Mapping[str, Sequence[Product]],
    bytes_a_second: float,
    product_ms: Mapping[Product, float],
) -> dict[str, float]:
    """The roofline of every step of `score`, each at the library's rate for its own products; the whole is their sum."""
    return {
        step: roofline_ms(cost, bytes_a_second, rate(shapes[step], product_ms) if step in shapes else math.inf)
        for step, cost in costs.items()
    }


def annotate(
    rows: Sequence[dict[str, Any]], workload: Workload, samples: int, map_itemsize: int, itemsize: int
) -> None:
    """Write into the rows of one case how they compare to what was measured beside them: share of the copy, roofline."""
    copy = _one(rows, subject=COPY)
    if copy is None:
        return
    costs, shapes = workload.score(samples, map_itemsize, itemsize), products(workload, samples)
    steps_of = {"masked_energy": ("head",), "project dual": ("projection",), "score": tuple(costs)}
    for row in rows:
        if row["subject"] == "pool_nap" and row["gb_per_s"]:
            row["share_of_copy"] = row["gb_per_s"] / copy["gb_per_s"]
        if row["subject"] not in steps_of or not row["provider"].startswith(TRITON) or row["p50_ms"] is None:
            continue
        library = _rows(rows, subject="matmul", precision=row["precision"])
        product_ms = {tuple(found["product"]): found["p50_ms"] for found in library}
        try:
            rooflines = score_roofline_ms(costs, shapes, 1e9 * copy["gb_per_s"], product_ms)
        except KeyError:
            continue
        row["roofline_ms"] = sum(rooflines[step] for step in steps_of[row["subject"]])
        row["times_roofline"] = row["p50_ms"] / row["roofline_ms"]


class Verdict(NamedTuple):
    """How one target fares in one case.

    Attributes:
        target: what is asked.
        where: the case; "" where it was not measured.
        figure: what came out, in words.
        verdict: "met", "missed", "no room" (the roofline itself is too close to the competitor) or "not measured".
    """

    target: str
    where: str
    figure: str
    verdict: str


def evaluate(rows: Sequence[Row]) -> list[Verdict]:
    """Every target in every case in which it was measured, those that were measured nowhere included."""
    r50 = [row for row in rows if row["workload"] == "R50" and row["p50_ms"] is not None]
    main = _rows(r50, samples=256)
    checks: dict[str, Iterator[tuple[Row, str, str]]] = {
        f"pool_nap, N ≥ 256: at least {BANDWIDTH_SHARE:.0%} of the copy bandwidth": _bandwidth(rows),
        f"score, R50 N=256: at most {ROOFLINE_FACTOR} × its roofline": _roofline(main),
        f"score, R50 N=256: at least {EAGER_FACTOR:g} × as fast as the eager reference": _faster(
            main, TRITON, (REFERENCE,), EAGER_FACTOR
        ),
        f"score, R50 N=256: at least {COMPILED_FACTOR:g} × as fast as torch.compile of it": _faster(
            main, TRITON + GRAPH, (COMPILED + GRAPH, COMPILED), COMPILED_FACTOR
        ),
        f"score, R50 N=256: at least {AUTOGRAD_FACTOR:g} × as fast a sample as autograd": _autograd(main),
        f"score, R50 N=256: at most {FORWARD_SHARE:.0%} of a ResNet-50 forward": _forward(main),
        f"score, R50 N=1: at most {LATENCY_US:g} µs in a CUDA graph": _latency(_rows(r50, samples=1)),
        f"extra memory: outputs and at most {WORKSPACE_MIB:g} MiB": _memory(rows),
    }
    verdicts = []
    for target, found in checks.items():
        here = [Verdict(target, _where(row), figure, verdict) for row, figure, verdict in found]
        verdicts += here or [Verdict(target, "", "", "not measured")]
    return verdicts


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _bandwidth(rows: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
    for row in _rows(rows, subject="pool_nap", provider=TRITON + GRAPH):
        if row["share_of_copy"] is not None and row["samples"] >= 256:
            yield row, f"{row['share_of_copy']:.1%}", _verdict(row["share_of_copy"] >= BANDWIDTH_SHARE)


def _roofline(main: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
    for row in _rows(main, subject="score", provider=TRITON + GRAPH):
        if row["times_roofline"] is not None:
            yield row, f"{row['times_roofline']:.2f} ×", _verdict(row["times_roofline"] <= ROOFLINE_FACTOR)


def _faster(main: Sequence[Row], ours: str, theirs: Sequence[str], factor: float) -> Iterator[tuple[Row, str, str]]:
    """Like against like: calls against calls, graphs against graphs where both were captured."""
    for row in _rows(main, subject="score", provider=ours):
        rivals = [_one(_case(main, row), subject="score", provider=provider) for provider in theirs]
        rival = next((found for found in rivals if found is not None), None)
        if rival is None:
            continue
        figure, met = f"{rival['p50_ms'] / row['p50_ms']:.1f} ×", rival["p50_ms"] >= factor * row["p50_ms"]
        if met or row["roofline_ms"] is None or rival["p50_ms"] >= factor * row["roofline_ms"]:
            yield row, figure, _verdict(met)
        else:
            yield row, f"{figure}; {1 / row['times_roofline']:.0%} of the roofline", "no room"


def _autograd(main: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
    for row in _rows(main, subject="score", provider=TRITON):
        autograd = _one(_case(main, row), provider=AUTOGRAD)
        if autograd is not None:
            factor = autograd["ms_per_sample"] / row["ms_per_sample"]
            yield row, f"{factor:,.0f} ×, autograd's loop extrapolated", _verdict(factor >= AUTOGRAD_FACTOR)


def _forward(main: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
    for row in _rows(main, subject="score", provider=TRITON + GRAPH):
        forwards = [found["p50_ms"] for found in _rows(_case(main, row), subject=RESNET)]
        if forwards:
            share = row["p50_ms"] / min(forwards)
            yield row, f"{share:.2%}", _verdict(share <= FORWARD_SHARE)


def _latency(single: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
    for row in _rows(single, subject="score", provider=TRITON + ONE_CALL):
        yield row, f"{1000 * row['p50_ms']:.1f} µs", _verdict(1000 * row["p50_ms"] <= LATENCY_US)


def _memory(rows: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
    measured = [row for row in _rows(rows, provider=TRITON) if row["peak_extra_mib"] is not None]
    if measured:
        worst = max(measured, key=lambda row: float(row["peak_extra_mib"]))
        extra = worst["peak_extra_mib"]
        yield worst, f"{extra:.1f} MiB at worst, in {worst['subject']}", _verdict(extra <= WORKSPACE_MIB)


def _rows(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if row["p50_ms"] is not None and all(row[key] == wanted[key] for key in wanted)]


def _one(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next(iter(_rows(rows, **wanted)), None)


def _case(rows: Sequence[Row], row: Row) -> list[Row]:
    return [other for other in rows if other["case"] == row["case"]]


def _where(row: Row) -> str:
    return f"{row['case']}, {row['precision']}" if row["precision"] else str(row["case"])
