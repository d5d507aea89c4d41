"""Peak extra memory of scoring one batch, beyond its inputs; exits with 1 where it is over the limit.

Every subject is measured in a process of its own: the feature map, the head and all that was fitted are built first and
count as inputs; everything above them during one call is extra, the results included. Two measures are taken and the
larger one counts: what torch's allocator hands out, and the growth of the resident size over the first call.

    python benchmarks/memory.py [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "kernels")]

import ood_engine as oe  # noqa: E402
import ood_kernels as ok  # noqa: E402
from ood_engine.bench.measure import (  # noqa: E402
    MIB,
    default_results_path,
    machine_facts,
    peak_allocated_mib,
    peak_resident_mib,
    print_table,
    write_results,
)

SUBJECTS = {
    "ok.score": (),
    "score_features, default detectors": oe.engine.DEFAULT_DETECTORS,
    "score_features, all detectors": oe.available_detectors(),
}
COLUMNS = {
    "subject": "subject",
    "inputs_mib": "inputs MiB",
    "allocated_mib": "torch peak MiB",
    "resident_mib": "resident peak MiB",
    "peak_extra_mib": "peak extra MiB",
    "limit_mib": "limit MiB",
}


class Classifier(nn.Module):
    """The smallest model that ends like a ResNet: map [N, D, H, W] → spatial mean → linear head."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, features, 1), nn.ReLU())
        self.head = nn.Linear(features, classes)
        nn.init.normal_(self.head.weight, std=3 / features**0.5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


def make_model(sizes: argparse.Namespace) -> Classifier:
    torch.manual_seed(0)
    return Classifier(sizes.features, sizes.classes)


def make_feature_map(sizes: argparse.Namespace) -> Tensor:
    return torch.empty(sizes.samples, sizes.features, sizes.side, sizes.side).normal_().relu_()


def fit_state(sizes: argparse.Namespace, path: Path) -> None:
    """Fit an engine with every detector on 2n images, so that n become anchors, and save its state."""
    # Threads that wait for each other make eigh very slow on a machine that does other work too.
    torch.set_num_threads(1)
    model = make_model(sizes)
    names = oe.available_detectors()
    shared = {"n_components": sizes.components, "max_anchors": sizes.anchors}
    settings = {name: shared for name in names if name.startswith("low_dim_gradient")}

    def loader(batch: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 2 * sizes.anchors, batch):
            count = min(batch, 2 * sizes.anchors - start)
            yield torch.randn(count, 3, sizes.side, sizes.side), torch.randint(sizes.classes, (count,))

    oe.Engine(model, names, settings=settings).fit(loader()).save(path)


def functional_subject(sizes: argparse.Namespace) -> tuple[Callable[[], object], list[Tensor]]:
    """`ok.score` with masks and a dual basis of random numbers: what they are does not change what is allocated."""
    model = make_model(sizes)
    anchors = torch.empty(sizes.anchors, sizes.classes).exponential_()
    anchors /= anchors.sum(1, keepdim=True)
    basis = ok.DualTensors(
        anchors,
        torch.empty(sizes.anchors, sizes.features).normal_().relu_(),
        torch.randn(sizes.anchors, sizes.components),
        torch.randn(sizes.components),
    )
    weight_mask = torch.rand(sizes.classes, sizes.features) > 0.1
    neuron_mask = torch.rand(sizes.features) > 0.1
    head = ok.Head(model.head.weight.detach(), model.head.bias.detach(), weight_mask, neuron_mask)
    feature_map = make_feature_map(sizes)
    inputs = [feature_map, *(tensor for tensor in (*head, *basis[:4]) if tensor is not None)]
    return lambda: ok.score(feature_map, head, basis), inputs


def engine_subject(
    sizes: argparse.Namespace, names: Sequence[str], state: Path
) -> tuple[Callable[[], object], list[Tensor]]:
    """`Engine.score_features` of an engine loaded from its state, with the detectors `names`."""
    with warnings.catch_warnings():
        # A probe trained with other thread counts may move in its last bits; here only memory is looked at.
        warnings.simplefilter("ignore", oe.OodEngineWarning)
        engine = oe.Engine.load(state, make_model(sizes))
    engine.detectors = {name: engine.detectors[name] for name in names}
    feature_map = make_feature_map(sizes)
    head = engine.tap.head
    inputs = [feature_map, head.weight, head.bias]
    inputs += [buffer for detector in engine.detectors.values() for buffer in detector.buffers()]
    return lambda: engine.score_features(feature_map), inputs


def measure(subject: str, sizes: argparse.Namespace, state: Path) -> dict[str, Any]:
    """One row, measured in this process."""
    names = SUBJECTS[subject]
    call, inputs = engine_subject(sizes, names, state) if names else functional_subject(sizes)
    resident = peak_resident_mib(call)
    allocated = peak_allocated_mib(call)
    distinct = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in inputs}
    return {
        "subject": subject,
        "provider": "ood_engine" if names else "ood_kernels",
        "inputs_mib": sum(distinct.values()) / MIB,
        "allocated_mib": allocated,
        "resident_mib": resident,
        "peak_extra_mib": max(allocated, resident or 0.0),
    }


