"""The subjects of a case: ours, plain torch, torch.compile, per-sample autograd, a ResNet-50, and the GPU's own limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import ood_kernels as ok
from benchmarks.gpu_problems import Problem
from benchmarks.gpu_roofline import (
    AUTOGRAD,
    COMPILED,
    COPY,
    GRAPH,
    LIBRARY,
    ONE_CALL,
    REFERENCE,
    RESNET,
    TRITON,
    products,
)
from benchmarks.gpu_timing import Mode, Subject
from ood_engine.bench.resnet50 import ResNet50
from ood_kernels.workloads import BasisKind, Cost

__all__ = ["TOLERANCES", "subjects_of"]

TOLERANCES = {"ieee": 1e-4, "tf32x3": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
"""Largest error that a subject may have, relative to the largest magnitude of each of its results."""

_EXACT = TOLERANCES["ieee"]
_OPERANDS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_AUTOGRAD_SAMPLES = 4
_MODES: dict[str, Mode] = {"": "calls", GRAPH: "graph", ONE_CALL: "one-call graphs"}
Call = Callable[[int], Any]


def subjects_of(problem: Problem, ours: str = "triton") -> Iterator[Subject]:
    """The subjects of a case, what the others are compared with first.

    Args:
        problem: operands and truth.
        ours: the backend that stands for ours.
    """
    case = problem.case
    yield from _limits(problem)
    yield from _pool(problem, ours)
    yield from _score(problem, ours)
    yield from _parts(problem, ours)
    if "bases" in case.extras:
        yield from _projections(problem, ours, "explicit", problem.explicit())
        yield from _projections(problem, ours, "factored", problem.factored())
    if "autograd" in case.extras:
        yield _autograd(problem)
    if "forward" in case.extras:
        yield from _forward(problem)


def _modes(subject: str, provider: str, call: Call, cost: Cost, *modes: str, **fields: Any) -> Iterator[Subject]:
    for name in modes:
        yield Subject(subject, provider + name, call, cost, mode=_MODES[name], **fields)


def _limits(problem: Problem) -> Iterator[Subject]:
    """How fast the GPU copies, and how fast its library multiplies: the roofline's two sides."""
    maps = problem.maps
    size = maps[0].numel() * maps[0].element_size()
    targets = [torch.empty_like(feature_map) for feature_map in maps]
    yield from _modes(
        COPY, LIBRARY + GRAPH, lambda i: targets[i % len(maps)].copy_(maps[i % len(maps)]), Cost(0, 2 * size), GRAPH
    )
    flat = [torch.as_strided(part, (part.numel() // 2,), (1,)) for part in maps]
    into = [torch.as_strided(part, (part.numel() // 2,), (1,)) for part in targets]
    yield from _modes(
        "copy of half the map", LIBRARY, lambda i: into[i % len(maps)].copy_(flat[i % len(maps)]), Cost(0, size), GRAPH
    )
    for precision in problem.case.precisions:
        for shape in sorted(set().union(*products(problem.case.workload, problem.case.samples).values())):
            yield _matmul(problem, precision, shape)


def _matmul(problem: Problem, precision: str, shape: tuple[int, int, int]) -> Subject:
    m, n, k = shape
    dtype = _OPERANDS.get(precision, torch.float32)
    left, right = (torch.randn(sides, device=problem.device, dtype=dtype) for sides in ((m, k), (n, k)))
    operands = problem.copies((left, right))

    def call(index: int) -> Tensor:
        a, b = operands[index % len(operands)]
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            return a @ b.T
        finally:
            torch.set_float32_matmul_precision("highest")

    elements = m * k + n * k + m * n
    cost = Cost(2 * m * n * k, elements * left.element_size())
    note = "in fp32: the library has no tf32x3" if precision == "tf32x3" else None
    return Subject("matmul", LIBRARY + GRAPH, call, cost, mode="graph", precision=precision, product=shape, note=note)


def _pool(problem: Problem, ours: str) -> Iterator[Subject]:
    case, maps = problem.case, problem.maps
    cost = case.workload.pool(case.samples, case.dtype.itemsize)
    checked: dict[str, Any] = {"truth": problem.truth[:2], "tolerance": _EXACT}

    def pool(index: int, backend: str) -> tuple[Tensor, ...]:
        return ok.pool_nap(maps[index % len(maps)], backend=backend)

    yield from _modes("pool_nap", TRITON, partial(pool, backend=ours), cost, "", GRAPH, **checked)
    yield from _modes("pool_nap", REFERENCE, partial(pool, backend="reference"), cost, "", **checked)
    if "compile" in case.extras:
        compiled = _compiled(ok.reference.pool_nap)
        yield from _modes(
            "pool_nap", COMPILED, lambda i: compiled(_as_map(maps[i % len(maps)])), cost, "", GRAPH, **checked
        )


def _score(problem: Problem, ours: str) -> Iterator[Subject]:
    case = problem.case
    maps, heads, bool_heads, duals = problem.maps, problem.heads, problem.bool_heads, problem.duals
    costs = case.workload.score(case.samples, case.dtype.itemsize, case.dtype.itemsize).values()
    cost = Cost(sum(step.flops for step in costs), sum(step.bytes for step in costs))

    def score(index: int, precision: str) -> ok.ScoreOutputs:
        feature_map, head, basis = (rotating[index % len(rotating)] for rotating in (maps, heads, duals))
        return ok.score(feature_map, head, basis, precision=precision, backend=ours)  # type: ignore[arg-type]

    def reference(index: int) -> ok.ScoreOutputs:
        feature_map, head, basis = (rotating[index % len(rotating)] for rotating in (maps, bool_heads, duals))
        return ok.score(feature_map, head, basis, backend="reference")  # type: ignore[arg-type]

    for precision in case.precisions:
        modes = ("", GRAPH, ONE_CALL) if case.samples == 1 else ("", GRAPH)
        call = partial(score, precision=precision)
        checked = {"truth": problem.truth, "tolerance": TOLERANCES[precision], "precision": precision}
        yield from _modes("score", TRITON, call, cost, *modes, **checked)
    exact: dict[str, Any] = {"truth": problem.truth, "tolerance": _EXACT}
    yield from _modes("score", REFERENCE, reference, cost, "", GRAPH, **exact)
    if "compile" in case.extras:
        compiled = _compiled(ok.reference.score)

        def call_compiled(index: int) -> ok.ScoreOutputs:
            return compiled(
                _as_map(maps[index % len(maps)]), bool_heads[index % len(bool_heads)], duals[index % len(duals)]
            )

        yield from _modes("score", COMPILED, call_compiled, cost, "", GRAPH, **exact)


def _parts(problem: Problem, ours: str) -> Iterator[Subject]:
    case = problem.case
    heads, bool_heads = problem.heads, problem.bool_heads
    cost = case.workload.head(case.samples, case.dtype.itemsize)
    features = problem.copies(problem.h)
    truth = problem.energy_truth()

    def energy(index: int, precision: str) -> tuple[Tensor, ...]:
        h, head = features[index % len(features)], heads[index % len(heads)]
        return ok.masked_energy(h, *head, precision=precision, backend=ours)

    def reference(index: int) -> tuple[Tensor, ...]:
        h, head = features[index % len(features)], bool_heads[index % len(bool_heads)]
        return ok.masked_energy(h, *head, backend="reference")

    for precision in case.precisions:
        fields = {"truth": truth, "tolerance": TOLERANCES[precision], "precision": precision}
        yield from _modes("masked_energy", TRITON, partial(energy, precision=precision), cost, "", GRAPH, **fields)
    yield from _modes("masked_energy", REFERENCE, reference, cost, "", truth=truth, tolerance=_EXACT)
    yield from _projections(problem, ours, "dual", problem.dual)


def _projections(problem: Problem, ours: str, kind: BasisKind, basis: ok.BasisTensors) -> Iterator[Subject]:
    case = problem.case
    cost = case.workload.projection(case.samples, case.dtype.itemsize, kind)
    bases = problem.duals if kind == "dual" else problem.copies(basis)
    softmaxes, features = problem.copies(problem.p), problem.copies(problem.h)
    truth = problem.projection_truth(basis)

    def project(index: int, precision: str, backend: str) -> Tensor:
        p, h = softmaxes[index % len(softmaxes)], features[index % len(features)]
        return ok.project_gradients(p, h, bases[index % len(bases)], precision=precision, backend=backend)

    every = kind == "dual" and "precisions" in case.extras
    for precision in ok.PRECISIONS if every else case.precisions:
        fields = {"truth": truth, "tolerance": TOLERANCES[precision], "precision": precision}
        call = partial(project, precision=precision, backend=ours)
        yield from _modes(f"project {kind}", TRITON, call, cost, "", GRAPH, **fields)
    plain = partial(project, precision="ieee", backend="reference")
    yield from _modes(f"project {kind}", REFERENCE, plain, cost, "", truth=truth, tolerance=_EXACT)


def _autograd(problem: Problem) -> Subject:
    """The recipe of arXiv 2310.17163 a sample at a time: gradient of the energy, its coordinates, centred."""
    samples = min(_AUTOGRAD_SAMPLES, problem.case.samples)
    explicit = problem.explicit()
    weight, bias = problem.head.weight.float(), problem.head.bias
    assert bias is not None
    head = torch.cat([weight, bias.float()[:, None]], 1).requires_grad_()
    extended = torch.cat([problem.h, problem.h.new_ones((len(problem.h), 1))], 1)[:samples]
    vectors = explicit.components.float().flatten(1)
    truth = problem.projection_truth(problem.dual)[0][:samples]

    def call(_: int) -> Tensor:
        coordinates = []
        for h_tilde in extended:
            with torch.enable_grad():
                energy = (head @ h_tilde).logsumexp(0)
            (gradient,) = torch.autograd.grad(energy, head)
            coordinates.append(vectors @ gradient.flatten() - explicit.constants)
        return torch.stack(coordinates)

    cost = Cost(2 * samples * vectors.numel(), samples * vectors.numel() * 4)
    note = "one gradient after the other, so the time a sample holds for any N"
    # The vectors were rounded to the basis's dtype.
    tolerance = TOLERANCES["bf16"] if problem.case.dtype != torch.float32 else 1e-3
    return Subject("project", AUTOGRAD, call, cost, (truth,), tolerance, samples=samples, note=note)


def _forward(problem: Problem) -> Iterator[Subject]:
    model = ResNet50().to(problem.device, torch.bfloat16).eval()
    for weight in model.parameters():
        if weight.ndim == 4:
            weight.data = weight.contiguous(memory_format=torch.channels_last)
    images = torch.randn((problem.case.samples, 3, 224, 224), device=problem.device, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    cost = Cost(0, images.numel() * 2)
    yield from _modes(
        RESNET, "eager", lambda _: model(images), cost, "", GRAPH, note="bf16, channels_last, random weights"
    )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _as_map(feature_map: Tensor) -> Tensor:
    return feature_map.transpose(1, 2).unsqueeze(-1) if feature_map.ndim == 3 else feature_map
