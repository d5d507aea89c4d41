"""What is asked of the samples a basis is found from, and how many components they can carry."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError, OodEngineWarning

if TYPE_CHECKING:
    from .eigen import CentredGram

__all__ = ["check_n_components", "check_samples", "count_components", "fix_signs"]


def check_samples(p: Tensor, h: Tensor, normalisation: str) -> None:
    """Raise InputError unless p [n, C] and h [n, D] are finite samples and the normalisation is known."""
    if p.ndim != 2 or h.ndim != 2 or p.shape[0] != h.shape[0]:
        raise InputError(f"expected softmax p [n, C] and features h [n, D], got {list(p.shape)} and {list(h.shape)}")
    if normalisation != "none":
        raise InputError(f"normalisation={normalisation!r}: expected 'none'")
    bad = int((~(torch.isfinite(p).all(1) & torch.isfinite(h).all(1))).sum())
    if bad:
        raise InputError(
            f"{bad} of {p.shape[0]} samples have NaN or infinite p or h: expected finite samples; leave them out"
        )


def check_n_components(wanted: int | float) -> None:
    """Raise InputError unless it is a number of components, or a share of the variance."""
    is_share = isinstance(wanted, float) and 0 < wanted < 1
    is_number = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1
    if not is_share and not is_number:
        raise InputError(f"n_components={wanted!r}: expected a whole number of at least 1, or a share in (0, 1)")


def count_components(
    eigenvalues: Tensor, gram: Tensor | CentredGram, wanted: int | float, total: Tensor | None = None
) -> int:
    """Return K that was asked for, or less where the gradients do not span it.

    Args:
        eigenvalues: [n], largest first; with `total` only the leading ones.
        gram: what they are of; its diagonal is read.
        wanted: K, or a share of the variance.
        total: 0-d sum of all n eigenvalues.
    """
    anchors = eigenvalues.shape[0] if total is None else len(gram)
    # Centring a Gram matrix of large entries leaves rounding of this size in directions that are really empty.
    floor = anchors * torch.finfo(eigenvalues.dtype).eps * float(gram.diagonal().max())
    rank = int((eigenvalues > floor).sum())
    if rank == 0:
        raise InputError(
            f"all {anchors} anchor gradients are equal: expected samples that differ; fit on more varied ID data"
        )
    if isinstance(wanted, float):
        cumulative = eigenvalues[:rank].cumsum(0) / (eigenvalues[:rank].sum() if total is None else total)
        return min(rank, int((cumulative < wanted).sum()) + 1)
    if wanted > rank:
        warnings.warn(
            f"n_components={wanted}: the {anchors} anchor gradients span {rank} directions, so {rank} are kept",
            OodEngineWarning,
            stacklevel=4,
        )
    return min(wanted, rank)


def fix_signs(vectors: Tensor) -> Tensor:
    """Make the entry of largest magnitude of every column positive, so that the same data gives the same basis."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
