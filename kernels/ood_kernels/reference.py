"""Reference implementation: every function of this package in plain torch, on any device, in any floating dtype.

fp64 inputs give fp64 outputs; fp32, bf16 and fp16 inputs accumulate in fp32 and give fp32 outputs. Outputs never alias
inputs, except for the factor returned by `cotangent`, and no function builds a tensor of [N, C, D]. Notation as in the papers:
A feature map, h pooled features, p softmax, lse logsumexp, G = a ⊗ h̃ last-layer gradient with h̃ = [h; 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import basis_tensors
from .bases.dual import linear_part
from .masks import unpack_mask
from .types import BasisTensors, HasBasisTensors, Head, PoolStatistics, ScoreOutputs, compute_dtype

__all__ = [
    "COTANGENTS",
    "check_cotangent",
    "cotangent",
    "linear_part",
    "masked_energy",
    "nap_from_statistics",
    "pool_nap",
    "pool_statistics",
    "project_gradients",
    "score",
]

COTANGENTS = ("energy", "predicted", "uniform", "max_logit", "sum_logits")
"""The scalars whose last-layer gradient has rank one, a ⊗ h̃."""

_WORKSPACE_ELEMENTS = 4 * 2**20
_MASKED_ELEMENTS = 2**20


def pool_statistics(feature_map: Tensor, *, rectify: bool = False) -> PoolStatistics:
    """Per-channel mean and maximum over H·W, see `ood_kernels.pool_statistics`."""
    dtype = compute_dtype(feature_map)
    samples, channels, height, width = feature_map.shape
    h = feature_map.new_empty((samples, channels), dtype=dtype)
    maximum = torch.empty_like(h)
    nap_mean = torch.empty_like(h)
    # Casting and rectifying copy, so samples are processed in chunks.
    needs_copy = rectify or feature_map.dtype != dtype
    rows = max(1, _WORKSPACE_ELEMENTS // max(1, channels * height * width)) if needs_copy else max(1, samples)
    for start in range(0, samples, rows):
        part = feature_map[start : start + rows].to(dtype)
        here = slice(start, start + rows)
        h[here] = part.mean((2, 3))
        if rectify:
            part = part.clamp_min(0)
        maximum[here] = part.amax((2, 3))
        # Rectifying would hide -Inf; adding 0 · h turns it into NaN.
        nap_mean[here] = part.mean((2, 3)) + 0 * h[here] if rectify else h[here]
    return PoolStatistics(h, nap_mean, maximum)


def nap_from_statistics(nap_mean: Tensor, maximum: Tensor, eps: float = 1.0) -> tuple[Tensor, Tensor]:
    """NAP from per-channel statistics: r_j = max_j / (mean_j + eps), S = (1/D) Σ_j r_j².

    A non-positive denominator, possible only with a signed map, gives a NaN ratio.

    Args:
        nap_mean: [N, D].
        maximum: [N, D].
        eps: see `ood_kernels.pool_nap`.

    Returns:
        (S [N], r [N, D]).
    """
    denominator = nap_mean + eps
    ratios = torch.where(denominator > 0, maximum / denominator, torch.nan)
    return ratios.square().mean(1), ratios


def pool_nap(
    feature_map: Tensor, eps: float = 1.0, *, rectify: bool = False, return_ratios: bool = False
) -> tuple[Tensor, ...]:
    """(h [N, D], NAP [N]) and optionally NAP's ratios [N, D], see `ood_kernels.pool_nap`."""
    statistics = pool_statistics(feature_map, rectify=rectify)
    nap, ratios = nap_from_statistics(statistics.nap_mean, statistics.maximum, eps)
    return (statistics.h, nap, ratios) if return_ratios else (statistics.h, nap)


def _finite_logsumexp(logits: Tensor) -> Tensor:
    """Row logsumexp [N], with ±Inf as NaN: +Inf from a non-finite feature would rank as the most in-distribution score."""
    lse = logits.logsumexp(1)
    return torch.where(lse.isfinite(), lse, torch.nan)


