"""A case of `ood_kernels.score`: its operands, and who computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels.workloads import WORKLOADS, Cost

from .cases import OURS, Case, Effort, Plan, Provider, providers_of
from .operands import Operands, as_map, as_vectors, precision_of, score_truth, tolerance_of
from .rivals import AUTOGRAD, REFERENCE, GradientRecipe, compiled

__all__ = ["AXES", "THREE_CALLS", "layout_of", "score_plan"]

AXES = "NDCHWnK"
THREE_CALLS = f"{OURS}, three calls"
"""Provider: pooling, head and projection by a call each."""

_LOOP_SAMPLES = 4


def layout_of(workload: str) -> str:
    """Memory format of the workload's map."""
    return "tokens" if WORKLOADS[workload].tokens else "NCHW"


def score_plan(
    subject: str,
    effort: Effort,
    workload: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    memory_format: str,
    *,
    sweeps: tuple[str, ...] = (),
    cold: bool = False,
    is_compiled: bool = False,
    with_autograd: bool = False,
) -> Plan:
    """Plan of the single pass with a dual basis.

    Args:
        subject: what it is called.
        effort: its device is taken.
        workload: name in `ood_kernels.workloads`.
        sizes: along `AXES`.
        dtype: of map, head and basis.
        memory_format: of the map.
        sweeps: see `Plan`.
        cold: see `Plan`.
        is_compiled: let torch.compile take part.
        with_autograd: let the papers' recipe take part.
    """
    build = partial(
        _build,
        workload=workload,
        sizes=sizes,
        dtype=dtype,
        memory_format=memory_format,
        device=effort.device,
        is_compiled=is_compiled,
        with_autograd=with_autograd,
    )
    return Plan(subject, workload, sizes, build, dtype, memory_format, sweeps, cold)


def _build(
    *,
    workload: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    memory_format: str,
    device: torch.device,
    is_compiled: bool,
    with_autograd: bool,
) -> Case:
    operands = Operands(workload, sizes, dtype, device)
    feature_map, basis = operands.feature_map(memory_format), operands.dual()
    head, engine_head = operands.head, operands.engine_head
    precision, tolerance = precision_of(dtype), tolerance_of(dtype)

    def three_calls() -> tuple[Tensor, ...]:
        h, nap = ok.pool_nap(feature_map)
        lse, pruned_lse, p = ok.masked_energy(h, *engine_head, precision=precision)
        return h, nap, lse, pruned_lse, p, ok.project_gradients(p, h, basis, precision=precision)

    found, missing = providers_of(
        lambda: Provider(
            OURS,
            lambda: ok.score(feature_map, engine_head, basis, precision=precision),
            tolerance=tolerance,
            captures=True,
        ),
        lambda: Provider(THREE_CALLS, three_calls, tolerance=tolerance, captures=True),
        lambda: Provider(REFERENCE, lambda: ok.reference.score(as_map(feature_map), head, basis)),
        *([lambda: compiled(ok.reference.score, as_map(feature_map), head, basis)] if is_compiled else []),
        *([lambda: _recipe(feature_map, head, basis)] if with_autograd else []),
    )
    steps = operands.size.score(operands.samples, dtype.itemsize, dtype.itemsize).values()
    cost = Cost(sum(step.flops for step in steps), sum(step.bytes for step in steps))
    return Case(found, score_truth(feature_map, head, basis), cost, missing)


def _recipe(feature_map: Tensor, head: ok.Head, basis: ok.DualTensors) -> Provider:
    """NAP, energies and low-dimensional gradients as the papers compute them, for the first samples."""
    maps = as_map(feature_map)[:_LOOP_SAMPLES].float()
    weight, bias, weight_mask, neuron_mask = head
    assert bias is not None
    assert weight_mask is not None
    assert neuron_mask is not None
    weight, bias, kept = weight.float(), bias.float(), neuron_mask
    pruned = weight * weight_mask
    recipe = GradientRecipe(head, as_vectors(basis), basis.constants)

    def call() -> tuple[Tensor, ...]:
        h, maximum = maps.mean((2, 3)), maps.amax((2, 3))
        nap = (maximum / (h + 1)).square().mean(1)
        logits = h @ weight.T + bias
        pruned_lse = ((h * kept) @ pruned.T + bias).logsumexp(1)
        return h, nap, logits.logsumexp(1), pruned_lse, logits.softmax(1), recipe.one_by_one(h)

    return Provider(AUTOGRAD, call, samples=len(maps), note="the gradients alone a sample at a time")
