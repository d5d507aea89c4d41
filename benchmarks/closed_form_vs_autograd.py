"""Low-dimensional gradient coordinates of a batch: the closed form beside autograd, on the CPU, in one interleaved run.

The scalar is the energy lse(W h + b). The last layer is one matrix [W b] acting on h̃ = [h; 1], so that autograd's gradients
of weight and bias arrive in the layout of the basis and the autograd forms are spared a copy.

- autograd, a sample at a time: the recipe of arXiv 2310.17163, written by us: gradient, minus the mean, times V [K, C·D̃].
- vmap(grad), in chunks: the same, batched; a chunk bounds the gradients that are alive.
- closed form, explicit: `ok.project_gradients` with the same V.
- closed form, dual: `ok.project_gradients` with the anchors in place of V; also one sample at a time.

Before anything is timed every subject's values are held to fp64 autograd projected on the same V in fp64; a subject that is
further off than 1e-4 is refused. Exits with 1 where one is, or where the dual form is less than 500 times as fast a sample as
autograd.

    python benchmarks/closed_form_vs_autograd.py [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "kernels")]

import ood_kernels as ok  # noqa: E402
from ood_engine.bench.measure import (  # noqa: E402
    MIB,
    default_results_path,
    interleave,
    machine_facts,
    peak_allocated_mib,
    print_table,
    timing_fields,
    write_results,
)
from ood_engine.subspace import DualBasis, extend  # noqa: E402

AUTOGRAD = "autograd, a sample at a time"
DUAL = "closed form, dual"
TOLERANCE = 1e-4
COLUMNS = {
    "subject": "subject",
    "samples": "samples a run",
    "p5_ms": "p5 ms",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "runs": "runs",
    "ms_per_sample": "ms a sample",
    "times_autograd": "× autograd",
    "basis_mib": "basis MiB",
    "peak_extra_mib": "peak extra MiB",
    "max_error": "max error",
}


class Problem(NamedTuple):
    """A batch, the head and one subspace in both its forms."""

    head: Tensor
    """[C, D̃], weight and bias side by side."""
    h: Tensor
    p: Tensor
    mean: Tensor
    """[C · D̃]"""
    vectors: Tensor
    """V [K, C · D̃]"""
    explicit: ok.ExplicitTensors
    dual: ok.DualTensors


class Subject(NamedTuple):
    """One way to the coordinates of the first `samples` samples."""

    provider: str
    samples: int
    call: Callable[[], Tensor]
    basis: Sequence[Tensor]


def energy(head: Tensor, h_tilde: Tensor) -> Tensor:
    """Energy score lse(W h + b) of one sample."""
    return (head @ h_tilde).logsumexp(0)


def make_problem(options: argparse.Namespace) -> Problem:
    """Features like a ReLU network's, and a head whose logits have a standard deviation of about 3, far from one-hot."""
    torch.manual_seed(0)
    weight = torch.randn(options.classes, options.features) * 3 / (options.features / 2) ** 0.5
    bias = torch.randn(options.classes) * 0.1
    anchors = torch.randn(options.anchors, options.features).relu()
    h = torch.randn(options.samples, options.features).relu()
    basis = DualBasis.fit(
        (anchors @ weight.T + bias).softmax(1), anchors, n_components=options.components, max_anchors=options.anchors
    )
    explicit = basis.to_explicit()
    p = (h @ weight.T + bias).softmax(1)
    head = torch.cat([weight, bias[:, None]], 1)
    vectors = explicit.tensors().components.flatten(1)
    return Problem(head, h, p, explicit.mean.flatten(), vectors, explicit.tensors(), basis.tensors())


def by_autograd(problem: Problem, samples: int) -> Tensor:
    """One sample after the other: forward, backward, centre, project."""
    head = problem.head.clone().requires_grad_()
    coordinates = []
    for h_tilde in extend(problem.h[:samples], True):
        (gradient,) = torch.autograd.grad(energy(head, h_tilde), head)
        coordinates.append(problem.vectors @ (gradient.flatten() - problem.mean))
    return torch.stack(coordinates)


def by_vmap(problem: Problem, chunk: int) -> Tensor:
    """`chunk` samples at a time: batched gradients, centre, project."""
    gradients_of = vmap(grad(energy), in_dims=(None, 0))
    parts = []
    for h_tilde in extend(problem.h, True).split(chunk):
        gradients = gradients_of(problem.head, h_tilde).flatten(1)
        parts.append(gradients.sub_(problem.mean) @ problem.vectors.T)
    return torch.cat(parts)


