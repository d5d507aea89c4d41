"""The activation pass: mean and maximum of every channel, and NAP, from one read of the feature map in any layout.

Two ways to walk through a sample, chosen by the strides: "channels", where those are innermost, and "rows", a row of H·W per
channel. Both load 16 bytes at a time where the memory is contiguous. A row that is not a whole number of 16-byte vectors (7×7!)
is the vectors that lie within it and parts of the two at its edges, which belong to its neighbours as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import greatest, maximum, multiple
from .launch import choose, launch

__all__ = ["pool_nap", "pool_partials", "pool_statistics", "row_nap"]


@triton.jit
def row_nap(partial_squares_ptr, rows, valid, blocks, channels):
    """NAP of samples from their sums of squared ratios [N, blocks], added in index order; 0 where not `valid`."""
    total = tl.load(partial_squares_ptr + rows * blocks, mask=valid, other=0.0)
    for block in range(1, blocks):
        total += tl.load(partial_squares_ptr + rows * blocks + block, mask=valid, other=0.0)
    return total / channels


@triton.jit
def _place(start, offset, width, stride_h, stride_w, FLAT: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of the positions start + offset along H·W, multiples of UNIT; FLAT where one stride leads through them all."""
    if FLAT:
        # Apart, so that only the first changes from chunk to chunk.
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
    """REPEAT tiles of a step, which is a chunk of H·W in a block of channels; 0 outside of the map and from `steps` on.

    [BLOCK_S positions, BLOCK_D channels], or [BLOCK_D · BLOCK_S, VEC]: BLOCK_S vectors of each of BLOCK_D rows. A tile a
    repeat, not one more axis: a thread then holds all of them in every version of Triton, and adds them without its neighbours.
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
            # Compared in vectors: a mask that might change within a vector would split its load.
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
    """Add tiles, of which PARTIAL lie in part beyond H·W, to the sums, sums of the positive part and maxima [BLOCK_S, BLOCK_D]."""
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
    """Add tiles to the sums, sums of the positive part and maxima [BLOCK_D · BLOCK_S]."""
    row = tl.arange(0, BLOCK_D * BLOCK_S)
    for repeat in tl.static_range(REPEAT):
        values = tiles[repeat].to(tl.float32)
        slot = start + repeat * BLOCK_S + row % BLOCK_S
        if EDGES:
            # The first `lead` elements of the first vector belong to the row before. Compared with numbers that the compiler
            # knows, so that it drops the tests of all vectors but those at the edges.
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
    """What the sums and maxima of a block start from."""
    return tl.full((BLOCK_D * BLOCK_S,) if LAYOUT == "rows" else (BLOCK_S, BLOCK_D), value, tl.float32)


@triton.jit
def _by_channel(values, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """[BLOCK_S, BLOCK_D] of the values that the threads hold."""
    return tl.trans(tl.reshape(values, (BLOCK_D, BLOCK_S))) if LAYOUT == "rows" else values


@triton.jit
def pool_kernel(
    feature_map_ptr, h_ptr, nap_mean_ptr, maximum_ptr, partial_squares_ptr, nap_ptr, zeroed_ptr,
    channels, width, stride_n, stride_d, stride_h, stride_w, zeroed_count, eps,
    LAYOUT: tl.constexpr, SPATIAL: tl.constexpr, FLAT: tl.constexpr, EDGES: tl.constexpr, RECTIFY: tl.constexpr,
    VEC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, REPEAT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (sample, split): a share of the sample's blocks of BLOCK_D channels. What has no pointer is not written."""
    # A row with edges may touch one vector more.
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
            # Without it the assembler puts the loads off to where they are needed, to save registers.
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
            h = tl.sum(_by_channel(sums, LAYOUT, BLOCK_D, BLOCK_S), 0) * (1.0 / SPATIAL)
            # Rectifying would hide -Inf; adding 0 · h keeps it as NaN.
            mean = h
            peak = greatest(_by_channel(maxima, LAYOUT, BLOCK_D, BLOCK_S), 0)
            if RECTIFY:
                mean = tl.sum(_by_channel(positive, LAYOUT, BLOCK_D, BLOCK_S), 0) * (1.0 / SPATIAL) + 0.0 * h
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
                ratio = peak / tl.where(mean + eps > 0.0, mean + eps, float("nan"))
                squares = tl.sum(tl.where(valid, ratio * ratio, 0.0), 0)
                tl.store(partial_squares_ptr + sample * blocks + block, squares)
                total += squares
            sums = _identity(0.0, LAYOUT, BLOCK_D, BLOCK_S)
            positive = sums
            maxima = _identity(float("-inf"), LAYOUT, BLOCK_D, BLOCK_S)
    if nap_ptr is not None:
        # A sample with splits waits for all of them: another launch then adds the same numbers in the same order.
        tl.store(nap_ptr + sample, total / channels, mask=tl.num_programs(1) == 1)


