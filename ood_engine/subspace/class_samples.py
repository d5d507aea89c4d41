"""ID samples grouped by class."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_kernels import reference

from ..errors import InputError, OodEngineWarning
from .base import extend

__all__ = ["ClassSamples", "class_differences", "inner_products"]

_BLOCK = 4096
_GRAM_BLOCK = 1024
_NAMED = 5


class ClassSamples(NamedTuple):
    """The samples of a class-average basis.

    Attributes:
        p: softmax [n, C].
        h: features [n, D].
        classes: [K] int64, the classes present.
        counts: [K] samples per class.
        order: [n] rows sorted by class, stable.
        cotangent: the scalar that is differentiated.
        bias: whether h̃ = [h; 1].
    """

    p: Tensor
    h: Tensor
    classes: Tensor
    counts: Tensor
    order: Tensor
    cotangent: str
    bias: bool

    @classmethod
    def of(cls, p: Tensor, h: Tensor, labels: Tensor | None, cotangent: str, bias: bool) -> ClassSamples:
        """Group by label, or without labels by predicted class.

        Raises:
            InputError: labels out of range, or a single class.
        """
        if labels is None:
            warnings.warn(
                "a class-average basis without labels: predicted classes are used; pass labels=... for true ones",
                OodEngineWarning,
                stacklevel=4,
            )
            labels = p.argmax(1)
        _check_labels(labels, *p.shape)
        labels = labels.to(p.device, torch.int64)
        classes, counts = labels.unique(return_counts=True)
        if len(classes) < 2:
            raise InputError(
                f"all {len(p)} samples have class {int(classes[0])}: expected at least 2 classes, as"
                " class averages are differences from the overall mean; fit on samples of more classes, or use a PCA basis"
            )
        return cls(p, h, classes, counts, labels.argsort(stable=True), cotangent, bias)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the basis: fp64 if p or h is, else fp32."""
        return reference.compute_dtype(self.p, self.h)

    @property
    def shares(self) -> Tensor:
        """[K] share of samples per class, in fp64."""
        return self.counts.double() / len(self.p)

    def by_class(self) -> tuple[Tensor, ...]:
        """The rows of each class."""
        return self.order.split(self.counts.tolist())

    def moment(self, rows: Tensor, power: int = 1) -> Tensor:
        """Elementwise mean of G^power over the rows: [C, D̃] in fp64."""
        total = torch.zeros((), dtype=torch.float64, device=self.p.device)
        for block in rows.split(_BLOCK):
            a = reference.cotangent(self.p[block].double(), self.cotangent)
            total = total + a.pow(power).T @ extend(self.h[block].double(), self.bias).pow(power)
        return total / len(rows)

    def distinct(self, squares: Tensor, floor: Tensor) -> Tensor:
        """Mask of the ‖Ḡ_c - Ḡ‖² [K] above rounding error; warns of the other classes.

        Raises:
            InputError: none is above it.
        """
        kept = squares > floor
        left_out = self.classes[~kept].tolist()
        if len(left_out) == len(kept):
            raise InputError(
                f"the mean gradients of all {len(kept)} classes are equal: expected classes that differ; fit on more varied ID data"
            )
        if left_out:
            named = ", ".join(map(str, left_out[:_NAMED])) + (", ..." if len(left_out) > _NAMED else "")
            warnings.warn(
                f"{len(left_out)} of {len(kept)} classes have the overall mean gradient ({named}), so"
                f" {int(kept.sum())} columns are kept",
                OodEngineWarning,
                stacklevel=5,
            )
        return kept


def class_differences(members: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients over n samples of the class means Ḡ_c - M [n, K], and of the overall mean M = Σ_c share_c Ḡ_c [n], in fp64.

    Args:
        members: class of each sample [n], 0 … K - 1.
        shares: weight of each class in M [K], with sum 1.
    """
    averages = F.one_hot(members, len(shares)).double()
    averages /= averages.sum(0)
    weights = averages @ shares
    return averages - weights[:, None], weights


def inner_products(coefficients: Tensor, a: Tensor, h: Tensor) -> Tensor:
    """[K, K] inner products of Σ_i coefficients_ik a_i ⊗ h̃_i, in row blocks of the samples' Gram matrix."""
    blocks = zip(a.split(_GRAM_BLOCK), h.split(_GRAM_BLOCK), coefficients.split(_GRAM_BLOCK), strict=True)
    parts = [part.T @ (((left @ a.T) * (right @ h.T)) @ coefficients) for left, right, part in blocks]
    return torch.stack(parts).sum(0)


def _check_labels(labels: Tensor, samples: int, classes: int) -> None:
    if labels.shape != (samples,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels: expected whole numbers [{samples}], got {labels.dtype} {list(labels.shape)}")
    outside = int(((labels < 0) | (labels >= classes)).sum())
    if outside:
        raise InputError(
            f"{outside} of {samples} labels are outside 0 to {classes - 1}: expected a class index each; leave those samples out"
        )
