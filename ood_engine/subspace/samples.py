"""Validation of the samples and settings of a basis, and the number of components they support."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError, OodEngineWarning

__all__ = ["check_fit", "check_max_anchors", "check_n_components", "check_samples", "count_components", "fix_signs"]

_BREAKS_RANK_ONE = "; 'nfk' scales every entry individually, which requires an ExplicitBasis"


def check_fit(
    p: Tensor, h: Tensor, normalisation: str, known: Sequence[str], max_anchors: int, most_anchors: int | None = None
) -> None:
    """Raise InputError unless p [n, C] and h [n, D] are finite, n ≥ 1, and all options are known."""
    if normalisation not in known:
        expected = " or ".join(repr(name) for name in known)
        otherwise = "" if "nfk" in known else _BREAKS_RANK_ONE
        raise InputError(f"normalisation={normalisation!r}: expected {expected}{otherwise}")
    check_max_anchors(max_anchors, most=most_anchors)
    check_samples(p, h)
    if p.numel() == 0 or h.numel() == 0:
        raise InputError(f"nothing to fit on: expected samples, got p {list(p.shape)} and h {list(h.shape)}")


def check_samples(p: Tensor, h: Tensor) -> None:
    """Raise InputError unless p [n, C] and h [n, D] are finite and of equal n."""
    if p.ndim != 2 or h.ndim != 2 or p.shape[0] != h.shape[0]:
        raise InputError(f"expected softmax p [n, C] and features h [n, D], got {list(p.shape)} and {list(h.shape)}")
    bad = int((~(torch.isfinite(p).all(1) & torch.isfinite(h).all(1))).sum())
    if bad:
        raise InputError(
            f"{bad} of {p.shape[0]} samples have NaN or infinite p or h: expected finite samples; leave them out"
        )


def check_max_anchors(max_anchors: int, least: int = 1, most: int | None = None) -> None:
    """Raise InputError unless it is a whole number of at least `least` and, for a full Gram matrix, at most `most`."""
    if not isinstance(max_anchors, int) or isinstance(max_anchors, bool) or max_anchors < least:
        raise InputError(f"max_anchors={max_anchors!r}: expected a whole number of at least {least}")
    if most is not None and max_anchors > most:
        raise InputError(
            f"max_anchors={max_anchors}: expected at most {most}, because PCA decomposes the full Gram matrix of the anchors;"
            f" take {most}, selected by anchors='pivoted' in a dual basis, or a factored basis, which reads more samples"
        )


def check_n_components(wanted: int | float) -> None:
    """Raise InputError unless it is a number of components or a share of the variance."""
    is_share = isinstance(wanted, float) and 0 < wanted < 1
    is_number = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1
    if not is_share and not is_number:
        raise InputError(f"n_components={wanted!r}: expected a whole number of at least 1, or a share in (0, 1)")


def count_components(eigenvalues: Tensor, gram: Tensor, wanted: int | float) -> int:
    """K as wanted, or the rank of the gradients if that is lower.

    Args:
        eigenvalues: all eigenvalues [n], largest first.
        gram: the matrix before centring, whose diagonal determines their rounding error.
        wanted: K, or a share of the variance.

    Raises:
        InputError: equal gradients.
    """
    anchors = eigenvalues.shape[0]
    # Centring a Gram matrix of large entries leaves rounding errors of this size in null directions.
    floor = anchors * torch.finfo(eigenvalues.dtype).eps * float(gram.diagonal().max())
    rank = int((eigenvalues > floor).sum())
    if rank == 0:
        raise InputError(
            f"all {anchors} anchor gradients are equal: expected samples that differ; fit on more varied ID data"
        )
    if isinstance(wanted, float):
        cumulative = eigenvalues[:rank].cumsum(0) / eigenvalues[:rank].sum()
        return min(rank, int((cumulative < wanted).sum()) + 1)
    if wanted > rank:
        warnings.warn(
            f"n_components={wanted}: the {anchors} anchor gradients span {rank} directions, so {rank} are kept",
            OodEngineWarning,
            stacklevel=4,
        )
    return min(wanted, rank)


def fix_signs(vectors: Tensor) -> Tensor:
    """Make the largest-magnitude entry of every column positive, for a unique basis."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
