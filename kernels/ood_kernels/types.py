"""The tuples that travel through the functional layer."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "BasisTensors",
    "DualTensors",
    "ExplicitTensors",
    "FactoredTensors",
    "HasBasisTensors",
    "Head",
    "PoolStatistics",
    "ScoreOutputs",
]


class Head(NamedTuple):
    """The classifier's last linear layer, and which of it is pruned for OPNP.

    Attributes:
        weight: [C, D].
        bias: [C], or None for a layer without one.
        weight_mask: True = keep, as bool [C, D] or packed by `pack_mask`; None keeps all.
        neuron_mask: bool [D], True = keep; None keeps all.
    """

    weight: Tensor
    bias: Tensor | None = None
    weight_mask: Tensor | None = None
    neuron_mask: Tensor | None = None


class PoolStatistics(NamedTuple):
    """Per-channel statistics of a feature map, from which NAP follows for any eps.

    Attributes:
        h: [N, D] mean over H·W of the map as it is: the penultimate features.
        nap_mean: [N, D] mean over H·W of the map that NAP looks at: the rectified map where that was asked, else `h`.
        maximum: [N, D] maximum over H·W of the map that NAP looks at.
    """

    h: Tensor
    nap_mean: Tensor
    maximum: Tensor


class DualTensors(NamedTuple):
    """A gradient subspace written over n anchor samples: V_k = Σ_i coefficients[i, k] · (a_i ⊗ h̃_i).

    Attributes:
        anchor_cotangents: [n, C], the a_i (for the energy cotangent the softmax of anchor i).
        anchor_features: [n, D], the h_i.
        coefficients: [n, K].
        constants: [K], subtracted so that the coordinates are centred.
        cotangent: which scalar was differentiated, see `ood_kernels.reference.cotangent`.
        bias: whether the gradient of the bias is part of the space (h̃ = [h; 1]).
        shift: [D] or None, subtracted from h before the Gram product, best the anchors' mean feature. Gram entries of features
            that share a large mean are large and almost equal, and their rounding is what a low precision loses.
        linear: [C, K], with `shift`: the coordinates of a ⊗ [shift; 1] for each class, see `linear_part`.
    """

    anchor_cotangents: Tensor
    anchor_features: Tensor
    coefficients: Tensor
    constants: Tensor
    cotangent: str = "energy"
    bias: bool = True
    shift: Tensor | None = None
    linear: Tensor | None = None

    def to(self, dtype: torch.dtype) -> DualTensors:
        """The same with the large tensors stored in another dtype; constants, shift and its linear part stay as they are."""
        large = ("anchor_cotangents", "anchor_features", "coefficients")
        return self._replace(**{name: getattr(self, name).to(dtype) for name in large})


class ExplicitTensors(NamedTuple):
    """A gradient subspace as its vectors: `components` [K, C, D̃] with D̃ = D + 1 where `bias`, else D."""

    components: Tensor
    constants: Tensor
    cotangent: str = "energy"
    bias: bool = True

    def to(self, dtype: torch.dtype) -> ExplicitTensors:
        """The same with the components stored in another dtype."""
        return self._replace(components=self.components.to(dtype))


class FactoredTensors(NamedTuple):
    """A gradient subspace inside a product of two smaller ones: V_k = class_factors · core_k · feature_factorsᵀ.

    Attributes:
        class_factors: [C, R], the directions U_p that the cotangents are reduced to.
        feature_factors: [D̃, Q], the directions U_h that h̃ is reduced to, with D̃ = D + 1 where `bias`, else D.
        core: [K, R, Q], the vectors in the coordinates of the two.
        constants: [K], subtracted so that the coordinates are centred.
        cotangent: which scalar was differentiated, see `ood_kernels.reference.cotangent`.
        bias: whether the gradient of the bias is part of the space (h̃ = [h; 1]).
    """

    class_factors: Tensor
    feature_factors: Tensor
    core: Tensor
    constants: Tensor
    cotangent: str = "energy"
    bias: bool = True

    def to(self, dtype: torch.dtype) -> FactoredTensors:
        """The same with factors and core stored in another dtype."""
        large = ("class_factors", "feature_factors", "core")
        return self._replace(**{name: getattr(self, name).to(dtype) for name in large})


BasisTensors = DualTensors | ExplicitTensors | FactoredTensors


@runtime_checkable
class HasBasisTensors(Protocol):
    """Anything fitted that can hand its tensors to the functional layer, such as `ood_engine.subspace.DualBasis`."""

    def tensors(self) -> BasisTensors:
        """Return the tensors of the basis."""
        ...


class ScoreOutputs(NamedTuple):
    """Everything one pass over a batch yields.

    Attributes:
        h: [N, D] pooled features.
        nap: [N] NAP score.
        lse: [N] logsumexp of the logits (the Energy score).
        pruned_lse: [N] logsumexp of the logits of the pruned head (the OPNP score).
        p: [N, C] softmax of the unpruned head.
        g_low: [N, K] centred coordinates of the last-layer gradient; [N, 0] without a basis.
    """

    h: Tensor
    nap: Tensor
    lse: Tensor
    pruned_lse: Tensor
    p: Tensor
    g_low: Tensor
