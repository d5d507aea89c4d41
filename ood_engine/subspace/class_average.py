"""The class-average basis: the mean centred gradient of each class."""

from __future__ import annotations

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from ..errors import InputError
from . import nfk
from .base import Basis, extend, whitening_of
from .class_samples import ClassSamples, class_differences, inner_products
from .dual import DualBasis
from .explicit import ExplicitBasis
from .samples import check_fit

__all__ = ["MAX_BYTES", "ClassAverageBasis", "class_means_bytes"]

MAX_BYTES = 2 * 2**30
"""Memory limit of exact class means over all samples; 2 GiB is our default; the paper gives none."""

_EPSILON = torch.finfo(torch.float64).eps
_EXPLICIT = ("components", "mean_gradient")
_DUAL = ("anchor_cotangents", "anchor_features", "coefficients", "shift", "linear", "mean_square", "weights")


class ClassAverageBasis(Basis):
    """Column c is (Ḡ_c - Ḡ) / ‖Ḡ_c - Ḡ‖ over the samples of true class c: normalised, not orthogonalised, as in the paper's code.

    Stored in one of two forms, see `fit`: as columns [K, C, D̃], or over anchors, V_c = Σ_i α_ic a_i ⊗ h̃_i with
    α_ic = (1[y_i = c] / n_c - 1 / n) / ‖Ḡ_c - Ḡ‖. `explained` is (n_c / n) ‖Ḡ_c - Ḡ‖² as a share of the gradient variance, which
    sums to the between-class share. `residual_norm` accounts for non-orthogonal columns.

    Args:
        cotangent: the differentiated scalar, see `ood_kernels.reference.cotangent`.
        bias: use the gradients of weight and bias together.

    Raises:
        InputError: an unknown cotangent.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> p, h = torch.rand(32, 4, generator=generator).softmax(1), torch.rand(32, 8, generator=generator)
        >>> basis = ClassAverageBasis.fit(p, h, labels=torch.arange(32) % 4)
        >>> basis.classes, basis.project(p, h).shape
        (tensor([0, 1, 2, 3]), torch.Size([32, 4]))
    """

    normalisations = ("none", "nfk", "nfk-separable")
    _optional_names = (*Basis._optional_names, *_EXPLICIT, *_DUAL)

    def __init__(self, *, cotangent: str = "energy", bias: bool = True) -> None:
        super().__init__("classes", cotangent=cotangent, bias=bias)

    classes: Tensor
    """[K] int64: class of each column."""
    components: Tensor | None

    @classmethod
    def fit(
        cls,
        p: Tensor,
        h: Tensor,
        *,
        labels: Tensor | None = None,
        n_components: int | float | None = None,
        cotangent: str = "energy",
        normalisation: str = "none",
        max_anchors: int = 4096,
        bias: bool = True,
        max_bytes: int = MAX_BYTES,
    ) -> ClassAverageBasis:
        """Compute the class means over all samples if they fit `max_bytes`, else over equally many anchors per class.

        Args:
            p: softmax [n, C].
            h: features [n, D].
            labels: true classes [n]; None: predicted classes, with a warning.
            n_components: unused: one column per class present.
            cotangent: the differentiated scalar.
            normalisation: "none", our default; "nfk", as in all runs of the paper's README, if the class means fit `max_bytes`;
                "nfk-separable", see `DualBasis.fit`.
            max_anchors: maximum total number of anchors, if the class means exceed `max_bytes`: the first max_anchors / K of each
                class, at least one. The overall mean then weights each class by its share of all samples.
            bias: use the gradients of weight and bias together.
            max_bytes: memory limit of the class means.

        Returns:
            The fitted basis, in fp64 if p or h is, else fp32.

        Raises:
            InputError: a single class, equal class means, labels out of range, non-finite values, or an unknown option.
        """
        basis = cls(cotangent=cotangent, bias=bias).to(p.device)
        check_fit(p, h, normalisation, cls.normalisations, max_anchors)
        samples = ClassSamples.of(p.detach(), h.detach(), labels, cotangent, bias)
        required = class_means_bytes(len(samples.classes), p.shape[1], h.shape[1] + bias, samples.dtype)
        if required <= max_bytes:
            basis._fit_explicit(samples, normalisation)
        elif normalisation == "nfk":
            raise InputError(
                f"normalisation='nfk' needs the class means themselves, {required} bytes: expected at most max_bytes={max_bytes};"
                " raise it, or take 'nfk-separable'"
            )
        else:
            basis._fit_dual(samples, normalisation, max_anchors)
        return basis

    def _fit_explicit(self, samples: ClassSamples, normalisation: str) -> None:
        """Two passes over the samples: overall moments, then one class at a time."""
        count, dtype = len(samples.p), samples.dtype
        mean, second = samples.moment(samples.order), samples.moment(samples.order, 2)
        scale = self._fit_scale(nfk.deviation(mean, second, count), normalisation, dtype)
        moment = (scale.square() * second).sum()
        components = torch.empty((len(samples.classes), *mean.shape), dtype=dtype, device=mean.device)
        squares, constants = mean.new_zeros(len(components)), mean.new_zeros(len(components))
        for column, rows in enumerate(samples.by_class()):
            difference = scale * (samples.moment(rows) - mean)
            squares[column] = difference.square().sum()
            vector = scale * difference / squares[column].sqrt()
            components[column], constants[column] = vector, (vector * mean).sum()
        kept = samples.distinct(squares, (count * _EPSILON) ** 2 * moment)
        components = components if bool(kept.all()) else components[kept]
        nfk.check_finite(components)
        variance = moment - (scale * mean).square().sum()
        self.set_fitted(
            components=components,
            mean_gradient=mean.to(dtype),
            constants=constants[kept].to(dtype),
            explained=(samples.shares * squares / variance)[kept].to(dtype),
            classes=samples.classes[kept],
            whitening=whitening_of(_gram(components, scale), dtype),
        )

    def _fit_scale(self, spread: Tensor, normalisation: str, dtype: torch.dtype) -> Tensor:
        """Set the metric. Returns I [C, D̃] in fp64, with 0 for constant entries, whose rounding errors it would amplify."""
        if normalisation == "none":
            return torch.ones_like(spread)
        if normalisation == "nfk":
            scale = nfk.inverse(spread)
            self.set_fitted(inverse_deviation=scale.to(dtype))
        else:
            self.set_separable(nfk.separate(spread, self.bias))
            scale = torch.outer(*self.scales())
        return torch.where(spread > 0, scale, 0)

    def _fit_dual(self, samples: ClassSamples, normalisation: str, max_anchors: int) -> None:
        """Fit over anchors, through the Gram matrix of the class means."""
        each = max(1, max_anchors // len(samples.classes))
        anchors = [rows[:each] for rows in samples.by_class()]
        rows, dtype = torch.cat(anchors), samples.dtype
        a, h = reference.cotangent(samples.p[rows].double(), self.cotangent), samples.h[rows].double()
        column = torch.arange(len(anchors), device=a.device).repeat_interleave(
            a.new_tensor(list(map(len, anchors))).long()
        )
        differences, weights = class_differences(column, samples.shares)
        if normalisation == "nfk-separable":
            spread = nfk.mean_and_deviation(a, extend(h, self.bias), weights)[1]
            self.set_separable(nfk.separate(spread, self.bias))
        scaled_a, scaled_h = self.scaled(a, h)
        inner = inner_products(torch.cat([differences, weights[:, None]], 1), scaled_a, extend(scaled_h, self.bias))
        gram, along_mean, mean_square = inner[:-1, :-1], inner[-1, :-1], inner[-1, -1]
        squares, norms = gram.diagonal(), self._square(a, h)
        kept = samples.distinct(squares, len(rows) * _EPSILON * norms.max())
        lengths = squares[kept].sqrt()
        coefficients, shift = differences[:, kept] / lengths, (weights @ h).to(dtype)
        a, h = self.scaled(a, h, power=2)
        linear = reference.linear_part(a, h, coefficients, shift.double(), self.bias)
        nfk.check_finite(a.to(dtype), h.to(dtype), linear.to(dtype))
        self.set_fitted(
            anchor_cotangents=a.to(dtype),
            anchor_features=h.to(dtype),
            coefficients=coefficients.to(dtype),
            shift=shift,
            linear=linear.to(dtype),
            mean_square=mean_square,
            weights=weights,
            constants=(along_mean[kept] / lengths).to(dtype),
            explained=(samples.shares * squares / (weights @ norms - mean_square))[kept].to(dtype),
            classes=samples.classes[kept],
            whitening=whitening_of(gram[kept][:, kept] / torch.outer(lengths, lengths), dtype),
        )

    @property
    def form(self) -> ExplicitBasis | DualBasis:
        """The same columns as the explicit or dual basis of their storage, with shared memory."""
        place = self.fitted("classes").device
        kind = DualBasis if self.components is None else ExplicitBasis
        basis = kind(cotangent=self.cotangent, bias=self.bias).to(place)
        basis.set_fitted(**{name: value for name, value in self.state_dict().items() if name in basis._buffers})
        return basis

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient."""
        return self.form.mean

    def tensors(self) -> ok.BasisTensors:
        """The tensors of the stored form, explicit or dual."""
        return self.form.tensors()

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_k weights_k V_k, [C, D̃] in fp64."""
        return self.form.combine(weights)

    def residual_norm(self, p: Tensor, h: Tensor) -> Tensor:
        """Norm of the component orthogonal to the span of all columns, [N] in fp64."""
        return self.form.residual_norm(p, h)

    def to_explicit(self) -> ExplicitBasis:
        """The columns [K, C, D̃]."""
        return self.form.to_explicit()


def class_means_bytes(present: int, classes: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of the mean gradients of the `present` classes: present · C · D̃ numbers."""
    return present * classes * width * dtype.itemsize


def _gram(components: Tensor, scale: Tensor) -> Tensor:
    """[K, K] inner products in fp64 of the normalised vectors components / scale, one class at a time."""
    gram = scale.new_zeros((len(components), len(components)))
    for each_class, scales in enumerate(scale):
        part = torch.where(scales > 0, components[:, each_class].double() / scales, 0)
        gram += part @ part.T
    return gram
