"""Data types of the functional layer: input and output tuples, the basis protocol, the compute dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

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
    """The classifier's last linear layer and its OPNP masks.

    Attributes:
        weight: [C, D].
        bias: [C], or None.
        weight_mask: True = keep, as bool [C, D] or packed by `pack_mask`; None keeps all.
        neuron_mask: bool [D], True = keep; None keeps all.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> head = ok.Head(torch.eye(2), neuron_mask=torch.tensor([True, False]))
        >>> lse, pruned_lse, p = ok.masked_energy(torch.zeros(1, 2), *head)
        >>> p
        tensor([[0.5000, 0.5000]])
    """

    weight: Tensor
    bias: Tensor | None = None
    weight_mask: Tensor | None = None
    neuron_mask: Tensor | None = None


class PoolStatistics(NamedTuple):
    """Per-channel statistics of a feature map, sufficient for NAP at any eps.

    Attributes:
        h: [N, D] mean over H·W of the raw map: the penultimate features.
        nap_mean: [N, D] mean over H·W of NAP's map: the rectified map with `rectify`, else equal to `h`.
        maximum: [N, D] maximum over H·W of NAP's map.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> statistics = ok.pool_statistics(torch.tensor([[[[-1.0, 5.0]]]]), rectify=True)
        >>> statistics.h, statistics.nap_mean, statistics.maximum
        (tensor([[2.]]), tensor([[2.5000]]), tensor([[5.]]))
    """

    h: Tensor
    nap_mean: Tensor
    maximum: Tensor


class BasisTensors(Protocol):
    """A subspace of last-layer gradients G = a ⊗ h̃, h̃ = [h; 1]: the interface of every basis kind in `bases`.

    Only the basis itself knows its tensors and their order in the operators.
    """

    def _asdict(self) -> dict[str, Any]:
        """The fields by name."""
        ...

    @property
    def kind(self) -> str:
        """Name of the basis kind in `bases.BASES` and in the operators."""
        ...

    @property
    def constants(self) -> Tensor:
        """[K], subtracted to centre the coordinates."""
        ...

    @property
    def cotangent(self) -> str:
        """The differentiated scalar, see `ood_kernels.reference.cotangent`."""
        ...

    @property
    def bias(self) -> bool:
        """Whether the space includes the gradient of the bias; otherwise h̃ = h."""
        ...

    @property
    def n_components(self) -> int:
        """Subspace dimension K."""
        ...

    def parts(self) -> list[Tensor | None]:
        """The tensors in the order of `from_parts`; None for an absent optional one."""
        ...

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor | None], cotangent: str = "energy", bias: bool = True) -> BasisTensors:
        """The basis made of these tensors."""
        ...

    def check(self) -> tuple[int, int]:
        """Classes C and features D; raises ValueError for incompatible shapes, which might broadcast silently."""
        ...

    def project(self, a: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates [N, K] of a ⊗ h̃ in plain torch, from a [N, C] and h [N, D]: the reference for the kernels."""
        ...

    def to(self, dtype: torch.dtype) -> BasisTensors:
        """A copy with the large tensors in another dtype."""
        ...


class HasBasisTensors(Protocol):
    """A fitted object with basis tensors, such as `ood_engine.subspace.DualBasis`."""

    def tensors(self) -> BasisTensors:
        """The tensors of the basis."""
        ...


class ScoreOutputs(NamedTuple):
    """All outputs of one pass over a batch.

    Attributes:
        h: [N, D] pooled features.
        nap: [N] NAP score.
        lse: [N] logsumexp of the logits (the Energy score).
        pruned_lse: [N] logsumexp of the logits of the pruned head (the OPNP score).
        p: [N, C] softmax of the full head.
        g_low: [N, K] centred coordinates of the last-layer gradient; [N, 0] without a basis.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> outputs = ok.score(torch.ones(4, 8, 2, 2), ok.Head(torch.zeros(3, 8)))
        >>> {name: tuple(output.shape) for name, output in outputs._asdict().items()}
        {'h': (4, 8), 'nap': (4,), 'lse': (4,), 'pruned_lse': (4,), 'p': (4, 3), 'g_low': (4, 0)}
    """

    h: Tensor
    nap: Tensor
    lse: Tensor
    pruned_lse: Tensor
    p: Tensor
    g_low: Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32: the dtype of accumulation and of every output."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32