@triton.jit
def combine_nap_kernel(partial_squares_ptr, nap_ptr, samples, blocks, channels, BLOCK_N: tl.constexpr):
    """NAP of BLOCK_N samples from the partial results of their splits."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < samples
    tl.store(nap_ptr + rows, row_nap(partial_squares_ptr, rows, valid, blocks, channels), mask=valid)


def pool_nap(feature_map: Tensor, eps: float, rectify: bool) -> tuple[Tensor, Tensor]:
    """(h [N, D], nap [N]) in fp32, as `reference.pool_nap`, from a feature map [N, D, H, W] of any strides.

    One launch where the batch alone fills the GPU, else a second one combines the splits of each sample: the same bits.
    """
    samples, channels = feature_map.shape[:2]
    walk, wide = _walk(feature_map)
    blocks = triton.cdiv(channels, walk["BLOCK_D"])
    splits = 1 if samples >= _multiprocessors(feature_map.device) else _splits(feature_map, blocks)
    h = feature_map.new_empty((samples, channels), dtype=torch.float32)
    nap = feature_map.new_empty((samples,), dtype=torch.float32)
    squares = feature_map.new_empty((samples, blocks), dtype=torch.float32)
    _launch(feature_map, walk, wide, splits, eps, rectify, h, squares=squares, nap=nap)
    if splits > 1:
        tile = choose("combine_nap", {"blocks": blocks}, {"BLOCK_N": 32, "num_warps": 1, "num_stages": 1}, nap.device)
        launch(
            combine_nap_kernel,
            (triton.cdiv(samples, tile["BLOCK_N"]),),
            partial_squares_ptr=squares,
            nap_ptr=nap,
            samples=samples,
            blocks=blocks,
            channels=channels,
            **tile,
        )
    return h, nap


def pool_partials(
    feature_map: Tensor, eps: float, rectify: bool, zeroed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h [N, D], sums of squared ratios [N, blocks]) in fp32, one launch; NAP is what `row_nap` makes of the second.

    Args:
        feature_map: [N, D, H, W], any strides.
        eps: added to the mean in a ratio's denominator.
        rectify: whether NAP takes the map's positive part.
        zeroed: contiguous int32 tensor set to zero on the way, for a later launch to count in.
    """
    samples, channels = feature_map.shape[:2]
    walk, wide = _walk(feature_map)
    blocks = triton.cdiv(channels, walk["BLOCK_D"])
    h = feature_map.new_empty((samples, channels), dtype=torch.float32)
    squares = feature_map.new_empty((samples, blocks), dtype=torch.float32)
    splits = _splits(feature_map, blocks)
    _launch(feature_map, walk, wide, splits, eps, rectify, h, squares=squares, zeroed=zeroed)
    return h, squares


