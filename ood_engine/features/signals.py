"""Detector inputs for one batch, each computed once on first use."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels.types import HasBasisTensors

from ..errors import DetectorUnavailableError
from ..runtime import Kernels, Masks

__all__ = ["Energies", "Pruner", "Shared", "Signals", "wide"]

T = TypeVar("T")

Energies = tuple[Tensor, Tensor, Tensor]
"""(lse [N], lse of the pruned head [N], softmax [N, C] of the unpruned head)."""


class Pruner(Protocol):
    """A source of pruning masks for the head, such as an OPNP detector."""

    @property
    def masks(self) -> Masks | None:
        """Weight and neuron mask; None without pruning."""
        ...


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or unchanged if fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Shared:
    """Results that several detectors ask for."""

    def __init__(self) -> None:
        self._shared: dict[Hashable, Any] = {}

    def shared(self, key: Hashable, build: Callable[[], T]) -> T:
        """The result of `build`, built once per key for all detectors."""
        if key not in self._shared:
            self._shared[key] = build()
        value: T = self._shared[key]
        return value


class Signals(Shared):
    """Penultimate features, NAP, energies, softmax and gradient coordinates of one batch.

    Attributes:
        energies: those of the unpruned head and of the pruned head of `pruner`; None until a detector needs them.

    Args:
        features: [N, D] penultimate features h, fp32 or fp64.
        head: the unpruned head.
        kernels: operators.
        statistics: per-channel statistics of the feature map; None without a map.
        nap: precomputed NAP [N] by eps.
        energies: precomputed energies, with the pruned head of `pruner`.
        coordinates: precomputed coordinates [N, K] by basis.
        pruner: source of the masks of the head computed in one pass with the unpruned one.
    """

    def __init__(
        self,
        features: Tensor,
        head: ok.Head,
        kernels: Kernels,
        *,
        statistics: ok.PoolStatistics | None = None,
        nap: dict[float, Tensor] | None = None,
        energies: Energies | None = None,
        coordinates: dict[HasBasisTensors, Tensor] | None = None,
        pruner: Pruner | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self._kernels = kernels
        self._statistics = statistics
        self._nap = nap or {}
        self.energies = energies
        self._coordinates = coordinates or {}
        self._pruner = pruner
        self.clamped: dict[str, Tensor] = {}

    def nap(self, eps: float) -> Tensor:
        """NAP [N] of the feature map.

        Raises:
            DetectorUnavailableError: no map.
        """
        if eps not in self._nap:
            if self._statistics is None:
                raise DetectorUnavailableError("NAP needs the feature map: pass feature_map [N, D, H, W]")
            _, nap_mean, maximum = self._statistics
            self._nap[eps] = ok.reference.nap_from_statistics(nap_mean, maximum, eps)[0]
        return self._nap[eps]

    @property
    def lse(self) -> Tensor:
        """[N] logsumexp of the logits: the Energy score."""
        return (self.energies or self._compute_energies())[0]

    @property
    def probabilities(self) -> Tensor:
        """[N, C] softmax of the unpruned head."""
        return (self.energies or self._compute_energies())[2]

    def pruned_lse(self, pruner: Pruner) -> Tensor:
        """[N] logsumexp of the logits of the head pruned by the masks of `pruner`."""
        if pruner is self._pruner:
            return (self.energies or self._compute_energies())[1]
        return self._kernels.masked_energy(self.features, self.head, pruner.masks)[1]

    def coordinates(self, basis: HasBasisTensors) -> Tensor:
        """[N, K] centred coordinates of the last-layer gradient in `basis`."""
        if basis not in self._coordinates:
            self._coordinates[basis] = self._kernels.project_gradients(self.probabilities, self.features, basis)
        return self._coordinates[basis]

    def count_clamped(self, name: str, rows: Tensor) -> None:
        """Record how many rows a detector clamped, without device synchronisation."""
        self.clamped[name] = rows.sum()

    def _compute_energies(self) -> Energies:
        masks = None if self._pruner is None else self._pruner.masks
        self.energies = self._kernels.masked_energy(self.features, self.head, masks)
        return self.energies
