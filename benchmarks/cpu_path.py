"""The path of CPU tensors: pooling beside a copy of the same bytes, and the whole pass beside a ResNet-50 forward.

- pooling: `pooling.pool_statistics`, which is what the operators run on the CPU, its plain twin in `ood_kernels.reference`, and
  `copy_` of the feature map into a tensor of the same layout, in turns, for every layout, dtype and shape.
- the pass: `ok.score` with a masked head and a dual basis on the feature map of a batch, and the forward that makes such a
  map, in turns.

Before it is timed pooling is held to fp64: the maximum has to be equal, a mean may be off by 1e-6 of the largest. Exits with 1
where it is further off, or slower than allowed: 2 copies, 3 for bf16 in NCHW, and 2 % of the forward.

    python benchmarks/cpu_path.py [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "kernels")]

import ood_kernels as ok  # noqa: E402
from ood_engine.bench.measure import (  # noqa: E402
    default_results_path,
    interleave,
    machine_facts,
    peak_allocated_mib,
    print_table,
    timing_fields,
    write_results,
)
from ood_engine.bench.resnet50 import ResNet50  # noqa: E402
from ood_engine.subspace import DualBasis  # noqa: E402
from ood_kernels.cpu import pooling  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAPS = ((2048, 7), (512, 14), (256, 56))
"""(D, H = W)"""
TOKENS = ((768, 196),)
"""(D, T)"""
TOLERANCE = 1e-6
COLUMNS = {
    "subject": "subject",
    "shape": "shape",
    "dtype": "dtype",
    "p5_ms": "p5 ms",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "runs": "runs",
    "ratio": "× copy",
    "ratio_p5": "p5",
    "ratio_p95": "p95",
    "limit": "limit",
    "peak_extra_mib": "peak extra MiB",
    "max_error": "max error",
}


def make_map(layout: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """ReLU of normal numbers, [N, D, H, W] from (N, D, H), or from (N, D, T) for tokens."""
    samples, channels, side = shape
    torch.manual_seed(0)
    if layout == "tokens":
        tokens = torch.randn(samples, side, channels).relu_().to(dtype)
        return tokens.transpose(1, 2).unsqueeze(3)
    feature_map = torch.randn(samples, channels, side, side).relu_().to(dtype)
    return feature_map.contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )


def pooling_error(feature_map: Tensor) -> float:
    """Largest difference of the pooled features to fp64's, relative to the largest; infinite where a maximum differs."""
    got = pooling.pool_statistics(feature_map)
    difference = largest = 0.0
    for i, one in enumerate(feature_map):
        exact = one.double().flatten(1)
        if not torch.equal(got.maximum[i].double(), exact.amax(1)):
            return float("inf")
        mean = exact.mean(1)
        difference = max(difference, float((got.h[i] - mean).abs().max()))
        largest = max(largest, float(mean.abs().max()))
    return difference / largest


