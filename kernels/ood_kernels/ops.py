"""The torch operators `torch.ops.ood_kernels.*`: schema, shape-only twin and implementations.

The schemas take tensors, numbers and words alone, so that opcheck, torch.compile and torch.export see through them.
torch's dispatcher chooses: Triton kernels for tensors on a GPU, plain torch (the reference, with a faster pooling on
the CPU) for all others; `backend` overrides it, see `backend.kernels`. fp64 is always computed by plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backend as backends
from . import reference
from .cpu import pooling
from .reference import compute_dtype

__all__ = [
    "masked_energy",
    "pool_nap",
    "pool_statistics",
    "project_dual",
    "project_explicit",
    "project_factored",
    "score",
]

# A Library object removes its operators when it is collected, so it lives as long as the module.
_LIBRARY = torch.library.Library("ood_kernels", "DEF")


def _plain_pool_statistics(feature_map: Tensor, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
    pool = pooling.pool_statistics if feature_map.device.type == "cpu" else reference.pool_statistics
    return pool(feature_map, rectify=rectify)


def _plain_pool_nap(feature_map: Tensor, eps: float, rectify: bool) -> tuple[Tensor, Tensor]:
    h, nap_mean, maximum = _plain_pool_statistics(feature_map, rectify)
    return h, reference.nap_from_statistics(nap_mean, maximum, eps)[0]


def _plain_project(kind: str, a: Tensor, h: Tensor, basis: Sequence[Tensor | None], bias: bool) -> Tensor:
    """The projection of that kind; `basis` holds the tensors of `types` in their order, shift and linear last."""
    project: Any = getattr(reference, f"project_{kind}")
    if kind == "dual":
        return project(a, h, *basis[:4], bias, *basis[4:])
    return project(a, h, *basis, bias)


def _plain_score(
    feature_map: Tensor,
    eps: float,
    rectify: bool,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    basis: Sequence[Tensor | None],
    kind: str,
    cotangent: str,
    basis_bias: bool,
) -> tuple[Tensor, ...]:
    h, nap = _plain_pool_nap(feature_map, eps, rectify)
    lse, pruned_lse, p = reference.masked_energy(h, weight, bias, weight_mask, neuron_mask)
    if not kind:
        return h, nap, lse, pruned_lse, p, h.new_empty((h.shape[0], 0))
    a = reference.cotangent(p, cotangent)
    return h, nap, lse, pruned_lse, p, _plain_project(kind, a, h, basis, basis_bias)


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    nested = [part if isinstance(part, (list, tuple)) else [part] for part in arguments]
    return [part for parts in nested for part in parts if isinstance(part, Tensor)]


def _define(name: str, schema: str, plain: Callable[..., Any], family: str) -> None:
    """Define an operator: plain torch everywhere, a Triton kernel family where the dispatcher finds tensors on a GPU."""
    _LIBRARY.define(schema)

    def run(*arguments: Any, backend: str = "", on_gpu: bool = False, **options: Any) -> Any:
        tensors = _tensors(arguments)
        module = backends.kernels(family, tensors[0], backend, preferred=on_gpu)
        if module is not None and all(tensor.dtype != torch.float64 for tensor in tensors):
            return getattr(module, name)(*arguments, **options)
        # Autocast would run the matrix products in half precision behind the caller's back.
        with torch.autocast(tensors[0].device.type, enabled=False):
            result = plain(*arguments)
        return tuple(result) if isinstance(result, tuple) else result

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    # ROCm's tensors carry this key as well.
    _LIBRARY.impl(name, partial(run, on_gpu=True), "CUDA")


_define(
    "pool_nap",
    "pool_nap(Tensor feature_map, float eps, bool rectify, *, str backend='') -> (Tensor, Tensor)",
    _plain_pool_nap,
    "pool_nap",
)
_define(
    "pool_statistics",
    "pool_statistics(Tensor feature_map, bool rectify, *, str backend='') -> (Tensor, Tensor, Tensor)",
    _plain_pool_statistics,
    "pool_nap",
)
_define(
    "masked_energy",
    "masked_energy(Tensor h, Tensor weight, Tensor? bias, Tensor? weight_mask, Tensor? neuron_mask, *,"
    " str precision='ieee', str backend='') -> (Tensor, Tensor, Tensor)",
    reference.masked_energy,
    "masked_energy",
)
_define(
    "project_dual",
    "project_dual(Tensor a, Tensor h, Tensor anchor_cotangents, Tensor anchor_features, Tensor coefficients,"
    " Tensor constants, bool bias, Tensor? shift=None, Tensor? linear=None, *, str precision='ieee', str backend='')"
    " -> Tensor",
    reference.project_dual,
    "project_dual",
)
_define(
    "project_explicit",
    "project_explicit(Tensor a, Tensor h, Tensor components, Tensor constants, bool bias, *, str precision='ieee',"
    " str backend='') -> Tensor",
    reference.project_explicit,
    "project_explicit",
)
_define(
    "project_factored",
    "project_factored(Tensor a, Tensor h, Tensor class_factors, Tensor feature_factors, Tensor core, Tensor constants,"
    " bool bias, *, str precision='ieee', str backend='') -> Tensor",
    reference.project_factored,
    "project_factored",
)
_define(
    "score",
    "score(Tensor feature_map, float eps, bool rectify, Tensor weight, Tensor? bias, Tensor? weight_mask,"
    " Tensor? neuron_mask, Tensor?[] basis, str kind, str cotangent, bool basis_bias, *, str precision='ieee',"
    " str backend='') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _plain_score,
    "score",
)


@torch.library.register_fake("ood_kernels::pool_nap", lib=_LIBRARY)
def _(feature_map: Tensor, eps: float, rectify: bool, **_: str) -> tuple[Tensor, Tensor]:
    samples, channels = feature_map.shape[:2]
    dtype = compute_dtype(feature_map)
    return feature_map.new_empty((samples, channels), dtype=dtype), feature_map.new_empty((samples,), dtype=dtype)


@torch.library.register_fake("ood_kernels::pool_statistics", lib=_LIBRARY)
def _(feature_map: Tensor, rectify: bool, **_: str) -> tuple[Tensor, Tensor, Tensor]:
    h = feature_map.new_empty(feature_map.shape[:2], dtype=compute_dtype(feature_map))
    return h, torch.empty_like(h), torch.empty_like(h)


@torch.library.register_fake("ood_kernels::masked_energy", lib=_LIBRARY)
def _(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    **_: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = h.new_empty((h.shape[0],), dtype=compute_dtype(h, weight))
    return lse, torch.empty_like(lse), lse.new_empty((h.shape[0], weight.shape[0]))


@torch.library.register_fake("ood_kernels::project_dual", lib=_LIBRARY)
def _(
    a: Tensor,
    h: Tensor,
    anchor_cotangents: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
    constants: Tensor,
    bias: bool,
    shift: Tensor | None = None,
    linear: Tensor | None = None,
    **_: str,
) -> Tensor:
    return h.new_empty((h.shape[0], coefficients.shape[1]), dtype=compute_dtype(a, h, coefficients))


@torch.library.register_fake("ood_kernels::project_explicit", lib=_LIBRARY)
def _(a: Tensor, h: Tensor, components: Tensor, constants: Tensor, bias: bool, **_: str) -> Tensor:
    return h.new_empty((h.shape[0], components.shape[0]), dtype=compute_dtype(a, h, components))


@torch.library.register_fake("ood_kernels::project_factored", lib=_LIBRARY)
def _(
    a: Tensor,
    h: Tensor,
    class_factors: Tensor,
    feature_factors: Tensor,
    core: Tensor,
    constants: Tensor,
    bias: bool,
    **_: str,
) -> Tensor:
    return h.new_empty((h.shape[0], core.shape[0]), dtype=compute_dtype(a, h, core))


@torch.library.register_fake("ood_kernels::score", lib=_LIBRARY)
def _(
    feature_map: Tensor,
    eps: float,
    rectify: bool,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    basis: Sequence[Tensor | None],
    kind: str,
    cotangent: str,
    basis_bias: bool,
    **_: str,
) -> tuple[Tensor, ...]:
    samples, channels = feature_map.shape[:2]
    h = feature_map.new_empty((samples, channels), dtype=compute_dtype(feature_map))
    nap = h.new_empty((samples,))
    lse = h.new_empty((samples,), dtype=compute_dtype(feature_map, weight))
    p = lse.new_empty((samples, weight.shape[0]))
    # In `types`: the components come first in an explicit basis, third in the others, which index K by their second axis (dual)
    # or first (factored).
    axis = {"dual": (2, 1), "explicit": (0, 0), "factored": (2, 0)}
    if not kind:
        g_low = h.new_empty((samples, 0))
    else:
        part, dimension = axis[kind]
        components = basis[part]
        assert components is not None
        g_low = h.new_empty((samples, components.shape[dimension]), dtype=compute_dtype(p, h, components))
    return h, nap, lse, torch.empty_like(lse), p, g_low


pool_nap = torch.ops.ood_kernels.pool_nap.default
pool_statistics = torch.ops.ood_kernels.pool_statistics.default
masked_energy = torch.ops.ood_kernels.masked_energy.default
project_dual = torch.ops.ood_kernels.project_dual.default
project_explicit = torch.ops.ood_kernels.project_explicit.default
project_factored = torch.ops.ood_kernels.project_factored.default
score = torch.ops.ood_kernels.score.default
