"""The torch operators `torch.ops.ood_kernels.*`: schema, shape-only twin and default implementation.

The schemas take tensors and numbers alone, so that opcheck, torch.compile and torch.export see through them. The
default implementation is the plain-torch reference; a faster one registers under the same name for its own dispatch
key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .reference import compute_dtype

__all__ = ["masked_energy", "pool_nap", "pool_statistics", "project_dual", "project_explicit"]

# A Library object removes its operators when it is collected, so it lives as long as the module.
_LIBRARY = torch.library.Library("ood_kernels", "DEF")

_LIBRARY.define("pool_nap(Tensor feature_map, float eps, bool rectify) -> (Tensor, Tensor)")
_LIBRARY.define("pool_statistics(Tensor feature_map, bool rectify) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "masked_energy(Tensor h, Tensor weight, Tensor? bias, Tensor? weight_mask, Tensor? neuron_mask)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "project_dual(Tensor a, Tensor h, Tensor anchor_cotangents, Tensor anchor_features, Tensor coefficients,"
    " Tensor constants, bool bias, Tensor? shift=None, Tensor? linear=None) -> Tensor"
)
_LIBRARY.define("project_explicit(Tensor a, Tensor h, Tensor components, Tensor constants, bool bias) -> Tensor")


def _full_precision(feature: Tensor) -> torch.autocast:
    """Autocast would run the matrix products in half precision behind the caller's back."""
    return torch.autocast(feature.device.type, enabled=False)


def _pool_nap(feature_map: Tensor, eps: float, rectify: bool) -> tuple[Tensor, Tensor]:
    with _full_precision(feature_map):
        h, nap = reference.pool_nap(feature_map, eps, rectify=rectify)
    return h, nap


def _pool_statistics(feature_map: Tensor, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
    with _full_precision(feature_map):
        return reference.pool_statistics(feature_map, rectify=rectify)


def _masked_energy(
    h: Tensor, weight: Tensor, bias: Tensor | None, weight_mask: Tensor | None, neuron_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    with _full_precision(h):
        return reference.masked_energy(h, weight, bias, weight_mask, neuron_mask)


def _project_dual(
    a: Tensor,
    h: Tensor,
    anchor_cotangents: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
    constants: Tensor,
    bias: bool,
    shift: Tensor | None = None,
    linear: Tensor | None = None,
) -> Tensor:
    with _full_precision(h):
        return reference.project_dual(
            a, h, anchor_cotangents, anchor_features, coefficients, constants, bias, shift, linear
        )


def _project_explicit(a: Tensor, h: Tensor, components: Tensor, constants: Tensor, bias: bool) -> Tensor:
    with _full_precision(h):
        return reference.project_explicit(a, h, components, constants, bias)


for _name, _implementation in {
    "pool_nap": _pool_nap,
    "pool_statistics": _pool_statistics,
    "masked_energy": _masked_energy,
    "project_dual": _project_dual,
    "project_explicit": _project_explicit,
}.items():
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("ood_kernels::pool_nap", lib=_LIBRARY)
def _(feature_map: Tensor, eps: float, rectify: bool) -> tuple[Tensor, Tensor]:
    samples, channels = feature_map.shape[:2]
    dtype = compute_dtype(feature_map)
    return feature_map.new_empty((samples, channels), dtype=dtype), feature_map.new_empty((samples,), dtype=dtype)


@torch.library.register_fake("ood_kernels::pool_statistics", lib=_LIBRARY)
def _(feature_map: Tensor, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
    h = feature_map.new_empty(feature_map.shape[:2], dtype=compute_dtype(feature_map))
    return h, torch.empty_like(h), torch.empty_like(h)


@torch.library.register_fake("ood_kernels::masked_energy", lib=_LIBRARY)
def _(
    h: Tensor, weight: Tensor, bias: Tensor | None, weight_mask: Tensor | None, neuron_mask: Tensor | None
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
) -> Tensor:
    return h.new_empty((h.shape[0], coefficients.shape[1]), dtype=compute_dtype(a, h, coefficients))


@torch.library.register_fake("ood_kernels::project_explicit", lib=_LIBRARY)
def _(a: Tensor, h: Tensor, components: Tensor, constants: Tensor, bias: bool) -> Tensor:
    return h.new_empty((h.shape[0], components.shape[0]), dtype=compute_dtype(a, h, components))


pool_nap = torch.ops.ood_kernels.pool_nap.default
pool_statistics = torch.ops.ood_kernels.pool_statistics.default
masked_energy = torch.ops.ood_kernels.masked_energy.default
project_dual = torch.ops.ood_kernels.project_dual.default
project_explicit = torch.ops.ood_kernels.project_explicit.default
