"""Single pass for small heads: one launch, in which each program computes all outputs of a few samples.

A program runs in sequence the programs that the three-launch variant distributes over the GPU, with its SAMPLES as the batch, and
reads back its own stores. A barrier between steps suffices, since all threads of a program share one L1 cache. Tiles of matrix
products have more rows than samples, as tensor cores require; the rest is padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import combine_program
from .device import greatest, maximum
from .dual_kernels import dual_program
from .masked_energy import head_program
from .project_explicit import explicit_program
from .project_factored import factored_program, product_program
from .softmax import finalise_program

__all__ = ["small_dual_kernel", "small_explicit_kernel", "small_factored_kernel", "small_kernel"]


@triton.jit
def pool_samples(
    feature_map_ptr, h_ptr, nap_ptr, samples, channels, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
    RECTIFY: tl.constexpr, FLAT: tl.constexpr, SAMPLES: tl.constexpr, POOL_D: tl.constexpr, POOL_S: tl.constexpr,
):  # fmt: skip
    """Write h and NAP, POOL_D channels at a time; each element of the map is read once, in stride order."""
    rows = tl.arange(0, SAMPLES)
    row_ptrs = feature_map_ptr + rows.to(tl.int64)[:, None, None] * stride_n
    is_sample = rows < samples
    squares = tl.zeros((SAMPLES,), tl.float32)
    sums = tl.zeros((SAMPLES, POOL_D), tl.float32)
    positive = tl.zeros((SAMPLES, POOL_D), tl.float32)
    maxima = tl.full((SAMPLES, POOL_D), float("-inf"), tl.float32)
    chunks = tl.cdiv(spatial, POOL_S)
    # One loop over channels and positions, so that the next channels load while these are reduced.
    for step in range(0, tl.cdiv(channels, POOL_D) * chunks):
        channel = step // chunks * POOL_D + tl.arange(0, POOL_D)
        position = step % chunks * POOL_S + tl.arange(0, POOL_S)
        is_channel, inside = channel < channels, (position < spatial)[None, None, :]
        if FLAT:
            along = position.to(tl.int64) * stride_w
        else:
            along = (position // width).to(tl.int64) * stride_h + (position % width).to(tl.int64) * stride_w
        offsets = channel.to(tl.int64)[None, :, None] * stride_d + along[None, None, :]
        known = is_sample[:, None, None] & is_channel[None, :, None] & inside
        values = tl.load(row_ptrs + offsets, mask=known, other=0.0).to(tl.float32)
        sums += tl.sum(values, 2)
        if RECTIFY:
            positive += tl.sum(maximum(values, 0.0), 2)
        maxima = maximum(maxima, greatest(tl.where(inside, values, float("-inf")), 2))
        if step % chunks == chunks - 1:
            # Correctly rounded: where mean + eps is 0, an approximate quotient would leave a residue.
            h = tl.div_rn(sums, tl.cast(spatial, tl.float32))
            # Rectifying would hide -Inf; adding 0 · h turns it into NaN.
            mean = tl.div_rn(positive, tl.cast(spatial, tl.float32)) + 0.0 * h if RECTIFY else h
            peak = maximum(maxima, 0.0) if RECTIFY else maxima
            is_known = is_sample[:, None] & is_channel[None, :]
            tl.store(h_ptr + rows[:, None] * channels + channel[None, :], h, mask=is_known)
            ratio = tl.where(mean + eps > 0.0, peak / (mean + eps), float("nan"))
            squares += tl.sum(tl.where(is_known, ratio * ratio, 0.0), 1)
            sums = tl.zeros((SAMPLES, POOL_D), tl.float32)
            positive = tl.zeros((SAMPLES, POOL_D), tl.float32)
            maxima = tl.full((SAMPLES, POOL_D), float("-inf"), tl.float32)
    tl.store(nap_ptr + rows, squares / channels, mask=is_sample)


@triton.jit
def pool_and_head(
    feature_map_ptr, h_ptr, nap_ptr,
    weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits_ptr, partials_ptr, argmaxima_ptr,
    samples, classes, channels, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
    weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
    RECTIFY: tl.constexpr, FLAT: tl.constexpr, HEAD_BIAS: tl.constexpr, WEIGHT_MASK: tl.constexpr, NEURON_MASK: tl.constexpr,
    HEAD_UNIT: tl.constexpr, PRECISION: tl.constexpr, SAMPLES: tl.constexpr, POOL_D: tl.constexpr, POOL_S: tl.constexpr,
    HEAD_N: tl.constexpr, HEAD_C: tl.constexpr, HEAD_D: tl.constexpr,
):  # fmt: skip
    """Write h, NAP, the logits and their partials."""
    pool_samples(
        feature_map_ptr, h_ptr, nap_ptr, samples, channels, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
        RECTIFY, FLAT, SAMPLES, POOL_D, POOL_S,
    )  # fmt: skip
    tl.debug_barrier()
    for class_tile in range(class_tiles):
        head_program(
            0, class_tile,
            h_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits_ptr, partials_ptr, argmaxima_ptr,
            samples, classes, channels, class_tiles,
            channels, 1, weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
            HEAD_BIAS, WEIGHT_MASK, NEURON_MASK, True, HEAD_UNIT, PRECISION, HEAD_N, HEAD_C, HEAD_D,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def finalise_tiles(
    p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, samples, classes, class_tiles,
    SOFTMAX_UNIT: tl.constexpr, SAMPLES: tl.constexpr, FINAL_C: tl.constexpr,
):  # fmt: skip
    """Write both energies, and the softmax in place of the logits, which must no longer be needed."""
    for class_tile in range(tl.cdiv(classes, FINAL_C)):
        finalise_program(
            0, class_tile, p_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, samples, classes, class_tiles,
            True, SOFTMAX_UNIT, SAMPLES, FINAL_C,
        )  # fmt: skip


@triton.jit
def combine_tiles(
    partial_ptr, constants_ptr, output_ptr, samples, components, splits,
    OUTPUT_UNIT: tl.constexpr, SAMPLES: tl.constexpr, COMBINE_K: tl.constexpr,
):  # fmt: skip
    """Reduce the partial coordinates."""
    tl.debug_barrier()
    for component_tile in range(tl.cdiv(components, COMBINE_K)):
        combine_program(
            tl.cast(0, tl.int32), component_tile, partial_ptr, constants_ptr, output_ptr, samples, components, splits,
            OUTPUT_UNIT, SAMPLES, COMBINE_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def small_kernel(
    feature_map_ptr, h_ptr, nap_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, p_ptr, partials_ptr, argmaxima_ptr,
    lse_ptr, pruned_lse_ptr,
    samples, classes, channels, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
    weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
    RECTIFY: tl.constexpr, FLAT: tl.constexpr, HEAD_BIAS: tl.constexpr, WEIGHT_MASK: tl.constexpr, NEURON_MASK: tl.constexpr,
    HEAD_UNIT: tl.constexpr, SOFTMAX_UNIT: tl.constexpr, PRECISION: tl.constexpr, SAMPLES: tl.constexpr,
    POOL_D: tl.constexpr, POOL_S: tl.constexpr, HEAD_N: tl.constexpr, HEAD_C: tl.constexpr, HEAD_D: tl.constexpr,
    FINAL_C: tl.constexpr,
):  # fmt: skip
    """All outputs without a basis."""
    first = tl.program_id(0).to(tl.int64) * SAMPLES
    count = tl.minimum(samples - first, SAMPLES).to(tl.int32)
    h, logits = h_ptr + first * channels, p_ptr + first * classes
    partials, argmaxima = partials_ptr + first * class_tiles * 4, argmaxima_ptr + first * class_tiles
    pool_and_head(
        feature_map_ptr + first * stride_n, h, nap_ptr + first,
        weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits, partials, argmaxima,
        count, classes, channels, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
        weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
        RECTIFY, FLAT, HEAD_BIAS, WEIGHT_MASK, NEURON_MASK, HEAD_UNIT, PRECISION, SAMPLES, POOL_D, POOL_S, HEAD_N, HEAD_C, HEAD_D,
    )  # fmt: skip
    finalise_tiles(
        logits,
        partials,
        lse_ptr + first,
        pruned_lse_ptr + first,
        count,
        classes,
        class_tiles,
        SOFTMAX_UNIT,
        SAMPLES,
        FINAL_C,
    )


@triton.jit(do_not_specialize=["samples"])
def small_dual_kernel(
    feature_map_ptr, h_ptr, nap_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, p_ptr, partials_ptr, argmaxima_ptr,
    lse_ptr, pruned_lse_ptr,
    shift_ptr, anchor_cotangents_ptr, anchor_features_ptr, coefficients_ptr, linear_ptr, partial_ptr, constants_ptr, output_ptr,
    samples, classes, channels, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
    weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
    anchors, components, programs,
    cotangent_row, cotangent_column, feature_row, feature_column, coefficient_row, coefficient_column,
    RECTIFY: tl.constexpr, FLAT: tl.constexpr, HEAD_BIAS: tl.constexpr, WEIGHT_MASK: tl.constexpr, NEURON_MASK: tl.constexpr,
    HEAD_UNIT: tl.constexpr, SOFTMAX_UNIT: tl.constexpr, PRECISION: tl.constexpr, SAMPLES: tl.constexpr,
    POOL_D: tl.constexpr, POOL_S: tl.constexpr, HEAD_N: tl.constexpr, HEAD_C: tl.constexpr, HEAD_D: tl.constexpr,
    FINAL_C: tl.constexpr,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, LINEAR: tl.constexpr, KIND: tl.constexpr,
    A_UNIT: tl.constexpr, H_UNIT: tl.constexpr, COTANGENT_UNIT: tl.constexpr, FEATURE_UNIT: tl.constexpr,
    COEFFICIENT_UNIT: tl.constexpr, LINEAR_UNIT: tl.constexpr, OUTPUT_UNIT: tl.constexpr,
    BLOCKS: tl.constexpr, CLASS_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, COMBINE_K: tl.constexpr,
):  # fmt: skip
    """All outputs with a dual basis; `programs` are its splits."""
    first = tl.program_id(0).to(tl.int64) * SAMPLES
    count = tl.minimum(samples - first, SAMPLES).to(tl.int32)
    h, logits = h_ptr + first * channels, p_ptr + first * classes
    partials, argmaxima = partials_ptr + first * class_tiles * 4, argmaxima_ptr + first * class_tiles
    pool_and_head(
        feature_map_ptr + first * stride_n, h, nap_ptr + first,
        weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits, partials, argmaxima,
        count, classes, channels, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
        weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
        RECTIFY, FLAT, HEAD_BIAS, WEIGHT_MASK, NEURON_MASK, HEAD_UNIT, PRECISION, SAMPLES, POOL_D, POOL_S, HEAD_N, HEAD_C, HEAD_D,
    )  # fmt: skip
    partial = partial_ptr + first * programs * components
    for split in range(programs):
        dual_program(
            0, split,
            logits, partials, argmaxima, h, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr, coefficients_ptr,
            linear_ptr, partial,
            count, anchors, classes, channels, components, class_tiles,
            cotangent_row, cotangent_column, feature_row, feature_column, coefficient_row, coefficient_column,
            BIAS, SHIFT, LINEAR, KIND, PRECISION,
            A_UNIT, H_UNIT, COTANGENT_UNIT, FEATURE_UNIT, COEFFICIENT_UNIT, LINEAR_UNIT,
            BLOCKS, CLASS_BLOCKS, BLOCK_N, BLOCK_A, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    combine_tiles(
        partial,
        constants_ptr,
        output_ptr + first * components,
        count,
        components,
        programs,
        OUTPUT_UNIT,
        SAMPLES,
        COMBINE_K,
    )
    finalise_tiles(
        logits,
        partials,
        lse_ptr + first,
        pruned_lse_ptr + first,
        count,
        classes,
        class_tiles,
        SOFTMAX_UNIT,
        SAMPLES,
        FINAL_C,
    )


@triton.jit(do_not_specialize=["samples"])
def small_explicit_kernel(
    feature_map_ptr, h_ptr, nap_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, p_ptr, partials_ptr, argmaxima_ptr,
    lse_ptr, pruned_lse_ptr,
    components_ptr, partial_ptr, constants_ptr, output_ptr,
    samples, classes, features, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
    weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
    component_count, class_step, feature_step, component_tiles, programs, stride_component, stride_class, stride_feature,
    RECTIFY: tl.constexpr, FLAT: tl.constexpr, HEAD_BIAS: tl.constexpr, WEIGHT_MASK: tl.constexpr, NEURON_MASK: tl.constexpr,
    HEAD_UNIT: tl.constexpr, SOFTMAX_UNIT: tl.constexpr, PRECISION: tl.constexpr, SAMPLES: tl.constexpr,
    POOL_D: tl.constexpr, POOL_S: tl.constexpr, HEAD_N: tl.constexpr, HEAD_C: tl.constexpr, HEAD_D: tl.constexpr,
    FINAL_C: tl.constexpr,
    KIND: tl.constexpr, BIAS: tl.constexpr, H_UNIT: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr, OUTPUT_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, COMBINE_K: tl.constexpr,
):  # fmt: skip
    """All outputs with an explicit basis; `programs` are its splits."""
    first = tl.program_id(0).to(tl.int64) * SAMPLES
    count = tl.minimum(samples - first, SAMPLES).to(tl.int32)
    h, logits = h_ptr + first * features, p_ptr + first * classes
    partials, argmaxima = partials_ptr + first * class_tiles * 4, argmaxima_ptr + first * class_tiles
    pool_and_head(
        feature_map_ptr + first * stride_n, h, nap_ptr + first,
        weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits, partials, argmaxima,
        count, classes, features, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
        weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
        RECTIFY, FLAT, HEAD_BIAS, WEIGHT_MASK, NEURON_MASK, HEAD_UNIT, PRECISION, SAMPLES, POOL_D, POOL_S, HEAD_N, HEAD_C, HEAD_D,
    )  # fmt: skip
    partial = partial_ptr + first * programs * component_count
    for tile in range(component_tiles * programs):
        explicit_program(
            0, tile % component_tiles, tile // component_tiles,
            logits, partials, argmaxima, h, components_ptr, partial,
            count, classes, features, component_count, class_tiles, class_step, feature_step,
            stride_component, stride_class, stride_feature,
            KIND, BIAS, PRECISION, H_UNIT, UNIT, FAR, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    combine_tiles(
        partial,
        constants_ptr,
        output_ptr + first * component_count,
        count,
        component_count,
        programs,
        OUTPUT_UNIT,
        SAMPLES,
        COMBINE_K,
    )
    finalise_tiles(
        logits,
        partials,
        lse_ptr + first,
        pruned_lse_ptr + first,
        count,
        classes,
        class_tiles,
        SOFTMAX_UNIT,
        SAMPLES,
        FINAL_C,
    )


@triton.jit(do_not_specialize=["samples"])
def small_factored_kernel(
    feature_map_ptr, h_ptr, nap_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, p_ptr, partials_ptr, argmaxima_ptr,
    lse_ptr, pruned_lse_ptr,
    factors_ptr, reduced_ptr, class_factors_ptr, core_ptr, partial_ptr, constants_ptr, output_ptr,
    samples, classes, channels, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
    weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
    class_rank, feature_rank, component_count, component_tiles, programs,
    factor_row, factor_column, stride_class, stride_class_factor, stride_component, stride_core_row, stride_core_column,
    RECTIFY: tl.constexpr, FLAT: tl.constexpr, HEAD_BIAS: tl.constexpr, WEIGHT_MASK: tl.constexpr, NEURON_MASK: tl.constexpr,
    HEAD_UNIT: tl.constexpr, SOFTMAX_UNIT: tl.constexpr, PRECISION: tl.constexpr, SAMPLES: tl.constexpr,
    POOL_D: tl.constexpr, POOL_S: tl.constexpr, HEAD_N: tl.constexpr, HEAD_C: tl.constexpr, HEAD_D: tl.constexpr,
    FINAL_C: tl.constexpr,
    FACTOR_BIAS: tl.constexpr, H_UNIT: tl.constexpr, FACTOR_UNIT: tl.constexpr, KIND: tl.constexpr,
    A_UNIT: tl.constexpr, CLASS_UNIT: tl.constexpr, S_UNIT: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr,
    OUTPUT_UNIT: tl.constexpr, FACTOR_N: tl.constexpr, FACTOR_Q: tl.constexpr, FACTOR_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    COMBINE_K: tl.constexpr,
):  # fmt: skip
    """All outputs with a factored basis; `programs` are its splits."""
    first = tl.program_id(0).to(tl.int64) * SAMPLES
    count = tl.minimum(samples - first, SAMPLES).to(tl.int32)
    h, logits = h_ptr + first * channels, p_ptr + first * classes
    partials, argmaxima = partials_ptr + first * class_tiles * 4, argmaxima_ptr + first * class_tiles
    pool_and_head(
        feature_map_ptr + first * stride_n, h, nap_ptr + first,
        weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits, partials, argmaxima,
        count, classes, channels, class_tiles, spatial, width, stride_n, stride_d, stride_h, stride_w, eps,
        weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
        RECTIFY, FLAT, HEAD_BIAS, WEIGHT_MASK, NEURON_MASK, HEAD_UNIT, PRECISION, SAMPLES, POOL_D, POOL_S, HEAD_N, HEAD_C, HEAD_D,
    )  # fmt: skip
    partial, reduced = partial_ptr + first * programs * component_count, reduced_ptr + first * feature_rank
    for factor_tile in range(tl.cdiv(feature_rank, FACTOR_Q)):
        product_program(
            0, factor_tile, h, factors_ptr, reduced, count, channels, feature_rank, factor_row, factor_column,
            FACTOR_BIAS, PRECISION, H_UNIT, FACTOR_UNIT, FACTOR_N, FACTOR_Q, FACTOR_D,
        )  # fmt: skip
    tl.debug_barrier()
    for tile in range(component_tiles * programs):
        factored_program(
            0, tile % component_tiles, tile // component_tiles,
            logits, partials, argmaxima, reduced, class_factors_ptr, core_ptr, partial,
            count, classes, class_rank, feature_rank, component_count, class_tiles,
            stride_class, stride_class_factor, stride_component, stride_core_row, stride_core_column,
            KIND, PRECISION, A_UNIT, CLASS_UNIT, S_UNIT, UNIT, FAR, BLOCK_N, BLOCK_K, BLOCK_Q, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    combine_tiles(
        partial,
        constants_ptr,
        output_ptr + first * component_count,
        count,
        component_count,
        programs,
        OUTPUT_UNIT,
        SAMPLES,
        COMBINE_K,
    )
    finalise_tiles(
        logits,
        partials,
        lse_ptr + first,
        pruned_lse_ptr + first,
        count,
        classes,
        class_tiles,
        SOFTMAX_UNIT,
        SAMPLES,
        FINAL_C,
    )