def rows_of(
    subjects: Mapping[str, Callable[[], object]],
    yardstick: str,
    rounds: int,
    least_seconds: float,
    fields: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Rows in the order of the subjects; a ratio is the median over the rounds of a subject's time by the yardstick's."""
    runs = interleave(subjects, rounds, least_seconds=least_seconds)
    rows: list[dict[str, Any]] = []
    for name, call in subjects.items():
        ratios = [mine / its for mine, its in zip(runs[name], runs[yardstick], strict=True)]
        spread = timing_fields(ratios)
        row: dict[str, Any] = {
            "subject": name,
            **timing_fields(runs[name]),
            "ratio": statistics.median(ratios),
            "ratio_p5": spread["p5_ms"],
            "ratio_p95": spread["p95_ms"],
            "limit": None,
            "peak_extra_mib": peak_allocated_mib(call),
            "max_error": None,
        }
        rows.append({**row, **fields.get(name, {})})
    return rows


def measure_pooling(layout: str, shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Rows of copy, pooling and reference for one feature map."""
    feature_map = make_map(layout, shape, dtype)
    target = torch.empty_like(feature_map)
    subjects = {
        "copy": lambda: target.copy_(feature_map),
        "pooling": lambda: pooling.pool_statistics(feature_map),
        "reference": lambda: ok.reference.pool_statistics(feature_map),
    }
    limit = 3.0 if layout == "nchw" and dtype == torch.bfloat16 else 2.0
    fields = {"pooling": {"limit": limit, "max_error": pooling_error(feature_map)}}
    rows = rows_of(subjects, "copy", rounds, 0.05, fields)
    size = [shape[0], shape[2], shape[1]] if layout == "tokens" else list(feature_map.shape)
    name = str(dtype).removeprefix("torch.")
    return [{**row, "subject": f"{row['subject']}, {layout}", "shape": str(size), "dtype": name} for row in rows]


def make_pass(options: argparse.Namespace) -> Callable[[], ok.ScoreOutputs]:
    """`ok.score` of a batch as ResNet-50 would give it, with OPNP masks at 10 % and a dual basis."""
    samples, features, classes, side = options.samples, options.features, options.classes, -(-options.image // 32)
    torch.manual_seed(0)
    feature_map = torch.randn(samples, features, side, side).relu_()
    weight = torch.randn(classes, features) * 3 / (features / 2) ** 0.5
    bias = torch.randn(classes) * 0.1
    anchors = torch.randn(options.anchors, features).relu_()
    p = (anchors @ weight.T + bias).softmax(1)
    basis = DualBasis.fit(p, anchors, n_components=options.components, max_anchors=options.anchors).tensors()
    head = ok.Head(weight, bias, torch.rand(classes, features) > 0.1, torch.rand(features) > 0.1)
    return lambda: ok.score(feature_map, head, basis)


def measure_pass(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the forward and of the pass behind it."""
    threads = torch.get_num_threads()
    score = make_pass(options)
    torch.set_num_threads(threads)
    images = torch.randn(options.samples, 3, options.image, options.image).contiguous(memory_format=torch.channels_last)
    model = ResNet50(options.classes).eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    subjects = {"ResNet-50 forward": lambda: model(images), "ok.score": score}
    with torch.inference_mode():
        rows = rows_of(subjects, "ResNet-50 forward", options.forward_rounds, 0.05, {"ok.score": {"limit": 0.02}})
    sizes = {
        "ResNet-50 forward": str(list(images.shape)),
        "ok.score": f"N={options.samples} D={options.features} C={options.classes}"
        f" n={options.anchors} K={options.components}",
    }
    return [{**row, "shape": sizes[row["subject"]], "dtype": "float32"} for row in rows]


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row that is wrong or too slow."""
    lines = []
    for row in rows:
        name = f"{row['subject']} {row['shape']} {row['dtype']}"
        if row["max_error"] is not None and row["max_error"] > TOLERANCE:
            lines.append(f"WRONG {name}: error {row['max_error']:.1e} > {TOLERANCE:g}")
        if row["limit"] is not None and row["ratio"] > row["limit"]:
            lines.append(f"TOO SLOW {name}: {row['ratio']:.3g} > {row['limit']:g}")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The CPU path: pooling by a copy, the pass by a ResNet-50 forward.")
    parser.add_argument("--samples", type=int, default=64, help="N")
    parser.add_argument("--maps", nargs="*", default=[f"{d}x{side}" for d, side in MAPS], help="D x side of the maps")
    parser.add_argument(
        "--tokens", nargs="*", default=[f"{d}x{length}" for d, length in TOKENS], help="D x T of tokens"
    )
    parser.add_argument("--rounds", type=int, default=15, help="times that copy and pooling have their turn")
    parser.add_argument("--forward-rounds", type=int, default=7, help="the same for the forward; 0 leaves it out")
    parser.add_argument("--features", type=int, default=2048, help="D of the pass")
    parser.add_argument("--classes", type=int, default=1000, help="C of the pass")
    parser.add_argument("--anchors", type=int, default=1000, help="n of the dual basis")
    parser.add_argument("--components", type=int, default=256, help="K of the dual basis")
    parser.add_argument("--image", type=int, default=224, help="height and width of the forward's images")
    path = default_results_path("cpu_path")
    parser.add_argument("--json", "--output", type=Path, nargs="?", const=path, help="write the rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    machine = machine_facts()
    start = time.perf_counter()
    provider = "pooling.cpp" if pooling.is_compiled() else "plain torch"
    seconds = time.perf_counter() - start
    print(f"pooling by {provider}; finding out took {seconds:.1f} s")
    rows: list[dict[str, Any]] = []
    cases = [(layout, size) for size in options.maps for layout in ("nchw", "channels_last")]
    cases += [("tokens", size) for size in options.tokens]
    for layout, size in cases:
        channels, side = (int(number) for number in size.split("x"))
        for dtype in DTYPES:
            rows += measure_pooling(layout, (options.samples, channels, side), dtype, options.rounds)
    if options.forward_rounds:
        rows += measure_pass(options)
    for row in rows:
        is_ours = row["subject"].startswith(("pooling", "ok.score"))
        row["provider"] = f"ood_kernels, {provider}" if is_ours else "torch"
    print_table(rows, COLUMNS)
    lines = failures(rows)
    print("\n".join(lines) or "every limit is kept")
    if options.json:
        write_results(options.json, machine, rows, compile_seconds=seconds, failures=lines)
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
