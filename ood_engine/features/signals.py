"""What detectors read for one batch; each quantity is computed once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels.types import HasBasisTensors

from ..errors import DetectorUnavailableError
from ..runtime import Kernels, Masks

__all__ = ["Energies", "Pruner", "Signals", "wide"]

T = TypeVar("T")

Energies = tuple[Tensor, Tensor, Tensor]
"""(lse [N], lse of the pruned head [N], softmax [N, C] of the unpruned head)."""


class Pruner(Protocol):
    """What prunes the head, such as an OPNP detector."""

    @property
    def masks(self) -> Masks | None:
        """Its weight and neuron mask; None where it prunes nothing."""
        ...


def wide(tensor: Tensor) -> Tensor:
    """fp32 unless it is fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Signals:
    """Penultimate features, NAP, energies, softmax and gradient coordinates of one batch.

    Args:
        features: [N, D] penultimate features h, fp32 or fp64.
        head: the unpruned head.
        kernels: the functions that compute.
        statistics: per-channel statistics of the feature map; None without a map.
        nap: NAP [N] by eps, where a pass over the map already gave it.
        energies: likewise, with the pruned head of `pruner`.
        coordinates: likewise, [N, K] by basis.
        pruner: whose pruned head shares one pass with the plain one.
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
        self.features = features
        self.head = head
        self._kernels = kernels
        self._statistics = statistics
        self._nap = nap or {}
        self._energies = energies
        self._coordinates = coordinates or {}
        self._pruner = pruner
        self._shared: dict[Hashable, Any] = {}
        self.clamped: dict[str, Tensor] = {}

    def nap(self, eps: float) -> Tensor:
        """NAP [N] of the feature map.

        Raises:
            DetectorUnavailableError: there is no map.
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
        return (self._energies or self._compute_energies())[0]

    @property
    def probabilities(self) -> Tensor:
        """[N, C] softmax of the unpruned head."""
        return (self._energies or self._compute_energies())[2]

    def pruned_lse(self, pruner: Pruner) -> Tensor:
        """[N] logsumexp of the logits of the head pruned by the masks of `pruner`."""
        if pruner is self._pruner:
            return (self._energies or self._compute_energies())[1]
        return self._kernels.masked_energy(self.features, self.head, pruner.masks)[1]

    def coordinates(self, basis: HasBasisTensors) -> Tensor:
        """[N, K] centred coordinates of the last-layer gradient in `basis`."""
        if basis not in self._coordinates:
            self._coordinates[basis] = self._kernels.project_gradients(self.probabilities, self.features, basis)
        return self._coordinates[basis]

    def shared(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` returns, built once a batch for all detectors that ask by the same key."""
        if key not in self._shared:
            self._shared[key] = build()
        value: T = self._shared[key]
        return value

    def count_clamped(self, name: str, rows: Tensor) -> None:
        """Note on the device, without waiting for it, how many rows a detector had to clamp."""
        self.clamped[name] = rows.sum()

    def _compute_energies(self) -> Energies:
        masks = None if self._pruner is None else self._pruner.masks
        self._energies = self._kernels.masked_energy(self.features, self.head, masks)
        return self._energies