def pool_statistics(feature_map: Tensor, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(h, mean that NAP sees, maximum), each [N, D] in fp32, as `reference.pool_statistics`; one launch."""
    walk, wide = _walk(feature_map)
    h = feature_map.new_empty(feature_map.shape[:2], dtype=torch.float32)
    mean, largest = torch.empty_like(h), torch.empty_like(h)
    splits = _splits(feature_map, triton.cdiv(feature_map.shape[1], walk["BLOCK_D"]))
    _launch(feature_map, walk, wide, splits, 0.0, rectify, h, mean=mean, largest=largest)
    return h, mean, largest


def _launch(
    feature_map: Tensor,
    walk: dict[str, Any],
    wide: bool,
    splits: int,
    eps: float,
    rectify: bool,
    h: Tensor,
    mean: Tensor | None = None,
    largest: Tensor | None = None,
    squares: Tensor | None = None,
    nap: Tensor | None = None,
    zeroed: Tensor | None = None,
) -> None:
    launch(
        pool_kernel,
        (feature_map.shape[0], splits),
        wide=wide,
        feature_map_ptr=feature_map,
        h_ptr=h,
        nap_mean_ptr=mean,
        maximum_ptr=largest,
        partial_squares_ptr=squares,
        nap_ptr=nap,
        zeroed_ptr=zeroed,
        channels=feature_map.shape[1],
        zeroed_count=0 if zeroed is None else zeroed.numel(),
        eps=float(eps),
        RECTIFY=rectify,
        **walk,
    )


def _walk(feature_map: Tensor) -> tuple[dict[str, Any], bool]:
    """How the kernel walks through a sample, by strides and shape and never by N; and whether its loads are 16 bytes wide."""
    _, channels, height, width = feature_map.shape
    stride_n, stride_d, stride_h, stride_w = feature_map.stride()
    spatial = height * width
    stride_w = stride_h if width == 1 else stride_w
    flat = height == 1 or width == 1 or stride_h == width * stride_w
    layout = "channels" if stride_d == 1 and (channels > 1 or spatial == 1) else "rows"

    vec = 16 // feature_map.element_size()
    # A tensor on "meta" has no address to be misaligned but its offset.
    wide = (feature_map.data_ptr() or feature_map.storage_offset() * feature_map.element_size()) % 16 == 0
    edges = layout == "rows" and spatial % vec != 0
    if layout == "channels":
        steps = [stride_n, channels, stride_h * (height > 1), stride_w * (spatial > 1)]
    else:
        # Vectors at the edges of rows are read as a whole: all that they hold must belong to the sample.
        steps = [stride_n, channels * spatial if edges else stride_d * (channels > 1)]
        wide = wide and flat and stride_w == 1 and (stride_d == spatial or not edges)
    wide = wide and all(step % vec == 0 for step in steps)
    if not wide:
        vec, edges = 1, False

    tile = _tile(feature_map, layout, spatial, vec, edges)
    strides = {"stride_n": stride_n, "stride_d": stride_d, "stride_h": stride_h, "stride_w": stride_w, "width": width}
    names = {"LAYOUT": layout, "SPATIAL": spatial, "FLAT": flat, "EDGES": edges, "VEC": vec}
    # A tile of fewer vectors than threads is read in smaller pieces; some GPUs have 64 threads at least.
    vectors = tile["BLOCK_D"] * tile["BLOCK_S"] // (vec if layout == "channels" else 1)
    return strides | names | tile, wide and vectors >= max(64, 32 * tile["num_warps"])


def _tile(feature_map: Tensor, layout: str, spatial: int, vec: int, edges: bool) -> dict[str, Any]:
    """BLOCK_S threads share a row of H·W (or the positions of a channel) and load REPEAT vectors each at once.

    Rows with edges go to one thread each while they are short: that costs no shuffle, and the cache brings the parts of its
    128-byte lines together. The next tiles wait in registers there, else in shared memory, STAGES - 1 of them.
    """
    channels = feature_map.shape[1]
    if layout == "channels":
        lanes = 128
        while lanes > 4 and triton.cdiv(channels, lanes * vec) * lanes * vec > 1.25 * channels:
            lanes //= 2
        vectors, threads, repeats = spatial, 256 // lanes, 4
    else:
        vectors = triton.cdiv(spatial + (vec - 1 if edges else 0), vec)
        repeats = 8 if edges and vectors <= 16 else 4
        threads = min(16, triton.next_power_of_2(triton.cdiv(vectors, repeats))) if edges else 8 if vec > 1 else 32
    block_s = min(threads, 32, triton.next_power_of_2(vectors))
    repeat = min(repeats, triton.next_power_of_2(triton.cdiv(vectors, block_s)))
    block_d = lanes * vec if layout == "channels" else 256 // block_s * max(1, (4 if vec > 1 else 16) // repeat)
    block_d = max(16, min(triton.next_power_of_2(channels), block_d))
    tile = block_d * block_s // (vec if layout == "channels" else 1)
    default = {
        "BLOCK_D": block_d,
        "BLOCK_S": block_s,
        "REPEAT": repeat,
        "STAGES": 1 if edges else 3,
        "num_warps": max(1, min(8, tile // 32)),
        "num_stages": 1,
    }
    shape: dict[str, int | str] = {
        "layout": layout,
        "edges": str(edges),
        "vec": vec,
        "spatial": spatial,
        "channels": channels,
    }
    return choose("pool_nap", shape, default, feature_map.device)


def _splits(feature_map: Tensor, blocks: int) -> int:
    """Programs that share a sample: about four a multiprocessor over the batch, none of them without a block."""
    wanted = triton.cdiv(4 * _multiprocessors(feature_map.device), max(1, feature_map.shape[0]))
    return triton.cdiv(blocks, triton.cdiv(blocks, min(wanted, blocks)))


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of the GPU; for a device that is none, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
