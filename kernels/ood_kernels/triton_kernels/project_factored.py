"""Projection on a factored basis: coordinates tᵀ core_k s with per-sample factors t = U_pᵀ a [R] and s = U_hᵀ h̃ [Q].

s is a separate product, [N, D̃] by [D̃, Q], which `score` runs alongside the head pass. A program of the projection owns a few
class factors: it forms their t on chip, from cotangents or logits, then proceeds as for an explicit basis with V = core. t is never
written; programs of other components recompute it, at far less than the cost of reading the core.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bases import FactoredTensors
from .combine import WORKSPACE_BYTES, combine, samples_at_once
from .device import matmul, multiple, rounded
from .launch import cdiv, choose, launch, next_power_of_2
from .project_explicit import add_class, is_far, row_unit, store_partial
from .tiles import cotangent_tile, matrix_tile, softmax_rows

__all__ = [
    "FactoredPlan",
    "factored_plan",
    "factored_program",
    "product_program",
    "project_factored",
    "reduce_features",
]


@triton.jit
def product_program(
    sample_tile, factor_tile,
    h_ptr, factors_ptr, reduced_ptr, samples, features, rank, stride_row, stride_column,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, H_UNIT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one tile of s [N, Q] = h @ feature_factors, plus the last row (the bias) with BIAS.

    h [N, D] is contiguous; H_UNIT divides D, UNIT divides Q and the row offsets of the factors.
    """
    row_start, factor_start = sample_tile * BLOCK_N, factor_tile * BLOCK_Q
    rows, factors = row_start + tl.arange(0, BLOCK_N), factor_start + tl.arange(0, BLOCK_Q)
    reduced = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    if BIAS:
        reduced += matrix_tile(
            factors_ptr, features, factor_start, features + 1, rank, stride_row, stride_column, UNIT, 1, BLOCK_Q
        ).to(tl.float32)
    for start in range(0, features, BLOCK_D):
        left = matrix_tile(h_ptr, row_start, start, samples, features, features, 1, H_UNIT, BLOCK_N, BLOCK_D)
        right = matrix_tile(
            factors_ptr, start, factor_start, features, rank, stride_row, stride_column, UNIT, BLOCK_D, BLOCK_Q
        )
        reduced = matmul(left, right, reduced, PRECISION)
    places = rows.to(tl.int64)[:, None] * rank + factors[None, :]
    tl.store(reduced_ptr + places, reduced, mask=(rows < samples)[:, None] & (factors < rank)[None, :])


@triton.jit(do_not_specialize=["samples"])
def product_kernel(
    h_ptr, factors_ptr, reduced_ptr, samples, features, rank, stride_row, stride_column,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, H_UNIT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Run `product_program` for every tile."""
    product_program(
        tl.program_id(0), tl.program_id(1),
        h_ptr, factors_ptr, reduced_ptr, samples, features, rank, stride_row, stride_column,
        BIAS, PRECISION, H_UNIT, UNIT, BLOCK_N, BLOCK_Q, BLOCK_D,
    )  # fmt: skip


@triton.jit
def factored_program(
    sample_tile, component_tile, split,
    a_ptr, partials_ptr, argmaxima_ptr, reduced_ptr, class_factors_ptr, core_ptr, partial_ptr,
    samples, classes, class_rank, feature_rank, component_count, class_tiles,
    stride_class, stride_class_factor, stride_component, stride_core_row, stride_core_column,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, CLASS_UNIT: tl.constexpr, S_UNIT: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write one tile of `partial` [S, N, K]: the sum over the BLOCK_R class factors of `split`.

    `a_ptr` holds the contiguous a [N, C] where KIND is "given", otherwise the logits, with the partials of `head_program`;
    `reduced_ptr` holds s [N, Q]. The units divide C, R, Q, Q and the row offsets of a, class_factors, s and core.
    """
    row_start, component_start = sample_tile * BLOCK_N, component_tile * BLOCK_K
    rows = row_start + tl.arange(0, BLOCK_N)
    largest, total, predicted = softmax_rows(partials_ptr, argmaxima_ptr, rows, rows < samples, class_tiles, KIND, 8)
    # An enclosing loop over both fails to compile for sm_100 in Triton 3.9.
    # 64 bits: the LLVM of Triton 3.6 may pack a 32-bit product with another and let them overflow, see `aot.compiled.miscompiled`.
    factor = tl.cast(split, tl.int64) * BLOCK_R
    t = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, classes, BLOCK_C):
        left = cotangent_tile(
            a_ptr, row_start, start, samples, classes, largest, total, predicted, KIND, A_UNIT, BLOCK_N, BLOCK_C
        )
        right = matrix_tile(
            class_factors_ptr, start, factor, classes, class_rank, stride_class, stride_class_factor,
            CLASS_UNIT, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        t = matmul(left, right, t, PRECISION)
    accumulator = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, feature_rank, BLOCK_Q):
        s = matrix_tile(reduced_ptr, row_start, start, samples, feature_rank, feature_rank, 1, S_UNIT, BLOCK_N, BLOCK_Q)
        s = rounded(s, PRECISION)
        for one in range(tl.minimum(BLOCK_R, class_rank - factor).to(tl.int32)):
            column = tl.sum(tl.where(tl.arange(0, BLOCK_R)[None, :] == one, t, 0.0), 1)
            accumulator = add_class(
                accumulator, column[:, None], s,
                core_ptr + (factor + one) * multiple(stride_core_row, UNIT),
                component_start, start, component_count, feature_rank, stride_component, stride_core_column,
                False, PRECISION, UNIT, FAR, BLOCK_N, BLOCK_K, BLOCK_Q,
            )  # fmt: skip
    store_partial(
        partial_ptr, accumulator, sample_tile, component_tile, split, samples, component_count, BLOCK_N, BLOCK_K
    )


