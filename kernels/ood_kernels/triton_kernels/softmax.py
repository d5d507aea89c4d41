"""Energies and softmax from the head pass's partial results, combined in a fixed order.

The partial result of a tile of classes is (max, sum of exp(z - max)); kernels that form the softmax on chip share these
functions.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .device import multiple
from .launch import cdiv, choose, launch, next_power_of_2

__all__ = ["finalise", "finalise_kernel", "finalise_program", "row_argmax", "row_lse", "row_softmax"]


@triton.jit
def row_softmax(partials_ptr, rows, valid, tiles, SLOT: tl.constexpr, WIDTH: tl.constexpr = 64):
    """Return (largest logit, Σ exp(z - largest)) of each row, [BLOCK] fp32; the sum is NaN for a non-finite logsumexp.

    exp(z - largest) / sum is the softmax to full accuracy, unlike exp(z - lse) for large |lse|. SLOT 0 is the full head, 2 the
    pruned one. Tiles are combined in index order, WIDTH at a time.
    """
    largest = tl.full(rows.shape, -float("inf"), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    row_ptrs = partials_ptr + rows.to(tl.int64) * tiles * 4 + SLOT
    for first in range(0, tiles, WIDTH):
        tile = first + tl.arange(0, WIDTH)
        inside = valid[:, None] & (tile < tiles)[None, :]
        ptrs = row_ptrs[:, None] + tile[None, :] * 4
        maxima = tl.load(ptrs, mask=inside, other=-float("inf"))
        sums = tl.load(ptrs + 1, mask=inside, other=0.0)
        higher = tl.maximum(largest, tl.max(maxima, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - anchor) + tl.sum(sums * tl.exp(maxima - anchor[:, None]), 1)
        largest = higher
    return largest, tl.where(tl.abs(largest) < float("inf"), total, float("nan"))


@triton.jit
def row_lse(partials_ptr, rows, valid, tiles, SLOT: tl.constexpr):
    """Return the logsumexp of each row, [BLOCK] fp32, NaN instead of ±Inf; see `row_softmax`."""
    largest, total = row_softmax(partials_ptr, rows, valid, tiles, SLOT)
    return largest + tl.log(total)


@triton.jit
def row_argmax(partials_ptr, argmaxima_ptr, rows, valid, tiles, WIDTH: tl.constexpr = 64):
    """Return the first class with the largest logit of each row, [BLOCK] int32; unspecified for a row with NaN."""
    largest = tl.full(rows.shape, -float("inf"), tl.float32)
    winner = tl.zeros(rows.shape, tl.int32)
    starts = rows.to(tl.int64) * tiles
    for first in range(0, tiles, WIDTH):
        tile = first + tl.arange(0, WIDTH)
        inside = valid[:, None] & (tile < tiles)[None, :]
        places = starts[:, None] + tile[None, :]
        maxima = tl.load(partials_ptr + places * 4, mask=inside, other=-float("inf"))
        classes = tl.load(argmaxima_ptr + places, mask=inside, other=2147483647)
        higher = tl.max(maxima, 1)
        candidate = tl.min(tl.where(maxima == higher[:, None], classes, 2147483647), 1)
        winner = tl.where(higher > largest, candidate, winner)
        largest = tl.maximum(largest, higher)
    return winner


@triton.jit
def finalise_program(
    sample_tile, class_tile, logits_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, samples, classes, tiles,
    SOFTMAX: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write one tile of the softmax, in place where `p_ptr` is `logits_ptr`; the first tile of classes also writes both energies.

    UNIT divides the number of classes, hence the offset of every row of logits.
    """
    rows = sample_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < samples
    largest, total = row_softmax(partials_ptr, rows, valid, tiles, 0)
    if class_tile == 0:
        tl.store(lse_ptr + rows, largest + tl.log(total), mask=valid)
        tl.store(pruned_lse_ptr + rows, row_lse(partials_ptr, rows, valid, tiles, 2), mask=valid)
    if SOFTMAX:
        width = multiple(classes, UNIT)
        here = class_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        places = rows.to(tl.int64)[:, None] * width + here[None, :]
        inside = valid[:, None] & (here < width)[None, :]
        logits = tl.load(logits_ptr + places, mask=inside, other=-float("inf"))
        # A tile of fewer elements than threads is read by several of them: all read before one writes in place.
        tl.debug_barrier()
        tl.store(p_ptr + places, tl.exp(logits - largest[:, None]) / total[:, None], mask=inside)


@triton.jit(do_not_specialize=["samples"])
def finalise_kernel(
    logits_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, samples, classes, tiles,
    SOFTMAX: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Run `finalise_program` for every tile."""
    finalise_program(
        tl.program_id(0), tl.program_id(1), logits_ptr, p_ptr, partials_ptr, lse_ptr, pruned_lse_ptr, samples, classes, tiles,
        SOFTMAX, UNIT, BLOCK_N, BLOCK_C,
    )  # fmt: skip


def finalise(logits: Tensor | None, partials: Tensor, lse: Tensor, pruned_lse: Tensor, classes: int) -> None:
    """Second launch: both energies from the partial results, and the softmax in place of the logits, if given."""
    samples, tiles, _ = partials.shape
    block = 1024 if classes > 4096 else min(512, next_power_of_2(classes))
    default = {"BLOCK_N": 4, "BLOCK_C": block, "num_warps": 4, "num_stages": 2}
    tile = choose("finalise", {"classes": classes}, default, partials.device)
    launch(
        finalise_kernel,
        (cdiv(samples, tile["BLOCK_N"]), 1 if logits is None else cdiv(classes, tile["BLOCK_C"])),
        wide=logits is not None and classes % 4 == 0,
        logits_ptr=logits,
        p_ptr=logits,
        partials_ptr=partials,
        lse_ptr=lse,
        pruned_lse_ptr=pruned_lse,
        samples=samples,
        classes=classes,
        tiles=tiles,
        SOFTMAX=logits is not None,
        UNIT=math.gcd(classes, 4),
        # Otherwise NVIDIA's compiler spills 8 bytes for an occupancy that a short kernel does not need.
        maxnreg=128,
        **tile,
    )
