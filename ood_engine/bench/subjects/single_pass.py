"""Everything in one pass: NAP, energy, pruned energy and gradient coordinates from the feature map alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..cases import Effort, Plan
from ..operands import SAMPLES, batches, dtypes, series, sizes_of
from ..scoring import AXES, layout_of, score_plan

__all__ = ["plans"]

_SUBJECT = "score"


def plans(effort: Effort) -> Iterator[Plan]:
    """ResNet-50 along N, and the other models; the papers' recipe takes part for R18, where its vectors are small."""
    dtype, other_dtype = dtypes(effort.device)
    is_gpu = effort.device.type == "cuda"
    plan = partial(score_plan, _SUBJECT, effort, cold=is_gpu)
    base = sizes_of("R50", AXES, SAMPLES, effort.device)
    for sizes, sweeps in series(base, N=batches(effort)):
        yield plan("R50", sizes, dtype, "NCHW", sweeps=sweeps, is_compiled=sizes == base)
    workloads = ("R18", "tiny") if effort.is_quick else ("R18", "W21k", "ViT", "MobileNetV2", "tiny")
    for workload in workloads:
        sizes = sizes_of(workload, AXES, SAMPLES, effort.device)
        yield plan(workload, sizes, dtype, layout_of(workload), with_autograd=workload == "R18")
    if not effort.is_quick:
        yield plan("R50", base, dtype, "channels_last")
    if is_gpu:
        yield plan("R50", base, other_dtype, "NCHW")
