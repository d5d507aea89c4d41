"""One sample at a time: the single pass at N = 1, with its operands in the caches and out of them."""

from __future__ import annotations

from collections.abc import Iterator

from ..cases import Effort, Plan
from ..operands import dtypes, sizes_of
from ..scoring import AXES, layout_of, score_plan

__all__ = ["plans"]

_SUBJECT = "latency"


def plans(effort: Effort) -> Iterator[Plan]:
    """ResNet-50, a small-image ResNet-18 and MobileNetV2, warm and cold."""
    dtype = dtypes(effort.device)[0]
    for workload in ("R50", "R18", "MobileNetV2"):
        sizes = sizes_of(workload, AXES, 1, effort.device)
        for cold in (False, True):
            is_compiled = workload == "R50" and not cold and not effort.is_quick
            yield score_plan(
                _SUBJECT, effort, workload, sizes, dtype, layout_of(workload), cold=cold, is_compiled=is_compiled
            )
