"""Third launch of the single pass for large heads: projections, the softmax, and reductions of partial results, concurrently.

Reducing programs wait for projecting ones. Every program first draws a ticket from an atomic counter, and the ticket, not the
position in the grid, assigns its work; reductions have the highest tickets. So whatever a program waits for has already started,
and since a started program runs to completion on its multiprocessor, no deadlock is possible, whatever the order in which the
hardware schedules the grid. Tickets determine the assignment of work, never the order of summation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import combine_program
from .dual_kernels import dual_program
from .masked_energy import head_program
from .pool_kernels import row_nap
from .project_explicit import explicit_program
from .project_factored import factored_program, product_program
from .softmax import finalise_program

__all__ = [
    "dual_score_kernel",
    "explicit_score_kernel",
    "factored_score_kernel",
    "finish_kernel",
    "head_product_kernel",
]


@triton.jit
def arrive(counter_ptr, WARPS: tl.constexpr):
    """Release the program's stores and count it at `counter_ptr`, once per 32 of 64 · WARPS threads.

    On NVIDIA, where release is cumulative, the barrier and a release by one thread would order the other warps' stores too. On AMD
    a wave can wait only for its own stores, so every wave releases.
    """
    tl.debug_barrier()
    thread = tl.arange(0, 64 * WARPS)
    tl.atomic_add(counter_ptr + thread * 0, 1, mask=thread % 32 == 0, sem="release")


@triton.jit
def wait_for(counter_ptr, programs, WARPS: tl.constexpr):
    """Wait until `programs` have arrived, and acquire their stores."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < programs * 2 * WARPS:
        pass


