"""The arithmetic of an engine: kernels or plain torch, precision, CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

import ood_kernels as ok
from ood_kernels.types import HasBasisTensors

from .errors import InputError

__all__ = ["Kernels", "Masks", "Runtime", "full_precision"]

Masks = tuple[Tensor | None, Tensor | None]
"""(weight mask, neuron mask) of a pruned head."""

_LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Precision, backend and CUDA graphs of everything an engine computes: fitting, calibration, tuning and scores.

    A state file holds precision and backend of its calibration and no more; loading it under others warns.

    Attributes:
        precision: what the GPU kernels round the operands of matrix products to: "ieee", "tf32x3", "tf32", "bf16" or "fp16",
            see `ood_kernels.score`. With the last two the subspace is also kept in half precision, half the bytes to read.
        backend: "triton", "reference", or None for what the device and OOD_ENGINE_BACKEND say.
        cuda_graph: on a GPU, replay the way from the feature map to the scores as one CUDA graph for batches of up to 64, for
            the lowest latency. Without a GPU it changes nothing.
    """

    precision: str = "ieee"
    backend: str | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ok.PRECISIONS:
            raise InputError(f"precision={self.precision!r}: expected one of {', '.join(ok.PRECISIONS)}")
        if self.backend not in (None, *ok.BACKENDS):
            raise InputError(f"backend={self.backend!r}: expected one of {', '.join(ok.BACKENDS)}, or None")

    @property
    def arithmetic(self) -> dict[str, str | None]:
        """What rounds a score: precision and backend."""
        return {"precision": self.precision, "backend": self.backend}


class Kernels:
    """The functions of `ood_kernels` as one engine calls them.

    For a GPU it keeps masks packed to bits and bases in half precision, made once for each fitted tensor.

    Args:
        runtime: backend and precision.
    """

    def __init__(self, runtime: Runtime | None = None) -> None:
        self.runtime = runtime or Runtime()
        self._options: dict[str, Any] = {"precision": self.runtime.precision, "backend": self.runtime.backend}
        self._packed = WeakIdKeyDictionary()
        self._bases = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Kernels], tuple[Runtime]]:
        # A copy, here or in another process, prepares its own tensors.
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
        """Everything in one pass over the map."""
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
        if known != _version(weight_mask):
            packed = ok.pack_mask(weight_mask)
            self._packed[weight_mask] = (_version(weight_mask), packed)
        return packed, neuron_mask

    def _prepare_basis(self, basis: HasBasisTensors) -> ok.BasisTensors:
        tensors = basis.tensors()
        dtype = _LOW_PRECISION.get(self.runtime.precision)
        if dtype is None:
            return tensors
        parts = [part for part in tensors.parts() if part is not None]
        if not parts[0].is_cuda:
            return tensors
        versions = tuple(_version(part) for part in parts)
        known, prepared = self._bases.get(parts[0], (None, tensors))
        if known != versions:
            prepared = tensors.to(dtype)
            self._bases[parts[0]] = (versions, prepared)
        return prepared


def _version(tensor: Tensor) -> int:
    """Counts changes in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def full_precision(device: torch.device) -> torch.autocast:
    """No autocast, which is for the model: detectors would run in half precision behind the caller's back."""
    return torch.autocast(device.type, enabled=False)
