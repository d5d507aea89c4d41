"""Where the dual and the explicit form of a subspace cost the same: the cost model beside the clock.

For growing numbers of classes both forms of the same subspace project the same batch, in turns. The model of
`ood_engine.subspace.plan` compares flops and bytes; it is right where it chooses the form that the clock chooses, or where the two
are within a factor of two, which no user would notice.

    python benchmarks/form_crossover.py [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "kernels")]

from ood_engine.bench.measure import (  # noqa: E402
    default_results_path,
    interleave,
    machine_facts,
    peak_allocated_mib,
    print_table,
    timing_fields,
    write_results,
)
from ood_engine.subspace import DualBasis  # noqa: E402

COLUMNS = {
    "shape": "shape",
    "provider": "form",
    "p5_ms": "p5 ms",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "planned_ms": "model ms",
    "peak_extra_mib": "extra MiB",
    "chosen": "chosen",
    "max_error": "error",
}
TOLERATED = 2.0


def measure(classes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a form."""
    generator = torch.Generator().manual_seed(classes)
    h = torch.randn(options.anchors + options.samples, options.features, generator=generator).relu()
    weight = torch.randn(classes, options.features, generator=generator) / options.features**0.5 * 3
    p = (h @ weight.T).softmax(1)
    dual = DualBasis.fit(p[options.samples :], h[options.samples :], n_components=options.components)
    bases = {"dual": dual, "explicit": dual.to_explicit()}
    p, h = p[: options.samples], h[: options.samples]
    plan = dual.plan(options.samples)
    truth = dual.to_explicit().project(p.double(), h.double())
    calls = {form: partial(basis.project, p, h) for form, basis in bases.items()}
    runs = interleave(calls, options.rounds)
    return [
        {
            "subject": "project_gradients",
            "provider": form,
            "shape": f"N={options.samples} D={options.features} C={classes} n={options.anchors} K={dual.n_components}",
            "dtype": "float32",
            **timing_fields(runs[form]),
            "planned_ms": 1e3 * next(cost.seconds for cost in plan.costs if cost.form == form),
            "peak_extra_mib": peak_allocated_mib(calls[form]),
            "chosen": form == plan.choice,
            "max_error": float((basis.project(p, h).double() - truth).abs().max() / truth.abs().max()),
        }
        for form, basis in bases.items()
    ]


def regret(rows: Sequence[dict[str, Any]]) -> float:
    """How many times as long as the faster form the chosen one takes."""
    chosen = next(row["p50_ms"] for row in rows if row["chosen"])
    return float(chosen / min(row["p50_ms"] for row in rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The cost model of the subspace's forms beside the clock.")
    numbers = [2, 5, 10, 20, 50, 100, 200]
    parser.add_argument(
        "--classes", type=lambda text: [int(part) for part in text.split(",")], default=numbers, help="C"
    )
    parser.add_argument("--samples", type=int, default=64, help="N")
    parser.add_argument("--features", type=int, default=512, help="D")
    parser.add_argument("--anchors", type=int, default=1000, help="n")
    parser.add_argument("--components", type=int, default=64, help="K")
    parser.add_argument("--rounds", type=int, default=25)
    path = default_results_path("form_crossover")
    parser.add_argument("--json", type=Path, nargs="?", const=path, help="write the rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    machine = machine_facts()
    rows, regrets = [], []
    for classes in options.classes:
        found = measure(classes, options)
        rows += found
        regrets.append(regret(found))
    print_table(rows, COLUMNS)
    middle = statistics.median(regrets)
    print(f"the chosen form took {max(regrets):.2f} times the faster one's time at worst, {middle:.2f} in the middle")
    if options.json:
        write_results(options.json, machine, rows)
    return 0 if max(regrets) <= TOLERATED else 1


if __name__ == "__main__":
    raise SystemExit(main())
