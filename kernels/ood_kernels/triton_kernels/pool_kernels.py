"""Kernels of the activation pass, see `pool_nap`."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import greatest, maximum, multiple

__all__ = ["combine_nap_kernel", "pool_kernel", "row_nap"]


@triton.jit
def row_nap(partial_squares_ptr, rows, valid, blocks, channels):
    """NAP from sums of squared ratios [N, blocks], added in index order; 0 where not `valid`."""
    total = tl.load(partial_squares_ptr + rows * blocks, mask=valid, other=0.0)
    for block in range(1, blocks):
        total += tl.load(partial_squares_ptr + rows * blocks + block, mask=valid, other=0.0)
    return total / channels


@triton.jit
def _place(start, offset, width, stride_h, stride_w, FLAT: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of positions start + offset along H·W, multiples of UNIT; FLAT if H·W has a single stride."""
    if FLAT:
        # Two terms, so that only the first changes between chunks.
        return multiple(tl.cast(start, tl.int64) * stride_w, UNIT) + multiple(offset.to(tl.int64) * stride_w, UNIT)
    else:
        position = start + offset
        return multiple((position // width).to(tl.int64) * stride_h + (position % width).to(tl.int64) * stride_w, UNIT)


@triton.jit
def _load(
    sample_ptr, step, steps, channels, width, stride_d, stride_h, stride_w,
    LAYOUT: tl.constexpr, SPATIAL: tl.constexpr, CHUNKS: tl.constexpr, FLAT: tl.constexpr, EDGES: tl.constexpr,
    VEC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """REPEAT tiles of a step, a chunk of H·W in a block of channels; 0 outside the map and from `steps` on.

    [BLOCK_S positions, BLOCK_D channels], or [BLOCK_D · BLOCK_S, VEC]: BLOCK_S vectors of each of BLOCK_D rows. Separate tiles
    instead of another axis keep every repeat in the same thread in all Triton versions, so adding them needs no shuffle.
    """
    block = step // CHUNKS
    left = tl.where(step < steps, channels - block * BLOCK_D, 0)
    start = step % CHUNKS * (REPEAT * BLOCK_S)
    tiles = ()
    for repeat in tl.static_range(REPEAT):
        if LAYOUT == "channels":
            channel = tl.arange(0, BLOCK_D)[None, :]
            slot = repeat * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
            place = _place(start, slot, width, stride_h, stride_w, FLAT, VEC) + channel
            # Compare whole vectors: a mask that could change within a vector would split its load.
            known = (start + slot < SPATIAL) & (channel // VEC < left // VEC)
            tile = tl.load(sample_ptr + block * BLOCK_D + place, mask=known, other=0.0)
        else:
            row = tl.arange(0, BLOCK_D * BLOCK_S)
            channel = row // BLOCK_S
            slot = repeat * BLOCK_S + row % BLOCK_S
            if EDGES:
                begin = channel * stride_d
                known = (start + slot) * VEC - SPATIAL < begin % VEC
                place = (begin // VEC + start + slot) * VEC
            else:
                known = (start + slot) * VEC < SPATIAL
                place = multiple(channel.to(tl.int64) * stride_d, VEC)
                place += _place(start * VEC, slot * VEC, width, stride_h, stride_w, FLAT, VEC)
            block_ptr = sample_ptr + multiple(tl.cast(block, tl.int64) * BLOCK_D * stride_d, VEC)
            known = known & (channel < left)
            lane = tl.arange(0, VEC)[None, :]
            tile = tl.load(block_ptr + (place[:, None] + lane), mask=known[:, None], other=0.0)
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _add_channels(
    sums, positive, maxima, tiles, start, PARTIAL: tl.constexpr,
    SPATIAL: tl.constexpr, RECTIFY: tl.constexpr, BLOCK_S: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """Accumulate tiles into sums, sums of the positive part and maxima [BLOCK_S, BLOCK_D]; PARTIAL ones may exceed H·W."""
    for repeat in tl.static_range(REPEAT):
        values = tiles[repeat].to(tl.float32)
        sums += values
        if RECTIFY:
            positive += maximum(values, 0.0)
        if PARTIAL:
            position = start + repeat * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
            values = tl.where(position < SPATIAL, values, float("-inf"))
        maxima = maximum(maxima, values)
    return sums, positive, maxima


@triton.jit
def _add_rows(
    sums, positive, maxima, tiles, start, stride_d, SPATIAL: tl.constexpr, EDGES: tl.constexpr, RECTIFY: tl.constexpr,
    VEC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """Accumulate tiles into sums, sums of the positive part and maxima [BLOCK_D · BLOCK_S]."""
    row = tl.arange(0, BLOCK_D * BLOCK_S)
    for repeat in tl.static_range(REPEAT):
        values = tiles[repeat].to(tl.float32)
        slot = start + repeat * BLOCK_S + row % BLOCK_S
        if EDGES:
            # The first `lead` elements of the first vector belong to the previous row. Comparing with compile-time constants lets
            # the compiler drop the tests of interior vectors.
            lead = (row // BLOCK_S * stride_d % VEC)[:, None]
            index = slot[:, None] * VEC + tl.arange(0, VEC)[None, :]
            inside = (lead <= index) & (index - SPATIAL < lead)
            peaks = greatest(tl.where(inside, values, float("-inf")), 1)
            values = tl.where(inside, values, 0.0)
        else:
            peaks = tl.where(slot * VEC < SPATIAL, greatest(values, 1), float("-inf"))
        sums += tl.sum(values, 1)
        if RECTIFY:
            positive += tl.sum(maximum(values, 0.0), 1)
        maxima = maximum(maxima, peaks)
    return sums, positive, maxima


@triton.jit
def _identity(value, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """Initial sums and maxima of a block."""
    return tl.full((BLOCK_D * BLOCK_S,) if LAYOUT == "rows" else (BLOCK_S, BLOCK_D), value, tl.float32)


@triton.jit
def _by_channel(values, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """The threads' values as [BLOCK_S, BLOCK_D]."""
    return tl.trans(tl.reshape(values, (BLOCK_D, BLOCK_S))) if LAYOUT == "rows" else values


@triton.jit
def pool_kernel(
    feature_map_ptr, h_ptr, nap_mean_ptr, maximum_ptr, partial_squares_ptr, nap_ptr, zeroed_ptr,
    channels, width, stride_n, stride_d, stride_h, stride_w, zeroed_count, eps,
    LAYOUT: tl.constexpr, SPATIAL: tl.constexpr, FLAT: tl.constexpr, EDGES: tl.constexpr, RECTIFY: tl.constexpr,
    VEC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, REPEAT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (sample, split): a share of the sample's blocks of BLOCK_D channels. Outputs without a pointer are skipped."""
    # A row with edges can touch one more vector.
    POSITIONS: tl.constexpr = SPATIAL + VEC - 1 if EDGES else SPATIAL
    CHUNK: tl.constexpr = REPEAT * BLOCK_S * (VEC if LAYOUT == "rows" else 1)
    CHUNKS: tl.constexpr = (POSITIONS + CHUNK - 1) // CHUNK
    sample = tl.program_id(0).to(tl.int64)
    sample_ptr = feature_map_ptr + multiple(sample * stride_n, VEC)
    blocks = tl.cdiv(channels, BLOCK_D)
    share = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.program_id(1) * share * CHUNKS
    steps = tl.minimum(first + share * CHUNKS, blocks * CHUNKS)

    if zeroed_ptr is not None:
        count = tl.where((tl.program_id(0) == 0) & (tl.program_id(1) == 0), zeroed_count, 0)
        for start in range(0, count, 1024):
            counter = start + tl.arange(0, 1024)
            tl.store(zeroed_ptr + counter, tl.zeros((1024,), tl.int32), mask=counter < count)

    total = 0.0
    sums = _identity(0.0, LAYOUT, BLOCK_D, BLOCK_S)
    positive = sums
    maxima = _identity(float("-inf"), LAYOUT, BLOCK_D, BLOCK_S)
    if EDGES:
        ahead = _load(
            sample_ptr, first, steps, channels, width, stride_d, stride_h, stride_w,
            LAYOUT, SPATIAL, CHUNKS, FLAT, EDGES, VEC, BLOCK_D, BLOCK_S, REPEAT,
        )  # fmt: skip
    for step in tl.range(first, steps, num_stages=STAGES):
        loaded = _load(
            sample_ptr, step + 1 if EDGES else step, steps, channels, width, stride_d, stride_h, stride_w,
            LAYOUT, SPATIAL, CHUNKS, FLAT, EDGES, VEC, BLOCK_D, BLOCK_S, REPEAT,
        )  # fmt: skip
        if EDGES:
            tiles = ahead
            ahead = loaded
            # Without it the assembler sinks the loads to their uses to save registers.
            tl.debug_barrier()
        else:
            tiles = loaded
        start = step % CHUNKS * (REPEAT * BLOCK_S)
        if LAYOUT == "rows":
            sums, positive, maxima = _add_rows(
                sums, positive, maxima, tiles, start, stride_d, SPATIAL, EDGES, RECTIFY, VEC, BLOCK_D, BLOCK_S, REPEAT
            )
        elif step % CHUNKS == CHUNKS - 1:
            sums, positive, maxima = _add_channels(
                sums, positive, maxima, tiles, start, True, SPATIAL, RECTIFY, BLOCK_S, REPEAT
            )
        else:
            sums, positive, maxima = _add_channels(
                sums, positive, maxima, tiles, start, False, SPATIAL, RECTIFY, BLOCK_S, REPEAT
            )
        if step % CHUNKS == CHUNKS - 1:
            channel_sums = tl.sum(_by_channel(sums, LAYOUT, BLOCK_D, BLOCK_S), 0)
            h = channel_sums * (1.0 / SPATIAL)
            # Rectifying would hide -Inf; adding 0 · h turns it into NaN.
            mean = h
            peak = greatest(_by_channel(maxima, LAYOUT, BLOCK_D, BLOCK_S), 0)
            if RECTIFY:
                channel_sums = tl.sum(_by_channel(positive, LAYOUT, BLOCK_D, BLOCK_S), 0)
                mean = channel_sums * (1.0 / SPATIAL) + 0.0 * h
                peak = maximum(peak, 0.0)
            block = step // CHUNKS
            channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
            valid = channel < channels
            place = sample * channels + channel
            tl.store(h_ptr + place, h, mask=valid)
            if maximum_ptr is not None:
                tl.store(nap_mean_ptr + place, mean, mask=valid)
                tl.store(maximum_ptr + place, peak, mask=valid)
            if partial_squares_ptr is not None:
                # Sums instead of means: mean + eps is fused with the product above, which leaves a residue instead of 0.
                ratio = peak / tl.where(channel_sums + eps * SPATIAL > 0.0, mean + eps, float("nan"))
                squares = tl.sum(tl.where(valid, ratio * ratio, 0.0), 0)
                tl.store(partial_squares_ptr + sample * blocks + block, squares)
                total += squares
            sums = _identity(0.0, LAYOUT, BLOCK_D, BLOCK_S)
            positive = sums
            maxima = _identity(float("-inf"), LAYOUT, BLOCK_D, BLOCK_S)
    if nap_ptr is not None:
        # With several splits, another launch adds the same numbers in the same order.
        tl.store(nap_ptr + sample, total / channels, mask=tl.num_programs(1) == 1)


@triton.jit(do_not_specialize=["samples"])
def combine_nap_kernel(partial_squares_ptr, nap_ptr, samples, blocks, channels, BLOCK_N: tl.constexpr):
    """NAP of BLOCK_N samples from their splits' partial results."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < samples
    tl.store(nap_ptr + rows, row_nap(partial_squares_ptr, rows, valid, blocks, channels), mask=valid)
