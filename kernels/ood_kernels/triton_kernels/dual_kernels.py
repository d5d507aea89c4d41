"""Kernels of the dual projection, see `project_dual`."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import matmul, multiple, rounded
from .tiles import cotangent_tile, matrix_tile, softmax_rows

__all__ = ["dual_kernel", "dual_program", "gram_kernel", "product_kernel"]


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
            # Rounding after the subtraction is the point of the shift.
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
    """Return accumulator + gram @ coefficients; in fp16, rows are scaled by a power of two against overflow of Gram entries."""
    if PRECISION == "fp16":
        magnitude = tl.abs(gram)
        largest = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), 1)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, 0.5**60)[:, None]
        # Dividing the accumulator too is exact and saves a second one.
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
    """Return accumulator + A @ linear over the CLASS_BLOCKS blocks of classes assigned to a block of anchors.

    With a shift, linear holds the dominant common part of the coordinates: rounded like the other operands, it would dominate the
    error. Each operand is therefore split into two bf16 numbers, with fp32's range and 16 bits of mantissa.
    """
    # As in the loop around: shared memory is for the products over C and D.
    for step in tl.range(CLASS_BLOCKS, num_stages=2):
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
    """Write one partial result, [rows of sample_tile, all components], into `partial` [splits, N, K].

    A split is BLOCKS blocks of BLOCK_A anchors. `a_ptr` holds the cotangents [N, C] where KIND is "given", otherwise the logits,
    with the partials of `head_program`. These, h [N, D], shift and linear are contiguous.
    """
    row_start = sample_tile * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    valid = rows < samples
    largest, total, predicted = softmax_rows(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, KIND, 16)
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
        # Two stages leave shared memory to the loops above, which dominate the time.
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
            # The next block may read other threads' stores.
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
    """Run `dual_program` for every tile of samples and split; sample tiles vary fastest, for reuse of anchors in L2."""
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
    largest, total, predicted = softmax_rows(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, KIND, 16)
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
        largest, total, predicted = softmax_rows(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, KIND, 16)
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
