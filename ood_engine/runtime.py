"""The arithmetic of an engine: backend, precision, CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

import ood_kernels as ok
from ood_kernels.types import HasBasisTensors

from .errors import InputError, one_of

__all__ = ["Kernels", "Masks", "Runtime", "full_precision", "version_of"]

Masks = tuple[Tensor | None, Tensor | None]
"""(weight mask, neuron mask) of a pruned head."""

_LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Precision, backend and CUDA graphs of fitting, calibration, tuning and scoring.

    A state file records only the precision and backend of its calibration; loading it under others warns.

    Attributes:
        precision: operand precision of matrix products in GPU kernels: "ieee", "tf32x3", "tf32", "bf16" or "fp16", see
            `ood_kernels.score`. The last two also store the subspace in half precision, at half the memory traffic.
        backend: "triton", "reference", or None: chosen by the device and OOD_ENGINE_BACKEND.
        cuda_graph: on a GPU, replay scoring from the feature map on as one CUDA graph for batches of up to 64, for the lowest
            latency. No effect without a GPU.

    Raises:
        InputError: an unknown precision or backend.

    Example:
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), runtime=Runtime(precision="tf32", cuda_graph=True))
        >>> engine.runtime
        Runtime(precision='tf32', backend=None, cuda_graph=True)
    """

    precision: str = "ieee"
    backend: str | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ok.PRECISIONS:
            raise InputError(f"precision={self.precision!r}: {one_of(self.precision, ok.PRECISIONS)}")
        if self.backend not in (None, *ok.BACKENDS):
            raise InputError(f"backend={self.backend!r}: expected one of {', '.join(ok.BACKENDS)}, or None")

    @property
    def arithmetic(self) -> dict[str, str | None]:
        """The settings that affect rounding: precision and backend."""
        return {"precision": self.precision, "backend": self.backend}


class Kernels:
    """The operators of `ood_kernels` under one runtime.

    On a GPU, bit-packed masks and half-precision bases are cached per fitted tensor.

    Args:
        runtime: backend and precision.
    """

    def __init__(self, runtime: Runtime | None = None) -> None:
        self.runtime = runtime or Runtime()
        self._options: dict[str, Any] = {"precision": self.runtime.precision, "backend": self.runtime.backend}
        self._packed = WeakIdKeyDictionary()
        self._bases = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Kernels], tuple[Runtime]]:
        # A copy rebuilds its own cache.
        return Kernels, (self.runtime,)

    def pool_nap(self, feature_map: Tensor, eps: float, rectify: bool) -> tuple[Tensor, ...]:
        """Pooled features [N, D] and NAP [N]."""
        return ok.pool_nap(feature_map, eps, rectify=rectify, backend=self.runtime.backend)

    def pool_statistics(self, feature_map: Tensor, rectify: bool) -> ok.PoolStatistics:
        """Mean and maximum of every channel, [N, D]."""
        return ok.pool_statistics(feature_map, rectify=rectify, backend=self.runtime.backend)

    def masked_energy(self, h: Tensor, head: ok.Head, masks: Masks | None) -> tuple[Tensor, Tensor, Tensor]:
        """(lse [N], pruned lse [N], p [N, C])."""
        return ok.masked_energy(h, head.weight, head.bias, *self._prepare_masks(masks), **self._options)

    def project_gradients(self, p: Tensor, h: Tensor, basis: HasBasisTensors) -> Tensor:
        """Centred coordinates [N, K]."""
        return ok.project_gradients(p, h, self._prepare_basis(basis), **self._options)

    def score(
        self,
        feature_map: Tensor,
        head: ok.Head,
        masks: Masks | None,
        basis: HasBasisTensors | None,
        eps: float,
        rectify: bool,
    ) -> ok.ScoreOutputs:
        """All scores in one pass over the map."""
        pruned = ok.Head(head.weight, head.bias, *self._prepare_masks(masks))
        tensors = None if basis is None else self._prepare_basis(basis)
        return ok.score(feature_map, pruned, tensors, eps, rectify=rectify, **self._options)

    def _prepare_masks(self, masks: Masks | None) -> Masks:
        if masks is None:
            return None, None
        weight_mask, neuron_mask = masks
        if weight_mask is None or not weight_mask.is_cuda:
            return masks
        known, packed = self._packed.get(weight_mask, (None, weight_mask))
        if known != version_of(weight_mask):
            packed = ok.pack_mask(weight_mask)
            self._packed[weight_mask] = (version_of(weight_mask), packed)
        return packed, neuron_mask

    def _prepare_basis(self, basis: HasBasisTensors) -> ok.BasisTensors:
        tensors = basis.tensors()
        dtype = _LOW_PRECISION.get(self.runtime.precision)
        if dtype is None:
            return tensors
        parts = [part for part in tensors.parts() if part is not None]
        if not parts[0].is_cuda:
            return tensors
        versions = tuple(version_of(part) for part in parts)
        known, prepared = self._bases.get(parts[0], (None, tensors))
        if known != versions:
            prepared = tensors.to(dtype)
            self._bases[parts[0]] = (versions, prepared)
        return prepared


def version_of(tensor: Tensor) -> int:
    """In-place modification count; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast, which is meant for the model: detectors would silently run in half precision."""
    return torch.autocast(device.type, enabled=False)
