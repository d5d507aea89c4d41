"""Why an image's gradient is unusual: the classes, channels and places whose contributions add up to its score.

A score that is quadratic in the coordinates g = ⟨G - Ḡ, V_k⟩, s = -Σ_k y_k w_k with y = g - m and w = A y, is
s = -⟨U, G - Ḡ⟩ + Σ_k w_k m_k with U = Σ_k w_k V_k, a matrix [C, D̃] like the gradient itself. Its entries
-U_cd (G - Ḡ)_cd are contributions that add up: by row to classes, by column to channels, and, since G = a ⊗ h̃ and h is the
mean of the feature map, by position to places of the image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ood_kernels import reference

from ..detectors.heads import Mahalanobis
from ..detectors.low_dim_gradient import LowDimGradient
from ..engine import Engine
from ..errors import InputError
from ..subspace import Basis, extend

__all__ = ["Explanation", "explain"]


class Explanation(NamedTuple):
    """What made the gradient of one image unusual; all in fp64 on the CPU, negative = towards out-of-distribution.

    Attributes:
        detector: whose score it is.
        score: the score that is explained; classes, channels and places each add up to score - offset.
        offset: the part that belongs to the nearest class mean and to no class or channel of this image; 0 for the norm.
        classes: [C] contribution of each class.
        channels: [D] contribution of each channel of the penultimate features.
        bias: contribution of the bias' gradient, which belongs to no channel; channels and bias add up to score - offset.
        places: [H, W] contribution of each position of the feature map, each with an equal share of what belongs to none
            (bias and mean gradient); None without a map that the head reads.
        predicted: the predicted class.
    """

    detector: str
    score: float
    offset: float
    classes: Tensor
    channels: Tensor
    bias: float
    places: Tensor | None
    predicted: int


def explain(engine: Engine, image: Tensor, detector: str = "low_dim_gradient") -> Explanation:
    """Explain the score of one image.

    Args:
        engine: fitted, with a low-dimensional-gradient detector.
        image: [C, H, W], preprocessed as for `Engine.score`.
        detector: name of that detector. Its head has to be `mahalanobis`, S = -(g - m)ᵀ Σ⁻¹ (g - m) with m the nearest class
            mean, or `projected_norm`, of which the square ‖g_low‖² is explained.

    Returns:
        Contributions that add up to the score, without a forward side (a = 0).

    Raises:
        InputError: no such detector, a head that is not quadratic, or not one image.
        NotFittedError: before `fit` or `load`.
    """
    if image.ndim != 3:
        raise InputError(f"image {list(image.shape)}: expected one image [C, H, W]")
    fitted = engine.detectors.get(detector)
    if not isinstance(fitted, LowDimGradient) or fitted.head not in ("mahalanobis", "projected_norm"):
        raise InputError(
            f"explain {detector!r}: expected a low-dimensional-gradient detector of this engine with the mahalanobis or the"
            " projected_norm head, whose scores are sums of contributions"
        )
    with torch.no_grad():
        captured = engine.scorer.run(image[None])
        signals = engine.scorer.signals(captured.feature_map, captured.head_input)
        p, h = signals.probabilities.double(), signals.features.double()
        basis = fitted.basis
        a = reference.cotangent(p, basis.cotangent)[0]
        g = basis.project(p, h)[0].double()
        weights, mean = _quadratic(fitted, g)
        direction = basis.combine(weights)
        centred = a[:, None] * extend(h, basis.bias) - basis.mean.double()
        contributions = -direction * centred
        columns = contributions.sum(0)
        has_map = captured.feature_map is not None and engine.plan.proven and engine.plan.tail is None
        places = None
        if has_map:
            assert captured.feature_map is not None
            places = _places(captured.feature_map[0], direction, a, basis)
        width = h.shape[1]
        offset = weights @ mean
        return Explanation(
            detector,
            float(contributions.sum() + offset),
            float(offset),
            contributions.sum(1).cpu(),
            columns[:width].cpu(),
            float(columns[width:].sum()),
            None if places is None else places.cpu(),
            int(p.argmax()),
        )


def _quadratic(detector: LowDimGradient, g: Tensor) -> tuple[Tensor, Tensor]:
    """(w = A y, m) of the score -(g - m)ᵀ A (g - m); for the norm A = -1 and m = 0."""
    if not isinstance(detector.low, Mahalanobis):
        return -g, torch.zeros_like(g)
    whitening, means = detector.low.fitted("whitening"), detector.low.fitted("means")
    whitened = g @ whitening
    nearest = means[(whitened - means).square().sum(1).argmin()]
    # The means are kept whitened; the whitening is square and has full rank.
    return whitening @ (whitened - nearest), torch.linalg.solve(whitening.T, nearest)


def _places(feature_map: Tensor, direction: Tensor, a: Tensor, basis: Basis) -> Tensor:
    """[H, W]: -⟨U, a ⊗ A(place)⟩ / HW, and an equal share of bias and mean gradient."""
    channels, height, width = feature_map.shape
    by_channel = a @ direction
    local = (by_channel[:channels, None, None] * feature_map.double()).sum(0)
    rest = by_channel[channels:].sum() - (direction * basis.mean.double()).sum()
    return -(local + rest) / (height * width)
