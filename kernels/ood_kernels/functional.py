"""The public functions: argument validation and dispatch to the torch operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import ops, reference
from .backend import default_backend, is_eager_on_gpu
from .bases import basis_tensors
from .checks import check_devices, check_head, check_precision, map_of, unfit
from .types import BasisTensors, HasBasisTensors, Head, PoolStatistics, ScoreOutputs

_Run = Callable[..., Any]

__all__ = ["masked_energy", "pool_nap", "pool_statistics", "project_gradients", "score"]


def pool_statistics(feature_map: Tensor, *, rectify: bool = False, backend: str | None = None) -> PoolStatistics:
    """Per-channel mean and maximum over H·W, from which NAP and the penultimate features follow.

    Args:
        feature_map: [N, D, H, W] or tokens [N, T, D], any strides, fp32, fp16, bf16 or fp64; N may be 0.
        rectify: take NAP's statistics of ReLU(feature_map), for maps with negative values; `h` stays the mean of the raw map.
        backend: "triton" or "reference"; None defers to the environment variable OOD_ENGINE_BACKEND, then to the device.

    Returns:
        PoolStatistics(h, nap_mean, maximum), each [N, D]; fp64 for fp64 input, else fp32. NaN and Inf propagate.

    Raises:
        ValueError: non-floating-point map, empty axis other than N, unknown backend.
        RuntimeError: the requested backend is unavailable.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> ok.pool_statistics(torch.tensor([[[[0.0, 4.0], [0.0, 0.0]]]]))
        PoolStatistics(h=tensor([[1.]]), nap_mean=tensor([[1.]]), maximum=tensor([[4.]]))
    """

    def written(run: _Run) -> tuple[Tensor, ...]:
        return run(map_of(feature_map), rectify, backend=backend or "")

    return PoolStatistics(*_call("pool_statistics", written, (feature_map,), (rectify, backend)))


def pool_nap(
    feature_map: Tensor,
    eps: float = 1.0,
    *,
    rectify: bool = False,
    return_ratios: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Pooled features and the NAP score: S = (1/D) Σ_j (max_HW A_j / (mean_HW A_j + eps))² (arXiv 2402.18162).

    Args:
        feature_map: A [N, D, H, W], the post-ReLU map before global pooling, or tokens [N, T, D]; any strides, fp32, fp16,
            bf16 or fp64.
        eps: 1.0 in the paper; part of the method rather than a numerical guard: it sets the scale of a small activation.
        rectify: NAP of ReLU(A), for signed maps; `h` stays the mean of A.
        return_ratios: also return the ratios max / (mean + eps).
        backend: "triton" or "reference"; None defers to the environment variable OOD_ENGINE_BACKEND, then to the device.

    Returns:
        (h [N, D], nap [N]) or (h, nap, ratios [N, D]); fp64 for fp64 input, else fp32. Higher = more in-distribution.
        A sample with NaN or Inf in its map, or with mean + eps ≤ 0 in any channel, scores NaN.

    Raises:
        ValueError: non-floating-point map, empty axis other than N, unknown backend.
        RuntimeError: the requested backend is unavailable.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> feature_map = torch.tensor([[[[0.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]])
        >>> ok.pool_nap(feature_map, return_ratios=True)
        (tensor([[1., 1.]]), tensor([2.1250]), tensor([[2.0000, 0.5000]]))
    """
    if not return_ratios:

        def written(run: _Run) -> tuple[Tensor, ...]:
            return run(map_of(feature_map), eps, rectify, backend=backend or "")

        h, nap = _call("pool_nap", written, (feature_map,), (eps, rectify, backend))
        return h, nap
    statistics = pool_statistics(feature_map, rectify=rectify, backend=backend)
    nap, ratios = reference.nap_from_statistics(statistics.nap_mean, statistics.maximum, eps)
    return statistics.h, nap, ratios