def by_autograd_in_fp64(problem: Problem, chunk: int = 16, block: int = 8) -> Tensor:
    """The truth [N, K]: fp64 autograd, centred and projected in fp64, a few samples and components at a time."""
    head = problem.head.double().requires_grad_()
    mean = problem.mean.double()
    parts = []
    for some in extend(problem.h.double(), True).split(chunk):
        gradients = torch.stack([torch.autograd.grad(energy(head, one), head)[0].flatten() - mean for one in some])
        parts.append(torch.cat([gradients @ vectors.double().T for vectors in problem.vectors.split(block)], 1))
    return torch.cat(parts)


def make_subjects(problem: Problem, options: argparse.Namespace) -> dict[str, Subject]:
    p, h = problem.p, problem.h
    explicit, dual = problem.explicit, problem.dual
    vectors = (problem.vectors, problem.mean)
    few = min(options.loop_samples, options.samples)
    return {
        AUTOGRAD: Subject("torch.autograd", few, lambda: by_autograd(problem, few), vectors),
        "vmap(grad), in chunks": Subject("torch.func", len(h), lambda: by_vmap(problem, options.chunk), vectors),
        "closed form, explicit": Subject(
            "ood_kernels", len(h), lambda: ok.project_gradients(p, h, explicit), explicit[:2]
        ),
        DUAL: Subject("ood_kernels", len(h), lambda: ok.project_gradients(p, h, dual), dual[:4]),
        f"{DUAL}, a sample at a time": Subject(
            "ood_kernels", 1, lambda: ok.project_gradients(p[:1], h[:1], dual), dual[:4]
        ),
    }


def measure(problem: Problem, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of the subjects that are right, names of those that are not)."""
    truth = by_autograd_in_fp64(problem)
    subjects = make_subjects(problem, options)
    errors: dict[str, float] = {}
    for name, subject in subjects.items():
        expected = truth[: subject.samples]
        errors[name] = float((subject.call().double() - expected).abs().max() / expected.abs().max())
    sound = {name: subject for name, subject in subjects.items() if errors[name] <= TOLERANCE}
    peaks = {name: peak_allocated_mib(subject.call) for name, subject in sound.items()}
    runs = interleave({name: subject.call for name, subject in sound.items()}, options.rounds)
    per_sample = {name: statistics.median(runs[name]) / subject.samples for name, subject in sound.items()}
    baseline = per_sample.get(AUTOGRAD)
    rows = [
        {
            "subject": name,
            "provider": subject.provider,
            "samples": subject.samples,
            **timing_fields(runs[name]),
            "ms_per_sample": per_sample[name],
            "times_autograd": None if baseline is None else baseline / per_sample[name],
            "basis_mib": sum(tensor.numel() * tensor.element_size() for tensor in subject.basis) / MIB,
            "peak_extra_mib": peaks[name],
            "max_error": errors[name],
        }
        for name, subject in sound.items()
    ]
    refused = [f"{name}: error {errors[name]:.1e} > {TOLERANCE:g}" for name in subjects if name not in sound]
    return rows, refused


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Gradient coordinates: the closed form beside autograd.")
    parser.add_argument("--samples", type=int, default=64, help="N")
    parser.add_argument("--features", type=int, default=2048, help="D")
    parser.add_argument("--classes", type=int, default=1000, help="C")
    parser.add_argument("--anchors", type=int, default=1000, help="n of the dual basis")
    parser.add_argument("--components", type=int, default=256, help="K")
    parser.add_argument("--loop-samples", type=int, default=4, help="samples of one run of the autograd loop")
    parser.add_argument("--chunk", type=int, default=16, help="samples whose gradients vmap holds at once")
    parser.add_argument("--rounds", type=int, default=15, help="times that every subject has its turn")
    parser.add_argument("--required-ratio", type=float, default=500.0, help="fail where the dual form gains less")
    path = default_results_path("closed_form_vs_autograd")
    parser.add_argument("--json", type=Path, nargs="?", const=path, help="write the rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    machine = machine_facts()
    shape = f"N={options.samples} D={options.features} C={options.classes} n={options.anchors} K={options.components}"
    print(shape, "float32, bias=True")
    rows, refused = measure(make_problem(options), options)
    rows = [{**row, "shape": shape, "dtype": "float32"} for row in rows]
    print_table(rows, COLUMNS)
    for line in refused:
        print(f"REFUSED {line}")
    ratio = next((row["times_autograd"] for row in rows if row["subject"] == DUAL), None)
    is_fast = ratio is not None and ratio >= options.required_ratio
    if ratio is not None:
        print(f"{DUAL}: {ratio:,.0f} times autograd a sample, at least {options.required_ratio:g} required")
    if options.json:
        write_results(options.json, machine, rows, refused=refused)
    return 0 if is_fast and not refused else 1


if __name__ == "__main__":
    raise SystemExit(main())
