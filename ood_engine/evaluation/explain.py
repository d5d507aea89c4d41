"""Explanation of an image's score as a sum of contributions of classes, channels and image positions.

The contributions of `decomposition` sum over channels to those of classes and over classes to those of channels. Because the
penultimate features are the mean of the feature map, they also sum over positions to contributions of image regions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine import Engine
from ..errors import InputError, did_you_mean
from .decomposition import decompose

__all__ = ["Explanation", "explain"]


class Explanation(NamedTuple):
    """Contributions to the score of one image, in fp64 on the CPU; negative = towards out-of-distribution.

    The classes, the channels with the bias, and the places each sum to score - offset.

    Attributes:
        detector: name of the detector.
        score: the explained score.
        offset: contribution of neither classes nor channels: of the nearest class mean, or of the entropy of an energy.
        classes: [C] contribution of each class; empty for NAP, which has none.
        channels: [D] contribution of each channel of the penultimate features.
        bias: contribution of the bias gradient, which belongs to no channel.
        places: [H, W] contribution of each position of the feature map, including an equal share of the bias and the mean
            gradient; None if the score is not linear in the map, or the head does not read it directly.
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
        engine: a fitted engine.
        image: [C, H, W], preprocessed as for `Engine.score`.
        detector: name of a detector whose score is a sum: energies, norms, NAP, and low-dimensional gradients with the head
            `mahalanobis`, S = -(g - m)ᵀ Σ⁻¹ (g - m) with m the nearest class mean, or `projected_norm`, explained by its square
            ‖g_low‖².

    Returns:
        The contributions, of the gradient alone (a = 0: no forward term).

    Raises:
        InputError: an unknown detector, one whose score is no sum, or anything but a single image.
        NotFittedError: before `fit` or `load`.

    Example:
        >>> import torch, ood_engine as oe
        >>> from ood_engine.demo import SmallCNN
        >>> images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> engine = oe.Engine(SmallCNN(4), ["low_dim_gradient"]).fit([images], labels="predicted")
        >>> explanation = oe.explain(engine, images[0])
        >>> explanation.classes.shape, explanation.channels.shape, explanation.places.shape
        (torch.Size([4]), torch.Size([64]), torch.Size([8, 8]))
        >>> total = float(explanation.channels.sum()) + explanation.bias + explanation.offset
        >>> abs(total - explanation.score) <= 1e-6 * abs(explanation.score)
        True
    """
    engine.scorer.require_fitted()
    if image.ndim != 3:
        raise InputError(f"image {list(image.shape)}: expected one image [C, H, W]")
    if detector not in engine.detectors:
        known = ", ".join(engine.detectors)
        raise InputError(
            f"explain {detector!r}: expected a detector of this engine, {known}{did_you_mean(detector, engine.detectors)}"
        )
    with torch.no_grad():
        captured = engine.scorer.run(image[None])
        signals = engine.scorer.signals(captured.feature_map, captured.head_input)
        feature_map = captured.feature_map
        if feature_map is not None and engine.scorer.rectify:
            feature_map = feature_map.relu()
        found = decompose(engine.detectors[detector], signals, engine.head, feature_map)
        if found is None:
            raise InputError(
                f"explain {detector!r}: its score is no sum of contributions; expected an energy (energy, max_logit, opnp, opp,"
                " onp), a norm (gradnorm, exgrad), nap, or low_dim_gradient with the mahalanobis or the projected_norm head"
            )
        by_channel = found.parts.sum(0)
        has_classes = len(found.parts) == engine.head.weight.shape[0]
        places = None
        plan = engine.plan
        if captured.feature_map is not None and plan.proven and not plan.tail and found.slopes is not None:
            places = _places(captured.feature_map[0].double(), found.slopes, found.parts.sum())
    return Explanation(
        detector,
        float(found.parts.sum() + found.offset),
        float(found.offset),
        found.parts.sum(1).cpu() if has_classes else torch.empty(0, dtype=torch.float64, device="cpu"),
        by_channel[:-1].cpu(),
        float(by_channel[-1]),
        None if places is None else places.cpu(),
        int(signals.probabilities.argmax()),
    )


def _places(feature_map: Tensor, slopes: Tensor, total: Tensor) -> Tensor:
    """[H, W]: Σ_d slope_d · A_d(position) / HW, plus an equal share of what no channel carries."""
    local = (slopes[:, None, None] * feature_map).sum(0) / feature_map[0].numel()
    return local + (total - local.sum()) / local.numel()
