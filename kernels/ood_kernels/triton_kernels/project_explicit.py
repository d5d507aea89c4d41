"""Projection on an explicit basis: coordinates Σ_cd a_c · h̃_d · V_kcd with V streamed once per tile of samples.

For each class c the sum over d is a matrix product of h and V[:, c, :]ᵀ, scaled per sample by a_c. So a stays in fp32, h is read
once for all classes, and V goes unchanged from memory to the tensor cores; an operand a ⊗ h̃ would have to be formed in registers
for every class, and rounded. The bias column of V initialises the sum over d.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bases import ExplicitTensors
from .combine import combine, samples_at_once
from .device import matmul, multiple, rounded
from .launch import cdiv, choose, launch
from .tiles import cotangent_tile, matrix_tile, softmax_rows

__all__ = ["ExplicitPlan", "add_class", "explicit_plan", "explicit_program", "project_explicit"]

_PROGRAMS = 512
_ELEMENTS = 512


@triton.jit
def add_class(
    accumulator, a, h, of_class, component_start, feature_start, component_count, features,
    stride_component, stride_feature,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return accumulator + a · (h Vᵀ) for one class and one tile of features: a [BLOCK_N, 1], h [BLOCK_N, BLOCK_D].

    `of_class` points to the class in the first vector. With BIAS, the first tile of features adds the bias column.
    """
    stride_component = multiple(stride_component, UNIT)
    first = of_class + tl.cast(component_start, tl.int64) * stride_component
    # 32-bit offsets suffice within a tile of all but giant bases, in half the registers.
    OFFSET: tl.constexpr = tl.int64 if FAR else tl.int32
    components = tl.arange(0, BLOCK_K).to(OFFSET)[None, :]
    columns = feature_start + tl.arange(0, BLOCK_D).to(OFFSET)[:, None]
    is_component = components < component_count - component_start
    inside = is_component & (columns < multiple(features, UNIT))
    vectors = tl.load(first + (components * stride_component + columns * stride_feature), mask=inside, other=0.0)
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if BIAS:
        last = first + (components * stride_component + tl.cast(features, OFFSET) * stride_feature)
        product += tl.load(last, mask=is_component & (feature_start == 0), other=0.0).to(tl.float32)
    return accumulator + a * matmul(h, vectors, product, PRECISION)


