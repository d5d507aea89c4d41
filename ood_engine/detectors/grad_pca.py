"""GradPCA (arXiv 2505.16017): share of a last-layer gradient within the subspace of the class-mean gradients."""

from __future__ import annotations

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from ..errors import InputError, one_of
from ..features.fit_data import FitData
from ..features.signals import Signals
from ..subspace.base import extend, tensors_of
from ..subspace.class_samples import class_differences, inner_products
from ..subspace.samples import fix_signs
from .base import Detector, register

__all__ = ["GradPCA"]

_CLASS_MEAN_BYTES = 2 * 2**30
_EPSILON = torch.finfo(torch.float64).eps


@register("grad_pca")
class GradPCA(Detector):
    """S = ‖Uᵀ(G - M)‖ / ‖G - M‖ in [0, 1]: U an orthonormal basis of the class-mean gradients Ḡ_c, centred by their mean M.

    U holds the leading eigenvectors of the K x K Gram matrix of Ḡ_c - M over the K classes present, with equal weights (our
    reading), and ‖G - M‖² = ‖a‖²‖h̃‖² - 2 aᵀ M h̃ + ‖M‖² in fp64. Unlabelled samples count for their predicted class. A gradient
    equal to M lies in every subspace and scores 1.

    With `sum_logits` this is PCA of class-mean features, over all samples. For other cotangents, class means are over all samples
    up to 2 GiB (our default; the paper gives none), beyond that over the `anchors_per_class` samples with the smallest
    fingerprints.

    Args:
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        explained: explained share of the trace of the Gram matrix; 0.99 is the paper's.
        anchors_per_class: samples per class if the class means exceed memory; 10 is our default; the paper gives none.

    Raises:
        InputError: an unknown cotangent, or a setting out of range.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import SmallCNN
        >>> images = torch.linspace(0, 4, 64)[:, None, None, None] * torch.rand(64, 1, 8, 8)
        >>> engine = Engine(SmallCNN(4), ["grad_pca"]).fit([images], labels="predicted")
        >>> score = engine.score(torch.rand(2, 1, 8, 8))["grad_pca"]
        >>> bool((score >= 0).all() and (score <= 1).all())
        True
    """

    _optional_names = ("components", "anchor_cotangents", "anchor_features", "coefficients", "shift", "linear")

    def __init__(self, *, cotangent: str = "sum_logits", explained: float = 0.99, anchors_per_class: int = 10) -> None:
        super().__init__("constants", "mean", "mean_square")
        if cotangent not in reference.COTANGENTS:
            raise InputError(f"cotangent={cotangent!r}: {one_of(cotangent, reference.COTANGENTS)}")
        if isinstance(explained, bool) or not isinstance(explained, (int, float)) or not 0 < explained <= 1:
            raise InputError(f"explained={explained!r}: expected a share in (0, 1]")
        if isinstance(anchors_per_class, bool) or not isinstance(anchors_per_class, int) or anchors_per_class < 1:
            raise InputError(f"anchors_per_class={anchors_per_class!r}: expected a whole number of at least 1")
        self._cotangent, self._explained, self._anchors_per_class = cotangent, explained, anchors_per_class

    def fit(self, data: FitData) -> None:
        """Compute the class means and their principal components.

        Raises:
            InputError: a single class, or equal class means.
        """
        for name in self._optional_names:
            self._buffers[name] = None
        _, index = data.split(0)
        classes, membership = data.labels(index).unique(return_inverse=True)
        if len(classes) < 2:
            raise InputError(
                f"grad_pca: {len(data)} ID samples of {len(classes)} class: expected at least 2 classes, as the subspace"
                " spans differences between their mean gradients; fit on samples of more classes"
            )
        n_classes, width = data.head.weight.shape
        if self._cotangent == "sum_logits":
            # a is constant, so a class mean is the gradient at the class-mean feature.
            features = _class_features(data, index, membership, len(classes))
            ones = features.new_ones((len(classes), n_classes))
            self._fit_anchors(ones, features, torch.arange(len(classes), device=features.device), data)
        elif 8 * len(classes) * n_classes * (width + 1) <= _CLASS_MEAN_BYTES:
            self._fit_class_means(self._class_means(data, index, membership, len(classes)), data)
        else:
            rows = _first_of_each(membership, self._anchors_per_class)
            parts = [
                (signals.probabilities, signals.features) for signals in data.signals(index[rows.to(index.device)])
            ]
            p, h = (torch.cat(column).double() for column in zip(*parts, strict=True))
            self._fit_anchors(reference.cotangent(p, self._cotangent), h, membership[rows], data)

    def _class_means(self, data: FitData, index: Tensor, membership: Tensor, count: int) -> Tensor:
        """[K, C, D̃] Ḡ_c in fp64, over all samples."""
        n_classes, width = data.head.weight.shape
        means = torch.zeros((count, n_classes, width + 1), dtype=torch.float64, device=membership.device)
        start = 0
        for signals in data.signals(index):
            a = reference.cotangent(signals.probabilities.double(), self._cotangent)
            h = extend(signals.features.double(), True)
            members = membership[start : start + len(h)]
            for each in members.unique().tolist():
                rows = members == each
                means[each] += a[rows].T @ h[rows]
            start += len(h)
        means /= membership.bincount(minlength=count)[:, None, None]
        return means

    def _fit_class_means(self, means: Tensor, data: FitData) -> None:
        """Explicit components from the class means."""
        dtype, mean = reference.compute_dtype(data.head.weight), means.mean(0)
        scale = means.square().sum((1, 2)).max()
        means -= mean
        flat = means.flatten(1)
        along = self._principal(flat @ flat.T, scale)
        components = (along.T @ flat).unflatten(1, mean.shape)
        self.set_fitted(
            components=components.to(dtype),
            constants=(components * mean).sum((1, 2)).to(dtype),
            mean=mean,
            mean_square=mean.square().sum(),
        )

    def _fit_anchors(self, a: Tensor, h: Tensor, membership: Tensor, data: FitData) -> None:
        """Components over anchors a [n, C], h [n, D] in fp64, with class `membership` [n] in 0 … K - 1."""
        count = int(membership.max()) + 1
        differences, weights = class_differences(membership, h.new_full((count,), 1 / count))
        extended = extend(h, True)
        inner = inner_products(torch.cat([differences, weights[:, None]], 1), a, extended)
        along = self._principal(inner[:-1, :-1], (a.square().sum(1) * extended.square().sum(1)).max())
        coefficients, shift = differences @ along, weights @ h
        dtype = reference.compute_dtype(data.head.weight)
        self.set_fitted(
            anchor_cotangents=a.to(dtype),
            anchor_features=h.to(dtype),
            coefficients=coefficients.to(dtype),
            shift=shift.to(dtype),
            linear=reference.linear_part(a, h, coefficients, shift.to(dtype).double()).to(dtype),
            constants=(inner[-1, :-1] @ along).to(dtype),
            mean=(a * weights[:, None]).T @ extended,
            mean_square=inner[-1, -1],
        )

    def _principal(self, gram: Tensor, scale: Tensor) -> Tensor:
        """[K, r] coefficients of orthonormal components over the differences Ḡ_c - M.

        Args:
            gram: Gram matrix [K, K] of the differences.
            scale: the largest ‖Ḡ_c‖², which determines the rounding error of the differences.
        """
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0), vectors.flip(1)
        rank = int((values > len(gram) * _EPSILON * scale).sum())
        if rank == 0:
            raise InputError(
                f"grad_pca: the mean gradients of all {len(gram)} classes are equal: expected classes that differ; fit on more"
                " varied ID data"
            )
        share = values[:rank].cumsum(0) / values[:rank].sum()
        kept = min(rank, int((share < self._explained).sum()) + 1)
        return fix_signs(vectors[:, :kept]) / values[:kept].sqrt()

    @property
    def n_components(self) -> int:
        """Columns of U."""
        return len(self.fitted("constants"))

    def tensors(self) -> ok.BasisTensors:
        """The tensors that `ood_kernels.project_gradients` takes: explicit where class means were held, else over anchors."""
        if self._buffers["components"] is not None:
            return tensors_of(self, ok.ExplicitTensors, self._cotangent)
        return tensors_of(self, ok.DualTensors, self._cotangent)

    @property
    def gradient_basis(self) -> GradPCA:
        """The detector itself, which holds the tensors of its subspace."""
        return self

    def forward(self, signals: Signals) -> Tensor:
        """[N] share of the norm inside the subspace."""
        inside = signals.coordinates(self).double().norm(dim=1)
        a, h = reference.cotangent(signals.probabilities.double(), self._cotangent), signals.features.double()
        mean, square = self.fitted("mean"), a.square().sum(1) * (h.square().sum(1) + 1)
        along = ((a @ mean[:, :-1]) * h).sum(1) + a @ mean[:, -1]
        total = square - 2 * along + self.fitted("mean_square")
        # The rounding residue of G = M, here in fp64 and in the coordinates in their dtype, has no meaningful direction.
        rounding = max(64 * _EPSILON, 8 * torch.finfo(signals.features.dtype).eps ** 2)
        is_mean = total <= rounding * square
        score = torch.where(is_mean, 1.0, inside / total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()).clamp(max=1)
        return score.to(signals.features.dtype)


def _class_features(data: FitData, index: Tensor, membership: Tensor, count: int) -> Tensor:
    """[K, D] mean feature per class in fp64, over all samples."""
    sums = torch.zeros((count, data.head.weight.shape[1]), dtype=torch.float64, device=membership.device)
    start = 0
    for signals in data.signals(index):
        features = signals.features.double()
        sums.index_add_(0, membership[start : start + len(features)], features)
        start += len(features)
    return sums / membership.bincount(minlength=count)[:, None]


def _first_of_each(membership: Tensor, count: int) -> Tensor:
    """Ascending rows of the first `count` members of each class."""
    order = membership.argsort(stable=True)
    return torch.cat([rows[:count] for rows in order.split(membership.bincount().tolist())]).sort().values
