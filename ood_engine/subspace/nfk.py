"""Normalised gradients, the neural Fisher kernel of the paper's code: g̃ = I ∘ (G - Ḡ) with I = Var(G)^(-1/2), elementwise.

All runs in the README of the code of arXiv 2310.17163 use it; our default is "none", centring only. I is generally not of rank
one, so it is exact only in bases that store vectors [K, C, D̃]; with the closest u ⊗ v instead, normalised gradients keep rank
one and every basis its speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .eigen import gram_pca

__all__ = [
    "NormalisedPca",
    "Separable",
    "check_finite",
    "deviation",
    "inverse",
    "mean_and_deviation",
    "pca",
    "separate",
]

_WORKSPACE_ELEMENTS = 4 * 2**20
_SWEEPS = 20
_ROUNDINGS = 8


class Separable(NamedTuple):
    """I ≈ u ⊗ v: u [C], v [D̃] with 1 for the bias, and the relative error of normalised gradients, 0-d."""

    class_scale: Tensor
    feature_scale: Tensor
    error: Tensor


class NormalisedPca(NamedTuple):
    """Components I ∘ V [K, C, D̃], their constants [K] and shares of the variance [K]."""

    components: Tensor
    constants: Tensor
    explained: Tensor


def check_finite(*tensors: Tensor) -> None:
    """Raise InputError if extreme scales overflowed the dtype."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise InputError(
            f"normalised gradients leave the range of {tensors[0].dtype}: expected gradient variances within it;"
            " give p or h as float64, or normalisation='none'"
        )


def mean_and_deviation(a: Tensor, h: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Elementwise mean and standard deviation of gradients, [C, D̃] each, from a [n, C] and h̃ [n, D̃] in fp64.

    Args:
        a: [n, C].
        h: h̃ [n, D̃].
        weights: [n] with sum 1; None: uniform.
    """
    weighted = a / len(a) if weights is None else a * weights[:, None]
    mean = weighted.T @ h
    return mean, deviation(mean, (weighted * a).T @ h.square(), len(a))


def deviation(mean: Tensor, second: Tensor, samples: int) -> Tensor:
    """Elementwise standard deviation of gradients, [C, D̃], from E[G] and E[G²]; exactly 0 below their rounding error."""
    variance = second - mean.square()
    floor = (samples + _ROUNDINGS) * torch.finfo(variance.dtype).eps * second
    return torch.where(variance > floor, variance, 0).sqrt()


def inverse(spread: Tensor) -> Tensor:
    """I = 1 / standard deviation, with the largest finite value for constant entries, as in the paper's code."""
    varies = _varies(spread)
    finite = torch.where(varies, 1 / spread, 0)
    return torch.where(varies, finite, finite.max())


def separate(spread: Tensor, bias: bool) -> Separable:
    """The u ⊗ v with the least error in normalised gradients: minimises Σ (u_c v_d / I_cd - 1)² over varying entries.

    As I² Var(G) = 1, the mean of that square is E‖(u ⊗ v - I) ∘ (G - Ḡ)‖² / E‖I ∘ (G - Ḡ)‖². Alternating least squares for u and
    v, starting from the best fit of log I. Constant rows and columns get the largest scale of the others.
    """
    varies = _varies(spread)
    logarithm = torch.where(varies, -spread.log(), 0)
    rows, columns = varies.sum(1).clamp_min(1), varies.sum(0).clamp_min(1)
    class_scale = (logarithm.sum(1) / rows).exp()
    feature_scale = (torch.where(varies, logarithm - class_scale.log()[:, None], 0).sum(0) / columns).exp()
    for _ in range(_SWEEPS):
        class_scale = _fit_scale(spread * feature_scale)
        feature_scale = _fit_scale(spread.T * class_scale)
    if bias:
        class_scale, feature_scale = class_scale * feature_scale[-1], feature_scale / feature_scale[-1]
    ratio = class_scale[:, None] * spread * feature_scale
    return Separable(class_scale, feature_scale, (ratio - 1)[varies].square().mean().sqrt())


def _fit_scale(rows: Tensor) -> Tensor:
    """The least-squares factor per row that brings its entries closest to 1."""
    squares = rows.square().sum(1)
    scale = torch.where(squares > 0, rows.sum(1) / squares, 0)
    return torch.where(scale > 0, scale, scale.max())


def _varies(spread: Tensor) -> Tensor:
    varies = spread > 0
    if not bool(varies.any()):
        raise InputError("no entry of the gradients varies: expected samples that differ; fit on more varied ID data")
    return varies


def pca(
    a: Tensor, h: Tensor, mean: Tensor, spread: Tensor, n_components: int | float, dtype: torch.dtype, max_bytes: int
) -> NormalisedPca:
    """PCA of I ∘ (G - Ḡ) over the samples G_i = a_i ⊗ h̃_i from their n × n Gram matrix, in chunks of classes.

    Args:
        a: [n, C] in fp64.
        h: h̃ [n, D̃] in fp64.
        mean: Ḡ [C, D̃].
        spread: elementwise standard deviation.
        n_components: K, or a share of the variance.
        dtype: dtype of the components.
        max_bytes: memory limit of the components.

    Raises:
        InputError: equal samples, or components beyond `max_bytes`.
    """
    # Constant entries are excluded: a large I would turn their rounding errors into variance.
    scale = torch.where(_varies(spread), 1 / spread, 0)
    gram = a.new_zeros((len(a), len(a)))
    for _, block in _normalised_blocks(a, h, mean, scale):
        gram += block @ block.T
    coefficients, _, explained, *_ = gram_pca(gram, n_components, is_centred=True)
    kept = len(explained)
    required = kept * mean.numel() * torch.finfo(dtype).bits // 8
    if required > max_bytes:
        raise InputError(
            f"{kept} components of {mean.shape[0]} x {mean.shape[1]} gradients take {required} bytes: expected at most"
            f" max_bytes={max_bytes}; use fewer components, or DualBasis with normalisation='nfk-separable'"
        )
    components = torch.empty((kept, *mean.shape), dtype=dtype, device=a.device)
    constants = a.new_zeros(kept)
    for classes, block in _normalised_blocks(a, h, mean, scale):
        part = (coefficients.T @ block).unflatten(1, (-1, mean.shape[1])) * scale[classes]
        components[:, classes] = part.to(dtype)
        constants += (part * mean[classes]).sum((1, 2))
    check_finite(components)
    return NormalisedPca(components, constants, explained)


def _normalised_blocks(a: Tensor, h: Tensor, mean: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(classes, their part of the normalised gradients [n, classes · D̃])."""
    step = max(1, _WORKSPACE_ELEMENTS // max(1, h.numel()))
    for start in range(0, a.shape[1], step):
        classes = slice(start, start + step)
        gradients = a[:, classes, None] * h[:, None, :]
        yield classes, ((gradients - mean[classes]) * scale[classes]).flatten(1)
