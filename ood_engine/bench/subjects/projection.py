"""Coordinates of last-layer gradients in a basis of each form: dual, explicit and factored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import ood_kernels as ok
from ood_kernels.workloads import BasisKind

from ..cases import OURS, Case, Effort, Plan, Provider, providers_of
from ..operands import (
    SAMPLES,
    SYNTHETIC,
    Operands,
    as_vectors,
    batches,
    dtypes,
    precision_of,
    series,
    sizes_of,
    tolerance_of,
)
from ..rivals import AUTOGRAD, LIBRARY, REFERENCE, VMAP, GradientRecipe, compiled

__all__ = ["plans"]

_AXES: dict[BasisKind, str] = {"dual": "NDCnK", "explicit": "NDCK", "factored": "NDCK"}
_Series = tuple[BasisKind, dict[str, int], dict[str, tuple[int, ...]]]
_SERIES: tuple[_Series, ...] = (
    ("dual", {"N": SAMPLES, "D": 256, "C": 1000, "n": 1000, "K": 64}, {"C": (1000, 4000, 16000)}),
    ("dual", {"N": SAMPLES, "D": 2048, "C": 100, "n": 1000, "K": 64}, {"D": (1024, 4096, 16384)}),
    ("dual", {"N": SAMPLES, "D": 64, "C": 10, "n": 2000, "K": 256}, {"K": (250, 1000, 2000)}),
    ("explicit", {"N": SAMPLES, "D": 512, "C": 100, "K": 16}, {"K": (4, 16, 64)}),
    ("factored", {"N": SAMPLES, "D": 512, "C": 100, "K": 256}, {"K": (64, 256, 1024)}),
)
"""Base sizes, and those of the axes that vary: the axis takes most of the work, so that its exponent can be seen."""

_MORE_SERIES: tuple[_Series, ...] = (
    ("explicit", {"N": SAMPLES, "D": 512, "C": 100, "K": 32}, {"C": (25, 100, 400), "D": (128, 512, 2048)}),
    ("factored", {"N": SAMPLES, "D": 64, "C": 1000, "K": 4}, {"C": (2000, 8000, 32000)}),
    ("factored", {"N": SAMPLES, "D": 512, "C": 10, "K": 4}, {"D": (1024, 4096, 16384)}),
)
"""Where there is time."""

_EXPLICIT_COMPONENTS = 16
_LOOP_SAMPLES = 4
_VMAP_SAMPLES = 16
_OUTER_ELEMENTS = 2**24


def plans(effort: Effort) -> Iterator[Plan]:
    """Each form along every size that it has, at the models' sizes, and beside per-sample autograd in one case."""
    plan, device = partial(_plan, effort), effort.device
    dual = sizes_of("R50", _AXES["dual"], SAMPLES, device)
    anchors = dual["n"]
    for sizes, sweeps in series(dual, N=batches(effort), n=(anchors // 2, anchors, 4 * anchors)):
        yield plan("dual", "R50", sizes, sweeps, is_compiled=sizes == dual and not effort.is_quick)
    # As many components as per-sample autograd finds memory for.
    yield plan("dual", "R50", dual | {"K": _EXPLICIT_COMPONENTS}, with_autograd=True)
    kinds: tuple[BasisKind, ...] = ("explicit", "factored")
    for kind in kinds:
        base = sizes_of("R18", _AXES[kind], SAMPLES, device)
        for sizes, sweeps in series(base, N=batches(effort)):
            yield plan(kind, "R18", sizes, sweeps, with_autograd=sizes == base)
    for kind, base, values in _SERIES if effort.is_quick else _SERIES + _MORE_SERIES:
        for sizes, sweeps in series(base, **values):
            yield plan(kind, SYNTHETIC, sizes, sweeps)
    if effort.is_quick:
        return
    yield plan("factored", "R50", sizes_of("R50", _AXES["factored"], SAMPLES, device))
    explicit = sizes_of("R50", _AXES["explicit"], SAMPLES, device)
    yield plan("explicit", "R50", explicit | ({"K": _EXPLICIT_COMPONENTS} if device.type == "cpu" else {}))
    for workload in ("R18", "W21k", "ViT", "MobileNetV2", "tiny"):
        yield plan("dual", workload, sizes_of(workload, _AXES["dual"], SAMPLES, device))


def _plan(
    effort: Effort,
    kind: BasisKind,
    workload: str,
    sizes: Mapping[str, int],
    sweeps: tuple[str, ...] = (),
    *,
    is_compiled: bool = False,
    with_autograd: bool = False,
) -> Plan:
    dtype = dtypes(effort.device)[0]
    build = partial(
        _build,
        kind=kind,
        workload=workload,
        sizes=sizes,
        dtype=dtype,
        device=effort.device,
        is_compiled=is_compiled,
        with_autograd=with_autograd,
    )
    subject = f"project {kind}"
    return Plan(subject, workload, sizes, build, dtype, sweeps=sweeps, cold=effort.device.type == "cuda")


def _build(
    *,
    kind: BasisKind,
    workload: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool,
    with_autograd: bool,
) -> Case:
    operands = Operands(workload, sizes, dtype, device)
    h, p = operands.features, operands.softmax
    basis = operands.basis(kind)
    precision, tolerance = precision_of(dtype), tolerance_of(dtype)
    found, missing = providers_of(
        lambda: Provider(
            OURS,
            lambda: ok.project_gradients(p, h, basis, precision=precision),
            tolerance=tolerance,
            captures=True,
            note=f"R={operands.size.class_rank} Q={operands.size.feature_rank}" if kind == "factored" else None,
        ),
        lambda: Provider(REFERENCE, lambda: ok.reference.project_gradients(p, h, basis)),
        lambda: _library(p, h, basis),
        *([lambda: compiled(ok.reference.project_gradients, p, h, basis)] if is_compiled else []),
    )
    if with_autograd:
        found += _autograd(operands, basis)
    truth = ok.reference.project_gradients(p.double(), h.double(), basis)
    return Case(found, (truth,), operands.size.projection(operands.samples, dtype.itemsize, kind), missing)


def _library(p: Tensor, h: Tensor, basis: ok.BasisTensors) -> Provider:
    """Plain products and what lies between them, in the dtype of the basis."""
    call: Callable[[], Tensor]
    if isinstance(basis, ok.DualTensors):
        call = partial(_dual_products, p, h, basis)
    elif isinstance(basis, ok.FactoredTensors):
        class_factors, feature_factors, core, constants = basis[:4]
        call = partial(_factored_products, p, h, class_factors, feature_factors, core.flatten(1).T, constants)
    else:
        call = partial(_explicit_products, p, h, basis.components.flatten(1).T, basis.constants)
    return Provider(LIBRARY, call, tolerance=tolerance_of(basis[0].dtype), captures=True)


def _dual_products(p: Tensor, h: Tensor, basis: ok.DualTensors) -> Tensor:
    cotangents, features, coefficients, constants = basis[:4]
    dtype = cotangents.dtype
    gram = (p.to(dtype) @ cotangents.T) * (h.to(dtype) @ features.T + 1)
    return (gram @ coefficients).float() - constants


def _explicit_products(p: Tensor, h: Tensor, vectors: Tensor, constants: Tensor) -> Tensor:
    """The gradients of a few samples at a time written out, times the vectors [C·D̃, K]."""
    a, h_tilde = p.to(vectors.dtype), F.pad(h, (0, 1), value=1.0).to(vectors.dtype)
    return _outer_times(a, h_tilde, vectors) - constants


def _factored_products(
    p: Tensor, h: Tensor, class_factors: Tensor, feature_factors: Tensor, core: Tensor, constants: Tensor
) -> Tensor:
    """The same with the reduced gradients, times the core [R·Q, K]."""
    a, h_tilde = p.to(core.dtype), F.pad(h, (0, 1), value=1.0).to(core.dtype)
    return _outer_times(a @ class_factors, h_tilde @ feature_factors, core) - constants


def _outer_times(left: Tensor, right: Tensor, vectors: Tensor) -> Tensor:
    rows = max(1, _OUTER_ELEMENTS // len(vectors))
    parts = [
        (some_left[:, :, None] * some_right[:, None, :]).flatten(1) @ vectors
        for some_left, some_right in zip(left.split(rows), right.split(rows), strict=True)
    ]
    return torch.cat(parts).float()


def _autograd(operands: Operands, basis: ok.BasisTensors) -> list[Provider]:
    """The papers' recipe, for the first samples."""
    h, recipe = operands.features, GradientRecipe(operands.head, as_vectors(basis), basis.constants)
    few, more = h[:_LOOP_SAMPLES], h[:_VMAP_SAMPLES]
    note = "the vectors as fp32, a gradient of all weights a sample"
    return [
        Provider(AUTOGRAD, lambda: recipe.one_by_one(few), samples=len(few), note=note),
        Provider(VMAP, lambda: recipe.by_vmap(more), samples=len(more), note=note),
    ]
