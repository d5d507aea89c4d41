"""Scores as sums of contributions of classes and channels, one function per family.

- Low-dimensional gradients: a score that is quadratic in the coordinates g_k = ⟨G - Ḡ, V_k⟩, s = -Σ_k y_k w_k with y = g - m and
  w = A y, equals s = -⟨U, G - Ḡ⟩ + Σ_k w_k m_k with U = Σ_k w_k V_k, a matrix [C, D̃] like the gradient itself.
- Energies, also of a pruned head: lse = Σ_c p_c z_c - Σ_c p_c log p_c, with z_c = Σ_j W_cj h_j + b_c. MaxLogit is one z_c.
- Norms of the gradient: ‖a ⊗ h‖₁ = Σ_cj |a_c| |h_j|.
- NAP: a mean over channels; it has no classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from ..detectors import Detector
from ..detectors.energy import Energy, MaxLogit
from ..detectors.gradient_norm import ExGrad, GradNorm
from ..detectors.heads import Mahalanobis
from ..detectors.low_dim_gradient import LowDimGradient
from ..detectors.nap import NAP
from ..detectors.opnp import OPNP
from ..features.signals import Signals
from ..subspace import extend

__all__ = ["Decomposition", "decompose"]


class Decomposition(NamedTuple):
    """The score of one image as `parts.sum() + offset`, in fp64.

    Attributes:
        parts: [C, D + 1] contribution of each class and channel, the last column that of the bias; one row without classes.
        offset: what belongs to neither.
        slopes: [D] derivative by each channel's mean over the positions, the same at every position; None if there is none.
    """

    parts: Tensor
    offset: Tensor
    slopes: Tensor | None


def decompose(detector: Detector, signals: Signals, head: ok.Head, feature_map: Tensor | None) -> Decomposition | None:
    """The decomposition of a detector's score of one image; None if it has none.

    Args:
        detector: fitted.
        signals: of a batch of one image.
        head: the unpruned head.
        feature_map: [1, D, H, W], rectified as NAP needs it; None if the model has none.
    """
    if isinstance(detector, LowDimGradient):
        return _quadratic(detector, signals) if detector.head in ("mahalanobis", "projected_norm") else None
    if isinstance(detector, NAP):
        # A geometric mean with another score is no sum.
        return _nap(detector, feature_map) if type(detector) is NAP and feature_map is not None else None
    if isinstance(detector, (Energy, MaxLogit, OPNP)):
        return _energy(detector, signals, head)
    if isinstance(detector, (GradNorm, ExGrad)):
        return _norm(detector, signals)
    return None


def _quadratic(detector: LowDimGradient, signals: Signals) -> Decomposition:
    """-(g - m)ᵀ A (g - m) with m the nearest class mean; for the norm, A = -1 and m = 0."""
    p, h, basis = signals.probabilities.double(), signals.features.double(), detector.basis
    a = reference.cotangent(p, basis.cotangent)[0]
    g = basis.project(p, h)[0].double()
    weights, mean = -g, torch.zeros_like(g)
    if isinstance(detector.low, Mahalanobis):
        whitening, means = detector.low.fitted("whitening"), detector.low.fitted("means")
        whitened = g @ whitening
        nearest = means[(whitened - means).square().sum(1).argmin()]
        # The means are stored whitened; the whitening matrix is square and of full rank.
        weights, mean = whitening @ (whitened - nearest), torch.linalg.solve(whitening.T, nearest)
    direction = basis.combine(weights)
    parts = -direction * (a[:, None] * extend(h, basis.bias) - basis.mean.double())
    slopes = -(a @ direction)[: h.shape[1]]
    return Decomposition(_with_bias(parts, h.shape[1]), weights @ mean, slopes)


def _energy(detector: Energy | MaxLogit | OPNP, signals: Signals, head: ok.Head) -> Decomposition:
    weight = head.weight.double()
    if isinstance(detector, OPNP):
        weight_mask, neuron_mask = detector.masks
        for mask in (weight_mask, neuron_mask):
            weight = weight if mask is None else weight * mask
    h, bias = signals.features[0].double(), None if head.bias is None else head.bias.double()[:, None]
    logits = (weight @ h)[:, None] if bias is None else (weight @ h)[:, None] + bias
    p = logits.softmax(0)
    if isinstance(detector, MaxLogit):
        p = F.one_hot(logits[:, 0].argmax(), len(logits)).double()[:, None]
    parts = torch.cat([p * weight * h, torch.zeros_like(logits) if bias is None else p * bias], 1)
    return Decomposition(parts, -torch.xlogy(p, p).sum(), (p * weight).sum(0))


def _norm(detector: GradNorm | ExGrad, signals: Signals) -> Decomposition:
    p, h = signals.probabilities[0].double(), signals.features[0].double()
    a = -2 * p * (1 - p) if isinstance(detector, ExGrad) else (p - 1 / len(p)).abs()
    parts = _with_bias(a[:, None] * h.abs(), len(h))
    return Decomposition(parts, parts.new_zeros(()), a.sum() * h.sign())


def _nap(detector: NAP, feature_map: Tensor) -> Decomposition:
    channels = feature_map[0].double().flatten(1)
    ratios = (channels.amax(1) / (channels.mean(1) + detector.settings["eps"])).square() / len(channels)
    parts = _with_bias(ratios[None], len(channels))
    return Decomposition(parts, parts.new_zeros(()), None)


def _with_bias(parts: Tensor, width: int) -> Tensor:
    """The parts with exactly one column for the bias."""
    return F.pad(parts, (0, width + 1 - parts.shape[1]))