def masked_energy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_mask: Tensor | None = None,
    neuron_mask: Tensor | None = None,
    *,
    precision: str = "ieee",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy of a linear head, full and with weights and neurons pruned (OPNP, arXiv 2402.10062).

    lse = log Σ_c exp(z_c) with z = h Wᵀ + b; the pruned lse uses W ∘ weight_mask and h ∘ neuron_mask, with the bias kept
    and no rescaling; p = softmax(z) of the full head.

    Args:
        h: [N, D] penultimate features.
        weight: [C, D].
        bias: [C] or None.
        weight_mask: True = keep, as bool [C, D] or packed by `pack_mask`; None keeps all.
        neuron_mask: bool [D], True = keep; None keeps all.
        precision: operand precision of matrix products on a GPU, see `score`.
        backend: "triton" or "reference"; None defers to the environment variable OOD_ENGINE_BACKEND, then to the device.

    Returns:
        (lse [N], pruned lse [N], p [N, C]); fp64 where h or weight is fp64, else fp32. Higher = more in-distribution.
        A sample with NaN or Inf in its features, even in a pruned neuron, is NaN in all three.

    Raises:
        ValueError: incompatible shapes or dtypes, unknown precision or backend.
        RuntimeError: the requested backend is unavailable.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> h, weight = torch.tensor([[1.0, 3.0]]), torch.eye(2)
        >>> ok.masked_energy(h, weight, neuron_mask=torch.tensor([True, False]))
        (tensor([3.1269]), tensor([1.3133]), tensor([[0.1192, 0.8808]]))
    """
    head = Head(weight, bias, weight_mask, neuron_mask)

    def written(run: _Run) -> tuple[Tensor, ...]:
        if h.ndim != 2 or not h.is_floating_point():
            raise unfit("h", "floating point features [N, D]", h)
        check_head(h.shape[1], *head)
        check_devices("h", h, head._asdict())
        check_precision(precision)
        detached = None if bias is None else bias.detach()
        return run(
            h.detach(), weight.detach(), detached, weight_mask, neuron_mask, precision=precision, backend=backend or ""
        )

    lse, pruned_lse, p = _call("masked_energy", written, (h,), (precision, backend), head)
    return lse, pruned_lse, p


def project_gradients(
    p: Tensor,
    h: Tensor,
    basis: BasisTensors | HasBasisTensors,
    *,
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """Coordinates of the last-layer gradient in a low-dimensional subspace (arXiv 2310.17163), in closed form.

    The gradient of a scalar of the logits with respect to weight and bias is G = a ⊗ h̃ with h̃ = [h; 1]; a = p for the
    energy. The result is the centred coordinates ⟨G - Ḡ, V_k⟩; for a PCA basis they equal, up to sign, those of PCA on the
    materialised gradients.

    Args:
        p: [N, C] softmax of the full head.
        h: [N, D] penultimate features.
        basis: a fitted basis of `ood_engine.subspace`, or one of the tuples in `bases`.
        precision: operand precision of matrix products on a GPU, see `score`.
        backend: "triton" or "reference"; None defers to the environment variable OOD_ENGINE_BACKEND, then to the device.

    Returns:
        g_low [N, K]; fp64 where p, h or a tensor of the basis is fp64, else fp32. A sample with NaN or Inf in p or h has no
        finite coordinate.

    Raises:
        ValueError: shapes or dtypes incompatible with the basis or within it, unknown cotangent, precision or backend.
        RuntimeError: the requested backend is unavailable.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> p, h = torch.tensor([[0.25, 0.75]]), torch.tensor([[1.0, 3.0]])
        >>> basis = ok.ExplicitTensors(torch.ones(1, 2, 3), constants=torch.tensor([0.5]))
        >>> ok.project_gradients(p, h, basis)  # (0.25 + 0.75) · (1 + 3 + 1) - 0.5
        tensor([[4.5000]])
    """
    tensors = basis_tensors(basis)

    def written(run: _Run) -> tuple[Tensor, ...]:
        classes, width = tensors.check()
        check_precision(precision)
        if p.ndim != 2 or p.shape[1] != classes or not p.is_floating_point():
            raise unfit("p", f"softmax [N, {classes}]", p)
        if h.shape != (p.shape[0], width) or not h.is_floating_point():
            raise unfit("h", f"features [{p.shape[0]}, {width}]", h)
        check_devices("p", p, {"h": h}, tensors._asdict())
        return (run(p.detach(), h.detach(), *_arguments(tensors), precision=precision, backend=backend or ""),)

    return _call("project_gradients", written, (p, h), (precision, backend), basis=tensors)[0]


def score(
    feature_map: Tensor,
    head: Head,
    basis: BasisTensors | HasBasisTensors | None = None,
    eps: float = 1.0,
    *,
    rectify: bool = False,
    precision: str = "ieee",
    backend: str | None = None,
) -> ScoreOutputs:
    """NAP, energy, pruned energy and gradient coordinates of a batch, from its feature map alone.

    Args:
        feature_map: [N, D, H, W] before global pooling, or tokens [N, T, D]; the head must act on the mean over H·W (T).
        head: Head(weight [C, D], bias, weight_mask, neuron_mask).
        basis: gradient subspace, see `project_gradients`; None leaves g_low empty.
        eps: NAP's eps, see `pool_nap`.
        rectify: NAP of ReLU(feature_map), see `pool_nap`.
        precision: operand precision of matrix products on a GPU, with accumulation in fp32: "ieee" keeps fp32; "tf32x3"
            splits each operand into two tf32 parts, for about fp32 accuracy on tensor cores; "tf32", "bf16" and "fp16"
            round. Plain torch always multiplies in the result's dtype.
        backend: "triton" or "reference"; None defers to the environment variable OOD_ENGINE_BACKEND, then to the device.

    Returns:
        ScoreOutputs(h, nap, lse, pruned_lse, p, g_low).

    Raises:
        ValueError: incompatible shapes or dtypes, unknown cotangent, precision or backend.
        RuntimeError: the requested backend is unavailable.

    Example:
        >>> import torch
        >>> import ood_kernels as ok
        >>> outputs = ok.score(torch.ones(1, 2, 7, 7), ok.Head(torch.eye(2)))
        >>> outputs.nap, outputs.lse  # (1 / (1 + eps))² and log(2e)
        (tensor([0.2500]), tensor([1.6931]))
    """
    tensors = None if basis is None else basis_tensors(basis)

    def written(run: _Run) -> tuple[Tensor, ...]:
        activations = map_of(feature_map)
        width = activations.shape[1]
        check_head(width, *head)
        check_precision(precision)
        if tensors is not None and tensors.check() != (head.weight.shape[0], width):
            raise unfit("head.weight", f"the basis's [C, D] = {list(tensors.check())}", head.weight)
        check_devices("feature_map", activations, head._asdict(), {} if tensors is None else tensors._asdict())
        bias = None if head.bias is None else head.bias.detach()
        return run(
            activations,
            eps,
            rectify,
            head.weight.detach(),
            bias,
            head.weight_mask,
            head.neuron_mask,
            *_arguments(tensors),
            precision=precision,
            backend=backend or "",
        )

    options = (eps, rectify, precision, backend)
    return ScoreOutputs(*_call("score", written, (feature_map,), options, head, tensors))


def _call(
    name: str,
    written: Callable[[_Run], tuple[Tensor, ...]],
    moving: tuple[Tensor, ...],
    options: tuple[Any, ...],
    head: Head | None = None,
    basis: BasisTensors | None = None,
) -> Sequence[Tensor]:
    """The outputs of an operator: on a GPU by the plan of an earlier call, see `plans`, otherwise as written."""
    if not is_eager_on_gpu(moving[0]):
        return written(getattr(ops, name))
    # Imported here, where there is a GPU, as the kernels are.
    from .plans import planned

    kept = [] if head is None else [*head]
    if basis is not None:
        kept += basis.parts()
        options += (basis.kind, basis.cotangent, basis.bias)
    present = [tensor for tensor in kept if tensor is not None]
    pattern = [tensor is None for tensor in kept]
    return planned(lambda: written(ops.DIRECT[name]), moving, present, (name, *pattern, *options, default_backend()))


def _arguments(tensors: BasisTensors | None) -> tuple[list[Tensor | None], str, str, bool]:
    """The operators' basis arguments: parts, kind, cotangent and bias."""
    if tensors is None:
        return [], "", "energy", True
    reference.check_cotangent(tensors.cotangent)
    parts = [None if part is None else part.detach() for part in tensors.parts()]
    return parts, tensors.kind, tensors.cotangent, tensors.bias
