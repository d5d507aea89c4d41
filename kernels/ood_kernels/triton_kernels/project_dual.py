"""Projection on a dual basis: g = ((A Aₐᵀ) ∘ ((H - μ) Hₐᵀ)) · coefficients + A · linear - constants, the Gram tile on chip.

A program forms the Gram tile of one tile of samples and a block of anchors, and multiplies it with all components before it
forms the next: were the components shared out among programs, each would repeat the products over C and D, which are most
of the work. The price is one partial result for every split of the anchors, read back once by `combine_program`, which adds
them in the order of the anchors. "stored" is the other way: the Gram matrix goes to memory and an ordinary product reads it.
A · linear is a product of the same kind, a Gram column a class, so the classes are shared out among the blocks of anchors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import cotangent, matmul, multiple, rounded
from .launch import choose, launch
from .softmax import row_argmax, row_softmax

__all__ = [
    "DualPlan",
    "combine",
    "combine_kernel",
    "combine_program",
    "dual_plan",
    "dual_program",
    "project_dual",
    "samples_at_once",
]

_WORKSPACE_BYTES = 32 * 2**20


@triton.jit
def softmax_rows(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, KIND: tl.constexpr):
    """Return (largest logit, Σ exp(z - largest), predicted class) of each row; without use where the cotangents are given."""
    largest = tl.zeros(rows.shape, tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    predicted = tl.zeros(rows.shape, tl.int32)
    # 16 tiles at a time: wider reads would take the registers that a projection needs.
    if KIND != "given":
        largest, total = row_softmax(partials_ptr, rows, valid, class_tiles, 0, 16)
        if KIND == "predicted" or KIND == "max_logit":
            predicted = row_argmax(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, 16)
    return largest, total, predicted


@triton.jit
def matrix_tile(
    pointer, row_start, column_start, height, width, row_stride, column_stride,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return a tile [ROWS, COLUMNS] of a matrix [height, width], 0 beyond it; UNIT divides its width and the stride of rows."""
    row_stride = multiple(row_stride, UNIT)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # Only where the tile starts needs 64 bits: offsets inside it of 32 bits leave registers for the accumulators.
    first = pointer + tl.cast(row_start, tl.int64) * row_stride + tl.cast(column_start, tl.int64) * column_stride
    inside = (row_start + rows < height)[:, None] & (column_start + columns < multiple(width, UNIT))[None, :]
    return tl.load(first + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def cotangent_tile(
    a_ptr, row_start, class_start, samples, classes, largest, total, predicted,
    KIND: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a tile of the cotangents at `a_ptr`, or of those formed from the logits there; 0 beyond the classes."""
    values = matrix_tile(a_ptr, row_start, class_start, samples, classes, classes, 1, UNIT, BLOCK_N, BLOCK_R)
    if KIND == "given":
        return values
    else:
        here = (class_start + tl.arange(0, BLOCK_R))[None, :]
        p = tl.exp(values.to(tl.float32) - largest[:, None]) / total[:, None]
        return tl.where(here < classes, cotangent(p, here, predicted[:, None], classes, KIND), 0.0)


@triton.jit
def gram_tile(
    a_ptr, h_ptr, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr,
    row_start, anchor_start, largest, total, predicted,
    samples, anchors, classes, channels, cotangent_row, cotangent_column, feature_row, feature_column,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, H_UNIT: tl.constexpr, COTANGENT_UNIT: tl.constexpr, FEATURE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return (A Aₐᵀ) ∘ ((H - shift) Hₐᵀ + bias) [BLOCK_N, BLOCK_A] in fp32."""
    cotangent_products = tl.zeros((BLOCK_N, BLOCK_A), tl.float32)
    for start in range(0, classes, BLOCK_R):
        left = cotangent_tile(
            a_ptr, row_start, start, samples, classes, largest, total, predicted, KIND, A_UNIT, BLOCK_N, BLOCK_R
        )
        right = matrix_tile(
            anchor_cotangents_ptr, anchor_start, start, anchors, classes, cotangent_row, cotangent_column,
            COTANGENT_UNIT, BLOCK_A, BLOCK_R,
        )  # fmt: skip
        cotangent_products = matmul(left, tl.trans(right), cotangent_products, PRECISION)
    feature_products = tl.zeros((BLOCK_N, BLOCK_A), tl.float32)
    for start in range(0, channels, BLOCK_R):
        left = matrix_tile(h_ptr, row_start, start, samples, channels, channels, 1, H_UNIT, BLOCK_N, BLOCK_R)
        if SHIFT:
            # Rounding after the difference is what the shift is for.
            here = start + tl.arange(0, BLOCK_R)
            shift = tl.load(shift_ptr + here, mask=here < channels, other=0.0).to(tl.float32)
            left = left.to(tl.float32) - shift[None, :]
        right = matrix_tile(
            anchor_features_ptr, anchor_start, start, anchors, channels, feature_row, feature_column,
            FEATURE_UNIT, BLOCK_A, BLOCK_R,
        )  # fmt: skip
        feature_products = matmul(left, tl.trans(right), feature_products, PRECISION)
    if BIAS and not SHIFT:
        feature_products += 1.0
    return cotangent_products * feature_products


@triton.jit
def add_weighted(gram, coefficients, accumulator, PRECISION: tl.constexpr):
    """Return accumulator + gram @ coefficients; in fp16, whose range a Gram entry can leave, each row scaled by a power of two."""
    if PRECISION == "fp16":
        magnitude = tl.abs(gram)
        largest = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), 1)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, 0.5**60)[:, None]
        # Dividing the sum by it as well is exact, and spares a second accumulator.
        return matmul(gram / power, coefficients, accumulator / power, PRECISION) * power
    else:
        return matmul(gram, coefficients, accumulator, PRECISION)