@triton.jit
def finish_program(
    program, tickets_ptr,
    logits_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr, partial_ptr, constants_ptr, output_ptr,
    samples, classes, channels, components, class_tiles, square_blocks, component_tiles, programs,
    SOFTMAX_UNIT: tl.constexpr, OUTPUT_UNIT: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FINAL_N: tl.constexpr, FINAL_C: tl.constexpr,
    COMBINE_N: tl.constexpr, COMBINE_K: tl.constexpr,
):  # fmt: skip
    """Write a tile of p, with energies and NAP of its samples; later programs instead wait for and write a tile of g_low.

    There is one counter per (tile of BLOCK_N samples, component tile); `programs` arrive at each, with one partial result each.
    """
    across = tl.cdiv(classes, FINAL_C)
    finals = tl.cdiv(samples, FINAL_N) * across
    if program < finals:
        finalise_samples(
            program // across, program % across,
            logits_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
            samples, classes, channels, class_tiles, square_blocks, SOFTMAX_UNIT, FINAL_N, FINAL_C,
        )  # fmt: skip
    else:
        wide = tl.cdiv(components, COMBINE_K)
        row, column = (program - finals) // wide, (program - finals) % wide
        group = tl.minimum(column * COMBINE_K // BLOCK_K, component_tiles - 1)
        wait_for(tickets_ptr + 1 + row * COMBINE_N // BLOCK_N * component_tiles + group, programs, WARPS)
        combine_program(
            row,
            column,
            partial_ptr,
            constants_ptr,
            output_ptr,
            samples,
            components,
            programs,
            OUTPUT_UNIT,
            COMBINE_N,
            COMBINE_K,
        )


@triton.jit
def finalise_samples(
    sample_tile, class_tile,
    logits_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
    samples, classes, channels, class_tiles, square_blocks,
    SOFTMAX_UNIT: tl.constexpr, FINAL_N: tl.constexpr, FINAL_C: tl.constexpr,
):  # fmt: skip
    """Write one tile of p; the first tile of classes also writes the energies and NAP."""
    finalise_program(
        sample_tile, class_tile, logits_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, samples, classes, class_tiles,
        True, SOFTMAX_UNIT, FINAL_N, FINAL_C,
    )  # fmt: skip
    if class_tile == 0:
        rows = sample_tile * FINAL_N + tl.arange(0, FINAL_N)
        nap = row_nap(partial_squares_ptr, rows, rows < samples, square_blocks, channels)
        tl.store(nap_ptr + rows, nap, mask=rows < samples)


@triton.jit(do_not_specialize=["samples"])
def finish_kernel(
    p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
    samples, classes, channels, class_tiles, square_blocks,
    SOFTMAX_UNIT: tl.constexpr, FINAL_N: tl.constexpr, FINAL_C: tl.constexpr,
):  # fmt: skip
    """Softmax in place of the logits, energies and NAP, without a basis."""
    finalise_samples(
        tl.program_id(0), tl.program_id(1),
        p_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
        samples, classes, channels, class_tiles, square_blocks, SOFTMAX_UNIT, FINAL_N, FINAL_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def dual_score_kernel(
    tickets_ptr, a_ptr, p_ptr, partials_ptr, argmaxima_ptr, h_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
    shift_ptr, anchor_cotangents_ptr, anchor_features_ptr, coefficients_ptr, linear_ptr, partial_ptr, constants_ptr, output_ptr,
    samples, anchors, classes, channels, components, class_tiles, square_blocks, component_tiles, programs,
    cotangent_row, cotangent_column, feature_row, feature_column, coefficient_row, coefficient_column,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, LINEAR: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, H_UNIT: tl.constexpr, COTANGENT_UNIT: tl.constexpr, FEATURE_UNIT: tl.constexpr,
    COEFFICIENT_UNIT: tl.constexpr, LINEAR_UNIT: tl.constexpr, SOFTMAX_UNIT: tl.constexpr, OUTPUT_UNIT: tl.constexpr,
    BLOCKS: tl.constexpr, CLASS_BLOCKS: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    FINAL_N: tl.constexpr, FINAL_C: tl.constexpr, COMBINE_N: tl.constexpr, COMBINE_K: tl.constexpr,
):  # fmt: skip
    """`dual_program` for every (tile of samples, job), then `finish_program`. `a_ptr` holds the logits."""
    number = tl.atomic_add(tickets_ptr, 1, sem="relaxed")
    sample_tiles = tl.cdiv(samples, BLOCK_N)
    if number < sample_tiles * programs:
        sample_tile = number % sample_tiles
        dual_program(
            sample_tile, number // sample_tiles,
            a_ptr, partials_ptr, argmaxima_ptr, h_ptr, shift_ptr, anchor_cotangents_ptr, anchor_features_ptr,
            coefficients_ptr, linear_ptr, partial_ptr,
            samples, anchors, classes, channels, components, class_tiles,
            cotangent_row, cotangent_column, feature_row, feature_column, coefficient_row, coefficient_column,
            BIAS, SHIFT, LINEAR, KIND, PRECISION,
            A_UNIT, H_UNIT, COTANGENT_UNIT, FEATURE_UNIT, COEFFICIENT_UNIT, LINEAR_UNIT,
            BLOCKS, CLASS_BLOCKS, BLOCK_N, BLOCK_A, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        arrive(tickets_ptr + 1 + sample_tile, WARPS)
    else:
        finish_program(
            number - sample_tiles * programs, tickets_ptr,
            a_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
            partial_ptr, constants_ptr, output_ptr,
            samples, classes, channels, components, class_tiles, square_blocks, component_tiles, programs,
            SOFTMAX_UNIT, OUTPUT_UNIT, WARPS, BLOCK_N, BLOCK_K, FINAL_N, FINAL_C, COMBINE_N, COMBINE_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def explicit_score_kernel(
    tickets_ptr, a_ptr, p_ptr, partials_ptr, argmaxima_ptr, h_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
    components_ptr, partial_ptr, constants_ptr, output_ptr,
    samples, classes, features, component_count, class_tiles, class_step, feature_step,
    square_blocks, component_tiles, programs, stride_component, stride_class, stride_feature,
    KIND: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    H_UNIT: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr, SOFTMAX_UNIT: tl.constexpr, OUTPUT_UNIT: tl.constexpr,
    WARPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    FINAL_N: tl.constexpr, FINAL_C: tl.constexpr, COMBINE_N: tl.constexpr, COMBINE_K: tl.constexpr,
):  # fmt: skip
    """`explicit_program` for every (tile of samples, component tile, split), then `finish_program`. `a_ptr` holds the logits."""
    number = tl.atomic_add(tickets_ptr, 1, sem="relaxed")
    sample_tiles = tl.cdiv(samples, BLOCK_N)
    if number < sample_tiles * component_tiles * programs:
        sample_tile = number % sample_tiles
        component_tile = number // sample_tiles % component_tiles
        explicit_program(
            sample_tile, component_tile, number // sample_tiles // component_tiles,
            a_ptr, partials_ptr, argmaxima_ptr, h_ptr, components_ptr, partial_ptr,
            samples, classes, features, component_count, class_tiles, class_step, feature_step,
            stride_component, stride_class, stride_feature,
            KIND, BIAS, PRECISION, H_UNIT, UNIT, FAR, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        arrive(tickets_ptr + 1 + sample_tile * component_tiles + component_tile, WARPS)
    else:
        finish_program(
            number - sample_tiles * component_tiles * programs, tickets_ptr,
            a_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
            partial_ptr, constants_ptr, output_ptr,
            samples, classes, features, component_count, class_tiles, square_blocks, component_tiles, programs,
            SOFTMAX_UNIT, OUTPUT_UNIT, WARPS, BLOCK_N, BLOCK_K, FINAL_N, FINAL_C, COMBINE_N, COMBINE_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def factored_score_kernel(
    tickets_ptr, a_ptr, p_ptr, partials_ptr, argmaxima_ptr, reduced_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
    class_factors_ptr, core_ptr, partial_ptr, constants_ptr, output_ptr,
    samples, classes, channels, class_rank, feature_rank, component_count, class_tiles,
    square_blocks, component_tiles, programs,
    stride_class, stride_class_factor, stride_component, stride_core_row, stride_core_column,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, CLASS_UNIT: tl.constexpr, S_UNIT: tl.constexpr, UNIT: tl.constexpr, FAR: tl.constexpr,
    SOFTMAX_UNIT: tl.constexpr, OUTPUT_UNIT: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    FINAL_N: tl.constexpr, FINAL_C: tl.constexpr, COMBINE_N: tl.constexpr, COMBINE_K: tl.constexpr,
):  # fmt: skip
    """`factored_program` for every (tile of samples, component tile, split), then `finish_program`. `a_ptr` holds the logits."""
    number = tl.atomic_add(tickets_ptr, 1, sem="relaxed")
    sample_tiles = tl.cdiv(samples, BLOCK_N)
    if number < sample_tiles * component_tiles * programs:
        sample_tile = number % sample_tiles
        component_tile = number // sample_tiles % component_tiles
        factored_program(
            sample_tile, component_tile, number // sample_tiles // component_tiles,
            a_ptr, partials_ptr, argmaxima_ptr, reduced_ptr, class_factors_ptr, core_ptr, partial_ptr,
            samples, classes, class_rank, feature_rank, component_count, class_tiles,
            stride_class, stride_class_factor, stride_component, stride_core_row, stride_core_column,
            KIND, PRECISION, A_UNIT, CLASS_UNIT, S_UNIT, UNIT, FAR, BLOCK_N, BLOCK_K, BLOCK_Q, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        arrive(tickets_ptr + 1 + sample_tile * component_tiles + component_tile, WARPS)
    else:
        finish_program(
            number - sample_tiles * component_tiles * programs, tickets_ptr,
            a_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, partial_squares_ptr, nap_ptr,
            partial_ptr, constants_ptr, output_ptr,
            samples, classes, channels, component_count, class_tiles, square_blocks, component_tiles, programs,
            SOFTMAX_UNIT, OUTPUT_UNIT, WARPS, BLOCK_N, BLOCK_K, FINAL_N, FINAL_C, COMBINE_N, COMBINE_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def head_product_kernel(
    h_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits_ptr, partials_ptr, argmaxima_ptr,
    factors_ptr, reduced_ptr,
    samples, classes, channels, tiles, rank,
    h_row, h_column, weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride, factor_row, factor_column,
    BIAS: tl.constexpr, WEIGHT_MASK: tl.constexpr, NEURON_MASK: tl.constexpr, LOGITS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    FACTOR_BIAS: tl.constexpr, H_UNIT: tl.constexpr, FACTOR_UNIT: tl.constexpr,
    FACTOR_N: tl.constexpr, FACTOR_Q: tl.constexpr, FACTOR_D: tl.constexpr,
):  # fmt: skip
    """`head_program` for every tile, then `product_program` for every tile of s [N, Q], from the same h."""
    sample_tiles = tl.cdiv(samples, BLOCK_N)
    program = tl.program_id(0)
    if program < sample_tiles * tiles:
        head_program(
            program % sample_tiles, program // sample_tiles,
            h_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits_ptr, partials_ptr, argmaxima_ptr,
            samples, classes, channels, tiles,
            h_row, h_column, weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
            BIAS, WEIGHT_MASK, NEURON_MASK, LOGITS, UNIT, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    else:
        rest = program - sample_tiles * tiles
        sample_tiles = tl.cdiv(samples, FACTOR_N)
        product_program(
            rest % sample_tiles, rest // sample_tiles,
            h_ptr, factors_ptr, reduced_ptr, samples, channels, rank, factor_row, factor_column,
            FACTOR_BIAS, PRECISION, H_UNIT, FACTOR_UNIT, FACTOR_N, FACTOR_Q, FACTOR_D,
        )  # fmt: skip
