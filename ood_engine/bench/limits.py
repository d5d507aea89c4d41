"""What the machine can do at all, measured in the same run: a copy of the same bytes, a large matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ood_kernels.workloads import Cost

from .cases import Case, Effort, Provider
from .clock import Clock

__all__ = ["COPY", "Limits"]

COPY = "limit: copy of the same bytes"
_MOST_COPY_BYTES = 512 * 2**20
_LEAST_COPY_BYTES = 2**12
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
_PRODUCT_CALLS = 7


class Limits:
    """The limits of one machine.

    Attributes:
        flops_a_second: dtype → rate of a large matrix product, as far as it was asked for.
    """

    def __init__(self, clock: Clock, effort: Effort) -> None:
        self._clock, self._device = clock, effort.device
        self.flops_a_second: dict[torch.dtype, float] = {}

    def copy(self, least_bytes: int) -> Provider:
        """Provider that reads half of the bytes and writes the other half; at most 512 MiB, at least 4 KiB."""
        size = min(max(least_bytes, _LEAST_COPY_BYTES), _MOST_COPY_BYTES) // 2
        source = torch.ones(size, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return Provider(COPY, lambda: target.copy_(source), tolerance=None, cost=Cost(0, 2 * size))

    @staticmethod
    def cost_of(provider: Provider, case: Case) -> Cost | None:
        """Least arithmetic and traffic of one call of a provider."""
        if provider.cost is not None:
            return provider.cost
        # A provider that takes fewer samples does another amount of work: its rates would mislead.
        return case.cost if provider.samples is None else None

    def rate(self, dtype: torch.dtype) -> float:
        """Flops a second of a large matrix product in this dtype, measured at the first question."""
        if dtype not in self.flops_a_second:
            size = _PRODUCT_SIZE[self._device.type]
            left, right = (torch.randn(size, size, device=self._device).to(dtype) for _ in range(2))
            self._clock.time(lambda: left @ right, False)
            samples = [self._clock.time(lambda: left @ right, False) for _ in range(_PRODUCT_CALLS)]
            times = sorted(sample.host_ms if sample.device_ms is None else sample.device_ms for sample in samples)
            self.flops_a_second[dtype] = 2 * size**3 / (times[len(times) // 2] / 1000)
        return self.flops_a_second[dtype]

    def annotate(self, rows: Sequence[dict[str, Any]], dtype: torch.dtype) -> None:
        """Write rates and the share of the limit into the rows of one case."""
        copied = next((row for row in rows if row["provider"] == COPY), None)
        for row in rows:
            own = row["device_p50_ms"] or row["p50_ms"]
            if row["samples_run"]:
                row["ms_per_sample"] = row["p50_ms"] / row["samples_run"]
            if row["bytes"] is None:
                continue
            row["gb_per_s"], row["tflop_per_s"] = row["bytes"] / own / 1e6, row["flops"] / own / 1e9
            if copied is not None:
                copy_rate = copied["bytes"] / (copied["device_p50_ms"] or copied["p50_ms"]) * 1000
                row["limit_ms"] = 1000 * Cost(row["flops"], row["bytes"]).seconds(self.rate(dtype), copy_rate)
                row["share_of_limit"] = row["limit_ms"] / own