@triton.jit
def add_linear(
    a_ptr, linear_ptr, accumulator, row_start, component_start, block, largest, total, predicted,
    samples, classes, components,
    KIND: tl.constexpr, PRECISION: tl.constexpr, A_UNIT: tl.constexpr, LINEAR_UNIT: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return accumulator + A @ linear over the CLASS_BLOCKS blocks of classes that belong to a block of anchors.

    With a shift, linear holds what all entries share, which is most of them: rounded to the type of the other products it would
    be the largest error of all. So each operand is two bf16 numbers, whose range is that of fp32, for 16 bits of mantissa.
    """
    for step in range(CLASS_BLOCKS):
        start = (block * CLASS_BLOCKS + step) * BLOCK_R
        left = cotangent_tile(
            a_ptr, row_start, start, samples, classes, largest, total, predicted, KIND, A_UNIT, BLOCK_N, BLOCK_R
        ).to(tl.float32)
        right = matrix_tile(
            linear_ptr, start, component_start, classes, components, components, 1, LINEAR_UNIT, BLOCK_R, BLOCK_K
        ).to(tl.float32)
        if PRECISION == "ieee" or PRECISION == "tf32x3":
            accumulator = matmul(left, right, accumulator, PRECISION)
        else:
            high_left, high_right = rounded(left, "bf16"), rounded(right, "bf16")
            accumulator = matmul(left - high_left.to(tl.float32), high_right, accumulator, "bf16")
            accumulator = matmul(high_left, right - high_right.to(tl.float32), accumulator, "bf16")
            accumulator = matmul(high_left, high_right, accumulator, "bf16")
    return accumulator


@triton.jit
def dual_program(
    sample_tile, split,
    a_ptr, partials_ptr, argmaxima_ptr, h_ptr, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr, coefficients_ptr,
    linear_ptr, partial_ptr,
    samples, anchors, classes, channels, components, class_tiles,
    cotangent_row, cotangent_column, feature_row, feature_column, coefficient_row, coefficient_column,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, LINEAR: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, H_UNIT: tl.constexpr, COTANGENT_UNIT: tl.constexpr, FEATURE_UNIT: tl.constexpr,
    COEFFICIENT_UNIT: tl.constexpr, LINEAR_UNIT: tl.constexpr, BLOCKS: tl.constexpr, CLASS_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one partial result, [rows of sample_tile, all components], at its place in `partial` [splits, N, K].

    A split is BLOCKS blocks of BLOCK_A anchors. The cotangents [N, C] are at `a_ptr` where KIND is "given", else the logits are
    there, with what `head_program` leaves of them. These, h [N, D], shift and linear are contiguous.
    """
    row_start = sample_tile * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    valid = rows < samples
    largest, total, predicted = softmax_rows(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, KIND)
    width = multiple(components, LINEAR_UNIT)
    outputs = partial_ptr + (tl.cast(split, tl.int64) * samples + row_start) * width
    outputs += (tl.arange(0, BLOCK_N) * width)[:, None]
    for step in range(BLOCKS):
        block = split * BLOCKS + step
        gram = gram_tile(
            a_ptr, h_ptr, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr,
            row_start, block * BLOCK_A, largest, total, predicted,
            samples, anchors, classes, channels, cotangent_row, cotangent_column, feature_row, feature_column,
            BIAS, SHIFT, KIND, PRECISION, A_UNIT, H_UNIT, COTANGENT_UNIT, FEATURE_UNIT, BLOCK_N, BLOCK_A, BLOCK_R,
        )  # fmt: skip
        # Two stages leave shared memory to the loops above, where the time goes.
        for start in tl.range(0, components, BLOCK_K, num_stages=2):
            here = start + tl.arange(0, BLOCK_K)[None, :]
            inside = valid[:, None] & (here < width)
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            if BLOCKS > 1:
                product = tl.load(outputs + here, mask=inside & (step > 0), other=0.0)
            if LINEAR:
                product = add_linear(
                    a_ptr, linear_ptr, product, row_start, start, block, largest, total, predicted,
                    samples, classes, components,
                    KIND, PRECISION, A_UNIT, LINEAR_UNIT, CLASS_BLOCKS, BLOCK_N, BLOCK_R, BLOCK_K,
                )  # fmt: skip
            coefficients = matrix_tile(
                coefficients_ptr, block * BLOCK_A, start, anchors, components, coefficient_row, coefficient_column,
                COEFFICIENT_UNIT, BLOCK_A, BLOCK_K,
            )  # fmt: skip
            product = add_weighted(gram, coefficients, product, PRECISION)
            tl.store(outputs + here, product, mask=inside)
        if BLOCKS > 1:
            # The next block may read from another thread what this one wrote.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["samples"])
def dual_kernel(
    a_ptr, partials_ptr, argmaxima_ptr, h_ptr, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr, coefficients_ptr,
    linear_ptr, partial_ptr,
    samples, anchors, classes, channels, components, class_tiles,
    cotangent_row, cotangent_column, feature_row, feature_column, coefficient_row, coefficient_column,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, LINEAR: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, H_UNIT: tl.constexpr, COTANGENT_UNIT: tl.constexpr, FEATURE_UNIT: tl.constexpr,
    COEFFICIENT_UNIT: tl.constexpr, LINEAR_UNIT: tl.constexpr, BLOCKS: tl.constexpr, CLASS_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Run `dual_program` for every tile of samples, those of one block of anchors side by side so that they share it in L2."""
    dual_program(
        tl.program_id(0), tl.program_id(1),
        a_ptr, partials_ptr, argmaxima_ptr, h_ptr, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr, coefficients_ptr,
        linear_ptr, partial_ptr,
        samples, anchors, classes, channels, components, class_tiles,
        cotangent_row, cotangent_column, feature_row, feature_column, coefficient_row, coefficient_column,
        BIAS, SHIFT, LINEAR, KIND, PRECISION,
        A_UNIT, H_UNIT, COTANGENT_UNIT, FEATURE_UNIT, COEFFICIENT_UNIT, LINEAR_UNIT,
        BLOCKS, CLASS_BLOCKS, BLOCK_N, BLOCK_A, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def gram_kernel(
    a_ptr, partials_ptr, argmaxima_ptr, h_ptr, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr, gram_ptr,
    samples, anchors, classes, channels, class_tiles, cotangent_row, cotangent_column, feature_row, feature_column,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, H_UNIT: tl.constexpr, COTANGENT_UNIT: tl.constexpr, FEATURE_UNIT: tl.constexpr,
    GRAM_UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write one tile of the Gram matrix [N, n], rounded to the type of `gram_ptr`."""
    row_start, anchor_start = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_A
    rows = row_start + tl.arange(0, BLOCK_N)
    valid = rows < samples
    largest, total, predicted = softmax_rows(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, KIND)
    gram = gram_tile(
        a_ptr, h_ptr, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr,
        row_start, anchor_start, largest, total, predicted,
        samples, anchors, classes, channels, cotangent_row, cotangent_column, feature_row, feature_column,
        BIAS, SHIFT, KIND, PRECISION, A_UNIT, H_UNIT, COTANGENT_UNIT, FEATURE_UNIT, BLOCK_N, BLOCK_A, BLOCK_R,
    )  # fmt: skip
    if PRECISION == "bf16":
        gram = rounded(gram, PRECISION)
    here = anchor_start + tl.arange(0, BLOCK_A)[None, :]
    width = multiple(anchors, GRAM_UNIT)
    tl.store(gram_ptr + rows.to(tl.int64)[:, None] * width + here, gram, mask=valid[:, None] & (here < width))


@triton.jit(do_not_specialize=["samples"])
def product_kernel(
    gram_ptr, a_ptr, partials_ptr, argmaxima_ptr, coefficients_ptr, linear_ptr, partial_ptr,
    samples, anchors, classes, components, class_tiles, coefficient_row, coefficient_column,
    LINEAR: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, GRAM_UNIT: tl.constexpr, COEFFICIENT_UNIT: tl.constexpr, LINEAR_UNIT: tl.constexpr,
    BLOCKS: tl.constexpr, CLASS_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one tile of partial [splits, N, K] from a stored Gram matrix, over BLOCKS blocks of anchors."""
    row_start, component_start, split = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K, tl.program_id(2)
    rows = row_start + tl.arange(0, BLOCK_N)
    valid = rows < samples
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if LINEAR:
        largest, total, predicted = softmax_rows(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, KIND)
        product = add_linear(
            a_ptr, linear_ptr, product, row_start, component_start, split, largest, total, predicted,
            samples, classes, components,
            KIND, PRECISION, A_UNIT, LINEAR_UNIT, BLOCKS * CLASS_BLOCKS, BLOCK_N, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    for step in tl.range(0, BLOCKS, num_stages=2):
        start = (split * BLOCKS + step) * BLOCK_A
        gram = matrix_tile(gram_ptr, row_start, start, samples, anchors, anchors, 1, GRAM_UNIT, BLOCK_N, BLOCK_A)
        coefficients = matrix_tile(
            coefficients_ptr, start, component_start, anchors, components, coefficient_row, coefficient_column,
            COEFFICIENT_UNIT, BLOCK_A, BLOCK_K,
        )  # fmt: skip
        product = add_weighted(gram.to(tl.float32), coefficients, product, PRECISION)
    here = component_start + tl.arange(0, BLOCK_K)[None, :]
    width = multiple(components, LINEAR_UNIT)
    outputs = partial_ptr + (split.to(tl.int64) * samples + rows)[:, None] * width + here
    tl.store(outputs, product, mask=valid[:, None] & (here < width))


@triton.jit
def combine_program(
    sample_tile, component_tile, partial_ptr, constants_ptr, output_ptr, samples, components, splits,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one tile of g_low [N, K] = Σ_s partial [s, N, K] - constants, added in the order of s; UNIT divides K."""
    rows = sample_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = component_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    width = multiple(components, UNIT)
    inside = (rows < samples)[:, None] & (here < width)[None, :]
    offsets = rows[:, None] * width + here[None, :]
    step = samples.to(tl.int64) * width
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    # Unrolled, or each load would wait for the one before it.
    for split in tl.range(0, splits, loop_unroll_factor=8):
        # Not from the first-level cache, which need not know what other programs have written.
        total += tl.load(partial_ptr + split * step + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    constants = tl.load(constants_ptr + here, mask=here < width, other=0.0).to(tl.float32)
    tl.store(output_ptr + offsets, total - constants[None, :], mask=inside)


@triton.jit(do_not_specialize=["samples"])
def combine_kernel(
    partial_ptr, constants_ptr, output_ptr, samples, components, splits,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Run `combine_program` for every tile."""
    combine_program(
        tl.program_id(0), tl.program_id(1), partial_ptr, constants_ptr, output_ptr, samples, components, splits,
        UNIT, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def combine(partial: Tensor, constants: Tensor, output: Tensor, splits: int) -> None:
    """Add partial results in the order of their splits: output = Σ_s partial[s] - constants.

    Args:
        partial: fp32, contiguous, its first splits · N · K elements are [splits, N, K].
        constants: [K].
        output: fp32 [N, K], contiguous, to be written.
        splits: number of partial results.
    """
    samples, components = output.shape
    block = min(128, max(16, triton.next_power_of_2(components)))
    launch(
        combine_kernel,
        (triton.cdiv(samples, 512 // block), triton.cdiv(components, block)),
        wide=components % 4 == 0,
        partial_ptr=partial,
        constants_ptr=constants.contiguous(),
        output_ptr=output,
        samples=samples,
        components=components,
        splits=splits,
        UNIT=math.gcd(components, 16),
        BLOCK_N=512 // block,
        BLOCK_K=block,
        num_warps=4,
        num_stages=1,
    )


def samples_at_once(samples: int, splits: int, components: int, block: int) -> int:
    """Samples, whole tiles of `block` unless all fit, whose partial results take no more than 32 MiB; at least one tile."""
    tiles = max(1, _WORKSPACE_BYTES // (4 * splits * components * block))
    return min(samples, tiles * block)


class DualPlan(NamedTuple):
    """How the sum over anchors is taken apart; it never depends on the number of samples.

    Attributes:
        arguments: what `dual_kernel` takes by these names, tile included, apart from the samples' own tensors and sizes.
        splits: number of partial results, and of programs for each tile of samples.
        wide: whether every row of the basis is aligned to 16 bytes.
        stored: whether the Gram matrix is to be stored.
    """

    arguments: dict[str, Any]
    splits: int
    wide: bool
    stored: bool


def dual_plan(
    anchor_cotangents: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
    bias: bool,
    shift: Tensor | None,
    linear: Tensor | None,
    precision: str,
) -> DualPlan:
    """The tile, the splits and the arguments for a basis; arguments as for `project_dual`."""
    (anchors, classes), channels, components = anchor_cotangents.shape, anchor_features.shape[1], coefficients.shape[1]
    shape: dict[str, int | str] = {
        "precision": precision,
        "itemsize": anchor_features.element_size(),
        "anchors": anchors,
    }
    shape |= {"classes": classes, "channels": channels, "components": components}
    default = _default_tile(anchors, components, anchor_features.element_size(), precision)
    tile = choose("project_dual", shape, default, anchor_features.device)
    stored = tile.pop("VARIANT") == "stored"
    blocks = triton.cdiv(anchors, tile["BLOCK_A"])
    # More than a block in a split only where the partial results of one tile of samples would not fit the workspace.
    most = max(1, _WORKSPACE_BYTES // (4 * tile["BLOCK_N"] * components))
    tile["BLOCKS"] = max(min(4, blocks) if stored else 1, triton.cdiv(blocks, most))
    tile["CLASS_BLOCKS"] = triton.cdiv(classes, tile["BLOCK_R"] * blocks)
    arguments = {
        "shift_ptr": anchor_features if shift is None else shift.contiguous(),
        "anchor_cotangents_ptr": anchor_cotangents,
        "anchor_features_ptr": anchor_features,
        "coefficients_ptr": coefficients,
        "linear_ptr": coefficients if linear is None else linear.contiguous(),
        "anchors": anchors,
        "classes": classes,
        "channels": channels,
        "components": components,
        "cotangent_row": anchor_cotangents.stride(0),
        "cotangent_column": anchor_cotangents.stride(1),
        "feature_row": anchor_features.stride(0),
        "feature_column": anchor_features.stride(1),
        "coefficient_row": coefficients.stride(0),
        "coefficient_column": coefficients.stride(1),
        "BIAS": bias,
        "SHIFT": shift is not None,
        "LINEAR": linear is not None,
        "PRECISION": precision,
        "A_UNIT": math.gcd(classes, 16),
        "H_UNIT": math.gcd(channels, 16),
        "COTANGENT_UNIT": _unit(anchor_cotangents),
        "FEATURE_UNIT": _unit(anchor_features),
        "COEFFICIENT_UNIT": _unit(coefficients),
        "LINEAR_UNIT": math.gcd(components, 16),
    }
    wide = all(_unit(part) * part.element_size() >= 16 for part in (anchor_cotangents, anchor_features, coefficients))
    return DualPlan(arguments | tile, triton.cdiv(blocks, tile["BLOCKS"]), wide, stored)


def project_dual(
    a: Tensor,
    h: Tensor,
    anchor_cotangents: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
    constants: Tensor,
    bias: bool = True,
    shift: Tensor | None = None,
    linear: Tensor | None = None,
    precision: str = "ieee",
    *,
    kind: str = "given",
    partials: Tensor | None = None,
    argmaxima: Tensor | None = None,
) -> Tensor:
    """Centred coordinates [N, K] in a dual basis in fp32, see `reference.project_dual`; all in fp32, fp16 or bf16.

    Two launches, three where the Gram matrix is stored, or as many of these as keep the workspace under 32 MiB.

    Args:
        a: [N, C], the cotangents; where `kind` names one (see `reference.cotangent`), the logits in fp32 instead.
        h: [N, D] penultimate features.
        anchor_cotangents: [n, C], any strides, as of the next two; contiguous rows are fast.
        anchor_features: [n, D].
        coefficients: [n, K].
        constants: [K].
        bias: whether the gradient of the bias is part of the space.
        shift: [D] or None.
        linear: [C, K] or None.
        precision: one of `launch.PRECISIONS`, to which both operands of each product are rounded, h after `shift` is
            subtracted and the Gram matrix among them; a and `linear` keep 16 bits at least. Where features share a mean,
            the median component of a PCA (n = D = 512, C = 100, K = 64) is then off by 1.5e-3 of its own root mean square
            in bf16 and 1.6e-4 in fp16, with a shift by 1.9e-4 and 1.9e-5; in "ieee" by 8e-8. fp16 needs features, and
            coefficients, within its range.
        kind: "given", or the name of the cotangent to be formed.
        partials: [N, T, 4] of the logits, from `masked_energy.head_partials`, unless a is given.
        argmaxima: int32 [N, T], likewise.
    """
    samples, components = h.shape[0], coefficients.shape[1]
    output = h.new_empty((samples, components), dtype=torch.float32)
    if output.numel() == 0:
        return output
    plan = dual_plan(anchor_cotangents, anchor_features, coefficients, bias, shift, linear, precision)
    a, h = a.contiguous(), h.contiguous()
    width = plan.splits * components + (anchor_cotangents.shape[0] if plan.stored else 0)
    at_once = samples_at_once(samples, 1, width, plan.arguments["BLOCK_N"])
    partial = h.new_empty((plan.splits * at_once * components,), dtype=torch.float32)
    gram_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    gram = h.new_empty((at_once, anchor_cotangents.shape[0]), dtype=gram_dtype) if plan.stored else None
    for start in range(0, samples, at_once):
        rows = slice(start, start + at_once)
        own = {
            "a_ptr": a[rows],
            "h_ptr": h[rows],
            "partials_ptr": a if partials is None else partials[rows],
            "argmaxima_ptr": a if argmaxima is None else argmaxima[rows],
            "samples": min(at_once, samples - start),
            "class_tiles": 0 if partials is None else partials.shape[1],
            "KIND": kind,
        }
        _launch_partial(plan, own | {"partial_ptr": partial}, gram)
        combine(partial, constants, output[rows], plan.splits)
    return output


def _launch_partial(plan: DualPlan, own: dict[str, Any], gram: Tensor | None) -> None:
    arguments = plan.arguments | own
    tiles = triton.cdiv(own["samples"], arguments["BLOCK_N"])
    if gram is None:
        launch(dual_kernel, (tiles, plan.splits), wide=plan.wide, **arguments)
        return
    arguments |= {"gram_ptr": gram, "GRAM_UNIT": math.gcd(arguments["anchors"], 16)}
    blocks = triton.cdiv(arguments["anchors"], arguments["BLOCK_A"])
    component_tiles = triton.cdiv(arguments["components"], arguments["BLOCK_K"])
    for kernel, grid in ((gram_kernel, (tiles, blocks)), (product_kernel, (tiles, component_tiles, plan.splits))):
        taken = {*kernel.arg_names, "num_warps", "num_stages"}
        launch(kernel, grid, wide=plan.wide, **{name: value for name, value in arguments.items() if name in taken})


def _unit(matrix: Tensor) -> int:
    """The power of two, 16 at most, that divides the width of a matrix and where its rows start."""
    return math.gcd(matrix.stride(0), matrix.shape[1], 16) if matrix.stride(1) == 1 else 1


def _default_tile(anchors: int, components: int, itemsize: int, precision: str) -> dict[str, Any]:
    """Enough blocks of anchors to fill a GPU from few samples; N = 256, n = 4096 makes 128 programs, one wave.

    Tensor cores need 64 samples for wgmma; ordinary cores, which "ieee" runs on, do not. A basis in fp32 takes twice the
    registers and shared memory on its way, "tf32x3" twice the registers again, which leaves less for the tile.
    """
    block = 128 if anchors >= 4096 and itemsize == 2 else 64 if anchors >= 512 else 32
    tile: dict[str, Any] = {"VARIANT": "fused", "BLOCK_N": 64, "BLOCK_A": block, "BLOCK_R": 32, "num_warps": 8}
    tile |= {"BLOCK_K": 128, "num_stages": 4} if itemsize == 2 else {"BLOCK_K": 64, "num_stages": 3}
    if precision == "ieee":
        tile |= {
            "BLOCK_N": 16,
            "BLOCK_A": min(block, 64),
            "BLOCK_R": 16,
            "BLOCK_K": 32,
            "num_warps": 4,
            "num_stages": 2,
        }
    elif precision == "tf32x3":
        tile |= {"BLOCK_A": 32, "BLOCK_R": 16, "BLOCK_K": 32, "num_stages": 3}
    tile["BLOCK_K"] = min(tile["BLOCK_K"], max(16, triton.next_power_of_2(components)))
    return tile
