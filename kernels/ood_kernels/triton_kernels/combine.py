"""Reduction of the partial results of a projection's splits, in the order of the splits."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .device import multiple
from .launch import cdiv, launch, next_power_of_2

__all__ = ["WORKSPACE_BYTES", "combine", "combine_kernel", "combine_program", "samples_at_once"]

WORKSPACE_BYTES = 32 * 2**20
"""Maximum size of the partial results; a larger batch is processed in chunks."""


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
    # Unrolled so that loads overlap.
    for split in tl.range(0, splits, loop_unroll_factor=8):
        # Bypass L1, which may be stale with respect to other programs' stores.
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
        partial: fp32, contiguous; the first splits · N · K elements are [splits, N, K].
        constants: [K].
        output: fp32 [N, K], contiguous; written.
        splits: number of partial results.
    """
    samples, components = output.shape
    block = min(128, max(16, next_power_of_2(components)))
    launch(
        combine_kernel,
        (cdiv(samples, 1024 // block), cdiv(components, block)),
        wide=components % 4 == 0,
        partial_ptr=partial,
        constants_ptr=constants.contiguous(),
        output_ptr=output,
        samples=samples,
        components=components,
        splits=splits,
        UNIT=math.gcd(components, 16),
        BLOCK_N=1024 // block,
        BLOCK_K=block,
        num_warps=4,
        num_stages=1,
    )


def samples_at_once(samples: int, splits: int, components: int, block: int) -> int:
    """Chunk size: samples whose partial results fit in 32 MiB, a multiple of `block` unless all fit; at least one tile."""
    tiles = max(1, WORKSPACE_BYTES // (4 * splits * components * block))
    return min(samples, tiles * block)
