"""Low-dimensional subspaces of last-layer gradient space (arXiv 2310.17163), found without forming a gradient.

The gradient of a scalar of the logits is G = a ⊗ h̃ (h̃ = [h; 1]), so every inner product of two gradients is
⟨G_i, G_j⟩ = (a_i·a_j)(h̃_i·h̃_j), and PCA of n anchor gradients is the eigenproblem of their centred n × n Gram matrix.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import reference

from .errors import InputError, OodEngineWarning
from .fitted import FittedModule

__all__ = ["DualBasis", "ExplicitBasis"]

_ANCHOR_BLOCK = 256


class _Basis(FittedModule):
    """What both forms share: fitting, projection, norms."""

    def __init__(self, *fitted: str, cotangent: str = "energy", bias: bool = True) -> None:
        super().__init__(*fitted, "constants", "explained")
        if cotangent not in reference.COTANGENTS:
            raise InputError(f"cotangent={cotangent!r}: expected one of {', '.join(reference.COTANGENTS)}")
        self.cotangent = cotangent
        self.bias = bias

    constants: Tensor
    explained: Tensor
    """[K] share of the anchors' total gradient variance along each component."""

    @property
    def n_components(self) -> int:
        """K."""
        return self.fitted("constants").shape[0]

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient Ḡ."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Bytes that a projection reads beside its inputs."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors() if isinstance(tensor, Tensor))

    def tensors(self) -> ok.BasisTensors:
        """The tensors that `ood_kernels.project_gradients` takes."""
        raise NotImplementedError

    def project(self, p: Tensor, h: Tensor) -> Tensor:
        """Centred coordinates g_low [N, K] of the gradients at softmax p [N, C] and features h [N, D]."""
        return ok.project_gradients(p, h, self)

    def centred_norm(self, p: Tensor, h: Tensor) -> Tensor:
        """‖G - Ḡ‖ [N] in fp64: ‖a‖²‖h̃‖² - 2 aᵀ Ḡ h̃ + ‖Ḡ‖², a difference of large numbers."""
        return self._norms(p, h)[0].sqrt()

    def residual_norm(self, p: Tensor, h: Tensor) -> Tensor:
        """‖(I - V Vᵀ)(G - Ḡ)‖ [N] in fp64: the part of the centred gradient outside the subspace; V has orthonormal columns."""
        total, inside = self._norms(p, h)
        return (total - inside).clamp_min(0).sqrt()

    def _norms(self, p: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """‖G - Ḡ‖² and ‖g_low‖², [N] each, in fp64."""
        a, h = reference.cotangent(p.double(), self.cotangent), h.double()
        along_mean, coordinates = self._inner_products(a, h)
        total = a.square().sum(1) * (h.square().sum(1) + self.bias) - 2 * along_mean + self._mean_square()
        return total.clamp_min(0), coordinates.square().sum(1)

    def _inner_products(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """⟨G, Ḡ⟩ [N] and the centred coordinates [N, K], in fp64."""
        raise NotImplementedError

    def _mean_square(self) -> Tensor:
        """‖Ḡ‖², 0-d in fp64."""
        raise NotImplementedError


def extend(h: Tensor, bias: bool) -> Tensor:
    """h̃ = [h; 1] where the bias is part of the gradient, else h."""
    return torch.cat([h, h.new_ones(h.shape[0], 1)], 1) if bias else h


class DualBasis(_Basis):
    """PCA of last-layer gradients, written over the n anchor samples it was found from: V_k = Σ_i α_ik (a_i ⊗ h̃_i).

    Exact: coordinates equal those of PCA on the materialised gradients of the anchors up to sign, at 2·(n·(C + D + K) + C·K)
    flops a sample instead of 2·K·C·D̃. The mean gradient is the anchors' own.

    Args:
        cotangent: the scalar that is differentiated, see `ood_kernels.reference.cotangent`.
        bias: take the gradients of weight and bias together.
    """

    def __init__(self, *, cotangent: str = "energy", bias: bool = True) -> None:
        names = ("anchor_cotangents", "anchor_features", "coefficients", "shift", "linear", "mean_square")
        super().__init__(*names, cotangent=cotangent, bias=bias)

    @classmethod
    def fit(
        cls,
        p: Tensor,
        h: Tensor,
        *,
        labels: Tensor | None = None,
        n_components: int | float = 0.99,
        cotangent: str = "energy",
        normalisation: str = "none",
        max_anchors: int = 4096,
        bias: bool = True,
    ) -> DualBasis:
        """Find the subspace from ID samples; the first `max_anchors` of them become the anchors.

        Args:
            p: softmax [n, C].
            h: features [n, D].
            labels: not used by PCA.
            n_components: K as a number, or the share of the gradient variance to explain, in (0, 1). The paper uses 200 for
                CIFAR; 0.99 is ours.
            cotangent: the scalar that is differentiated.
            normalisation: "none", our default: centred only.
            max_anchors: most samples to build the Gram matrix from.
            bias: take the gradients of weight and bias together.

        Returns:
            The fitted basis, in fp64 where p or h is, else fp32.

        Raises:
            InputError: too few samples for K, values that are not finite, or an unknown option.
        """
        check_n_components(n_components)
        basis = cls(cotangent=cotangent, bias=bias)
        _check_samples(p, h, normalisation)
        p, h = p.detach(), h.detach()
        dtype = reference.compute_dtype(p, h)
        anchor_a = reference.cotangent(p[:max_anchors].double(), cotangent)
        anchor_h = h[:max_anchors].double()
        gram = (anchor_a @ anchor_a.T) * (extend(anchor_h, bias) @ extend(anchor_h, bias).T)
        gram_mean = gram.mean(1)
        centred = gram - gram_mean[:, None] - gram_mean[None, :] + gram_mean.mean()
        eigenvalues, eigenvectors = torch.linalg.eigh(centred)
        eigenvalues, eigenvectors = eigenvalues.flip(0), eigenvectors.flip(1)
        kept = _count_components(eigenvalues, gram, n_components)
        explained = eigenvalues[:kept] / eigenvalues.clamp_min(0).sum()
        coefficients = _fix_signs(eigenvectors[:, :kept]) / eigenvalues[:kept].sqrt()
        shift = anchor_h.mean(0).to(dtype)
        linear = reference.linear_part(anchor_a, anchor_h, coefficients, shift.double(), bias)
        basis.set_fitted(
            anchor_cotangents=anchor_a.to(dtype),
            anchor_features=anchor_h.to(dtype),
            coefficients=coefficients.to(dtype),
            constants=(gram_mean @ coefficients).to(dtype),
            shift=shift,
            linear=linear.to(dtype),
            explained=explained.to(dtype),
            mean_square=gram_mean.mean(),
        )
        return basis

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient of the anchors."""
        a, h = self.fitted("anchor_cotangents"), self.fitted("anchor_features")
        return a.double().T @ extend(h.double(), self.bias) / a.shape[0]

    def flops(self, samples: int) -> int:
        """Floating point operations of projecting `samples` gradients."""
        anchors, classes = self.fitted("anchor_cotangents").shape
        width = self.fitted("anchor_features").shape[1]
        return 2 * samples * (anchors * (classes + width + self.n_components) + classes * self.n_components)

    def tensors(self) -> ok.DualTensors:
        """Anchors, coefficients, constants and shift."""
        return ok.DualTensors(
            self.fitted("anchor_cotangents"),
            self.fitted("anchor_features"),
            self.fitted("coefficients"),
            self.fitted("constants"),
            self.cotangent,
            self.bias,
            self.fitted("shift"),
            self.fitted("linear"),
        )

    def _inner_products(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        names = ("anchor_cotangents", "anchor_features", "coefficients")
        anchors = zip(*(self.fitted(name).split(_ANCHOR_BLOCK) for name in names), strict=True)
        along_mean, coordinates = torch.zeros_like(a[:, 0]), -self.fitted("constants").double()
        for block in anchors:  # a block at a time, for the anchors in fp64 are twice their size
            anchor_a, anchor_h, coefficients = (part.double() for part in block)
            kernel = (a @ anchor_a.T) * (h @ anchor_h.T + self.bias)
            along_mean = along_mean + kernel.sum(1)
            coordinates = coordinates + kernel @ coefficients
        return along_mean / len(self.fitted("anchor_cotangents")), coordinates

    def _mean_square(self) -> Tensor:
        return self.fitted("mean_square")

    def to_explicit(self) -> ExplicitBasis:
        """The same subspace as its vectors [K, C, D̃]: K·C·D̃ numbers, 8 GB for ImageNet's ResNet-50 at K = 1000."""
        a, h = self.fitted("anchor_cotangents"), extend(self.fitted("anchor_features"), self.bias)
        coefficients = self.fitted("coefficients")
        components = torch.empty((coefficients.shape[1], a.shape[1], h.shape[1]), dtype=h.dtype, device=h.device)
        for k, column in enumerate(coefficients.T):
            torch.matmul((a * column[:, None]).T, h, out=components[k])
        basis = ExplicitBasis(cotangent=self.cotangent, bias=self.bias)
        basis.set_fitted(
            components=components,
            mean_gradient=self.mean.to(h.dtype),
            constants=self.fitted("constants").clone(),
            explained=self.fitted("explained").clone(),
        )
        return basis


class ExplicitBasis(_Basis):
    """A gradient subspace as its vectors V [K, C, D̃]: 2·K·C·D̃ flops a sample, for few classes or few components.

    Args:
        cotangent: the scalar that is differentiated, see `ood_kernels.reference.cotangent`.
        bias: take the gradients of weight and bias together.
    """

    def __init__(self, *, cotangent: str = "energy", bias: bool = True) -> None:
        super().__init__("components", "mean_gradient", cotangent=cotangent, bias=bias)

    @classmethod
    def fit(cls, p: Tensor, h: Tensor, **options: Any) -> ExplicitBasis:
        """The PCA of `DualBasis.fit`, with its options and errors, written out."""
        return DualBasis.fit(p, h, **options).to_explicit()

    @property
    def mean(self) -> Tensor:
        """[C, D̃] mean gradient."""
        return self.fitted("mean_gradient")

    def flops(self, samples: int) -> int:
        """Floating point operations of projecting `samples` gradients."""
        return 2 * samples * self.fitted("components").numel()

    def tensors(self) -> ok.ExplicitTensors:
        """Components and constants."""
        return ok.ExplicitTensors(self.fitted("components"), self.fitted("constants"), self.cotangent, self.bias)

    def _inner_products(self, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        along_mean = ((a @ self.mean.double()) * extend(h, self.bias)).sum(1)
        tensors = self.tensors()
        return along_mean, reference.project_explicit(a, h, tensors.components, tensors.constants, self.bias)

    def _mean_square(self) -> Tensor:
        return self.mean.double().square().sum()

    def to_explicit(self) -> ExplicitBasis:
        """Itself."""
        return self


def _check_samples(p: Tensor, h: Tensor, normalisation: str) -> None:
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


def _count_components(eigenvalues: Tensor, gram: Tensor, wanted: int | float) -> int:
    """K that was asked for, or less where the gradients do not span it."""
    anchors = eigenvalues.shape[0]
    # Centring a Gram matrix of large entries leaves rounding of this size in directions that are really empty.
    floor = anchors * torch.finfo(eigenvalues.dtype).eps * float(gram.diagonal().max())
    rank = int((eigenvalues > floor).sum())
    if rank == 0:
        raise InputError(
            f"all {anchors} anchor gradients are equal: expected samples that differ; fit on more varied ID data"
        )
    if isinstance(wanted, float):
        cumulative = eigenvalues[:rank].cumsum(0) / eigenvalues[:rank].sum()
        return int((cumulative < wanted).sum()) + 1
    if wanted > anchors - 1:
        raise InputError(
            f"n_components={wanted} with {anchors} anchors: expected at least {wanted + 1} anchors, for centred gradients of n"
            " samples span n - 1 directions; fit on more samples or ask for fewer components"
        )
    if wanted > rank:
        warnings.warn(
            f"n_components={wanted}: the {anchors} anchor gradients span {rank} directions, so {rank} are kept",
            OodEngineWarning,
            stacklevel=4,
        )
    return min(wanted, rank)


def _fix_signs(vectors: Tensor) -> Tensor:
    """Make the entry of largest magnitude of every column positive, so that the same data gives the same basis."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
