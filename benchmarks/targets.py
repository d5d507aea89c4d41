"""Which targets does a run reach? Arithmetic on the rows of one result file.

python -m benchmarks.targets FILE      # a line a target; exits with 1 where one is missed
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cases import AUTOGRAD, COMPILED, OURS, REFERENCE
from .engine import ALL, ALONE, FORWARD
from .fitting import CHOSEN
from .rows import read

__all__ = ["Verdict", "evaluate", "main", "pick", "sizes_of"]

Row = Mapping[str, Any]


class Verdict(NamedTuple):
    """What became of one target.

    Attributes:
        target: what is asked.
        figure: the worst that was measured, and where; "" where nothing was.
        verdict: "met", "missed" or "not measured".
    """

    target: str
    figure: str
    verdict: str


def sizes_of(row: Row) -> dict[str, int]:
    """N, D, ... of a row."""
    return {name: int(size) for name, size in (part.split("=") for part in row["shape"].split())}


def pick(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows with a time and these values; capital letters are sizes."""
    timed = [row for row in rows if "median_ms" in row]
    return [
        row
        for row in timed
        if all((sizes_of(row) if len(name) == 1 else row).get(name) == value for name, value in wanted.items())
    ]


def against(rows: Sequence[Row], ours: Row, provider: str) -> float | None:
    """How many times as long a sample as ours takes another provider of the case, both by the ratio to its reference row."""
    rivals = [row for row in rows if row["case"] == ours["case"] and row["provider"] == provider and "ratio" in row]
    return rivals[0]["ratio"] / ours["ratio"] if rivals and "ratio" in ours else None


def growth(rows: Sequence[Row]) -> float | None:
    """The exponent of time along the samples, between the smallest and the largest case."""
    points = sorted((sizes_of(row)["samples"], row["median_ms"]) for row in rows)
    if len(points) < 2:
        return None
    (few, short), (many, long) = points[0], points[-1]
    return math.log(long / short) / math.log(many / few)


def evaluate(rows: Sequence[Row], is_gpu: bool) -> list[Verdict]:
    """Every target, those that were not measured included."""
    verdicts = []
    for target, limit, is_least, measured, figure in _on_a_gpu(rows) if is_gpu else _on_a_cpu(rows):
        values = [(figure(row), _where(row)) for row in measured]
        known = [(value, where) for value, where in values if value is not None]
        if not known:
            verdicts.append(Verdict(target, "", "not measured"))
            continue
        value, where = min(known) if is_least else max(known)
        met = value >= limit if is_least else value <= limit
        verdicts.append(Verdict(target, f"{value:,.3g} ({where})", "met" if met else "missed"))
    return verdicts


_Target = tuple[str, float, bool, Sequence[Row], Callable[[Row], float | None]]
"""What is asked, the limit, whether it is the least, the rows to look at, and the figure of a row."""


def _where(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("provider", "workload", "shape", "dtype", "layout") if name in row)


def _share_of_forward(rows: Sequence[Row]) -> Callable[[Row], float | None]:
    """Time a sample by that of a ResNet-50 forward of 64 images."""
    forwards = {row["dtype"]: row for row in pick(rows, subject="engine around a forward", provider=FORWARD, N=64)}

    def share(row: Row) -> float | None:
        forward = forwards.get(row["dtype"])
        return (
            None if forward is None else row["median_ms"] / row["samples"] / (forward["median_ms"] / forward["samples"])
        )

    return share


def _on_a_cpu(rows: Sequence[Row]) -> Iterator[_Target]:
    pooled = [row for row in pick(rows, subject="pool_nap", provider=OURS) if "share_of_copy" in row]
    strided = [row for row in pooled if (row["dtype"], row["layout"]) == ("bfloat16", "rows")]
    others = [row for row in pooled if row not in strided]
    score = pick(rows, subject="score", workload="R50", provider=OURS, N=64)
    dual = pick(rows, subject="project dual", workload="R50", provider=OURS)
    large = pick(rows, subject="score", provider=OURS, N=1024) + pick(rows, subject="scores of a large batch")
    large = [row for row in large if row["provider"] in (OURS, ALONE, ALL)]
    fits = pick(rows, subject="fit engine", workload="R18", provider=OURS)
    yield "pooling: at most 2 copies of the same bytes", 2, False, others, lambda row: 1 / row["share_of_copy"]
    yield "pooling NCHW in bf16: at most 3 copies", 3, False, strided, lambda row: 1 / row["share_of_copy"]
    yield "score, N=64: at most 0.02 of a ResNet-50 forward", 0.02, False, score, _share_of_forward(rows)
    yield (
        "dual: at least 500 times as fast a sample as autograd",
        500,
        True,
        dual,
        lambda row: against(rows, row, AUTOGRAD),
    )
    yield "scores of 1024 samples: at most 200 MiB", 200, False, large, lambda row: row["peak_mib"]
    yield (
        "chosen form: at most 2 times the other's time",
        2,
        False,
        pick(rows, provider=CHOSEN),
        lambda row: row["ratio"],
    )
    yield "fitting: grows at most with samples^1.1", 1.1, False, fits[-1:], lambda row: growth(fits)


def _on_a_gpu(rows: Sequence[Row]) -> Iterator[_Target]:
    pooled = [row for row in pick(rows, subject="pool_nap", provider=OURS) if row["samples"] >= 256]
    main = pick(rows, subject="score", workload="R50", provider=OURS, N=256)
    dual = pick(rows, subject="project dual", workload="R50", provider=OURS, N=256)
    single = pick(rows, subject="score", workload="R50", provider=OURS, N=1)
    called = [row for row in pick(rows, provider=OURS, workload="R50") if "samples" in row]
    yield "pool_nap, N ≥ 256: at least 0.9 of the copy bandwidth", 0.9, True, pooled, lambda row: row["share_of_copy"]
    yield (
        "score, N=256: at most 1.25 times its roofline",
        1.25,
        False,
        main,
        lambda row: row["median_ms"] / row["limit_ms"],
    )
    yield "score: at least 10 times as fast as eager", 10, True, main, lambda row: against(rows, row, REFERENCE)
    yield (
        "score: at least 1.5 times as fast as torch.compile",
        1.5,
        True,
        main,
        lambda row: against(rows, row, COMPILED),
    )
    yield (
        "dual: at least 1000 times as fast a sample as autograd",
        1000,
        True,
        dual,
        lambda row: against(rows, row, AUTOGRAD),
    )
    yield "score, N=256: at most 0.01 of a ResNet-50 forward", 0.01, False, main, _share_of_forward(rows)
    yield "score, N=1: at most 0.03 ms", 0.03, False, single, lambda row: row["median_ms"]
    yield "memory of a call, results included: at most 64 MiB", 64, False, called, lambda row: row["peak_mib"]


def main(argv: Sequence[str]) -> int:
    """Print the verdicts of a file; 1 where a target is missed, 2 without a file."""
    if len(argv) != 1 or not Path(argv[0]).is_file():
        print("usage: python -m benchmarks.targets FILE", file=sys.stderr)
        return 2
    document = read(Path(argv[0]))
    verdicts = evaluate(document["rows"], "gpu" in document["machine"])
    for one in verdicts:
        print(f"{one.verdict:14}{one.target}: {one.figure or '-'}")
    return int(any(one.verdict == "missed" for one in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
