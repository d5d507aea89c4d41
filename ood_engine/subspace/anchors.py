"""Selection of the anchor samples of a subspace; the methods are chosen here, not the paper's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ood_kernels import reference

from ..errors import InputError, one_of
from .base import extend
from .samples import check_samples

__all__ = ["ANCHOR_METHODS", "Anchors", "check_anchor_method", "choose_anchors"]

ANCHOR_METHODS = ("first", "class_balanced", "pivoted")
_EPSILON = torch.finfo(torch.float64).eps
_BLOCK = 1024


@dataclass(frozen=True)
class Anchors:
    """The selected samples.

    Attributes:
        index: [m] int64 rows, m = min(count, n); ascending, or in order of selection for "pivoted".
        residual: 0-d fp64 in [0, 1], Σ_i ‖G_i - its projection onto the span of the anchors' gradients‖² / Σ_i ‖G_i‖²; None if
            every sample is an anchor.
    """

    index: Tensor
    residual: Tensor | None


def check_anchor_method(method: str) -> None:
    """Raise InputError for a method that is not one of `ANCHOR_METHODS`."""
    if method not in ANCHOR_METHODS:
        raise InputError(f"anchors={method!r}: {one_of(method, ANCHOR_METHODS)}")


def choose_anchors(
    p: Tensor,
    h: Tensor,
    count: int,
    *,
    method: str = "first",
    labels: Tensor | None = None,
    cotangent: str = "energy",
    bias: bool = True,
) -> Anchors:
    """Select `count` of n samples deterministically.

    "first" selects the first samples: a random subset if they are ordered by fingerprint. "class_balanced" selects the first
    samples of each class, in equal numbers; the shortfall of small classes goes to the others. "pivoted" is greedy: next is the
    sample whose gradient is farthest from the span of those already selected, i.e. pivoted Cholesky of the Gram matrix
    K_ij = (a_i·a_j)(h̃_i·h̃_j) without forming it, in O(count·n·(C + D + count)) operations and 8·count·n bytes. Once the span
    contains all gradients, the first remaining samples follow.

    Args:
        p: softmax [n, C].
        h: features [n, D].
        count: number of samples.
        method: one of `ANCHOR_METHODS`.
        labels: classes [n] for "class_balanced"; negative or None: predicted classes.
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        bias: use the gradients of weight and bias together.

    Raises:
        InputError: non-finite samples, mismatched labels, a count below 1 or an unknown method.
    """
    check_anchor_method(method)
    check_samples(p, h)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"count={count!r}: expected a whole number of at least 1")
    p, h = p.detach(), h.detach()
    everything = torch.arange(len(p), device=p.device)
    if count >= len(p):
        return Anchors(everything, None)
    a, features = reference.cotangent(p.double(), cotangent), extend(h.double(), bias)
    if method == "pivoted":
        return _pivoted(a, features, count)
    index = everything[:count] if method == "first" else _class_balanced(p, labels, count)
    return Anchors(index, _residual_share(a, features, index))


def _class_balanced(p: Tensor, labels: Tensor | None, count: int) -> Tensor:
    """One sample per class, round-robin."""
    predicted = p.argmax(1)
    if labels is None:
        labels = predicted
    elif labels.shape != predicted.shape or labels.is_floating_point():
        raise InputError(
            f"labels: expected whole numbers {list(predicted.shape)}, got {labels.dtype} {list(labels.shape)}"
        )
    labels = labels.to(p.device, torch.int64)
    labels = torch.where(labels < 0, predicted, labels)
    by_class = labels.argsort(stable=True)
    counts = labels.unique(return_counts=True)[1]
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    turn = torch.arange(len(labels), device=p.device) - starts
    return by_class[turn.argsort(stable=True)[:count]].sort().values


def _pivoted(a: Tensor, h: Tensor, count: int) -> Anchors:
    """Pivoted Cholesky; a [n, C] and h̃ [n, D̃] in fp64."""
    left = a.square().sum(1) * h.square().sum(1)
    trace, floor = left.sum(), len(a) * _EPSILON * left.max()
    columns = a.new_zeros((count, len(a)))
    chosen = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    pivots: list[int] = []
    for step in range(count):
        pivot = int(left.argmax())
        if not left[pivot] > floor:
            break
        column = (a @ a[pivot]) * (h @ h[pivot]) - columns[:step, pivot] @ columns[:step]
        columns[step] = column / left[pivot].sqrt()
        left = (left - columns[step].square()).clamp_min(0)
        pivots.append(pivot)
        chosen[pivot] = True
        left[chosen] = 0
    rest = (~chosen).nonzero()[:, 0][: count - len(pivots)]
    index = torch.cat([torch.tensor(pivots, dtype=torch.int64, device=a.device), rest])
    left[rest] = 0
    return Anchors(index, _share(left.sum(), trace))


def _residual_share(a: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """1 - tr(K_nm K_mm⁻¹ K_mn) / tr(K), in chunks of samples."""
    anchor_a, anchor_h = a[index], h[index]
    gram = (anchor_a @ anchor_a.T) * (anchor_h @ anchor_h.T)
    # A ridge of twice the rounding error, so that Cholesky succeeds for linearly dependent anchors.
    gram.diagonal().add_(2 * len(gram) * _EPSILON * gram.diagonal().max() + torch.finfo(gram.dtype).tiny)
    factor = torch.linalg.cholesky(gram)
    trace, captured = gram.new_zeros(()), gram.new_zeros(())
    for left, right in zip(a.split(_BLOCK), h.split(_BLOCK), strict=True):
        trace += (left.square().sum(1) * right.square().sum(1)).sum()
        across = (anchor_a @ left.T) * (anchor_h @ right.T)
        captured += torch.linalg.solve_triangular(factor, across, upper=False).square().sum()
    return _share(trace - captured, trace)


def _share(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, part / total, 0.0).clamp(0, 1)
