"""The torch operators `torch.ops.ood_kernels.*`: schemas, fake implementations and real ones.

The schemas take only tensors, numbers and strings, for opcheck, torch.compile and torch.export. torch's dispatcher selects
Triton kernels for GPU tensors and plain torch (the reference, with faster pooling on the CPU) otherwise; `backend` overrides
it, see `backend.kernels`. fp64 always runs in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backend as backends
from . import reference
from .bases import BASES
from .cpu import pooling
from .types import BasisTensors, compute_dtype

__all__ = [
    "DIRECT",
    "masked_energy",
    "pool_nap",
    "pool_statistics",
    "project_gradients",
    "score",
]

DIRECT: dict[str, Callable[..., Any]] = {}
"""What every operator runs for GPU tensors, without torch's dispatcher."""

# Garbage collection of a Library removes its operators, so the module keeps it alive.
_LIBRARY = torch.library.Library("ood_kernels", "DEF")


def _plain_pool_statistics(feature_map: Tensor, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
    pool = pooling.pool_statistics if feature_map.device.type == "cpu" else reference.pool_statistics
    return pool(feature_map, rectify=rectify)


def _plain_pool_nap(feature_map: Tensor, eps: float, rectify: bool) -> tuple[Tensor, Tensor]:
    h, nap_mean, maximum = _plain_pool_statistics(feature_map, rectify)
    return h, reference.nap_from_statistics(nap_mean, maximum, eps)[0]


def _plain_score(
    feature_map: Tensor,
    eps: float,
    rectify: bool,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    basis: BasisTensors | None,
) -> tuple[Tensor, ...]:
    h, nap = _plain_pool_nap(feature_map, eps, rectify)
    lse, pruned_lse, p = reference.masked_energy(h, weight, bias, weight_mask, neuron_mask)
    g_low = h.new_empty((h.shape[0], 0)) if basis is None else reference.project_gradients(p, h, basis)
    return h, nap, lse, pruned_lse, p, g_low


def _basis(parts: Sequence[Tensor | None], kind: str, cotangent: str, bias: bool) -> BasisTensors | None:
    """The basis in an operator's last four arguments; None for kind ""."""
    return BASES[kind].from_parts(parts, cotangent, bias) if kind else None


def _is_double(arguments: Sequence[Any]) -> bool:
    nested = [part if isinstance(part, (list, tuple)) else [part] for part in arguments]
    return any(isinstance(part, Tensor) and part.dtype == torch.float64 for parts in nested for part in parts)


def _define(schema: str, plain: Callable[..., Any], *, family: str = "", with_basis: bool = False) -> None:
    """Define an operator: plain torch everywhere, a Triton kernel family for GPU tensors.

    Args:
        schema: operator schema; the first argument is a tensor.
        plain: plain-torch implementation; with `with_basis`, it takes the last four arguments as one basis.
        family: kernel module with a function of the operator's name; "" for the module of the same name.
        with_basis: whether the last four arguments describe a basis.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)

    def run(*arguments: Any, backend: str = "", on_gpu: bool = False, **options: Any) -> Any:
        module = backends.kernels(family or name, arguments[0], backend, preferred=on_gpu)
        given = (*arguments[:-4], _basis(*arguments[-4:])) if with_basis else arguments
        if module is not None and not _is_double(arguments):
            return getattr(module, name)(*given, **options)
        device = arguments[0].device.type
        if not torch.is_autocast_enabled(device):
            return plain(*given)
        # Autocast would run the matrix products in half precision behind the caller's back.
        with torch.autocast(device, enabled=False):
            return plain(*given)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    # ROCm tensors carry this key too.
    DIRECT[name] = partial(run, on_gpu=True)
    _LIBRARY.impl(name, DIRECT[name], "CUDA")


_define(
    "pool_nap(Tensor feature_map, float eps, bool rectify, *, str backend='') -> (Tensor, Tensor)",
    _plain_pool_nap,
)
_define(
    "pool_statistics(Tensor feature_map, bool rectify, *, str backend='') -> (Tensor, Tensor, Tensor)",
    _plain_pool_statistics,
    family="pool_nap",
)
_define(
    "masked_energy(Tensor h, Tensor weight, Tensor? bias, Tensor? weight_mask, Tensor? neuron_mask, *,"
    " str precision='ieee', str backend='') -> (Tensor, Tensor, Tensor)",
    reference.masked_energy,
)
_define(
    "project_gradients(Tensor p, Tensor h, Tensor?[] basis, str kind, str cotangent, bool basis_bias, *,"
    " str precision='ieee', str backend='') -> Tensor",
    reference.project_gradients,
    with_basis=True,
)
_define(
    "score(Tensor feature_map, float eps, bool rectify, Tensor weight, Tensor? bias, Tensor? weight_mask,"
    " Tensor? neuron_mask, Tensor?[] basis, str kind, str cotangent, bool basis_bias, *, str precision='ieee',"
    " str backend='') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _plain_score,
    with_basis=True,
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


@torch.library.register_fake("ood_kernels::project_gradients", lib=_LIBRARY)
def _(
    p: Tensor, h: Tensor, basis: Sequence[Tensor | None], kind: str, cotangent: str, basis_bias: bool, **_: str
) -> Tensor:
    return _empty_coordinates(p, h, _basis(basis, kind, cotangent, basis_bias))


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
    g_low = _empty_coordinates(p, h, _basis(basis, kind, cotangent, basis_bias))
    return h, nap, lse, torch.empty_like(lse), p, g_low


def _empty_coordinates(p: Tensor, h: Tensor, basis: BasisTensors | None) -> Tensor:
    if basis is None:
        return h.new_empty((h.shape[0], 0))
    return h.new_empty((h.shape[0], basis.n_components), dtype=compute_dtype(p, h, *basis.parts()))


pool_nap = torch.ops.ood_kernels.pool_nap.default
pool_statistics = torch.ops.ood_kernels.pool_statistics.default
masked_energy = torch.ops.ood_kernels.masked_energy.default
project_gradients = torch.ops.ood_kernels.project_gradients.default
score = torch.ops.ood_kernels.score.default