def measure_apart(subject: str, arguments: Sequence[str], state: Path) -> dict[str, Any]:
    """One row, measured in a new process; "fit" as the subject fits the state instead."""
    command = [sys.executable, __file__, *arguments, "--subject", subject, "--state", str(state)]
    # Freed blocks then always go back to the system, and do not hide a later peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    row: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return row


def naive_row(sizes: argparse.Namespace) -> dict[str, Any]:
    """What one gradient a sample, [N, C, D + 1] in fp32, would take: computed, not run."""
    mib = sizes.samples * sizes.classes * (sizes.features + 1) * 4 / MIB
    return {
        "subject": "per-sample gradients [N, C, D+1], computed and not run",
        "provider": "arithmetic",
        "peak_extra_mib": mib,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak extra memory of scoring one batch, beyond its inputs.")
    parser.add_argument("--samples", type=int, default=1024, help="N")
    parser.add_argument("--features", type=int, default=2048, help="D")
    parser.add_argument("--classes", type=int, default=1000, help="C")
    parser.add_argument("--side", type=int, default=7, help="H and W")
    parser.add_argument("--anchors", type=int, default=4096, help="n of the dual basis")
    parser.add_argument("--components", type=int, default=256, help="K")
    parser.add_argument("--limit-mib", type=float, default=200.0, help="fail above this")
    parser.add_argument("--json", type=Path, nargs="?", const=default_results_path("memory"), help="write the rows")
    parser.add_argument("--subject", choices=("fit", *SUBJECTS), help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    if options.subject == "fit":
        fit_state(options, options.state)
        print("{}")
        return 0
    if options.subject:
        print(json.dumps(measure(options.subject, options, options.state)))
        return 0
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.safetensors"
        print(f"fitting an engine to {2 * options.anchors} samples ...", file=sys.stderr, flush=True)
        measure_apart("fit", arguments, state)
        rows = [measure_apart(subject, arguments, state) for subject in SUBJECTS]
    shape = (
        f"N={options.samples} D={options.features} C={options.classes} H=W={options.side}"
        f" n={options.anchors} K={options.components}"
    )
    common: dict[str, Any] = {
        "shape": shape,
        "dtype": "float32",
        **dict.fromkeys(("p5_ms", "p50_ms", "p95_ms", "runs", "max_error")),
    }
    rows = [{**common, **row, "limit_mib": options.limit_mib} for row in rows]
    rows.append({**common, **naive_row(options)})
    print(shape, "float32")
    print_table(rows, COLUMNS)
    over = [row["subject"] for row in rows[:-1] if row["peak_extra_mib"] > options.limit_mib]
    for subject in over:
        print(f"OVER THE LIMIT of {options.limit_mib:g} MiB: {subject}")
    if options.json:
        write_results(options.json, machine, rows)
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
