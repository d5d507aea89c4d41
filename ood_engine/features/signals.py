"""What detectors read for one batch; each quantity is computed once, when first asked for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

import ood_kernels as ok

from ..errors import DetectorUnavailableError
from ..runtime import Kernels

__all__ = ["GradientBasis", "Masks", "Signals", "wide"]

Masks = tuple[Tensor | None, Tensor | None]
"""(weight mask, neuron mask) of a pruned head."""


def wide(tensor: Tensor) -> Tensor:
    """fp32 unless it is fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class GradientBasis(Protocol):
    """What `Signals` needs of a basis of gradient space."""

    def tensors(self) -> ok.BasisTensors:
        """The tensors of the basis."""
        ...


class Signals:
    """Penultimate features, NAP, energies, softmax and gradient coordinates of one batch.

    Args:
        features: [N, D] penultimate features h, fp32 or fp64.
        head: the unpruned head.
        statistics: per-channel statistics of the feature map; None for a model without one.
        nap: NAP that a single pass over the map already gave, by eps.
        fuse: masks of one pruned head whose energy is computed in the same pass as the plain one.
        kernels: the functions that compute; None takes those of a default runtime.
    """

    def __init__(
        self,
        features: Tensor,
        head: ok.Head,
        statistics: ok.PoolStatistics | None = None,
        nap: dict[float, Tensor] | None = None,
        fuse: Masks | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.features = features
        self.head = head
        self._statistics = statistics
        self._nap = dict(nap or {})
        self._fuse = fuse
        self._kernels = kernels or Kernels()
        self._energy: tuple[Tensor, Tensor, Tensor] | None = None
        self._coordinates: dict[tuple[int | str | None, ...], Tensor] = {}
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
        return self._energies()[0]

    @property
    def probabilities(self) -> Tensor:
        """[N, C] softmax of the unpruned head."""
        return self._energies()[2]

    def pruned_lse(self, masks: Masks) -> Tensor:
        """[N] logsumexp of the logits of the head pruned by `masks`."""
        if self._fuse is not None and all(ours is theirs for ours, theirs in zip(self._fuse, masks, strict=True)):
            return self._energies()[1]
        return self._kernels.masked_energy(self.features, self.head, masks)[1]

    def coordinates(self, basis: GradientBasis) -> Tensor:
        """[N, K] centred coordinates of the last-layer gradient in `basis`."""
        key = _basis_key(basis)
        if key not in self._coordinates:
            self._coordinates[key] = self._kernels.project_gradients(self.probabilities, self.features, basis)
        return self._coordinates[key]

    def adopt(self, outputs: ok.ScoreOutputs, basis: GradientBasis | None) -> None:
        """Take energies and coordinates from a single pass that computed them with the masks of `fuse`."""
        self._energy = (outputs.lse, outputs.pruned_lse, outputs.p)
        if basis is not None:
            self._coordinates[_basis_key(basis)] = outputs.g_low

    def count_clamped(self, name: str, rows: Tensor) -> None:
        """Note on the device, without waiting for it, how many rows a detector had to clamp."""
        self.clamped[name] = rows.sum()

    def _energies(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._energy is None:
            masks = self._fuse or (None, None)
            self._energy = self._kernels.masked_energy(self.features, self.head, masks)
        return self._energy


def _basis_key(basis: GradientBasis) -> tuple[int | str | None, ...]:
    # Detectors loaded from one state hold bases of their own over the same tensors.
    return tuple(id(part) if isinstance(part, Tensor) else part for part in basis.tensors())