@triton.jit(do_not_specialize=["samples"])
def factored_kernel(
    a_ptr, partials_ptr, argmaxima_ptr, reduced_ptr, class_factors_ptr, core_ptr, partial_ptr,
    samples, classes, class_rank, feature_rank, component_count, class_tiles,
    stride_class, stride_class_factor, stride_component, stride_core_row, stride_core_column,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, CLASS_UNIT: tl.constexpr, S_UNIT: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Run `factored_program` for every tile and split; sample tiles vary fastest, for reuse of the core in L2."""
    factored_program(
        tl.program_id(0), tl.program_id(1), tl.program_id(2),
        a_ptr, partials_ptr, argmaxima_ptr, reduced_ptr, class_factors_ptr, core_ptr, partial_ptr,
        samples, classes, class_rank, feature_rank, component_count, class_tiles,
        stride_class, stride_class_factor, stride_component, stride_core_row, stride_core_column,
        KIND, PRECISION, A_UNIT, CLASS_UNIT, S_UNIT, UNIT, FAR, BLOCK_N, BLOCK_K, BLOCK_Q, BLOCK_R, BLOCK_C,
    )  # fmt: skip


class FactoredPlan(NamedTuple):
    """Split of both launches, independent of the number of samples.

    Attributes:
        product: arguments of `product_kernel` by name, tile included, without per-sample tensors and sizes.
        projection: likewise for `factored_kernel`.
        factor_tiles: programs of the product along Q.
        component_tiles: programs of the projection along K.
        splits: partial results S.
        wide: whether every row of the factors and the core is aligned to 16 bytes.
    """

    product: dict[str, Any]
    projection: dict[str, Any]
    factor_tiles: int
    component_tiles: int
    splits: int
    wide: bool


def factored_plan(basis: FactoredTensors, precision: str) -> FactoredPlan:
    """Tiles, splits and arguments for a basis."""
    class_factors, feature_factors, core = basis.class_factors, basis.feature_factors, basis.core
    component_count, class_rank, feature_rank = core.shape
    classes, features = class_factors.shape[0], feature_factors.shape[0] - basis.bias
    itemsize = core.element_size()
    shape: dict[str, int | str] = {"precision": precision, "itemsize": itemsize, "classes": classes}
    shape |= {"components": component_count, "class_rank": class_rank, "feature_rank": feature_rank}
    tile = choose("project_factored", shape, _default_tile(itemsize, precision), core.device)
    # More class factors per split only if the partial results of one tile of samples would exceed the workspace.
    most = max(1, WORKSPACE_BYTES // (4 * tile["BLOCK_N"] * component_count))
    tile["BLOCK_R"] = max(tile["BLOCK_R"], min(64, next_power_of_2(cdiv(class_rank, most))))
    widths = ((class_factors, class_rank), (feature_factors, feature_rank), (core, feature_rank))
    units = [row_unit(part, width) for part, width in widths]
    common = {name: tile.pop(name) for name in ("BLOCK_N", "num_warps", "num_stages")} | {"PRECISION": precision}
    product = {
        "factors_ptr": feature_factors,
        "features": features,
        "rank": feature_rank,
        "stride_row": feature_factors.stride(0),
        "stride_column": feature_factors.stride(1),
        "BIAS": basis.bias,
        "H_UNIT": math.gcd(features, 16),
        "UNIT": units[1],
        "BLOCK_Q": 16,
        "BLOCK_D": tile.pop("BLOCK_D"),
    }
    projection = {
        "class_factors_ptr": class_factors,
        "core_ptr": core,
        "classes": classes,
        "class_rank": class_rank,
        "feature_rank": feature_rank,
        "component_count": component_count,
        "stride_class": class_factors.stride(0),
        "stride_class_factor": class_factors.stride(1),
        "stride_component": core.stride(0),
        "stride_core_row": core.stride(1),
        "stride_core_column": core.stride(2),
        "A_UNIT": math.gcd(classes, 16),
        "CLASS_UNIT": units[0],
        "S_UNIT": math.gcd(feature_rank, 16),
        "UNIT": units[2],
        "FAR": is_far(core, tile["BLOCK_K"]),
    }
    return FactoredPlan(
        product | common,
        projection | common | tile,
        cdiv(feature_rank, product["BLOCK_Q"]),
        cdiv(component_count, tile["BLOCK_K"]),
        cdiv(class_rank, tile["BLOCK_R"]),
        all(unit * part.element_size() >= 16 for unit, (part, _) in zip(units, widths, strict=True)),
    )


def _default_tile(itemsize: int, precision: str) -> dict[str, Any]:
    """As for an explicit basis, with 16 class factors per program: the minimum for a matrix product."""
    return {
        "BLOCK_N": 16 if precision == "ieee" else 64,
        "BLOCK_K": 32,
        "BLOCK_Q": (64 if precision == "tf32x3" else 128) // itemsize,
        "BLOCK_R": 16,
        "BLOCK_C": 32,
        "BLOCK_D": 64,
        "num_warps": 4,
        "num_stages": 3,
    }


def reduce_features(h: Tensor, plan: FactoredPlan) -> Tensor:
    """First launch: s [N, Q] in fp32."""
    samples = h.shape[0]
    reduced = h.new_empty((samples, plan.product["rank"]), dtype=torch.float32)
    grid = (cdiv(samples, plan.product["BLOCK_N"]), plan.factor_tiles)
    launch(
        product_kernel, grid, wide=plan.wide, h_ptr=h.contiguous(), reduced_ptr=reduced, samples=samples, **plan.product
    )
    return reduced


def project_factored(
    a: Tensor,
    h: Tensor,
    basis: FactoredTensors,
    precision: str = "ieee",
    *,
    kind: str = "given",
    partials: Tensor | None = None,
    argmaxima: Tensor | None = None,
) -> Tensor:
    """Centred coordinates [N, K] in a factored basis in fp32, see `reference.project_factored`; inputs in fp32, fp16 or bf16.

    Three launches per chunk of samples, with a workspace of at most 32 MiB.

    Args:
        a: [N, C] cotangents; fp32 logits instead if `kind` names a cotangent, see `reference.cotangent`.
        h: [N, D] penultimate features.
        basis: any strides; contiguous rows of a multiple of 16 bytes are fast.
        precision: one of `PRECISIONS`, for the operands of each product: a, U_p, h, U_h, s and core; t and the bias row are
            never rounded. fp16 loses cotangents below 6e-8, and features must be within its range.
        kind: "given", or the cotangent to form.
        partials: [N, T, 4] of the logits, from `masked_energy.head_partials`; None for "given".
        argmaxima: int32 [N, T], likewise.
    """
    samples, component_count = h.shape[0], basis.n_components
    output = h.new_empty((samples, component_count), dtype=torch.float32)
    if output.numel() == 0:
        return output
    plan = factored_plan(basis, precision)
    block = plan.projection["BLOCK_N"]
    at_once = samples_at_once(samples, 1, plan.splits * component_count + plan.product["rank"], block)
    partial = h.new_empty((plan.splits * at_once * component_count,), dtype=torch.float32)
    for start in range(0, samples, at_once):
        rows = slice(start, start + at_once)
        own: dict[str, Any] = {
            "a_ptr": a[rows].contiguous(),
            "partials_ptr": a if partials is None else partials[rows],
            "argmaxima_ptr": a if argmaxima is None else argmaxima[rows],
            "reduced_ptr": reduce_features(h[rows], plan),
            "partial_ptr": partial,
            "samples": min(at_once, samples - start),
            "class_tiles": 0 if partials is None else partials.shape[1],
            "KIND": kind,
        }
        grid = (cdiv(own["samples"], block), plan.component_tiles, plan.splits)
        launch(factored_kernel, grid, wide=plan.wide, **plan.projection, **own)
        combine(partial, basis.constants, output[rows], plan.splits)
    return output