def masked_energy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_mask: Tensor | None = None,
    neuron_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse [N], pruned lse [N], p [N, C]), see `ood_kernels.masked_energy`."""
    dtype = compute_dtype(h, weight)
    # One layout for the full and the pruned product, so that all-True masks change no bit.
    h, weight = h.to(dtype).contiguous(), weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype)
    if weight_mask is None and neuron_mask is None:
        logits = F.linear(h, weight, bias)
        lse = _finite_logsumexp(logits)
        return lse, lse.clone(), logits.softmax(1)
    if weight_mask is not None and weight_mask.dtype == torch.int32:
        weight_mask = unpack_mask(weight_mask, weight.shape[1])
    # Multiply rather than `where`: 0 · NaN is NaN, so a non-finite feature surfaces even in a pruned neuron.
    kept = h if neuron_mask is None else h * neuron_mask
    logits = h.new_empty((h.shape[0], weight.shape[0]))
    pruned = torch.empty_like(logits)
    # Chunks of classes keep the masked weights in cache.
    rows = max(1, _MASKED_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        here = slice(start, start + rows)
        part, of_part = weight[here], None if bias is None else bias[here]
        logits[:, here] = F.linear(h, part, of_part)
        pruned[:, here] = F.linear(kept, part if weight_mask is None else part * weight_mask[here], of_part)
    return _finite_logsumexp(logits), _finite_logsumexp(pruned), logits.softmax(1)


def cotangent(p: Tensor, kind: str = "energy") -> Tensor:
    """The factor a = ∂y/∂z [N, C] of the last-layer gradient G = a ⊗ h̃ of a scalar y, from the softmax p [N, C].

    `energy` y = lse: a = p. `predicted` y = lse - z_ŷ: a = p - e_ŷ. `uniform` y = lse - mean z: a = p - 1/C.
    `max_logit` y = z_ŷ: a = e_ŷ. `sum_logits` y = Σ z: a = 1. For `energy` the result may alias p.

    Raises:
        ValueError: unknown cotangent.
    """
    p = p.to(compute_dtype(p))
    if kind == "energy":
        return p
    if kind == "uniform":
        return p - 1.0 / p.shape[1]
    if kind == "sum_logits":
        return p * 0 + 1
    if kind in ("predicted", "max_logit"):
        # A row with NaN has no predicted class; adding 0 · p propagates the NaN.
        one_hot = F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype) + p * 0
        return one_hot if kind == "max_logit" else p - one_hot
    raise _unknown_cotangent(kind)


def check_cotangent(kind: str) -> None:
    """Raise ValueError unless the cotangent is one of `COTANGENTS`."""
    if kind not in COTANGENTS:
        raise _unknown_cotangent(kind)


def _unknown_cotangent(kind: str) -> ValueError:
    return ValueError(f"cotangent {kind!r} is not known: expected one of {', '.join(COTANGENTS)}")


def project_gradients(p: Tensor, h: Tensor, basis: BasisTensors | HasBasisTensors) -> Tensor:
    """Centred coordinates g_low [N, K] of the last-layer gradients, see `ood_kernels.project_gradients`."""
    tensors = basis_tensors(basis)
    return tensors.project(cotangent(p, tensors.cotangent), h)


def score(
    feature_map: Tensor,
    head: Head,
    basis: BasisTensors | HasBasisTensors | None = None,
    eps: float = 1.0,
    *,
    rectify: bool = False,
) -> ScoreOutputs:
    """All scores of a batch, see `ood_kernels.score`."""
    h, nap = pool_nap(feature_map, eps, rectify=rectify)
    lse, pruned_lse, p = masked_energy(h, *head)
    g_low = h.new_empty((h.shape[0], 0)) if basis is None else project_gradients(p, h, basis)
    return ScoreOutputs(h, nap, lse, pruned_lse, p, g_low)
