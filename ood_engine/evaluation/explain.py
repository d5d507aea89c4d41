"""Explanation of an image's score as a sum of contributions of classes, channels and image positions.

A score that is quadratic in the coordinates g_k = ⟨G - Ḡ, V_k⟩, s = -Σ_k y_k w_k with y = g - m and w = A y, equals
s = -⟨U, G - Ḡ⟩ + Σ_k w_k m_k with U = Σ_k w_k V_k, a matrix [C, D̃] like the gradient itself. The terms -U_cd (G - Ḡ)_cd sum
over rows to class contributions, over columns to channel contributions, and, because G = a ⊗ h̃ and h is the mean of the feature
map, over positions to contributions of image regions.
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
    """Contributions to the score of one image, in fp64 on the CPU; negative = towards out-of-distribution.

    The classes, the channels with the bias, and the places each sum to score - offset.

    Attributes:
        detector: name of the detector.
        score: the explained score.
        offset: contribution of the nearest class mean, independent of the image's classes and channels; 0 for the norm.
        classes: [C] contribution of each class.
        channels: [D] contribution of each channel of the penultimate features.
        bias: contribution of the bias gradient, which belongs to no channel.
        places: [H, W] contribution of each position of the feature map, including an equal share of the bias and the mean
            gradient; None if the head does not read the map directly.
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
    """Explain the score of one image as a sum of contributions.

    Args:
        engine: a fitted engine with a low-dimensional-gradient detector.
        image: [C, H, W], preprocessed as for `Engine.score`.
        detector: name of the detector. Its head must be `mahalanobis`, S = -(g - m)ᵀ Σ⁻¹ (g - m) with m the nearest class mean,
            or `projected_norm`, explained by its square ‖g_low‖².

    Returns:
        The contributions, of the gradient alone (a = 0: no forward term).

    Raises:
        InputError: an unknown detector, a head that is not quadratic, or anything but a single image.
        NotFittedError: before `fit` or `load`.

    Example:
        >>> import torch, ood_engine as oe
        >>> from ood_engine.demo import SmallCNN
        >>> images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> engine = oe.Engine(SmallCNN(4), ["low_dim_gradient"]).fit([(images, torch.arange(32) % 4)])
        >>> explanation = oe.explain(engine, images[0])
        >>> explanation.classes.shape, explanation.channels.shape, explanation.places.shape
        (torch.Size([4]), torch.Size([64]), torch.Size([8, 8]))
        >>> total = float(explanation.channels.sum()) + explanation.bias + explanation.offset
        >>> abs(total - explanation.score) <= 1e-6 * abs(explanation.score)
        True
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
        has_map = captured.feature_map is not None and engine.plan.proven and not engine.plan.tail
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
    """(w = A y, m) of the score -(g - m)ᵀ A (g - m); A = -1 and m = 0 for the norm."""
    if not isinstance(detector.low, Mahalanobis):
        return -g, torch.zeros_like(g)
    whitening, means = detector.low.fitted("whitening"), detector.low.fitted("means")
    whitened = g @ whitening
    nearest = means[(whitened - means).square().sum(1).argmin()]
    # The means are stored whitened; the whitening matrix is square and of full rank.
    return whitening @ (whitened - nearest), torch.linalg.solve(whitening.T, nearest)


def _places(feature_map: Tensor, direction: Tensor, a: Tensor, basis: Basis) -> Tensor:
    """[H, W]: -⟨U, a ⊗ A(position)⟩ / HW, plus an equal share of the bias and the mean gradient."""
    channels, height, width = feature_map.shape
    by_channel = a @ direction
    local = (by_channel[:channels, None, None] * feature_map.double()).sum(0)
    rest = by_channel[channels:].sum() - (direction * basis.mean.double()).sum()
    return -(local + rest) / (height * width)