@triton.jit
def store_partial(
    partial_ptr, value, sample_tile, component_tile, split, samples, component_count,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write a tile [BLOCK_N, BLOCK_K] into `partial` [S, N, K]."""
    rows = sample_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    components = component_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    places = (tl.cast(split, tl.int64) * samples + rows)[:, None] * component_count + components[None, :]
    tl.store(partial_ptr + places, value, mask=(rows < samples)[:, None] & (components < component_count)[None, :])


@triton.jit
def explicit_program(
    sample_tile, component_tile, split,
    a_ptr, partials_ptr, argmaxima_ptr, h_ptr, components_ptr, partial_ptr,
    samples, classes, features, component_count, class_tiles, class_step, feature_step,
    stride_component, stride_class, stride_feature,
    KIND: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    H_UNIT: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one tile of `partial` [S, N, K]: the sum over the `class_step` classes and `feature_step` features of `split`.

    Splits iterate over features first. `a_ptr` holds the contiguous a [N, C] where KIND is "given", otherwise the logits, with the
    partials of `head_program`; h [N, D] is contiguous. `features` is D, excluding the bias column. UNIT divides D and all
    strides of V but the last, H_UNIT divides D.
    """
    row_start, component_start = sample_tile * BLOCK_N, component_tile * BLOCK_K
    rows = row_start + tl.arange(0, BLOCK_N)
    largest, total, predicted = softmax_rows(partials_ptr, argmaxima_ptr, rows, rows < samples, class_tiles, KIND, 8)
    feature_splits = tl.cdiv(features, feature_step)
    first_class = split // feature_splits * class_step
    first_feature = split % feature_splits * feature_step
    accumulator = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for feature in range(first_feature, tl.minimum(first_feature + feature_step, features), BLOCK_D):
        h = matrix_tile(h_ptr, row_start, feature, samples, features, features, 1, H_UNIT, BLOCK_N, BLOCK_D)
        h = rounded(h, PRECISION)
        for one in range(first_class, tl.minimum(first_class + class_step, classes)):
            a = cotangent_tile(
                a_ptr, row_start, one, samples, classes, largest, total, predicted, KIND, 1, BLOCK_N, 1
            ).to(tl.float32)
            accumulator = add_class(
                accumulator, a, h, components_ptr + tl.cast(one, tl.int64) * multiple(stride_class, UNIT),
                component_start, feature, component_count, features, stride_component, stride_feature,
                BIAS, PRECISION, UNIT, FAR, BLOCK_N, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    store_partial(
        partial_ptr, accumulator, sample_tile, component_tile, split, samples, component_count, BLOCK_N, BLOCK_K
    )


@triton.jit(do_not_specialize=["samples"])
def explicit_kernel(
    a_ptr, partials_ptr, argmaxima_ptr, h_ptr, components_ptr, partial_ptr,
    samples, classes, features, component_count, class_tiles, class_step, feature_step,
    stride_component, stride_class, stride_feature,
    KIND: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    H_UNIT: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Run `explicit_program` for every tile and split; sample tiles vary fastest, for reuse of V in L2."""
    explicit_program(
        tl.program_id(0), tl.program_id(1), tl.program_id(2),
        a_ptr, partials_ptr, argmaxima_ptr, h_ptr, components_ptr, partial_ptr,
        samples, classes, features, component_count, class_tiles, class_step, feature_step,
        stride_component, stride_class, stride_feature,
        KIND, BIAS, PRECISION, H_UNIT, UNIT, FAR, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip


class ExplicitPlan(NamedTuple):
    """Split of the sum over classes and features, independent of the number of samples.

    Attributes:
        arguments: of `explicit_kernel` by name, tile included, without per-sample tensors and sizes.
        component_tiles: programs along K.
        splits: partial results S.
        wide: whether every row of V is aligned to 16 bytes.
    """

    arguments: dict[str, Any]
    component_tiles: int
    splits: int
    wide: bool


def explicit_plan(basis: ExplicitTensors, precision: str) -> ExplicitPlan:
    """Tile, splits and arguments for a basis."""
    components = basis.components
    component_count, classes, features = *components.shape[:2], components.shape[2] - basis.bias
    itemsize = components.element_size()
    unit = row_unit(components, features)
    wide = unit * itemsize >= 16
    shape: dict[str, int | str] = {"precision": precision, "rows": "aligned" if wide else "unaligned"}
    shape |= {"itemsize": itemsize, "classes": classes, "features": features, "components": component_count}
    tile = choose("project_explicit", shape, _default_tile(itemsize, precision, wide), components.device)
    component_tiles = cdiv(component_count, tile["BLOCK_K"])
    # Partial results of one tile of samples then take at most 4 MiB, for K up to 16384.
    most = max(1, _PROGRAMS // component_tiles)
    class_step, feature_tiles = splitting(classes, features, tile["BLOCK_D"], most)
    feature_step = feature_tiles * tile["BLOCK_D"]
    splits = cdiv(classes, class_step) * cdiv(features, feature_step)
    arguments = {
        "components_ptr": components,
        "classes": classes,
        "features": features,
        "component_count": component_count,
        "class_step": class_step,
        "feature_step": feature_step,
        "stride_component": components.stride(0),
        "stride_class": components.stride(1),
        "stride_feature": components.stride(2),
        "BIAS": basis.bias,
        "PRECISION": precision,
        "H_UNIT": math.gcd(features, 16),
        "UNIT": unit,
        "FAR": is_far(components, tile["BLOCK_K"]),
    }
    return ExplicitPlan(arguments | tile, component_tiles, splits, wide)


def splitting(classes: int, features: int, block: int, most: int) -> tuple[int, int]:
    """(classes, tiles of `block` features) per split, for at most `most` splits, each worth a partial result.

    Features are split first, so that a program needs one tile of h. From about 512 elements of each component per split, reading
    V takes longer than writing and reading a partial result.
    """
    feature_tiles = cdiv(features, block)
    most = min(most, max(1, classes * features // _ELEMENTS))
    tiles = cdiv(feature_tiles, min(most, feature_tiles))
    class_splits = max(1, most // cdiv(feature_tiles, tiles))
    return cdiv(classes, min(classes, class_splits)), tiles


def row_unit(tensor: Tensor, width: int) -> int:
    """Largest power of two up to 16 that divides the rows' width and offsets."""
    return math.gcd(*tensor.stride()[:-1], width, 16) if tensor.stride(-1) == 1 else 1


def is_far(vectors: Tensor, block: int) -> bool:
    """Whether offsets within `block` vectors of V [K, C, D̃] need 64 bits."""
    return block * vectors.stride(0) + vectors.shape[2] * vectors.stride(2) >= 2**31


def _default_tile(itemsize: int, precision: str, wide: bool) -> dict[str, Any]:
    """Default tile: 64 samples for wgmma on tensor cores, 16 for "ieee" on CUDA cores.

    Registers limit the rest: unaligned rows, such as those of D + 1 columns, take an address per element, so that only one tile of
    V is prefetched; "tf32x3" holds every operand twice.
    """
    return {
        "BLOCK_N": 16 if precision == "ieee" else 64,
        "BLOCK_K": 32,
        "BLOCK_D": (64 if precision == "tf32x3" else 128) // itemsize,
        "num_warps": 4,
        "num_stages": 4 if wide else 2,
    }


def project_explicit(
    a: Tensor,
    h: Tensor,
    basis: ExplicitTensors,
    precision: str = "ieee",
    *,
    kind: str = "given",
    partials: Tensor | None = None,
    argmaxima: Tensor | None = None,
) -> Tensor:
    """Centred coordinates [N, K] in an explicit basis in fp32, see `reference.project_explicit`; inputs in fp32, fp16 or bf16.

    Two launches per chunk of samples, with a workspace of at most 32 MiB.

    Args:
        a: [N, C] cotangents; fp32 logits instead if `kind` names a cotangent, see `reference.cotangent`.
        h: [N, D] penultimate features.
        basis: any strides. Rows of V are read 16 bytes at a time if all are aligned to 16 bytes; with bias, this takes
            padded rows.
        precision: one of `PRECISIONS`, for h and V; a and the bias column are never rounded.
        kind: "given", or the cotangent to form.
        partials: [N, T, 4] of the logits, from `masked_energy.head_partials`; None for "given".
        argmaxima: int32 [N, T], likewise.
    """
    samples, component_count = h.shape[0], basis.n_components
    output = h.new_empty((samples, component_count), dtype=torch.float32)
    if output.numel() == 0:
        return output
    plan = explicit_plan(basis, precision)
    block = plan.arguments["BLOCK_N"]
    at_once = samples_at_once(samples, plan.splits, component_count, block)
    partial = h.new_empty((plan.splits * at_once * component_count,), dtype=torch.float32)
    for start in range(0, samples, at_once):
        rows = slice(start, start + at_once)
        own: dict[str, Any] = {
            "a_ptr": a[rows].contiguous(),
            "h_ptr": h[rows].contiguous(),
            "partials_ptr": a if partials is None else partials[rows],
            "argmaxima_ptr": a if argmaxima is None else argmaxima[rows],
            "partial_ptr": partial,
            "samples": min(at_once, samples - start),
            "class_tiles": 0 if partials is None else partials.shape[1],
            "KIND": kind,
        }
        grid = (cdiv(own["samples"], block), plan.component_tiles, plan.splits)
        launch(explicit_kernel, grid, wide=plan.wide, **plan.arguments, **own)
        combine(partial, basis.constants, output[rows], plan.splits)
    return output
