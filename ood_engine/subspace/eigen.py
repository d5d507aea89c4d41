"""PCA of samples from the eigenvectors of their Gram matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .samples import count_components, fix_signs

__all__ = ["LARGEST_EIGENPROBLEM", "GramPca", "centre", "gram_pca"]

LARGEST_EIGENPROBLEM = 8192
"""Row limit of eigendecompositions, chosen here: 512 MiB in fp64, and as much for the eigenvectors."""


class GramPca(NamedTuple):
    """PCA of n samples G_i, expressed over the samples.

    Attributes:
        coefficients: [n, K]; the components are V_k = Σ_i coefficients_ik (G_i - Ḡ), orthonormal.
        eigenvalues: [K] of the centred Gram matrix, largest first.
        explained: [K] share of its trace.
        constants: [K] ⟨Ḡ, V_k⟩.
        mean_square: 0-d ‖Ḡ‖².
    """

    coefficients: Tensor
    eigenvalues: Tensor
    explained: Tensor
    constants: Tensor
    mean_square: Tensor


def centre(gram: Tensor) -> Tensor:
    """J K J with J = I - 11ᵀ/n, [n, n]: the inner products of the samples minus their mean."""
    row_mean = gram.mean(1)
    return gram - row_mean[:, None] - row_mean[None, :] + row_mean.mean()


def gram_pca(gram: Tensor, n_components: int | float, *, is_centred: bool = False) -> GramPca:
    """PCA from the Gram matrix K_ij = ⟨G_i, G_j⟩ [n, n] in fp64.

    Args:
        gram: K.
        n_components: their number, or the explained share of the variance, in (0, 1).
        is_centred: whether the samples are already centred.

    Raises:
        InputError: equal samples.
    """
    values, vectors = torch.linalg.eigh(gram if is_centred else centre(gram))
    values, vectors = values.flip(0), vectors.flip(1)
    kept = count_components(values, gram, n_components)
    leading = values[:kept]
    coefficients = fix_signs(vectors[:, :kept]) / leading.sqrt()
    along_mean = gram.mean(1)
    explained = leading / values.clamp_min(0).sum()
    return GramPca(coefficients, leading, explained, along_mean @ coefficients, along_mean.mean())
