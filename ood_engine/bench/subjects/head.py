"""The head pass: energy of the head and of the pruned head, and the softmax, from pooled features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import ood_kernels as ok

from ..cases import OURS, Case, Effort, Plan, Provider, providers_of
from ..operands import SAMPLES, Operands, batches, dtypes, precision_of, series, sizes_of, tolerance_of
from ..rivals import LIBRARY, REFERENCE, compiled

__all__ = ["plans"]

_SUBJECT = "masked_energy"
_AXES = "NDC"


def plans(effort: Effort) -> Iterator[Plan]:
    """ResNet-50's head along N, C and D, and other models' heads; the other dtype too on a GPU."""
    dtype, other_dtype = dtypes(effort.device)
    base = sizes_of("R50", _AXES, SAMPLES, effort.device)
    values = {"N": batches(effort), "C": (125, 1000, 8000), "D": (512, 2048, 8192)}
    for sizes, sweeps in series(base, **values):
        yield _plan(effort, "R50", sizes, dtype, sweeps, is_compiled=sizes == base and not effort.is_quick)
    workloads = ("R18", "tiny") if effort.is_quick else ("R18", "W21k", "ViT", "MobileNetV2", "tiny")
    for workload in workloads:
        yield _plan(effort, workload, sizes_of(workload, _AXES, SAMPLES, effort.device), dtype)
    if effort.device.type == "cuda":
        yield _plan(effort, "R50", base, other_dtype)


def _plan(
    effort: Effort,
    workload: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    sweeps: tuple[str, ...] = (),
    *,
    is_compiled: bool = False,
) -> Plan:
    build = partial(_build, workload=workload, sizes=sizes, dtype=dtype, device=effort.device, is_compiled=is_compiled)
    return Plan(_SUBJECT, workload, sizes, build, dtype, sweeps=sweeps, cold=effort.device.type == "cuda")


def _build(
    *, workload: str, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, is_compiled: bool
) -> Case:
    operands = Operands(workload, sizes, dtype, device)
    h, head, engine_head = operands.features, operands.head, operands.engine_head
    precision = precision_of(dtype)
    found, missing = providers_of(
        lambda: Provider(
            OURS,
            lambda: ok.masked_energy(h, *engine_head, precision=precision),
            tolerance=tolerance_of(dtype),
            captures=True,
        ),
        lambda: Provider(REFERENCE, lambda: ok.reference.masked_energy(h, *head)),
        lambda: _library(h, head),
        *([lambda: compiled(ok.reference.masked_energy, h, *head)] if is_compiled else []),
    )
    truth = ok.reference.masked_energy(h.double(), *head)
    return Case(found, truth, operands.size.head(operands.samples, dtype.itemsize), missing)


def _library(h: Tensor, head: ok.Head) -> Provider:
    """Two products as a user would write them, with the pruned weights made beforehand."""
    weight, bias, weight_mask, neuron_mask = head
    assert weight_mask is not None
    assert neuron_mask is not None
    pruned = weight * weight_mask * neuron_mask

    def call() -> tuple[Tensor, Tensor, Tensor]:
        features = h.to(weight.dtype)
        logits = F.linear(features, weight, bias).float()
        pruned_logits = F.linear(features, pruned, bias).float()
        return logits.logsumexp(1), pruned_logits.logsumexp(1), logits.softmax(1)

    note = "keeps the pruned weights beside the weights"
    return Provider(LIBRARY, call, tolerance=tolerance_of(weight.dtype), captures=True, note=note)
