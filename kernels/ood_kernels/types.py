"""What travels through the functional layer: tuples, what a basis is, and the dtype of every output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "BasisTensors",
    "HasBasisTensors",
    "Head",
    "PoolStatistics",
    "ScoreOutputs",
    "compute_dtype",
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


class BasisTensors(Protocol):
    """A subspace of last-layer gradients G = a ⊗ h̃, h̃ = [h; 1]: what every form in `bases` answers.

    Only the form itself knows which tensors it has and in which order operators take them.
    """

    @property
    def kind(self) -> str:
        """Its name in `bases.BASES` and in the operators."""
        ...

    @property
    def constants(self) -> Tensor:
        """[K], subtracted so that the coordinates are centred."""
        ...

    @property
    def cotangent(self) -> str:
        """Which scalar was differentiated, see `ood_kernels.reference.cotangent`."""
        ...

    @property
    def bias(self) -> bool:
        """Whether the gradient of the bias is part of the space; else h̃ = h."""
        ...

    @property
    def n_components(self) -> int:
        """K."""
        ...

    def parts(self) -> list[Tensor | None]:
        """Its tensors in the order of `from_parts`; None for one that it may lack."""
        ...

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor | None], cotangent: str = "energy", bias: bool = True) -> BasisTensors:
        """The basis with these tensors."""
        ...

    def check(self) -> tuple[int, int]:
        """Classes C and features D; raises ValueError for tensors that do not fit together, which could broadcast silently."""
        ...

    def project(self, a: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates [N, K] of a ⊗ h̃ in plain torch, from a [N, C] and h [N, D]; the truth for its kernels."""
        ...

    def to(self, dtype: torch.dtype) -> BasisTensors:
        """The same with the large tensors stored in another dtype."""
        ...


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


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where any of the tensors is fp64, else fp32: the dtype of accumulation and of every output."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32
