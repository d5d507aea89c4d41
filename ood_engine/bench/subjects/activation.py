"""The activation pass: pooled features and NAP from the feature map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch

import ood_kernels as ok

from ..cases import OURS, Case, Effort, Plan, Provider, providers_of
from ..operands import SAMPLES, Operands, as_map, batches, dtypes, pool_truth, series, sizes_of
from ..rivals import REFERENCE, compiled

__all__ = ["plans"]

_SUBJECT = "pool_nap"
_AXES = "NDHW"


def plans(effort: Effort) -> Iterator[Plan]:
    """ResNet-50's map along N and D, in both layouts and dtypes and in both states of the caches; other models' maps.

    The map of W21k is that of R50.
    """
    dtype, other_dtype = dtypes(effort.device)
    plan = partial(_plan, effort)
    base = sizes_of("R50", _AXES, SAMPLES, effort.device)
    channels = (256, 2048, 8192) if effort.is_quick else (256, 1024, 2048, 8192)
    for sizes, sweeps in series(base, N=batches(effort), D=channels):
        yield plan("R50", sizes, dtype, "NCHW", sweeps=sweeps, is_compiled=sizes == base and not effort.is_quick)
    yield plan("R50", base, dtype, "NCHW", is_usual=False)
    if effort.is_quick:
        yield plan("R50", base, dtype, "channels_last")
    else:
        for sizes, sweeps in series(base, N=batches(effort)):
            yield plan("R50", sizes, dtype, "channels_last", sweeps=sweeps)
        yield plan("R50", base, other_dtype, "NCHW")
    yield plan("R50", base, other_dtype, "channels_last")
    for workload, memory_format in (
        ("ViT", "tokens"),
        ("R18", "NCHW"),
        ("MobileNetV2", "channels_last"),
        ("tiny", "NCHW"),
    ):
        sizes = sizes_of(workload, _AXES, SAMPLES, effort.device)
        yield plan(workload, sizes, dtype, memory_format)
        if not effort.is_quick:
            yield plan(workload, sizes, other_dtype, memory_format)


def _plan(
    effort: Effort,
    workload: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    memory_format: str,
    *,
    sweeps: tuple[str, ...] = (),
    is_usual: bool = True,
    is_compiled: bool = False,
) -> Plan:
    build = partial(
        _build,
        workload=workload,
        sizes=sizes,
        dtype=dtype,
        memory_format=memory_format,
        device=effort.device,
        is_compiled=is_compiled,
    )
    # Its own caches hold the operands of a CPU, the model's forward has pushed out those of a GPU.
    cold = (effort.device.type == "cuda") == is_usual
    return Plan(_SUBJECT, workload, sizes, build, dtype, memory_format, sweeps, cold)


def _build(
    *,
    workload: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    memory_format: str,
    device: torch.device,
    is_compiled: bool,
) -> Case:
    operands = Operands(workload, sizes, dtype, device)
    feature_map = operands.feature_map(memory_format)
    found, missing = providers_of(
        lambda: Provider(OURS, lambda: ok.pool_nap(feature_map), captures=True),
        lambda: Provider(REFERENCE, lambda: ok.reference.pool_nap(as_map(feature_map))),
        *([lambda: compiled(ok.reference.pool_nap, as_map(feature_map))] if is_compiled else []),
    )
    cost = operands.size.pool(operands.samples, dtype.itemsize)
    return Case(found, pool_truth(feature_map), cost, missing)
