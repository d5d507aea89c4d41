"""Activation pass: per-channel mean and maximum, and NAP, from one read of a feature map in any layout.

Two traversals of a sample, selected by stride: "channels", for innermost channels, and "rows", one row of H·W per channel. Both
load 16 bytes at a time from contiguous memory. A row whose length is not a multiple of 16 bytes (7×7!) consists of whole vectors
and parts of the two at its edges, which it shares with its neighbours.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .launch import cdiv, choose, launch, next_power_of_2
from .pool_kernels import combine_nap_kernel, pool_kernel

__all__ = ["pool_nap", "pool_partials", "pool_statistics"]


def pool_nap(feature_map: Tensor, eps: float, rectify: bool) -> tuple[Tensor, Tensor]:
    """(h [N, D], nap [N]) in fp32, as `reference.pool_nap`, from a feature map [N, D, H, W] of any strides.

    One launch if the batch alone fills the GPU; otherwise a second one combines the splits, bitwise identically.
    """
    samples, channels = feature_map.shape[:2]
    walk, wide = _walk(feature_map)
    blocks = cdiv(channels, walk["BLOCK_D"])
    splits = 1 if samples >= _multiprocessors(feature_map.device) else _splits(feature_map, blocks)
    h = feature_map.new_empty((samples, channels), dtype=torch.float32)
    nap = feature_map.new_empty((samples,), dtype=torch.float32)
    squares = feature_map.new_empty((samples, blocks), dtype=torch.float32)
    _launch(feature_map, walk, wide, splits, eps, rectify, h, squares=squares, nap=nap)
    if splits > 1:
        tile = choose("combine_nap", {"blocks": blocks}, {"BLOCK_N": 32, "num_warps": 1, "num_stages": 1}, nap.device)
        launch(
            combine_nap_kernel,
            (cdiv(samples, tile["BLOCK_N"]),),
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
    """(h [N, D], sums of squared ratios [N, blocks]) in fp32, one launch; `row_nap` computes NAP from the latter.

    Args:
        feature_map: [N, D, H, W], any strides.
        eps: added to the mean in the denominator.
        rectify: NAP of the map's positive part.
        zeroed: contiguous int32 tensor, also set to zero: counters for a later launch.
    """
    samples, channels = feature_map.shape[:2]
    walk, wide = _walk(feature_map)
    blocks = cdiv(channels, walk["BLOCK_D"])
    h = feature_map.new_empty((samples, channels), dtype=torch.float32)
    squares = feature_map.new_empty((samples, blocks), dtype=torch.float32)
    splits = _splits(feature_map, blocks)
    _launch(feature_map, walk, wide, splits, eps, rectify, h, squares=squares, zeroed=zeroed)
    return h, squares


def pool_statistics(feature_map: Tensor, rectify: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(h, nap_mean, maximum), each [N, D] in fp32, as `reference.pool_statistics`; one launch."""
    walk, wide = _walk(feature_map)
    h = feature_map.new_empty(feature_map.shape[:2], dtype=torch.float32)
    mean, largest = torch.empty_like(h), torch.empty_like(h)
    splits = _splits(feature_map, cdiv(feature_map.shape[1], walk["BLOCK_D"]))
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
    """Traversal arguments from strides and shape, never from N; and whether loads are 16 bytes wide."""
    samples, channels, height, width = feature_map.shape
    stride_n, stride_d, stride_h, stride_w = feature_map.stride()
    spatial = height * width
    # The stride of an axis of size 1 is arbitrary: one sample is read, and compiled for, as in a contiguous batch.
    stride_n = stride_n if samples > 1 else channels * spatial
    stride_w = stride_h if width == 1 else stride_w
    flat = height == 1 or width == 1 or stride_h == width * stride_w
    layout = "channels" if stride_d == 1 and (channels > 1 or spatial == 1) else "rows"

    vec = 16 // feature_map.element_size()
    # A "meta" tensor has no address, only an offset.
    wide = (feature_map.data_ptr() or feature_map.storage_offset() * feature_map.element_size()) % 16 == 0
    edges = layout == "rows" and spatial % vec != 0
    if layout == "channels":
        steps = [stride_n, channels, stride_h * (height > 1), stride_w * (spatial > 1)]
    else:
        # Edge vectors are read whole, so they must lie within the sample.
        steps = [stride_n, channels * spatial if edges else stride_d * (channels > 1)]
        wide = wide and flat and stride_w == 1 and (stride_d == spatial or not edges)
    wide = wide and all(step % vec == 0 for step in steps)
    if not wide:
        vec, edges = 1, False

    tile = _tile(feature_map, layout, spatial, vec, edges)
    strides = {"stride_n": stride_n, "stride_d": stride_d, "stride_h": stride_h, "stride_w": stride_w, "width": width}
    names = {"LAYOUT": layout, "SPATIAL": spatial, "FLAT": flat, "EDGES": edges, "VEC": vec}
    # A tile with fewer vectors than threads is read in smaller pieces; a warp is 64 threads on some GPUs.
    vectors = tile["BLOCK_D"] * tile["BLOCK_S"] // (vec if layout == "channels" else 1)
    return strides | names | tile, wide and vectors >= max(64, 32 * tile["num_warps"])


def _tile(feature_map: Tensor, layout: str, spatial: int, vec: int, edges: bool) -> dict[str, Any]:
    """Tile in which BLOCK_S threads share a row of H·W (or the positions of a channel), REPEAT vectors each.

    A short row with edges takes a single thread: no shuffle, and the cache merges partial reads of its 128-byte lines. There,
    prefetched tiles stay in registers; otherwise STAGES - 1 of them are in shared memory.
    """
    channels = feature_map.shape[1]
    if layout == "channels":
        lanes = 128
        while lanes > 4 and cdiv(channels, lanes * vec) * lanes * vec > 1.25 * channels:
            lanes //= 2
        vectors, threads, repeats = spatial, 256 // lanes, 4
    else:
        vectors = cdiv(spatial + (vec - 1 if edges else 0), vec)
        repeats = 8 if edges and vectors <= 16 else 4
        threads = min(16, next_power_of_2(cdiv(vectors, repeats))) if edges else 8 if vec > 1 else 32
    block_s = min(threads, 32, next_power_of_2(vectors))
    repeat = min(repeats, next_power_of_2(cdiv(vectors, block_s)))
    block_d = lanes * vec if layout == "channels" else 256 // block_s * max(1, (4 if vec > 1 else 16) // repeat)
    block_d = max(16, min(next_power_of_2(channels), block_d))
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
    """Programs per sample: about four per multiprocessor over the batch, each with at least one block."""
    wanted = cdiv(4 * _multiprocessors(feature_map.device), max(1, feature_map.shape[0]))
    return cdiv(blocks, cdiv(blocks, min(wanted, blocks)))


@cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; those of an H100 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
