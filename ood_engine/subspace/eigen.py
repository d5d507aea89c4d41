"""Leading eigenpairs of the centred Gram matrix of gradients: exact while it is small, by block iteration beyond."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OodEngineWarning

__all__ = ["EXACT_ROWS", "GRAM_BYTES", "CentredGram", "Eigenpairs", "leading_eigenpairs"]

EXACT_ROWS = 8192
"""Most rows of a Gram matrix that is decomposed as a whole; ours."""
GRAM_BYTES = 2 * 2**30
"""Most memory for a Gram matrix that is kept between products; a larger one is computed anew each time, in row blocks. Ours."""

_BLOCK_ELEMENTS = 8 * 2**20
_EXTRA = 16
_FIRST_GUESS = 32
_SEED = 0


class Eigenpairs(NamedTuple):
    """Eigenvalues [m], largest first, eigenvectors [n, m], and the sum of all n eigenvalues, 0-d; m = n where n is small."""

    values: Tensor
    vectors: Tensor
    total: Tensor


class CentredGram:
    """The Gram matrix J K J of centred gradients, J = I - 11ᵀ/n and K_ij = (a_i·a_j)(h̃_i·h̃_j), as an operator.

    Neither the gradients [n, C·D̃] nor, above `GRAM_BYTES`, the matrix [n, n] are formed.

    Args:
        a: cotangents [n, C] in fp64.
        h: h̃ [n, D̃] in fp64.

    Attributes:
        row_mean: [n] mean of each row of K, which is ⟨G_i, Ḡ⟩.
        mean: 0-d mean of K, which is ‖Ḡ‖².
    """

    def __init__(self, a: Tensor, h: Tensor) -> None:
        self._a, self._h = a, h
        self._gram: Tensor | None = None
        if len(a) <= EXACT_ROWS or 8 * len(a) ** 2 <= GRAM_BYTES:
            self._gram = (a @ a.T) * (h @ h.T)
            self.row_mean = self._gram.mean(1)
        else:
            self.row_mean = self._times(a.new_full((len(a), 1), 1 / len(a)))[:, 0]
        self.mean = self.row_mean.mean()

    def __len__(self) -> int:
        return len(self._a)

    def diagonal(self) -> Tensor:
        """[n] diagonal of K, not centred: ‖G_i‖²."""
        return self._a.square().sum(1) * self._h.square().sum(1)

    def trace(self) -> Tensor:
        """0-d trace of the centred matrix, Σ ‖G_i - Ḡ‖²."""
        return (self.diagonal().sum() - len(self) * self.mean).clamp_min(0)

    def dense(self) -> Tensor:
        """[n, n] centred."""
        gram = (self._a @ self._a.T) * (self._h @ self._h.T) if self._gram is None else self._gram
        return gram - self.row_mean[:, None] - self.row_mean[None, :] + self.mean

    def __matmul__(self, block: Tensor) -> Tensor:
        """Product with a block [n, b]."""
        product = self._times(block - block.mean(0))
        return product - product.mean(0)

    def _times(self, block: Tensor) -> Tensor:
        if self._gram is not None:
            return self._gram @ block
        rows = max(1, _BLOCK_ELEMENTS // len(self))
        parts = zip(self._a.split(rows), self._h.split(rows), strict=True)
        return torch.cat([((a @ self._a.T) * (h @ self._h.T)) @ block for a, h in parts])


def leading_eigenpairs(
    gram: CentredGram, wanted: int | float, *, tolerance: float = 1e-8, max_iterations: int = 300
) -> Eigenpairs:
    """The leading eigenpairs of a centred Gram matrix, all of them up to `EXACT_ROWS` rows.

    Beyond, randomised block iteration (Halko, Martinsson and Tropp, 2011): a random block from a fixed seed, twice as wide as the
    number of pairs wanted, is multiplied, orthonormalised and rotated to its Ritz vectors until every wanted pair has
    ‖G v - λ v‖ ≤ tolerance · λ, or is as near as rounding lets it be. A share of the trace widens the block until it is reached.

    Args:
        gram: the operator.
        wanted: number of pairs, or the share of the trace that they are to reach, in (0, 1).
        tolerance: on the residual, relative to the eigenvalue.
        max_iterations: most products with the block, after which a warning says how far it came.

    Returns:
        At least the pairs wanted, where there are as many.
    """
    if len(gram) <= EXACT_ROWS:
        values, vectors = torch.linalg.eigh(gram.dense())
        return Eigenpairs(values.flip(0), vectors.flip(1), values.clamp_min(0).sum())
    generator = torch.Generator().manual_seed(_SEED)
    diagonal, total = gram.diagonal(), gram.trace()
    block = diagonal.new_zeros((len(gram), 0))
    pairs = min(len(gram), wanted if isinstance(wanted, int) else _FIRST_GUESS)
    while True:
        width = min(len(gram), 2 * pairs + _EXTRA)
        fresh = torch.randn((len(gram), width - block.shape[1]), generator=generator, dtype=torch.float64)
        start = torch.cat([block, fresh.to(diagonal.device)], 1)
        largest = float(diagonal.max())
        if isinstance(wanted, float):
            # One step shows whether the block is wide enough; Ritz values only grow from there.
            values, start = _iterate(gram, start, pairs, float("inf"), 1, largest)
            if pairs < len(gram) and values[:pairs].sum() < wanted * total:
                pairs, block = min(len(gram), 2 * pairs), start
                continue
        values, vectors = _iterate(gram, start, pairs, tolerance, max_iterations, largest)
        return Eigenpairs(values[:pairs], vectors[:, :pairs], total)


def _iterate(
    gram: CentredGram, block: Tensor, pairs: int, tolerance: float, max_iterations: int, largest: float
) -> tuple[Tensor, Tensor]:
    """Ritz values [b], largest first, and vectors [n, b], of which the first `pairs` have converged."""
    rounding = 4 * len(gram) * torch.finfo(torch.float64).eps * largest
    product = block
    for _ in range(max_iterations):
        block = torch.linalg.qr(product)[0]
        product = gram @ block
        small = block.T @ product
        values, rotation = torch.linalg.eigh((small + small.T) / 2)
        values, rotation = values.flip(0), rotation.flip(1)
        block, product = block @ rotation, product @ rotation
        residual = (product - block * values)[:, :pairs].norm(dim=0)
        allowed = (tolerance * values[:pairs].clamp_min(torch.finfo(values.dtype).tiny)).clamp_min(rounding)
        if bool((residual <= allowed).all()):
            return values, block
    warnings.warn(
        f"the eigenvectors of {len(gram)} anchors are known to {float((residual / allowed).max()) * tolerance:.1e} of their"
        f" eigenvalue after {max_iterations} iterations, not to {tolerance:.0e}: ask for fewer components or anchors",
        OodEngineWarning,
        stacklevel=4,
    )
    return values, block
