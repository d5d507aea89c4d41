"""Settings and fit of a detector's gradient subspace."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple

from torch import Tensor

from ood_kernels.reference import compute_dtype

from ..errors import InputError, one_of
from ..features.fit_data import FitData
from ..subspace import BASES, Basis, ClassAverageBasis, DualBasis, ExplicitBasis, check_n_components
from ..subspace.anchors import check_anchor_method
from ..subspace.class_average import MAX_BYTES, class_means_bytes
from ..subspace.eigen import LARGEST_EIGENPROBLEM
from ..subspace.samples import check_max_anchors

__all__ = ["GradientSubspace"]

_NORMALISATIONS = {name: kind.normalisations for name, kind in {"auto": DualBasis, **BASES}.items()}
_CANDIDATES_PER_ANCHOR = 16
_PLANNED_BATCH = 64


class GradientSubspace(NamedTuple):
    """Settings of a subspace; detectors with equal settings share one fit.

    Attributes:
        basis: one of `ood_engine.subspace.BASES`, or "auto": the cheaper of "dual" and "explicit" for batches of 64.
        n_components: K, or the explained share of the gradient variance.
        cotangent: the differentiated scalar.
        normalisation: "none", "nfk" or "nfk-separable".
        max_anchors: maximum number of anchors.
        anchors: selection method, see `ood_engine.subspace.anchors.choose_anchors`.
    """

    basis: str
    n_components: int | float
    cotangent: str
    normalisation: str
    max_anchors: int
    anchors: str

    def check(self) -> None:
        """Raise InputError for settings that are unknown, out of range or incompatible."""
        if self.basis not in _NORMALISATIONS:
            raise InputError(f"basis={self.basis!r}: {one_of(self.basis, _NORMALISATIONS)}")
        reads_gram = self.basis in ("auto", "dual", "explicit")
        check_max_anchors(self.max_anchors, least=2, most=LARGEST_EIGENPROBLEM if reads_gram else None)
        check_n_components(self.n_components)
        if self.normalisation not in _NORMALISATIONS[self.basis]:
            raise InputError(
                f"normalisation={self.normalisation!r} with basis={self.basis!r}: expected one of"
                f" {', '.join(_NORMALISATIONS[self.basis])}"
            )
        check_anchor_method(self.anchors)
        if self.anchors != "first" and self.basis not in ("auto", "dual"):
            raise InputError(
                f"anchors={self.anchors!r} with basis={self.basis!r}: expected 'first'; other methods need the auto or dual basis"
            )

    def unfitted(self, tensors: Collection[str] = ()) -> Basis:
        """An unfitted basis of the kind given by these settings.

        Args:
            tensors: names of the stored tensors, which identify the outcome of "auto".
        """
        automatic = ExplicitBasis if "components" in tensors else DualBasis
        return BASES.get(self.basis, automatic)(cotangent=self.cotangent)

    def candidates(self, data: FitData) -> int:
        """Maximum number of samples for fitting the basis; at most half are used, see `FitData.split`."""
        if self.basis == "class_average" and _holds_class_means(data):
            return len(data)
        return self.max_anchors * (1 if self.anchors == "first" else _CANDIDATES_PER_ANCHOR)

    def fit(self, data: FitData, index: Tensor) -> Basis:
        """The basis fitted on the samples at `index`, shared by all detectors with these settings.

        Raises:
            InputError: fewer than two samples, or samples that do not admit such a basis.
        """
        key: Hashable = ("basis", self)
        return data.shared(key, lambda: self._fit(data, index))

    def _fit(self, data: FitData, index: Tensor) -> Basis:
        if len(index) < 2:
            raise InputError(
                f"{len(data)} ID samples, {data.distinct} of them different: expected at least 4 different ones, half of them"
                " anchors of the subspace; fit on more"
            )
        p = data.collect(("p", len(index)), index, lambda signals: signals.probabilities)
        h = data.collect(("h", len(index)), index, lambda signals: signals.features)
        options: dict[str, Any] = {
            "n_components": self.n_components,
            "cotangent": self.cotangent,
            "normalisation": self.normalisation,
            "max_anchors": self.max_anchors,
        }
        if self.basis == "class_average":
            # Exact nfk requires the class means, and raises if they are too large.
            needs_means = _holds_class_means(data) or self.normalisation == "nfk"
            options |= {"labels": data.labels(index).to(p.device), "max_bytes": MAX_BYTES if needs_means else 0}
            return ClassAverageBasis.fit(p, h, **options)
        if self.basis not in ("auto", "dual"):
            return BASES[self.basis].fit(p, h, **options)
        if self.anchors == "class_balanced":
            options["labels"] = data.labels(index).to(p.device)
        basis = DualBasis.fit(p, h, anchors=self.anchors, **options)
        if self.basis == "auto" and basis.plan(_PLANNED_BATCH).choice == "explicit":
            return basis.to_explicit()
        return basis


def _holds_class_means(data: FitData) -> bool:
    """Whether C class means fit in memory, regardless of the number of classes present in the samples."""
    classes, features = data.head.weight.shape
    return class_means_bytes(classes, classes, features + 1, compute_dtype(data.head.weight)) <= MAX_BYTES
