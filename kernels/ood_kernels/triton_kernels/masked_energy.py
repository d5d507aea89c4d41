"""Head pass: logsumexp of the full and the pruned head from one read of the weight, and the softmax.

The first launch computes tiles of logits, samples by classes, and for each tile (max, sum of exp(z - max)) of both heads; the
second (`softmax`) combines these and normalises the logits in place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import INTERPRETED, matmul, multiple
from .launch import cdiv, choose, launch
from .softmax import finalise, finalise_program, row_argmax, row_lse, row_softmax

__all__ = [
    "candidates",
    "energies",
    "finalise",
    "finalise_program",
    "head_arguments",
    "head_kernel",
    "head_partials",
    "head_program",
    "masked_energy",
    "row_argmax",
    "row_lse",
    "row_softmax",
]

_PARTIAL_BYTES = 32 * 2**20


@triton.jit
def kept(
    mask_ptr, rows, valid, row_stride, column_stride, start, channels, KIND: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return the keep mask, 0 or 1 [BLOCK_D, rows], from storage as "bits" (see `pack_mask`) or "bytes"."""
    columns = tl.arange(0, BLOCK_D)
    row_ptrs = mask_ptr + rows.to(tl.int64) * row_stride
    if KIND == "bytes":
        inside = (start + columns < channels)[:, None] & valid[None, :]
        offsets = (start + columns).to(tl.int64) * column_stride
        return tl.load(row_ptrs[None, :] + offsets[:, None], mask=inside, other=0).to(tl.int32)
    else:
        first = start // 32
        words = tl.load(row_ptrs + first * column_stride, mask=valid, other=0)[None, :]
        for step in tl.static_range(1, BLOCK_D // 32):
            # Bits beyond the last word are arbitrary: the weights there are 0.
            word = tl.minimum(first + step, (channels - 1) // 32)
            following = tl.load(row_ptrs + word * column_stride, mask=valid, other=0)
            words = tl.where(columns[:, None] >= 32 * step, following[None, :], words)
        return (words >> ((start + columns) % 32)[:, None]) & 1


@triton.jit
def tile_partials(logits, BLOCK_C: tl.constexpr):
    """Return (max, sum of exp(z - max), position of the first max) of each row of a tile of logits [rows, BLOCK_C].

    A row with NaN or +Inf has a NaN sum, whatever its max.
    """
    largest = tl.max(logits, 1)
    # A tile of classes ruled out by a bias of -Inf has max -Inf and must sum to 0 instead of NaN.
    anchor = tl.where(largest == -float("inf"), 0.0, largest)
    positions = tl.where(logits == largest[:, None], tl.arange(0, BLOCK_C)[None, :], BLOCK_C - 1)
    return largest, tl.sum(tl.exp(logits - anchor[:, None]), 1), tl.min(positions, 1)


@triton.jit
def head_program(
    sample_tile, class_tile,
    h_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits_ptr, partials_ptr, argmaxima_ptr,
    samples, classes, channels, tiles,
    h_row, h_column, weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
    BIAS: tl.constexpr, WEIGHT_MASK: tl.constexpr, NEURON_MASK: tl.constexpr, LOGITS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the logits and partials of one tile; the weight is read once for both heads.

    WEIGHT_MASK and NEURON_MASK are "none", "bits" or "bytes". Both masks multiply the weight: the products
    with h are unchanged in value, and 0 · NaN and 0 · Inf are NaN, so a non-finite feature surfaces even in a pruned neuron.
    UNIT divides the number of channels and the row strides of h and weight.
    """
    PRUNED: tl.constexpr = WEIGHT_MASK != "none" or NEURON_MASK != "none"
    h_row, weight_row, channels = multiple(h_row, UNIT), multiple(weight_row, UNIT), multiple(channels, UNIT)
    rows = sample_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    here = class_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.arange(0, BLOCK_D)
    is_sample, is_class = rows < samples, here < classes
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * h_row + columns.to(tl.int64)[None, :] * h_column
    weight_ptrs = weight_ptr + here.to(tl.int64)[None, :] * weight_row + columns.to(tl.int64)[:, None] * weight_column
    plain = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    pruned = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, channels, BLOCK_D):
        inside = start + columns < channels
        features = tl.load(h_ptrs, mask=is_sample[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=inside[:, None] & is_class[None, :], other=0.0)
        if INTERPRETED:
            features, weight = features.to(tl.float32), weight.to(tl.float32)
        plain = matmul(features, weight, plain, PRECISION)
        if PRUNED:
            keep = tl.full((BLOCK_D, 1), 1, tl.int32)
            if WEIGHT_MASK != "none":
                keep = kept(
                    weight_mask_ptr, here, is_class, mask_row, mask_column, start, channels, WEIGHT_MASK, BLOCK_D
                )
            if NEURON_MASK != "none":
                only = tl.arange(0, 1)
                keep &= kept(neuron_mask_ptr, only, only == 0, 0, neuron_stride, start, channels, NEURON_MASK, BLOCK_D)
            pruned = matmul(features, weight * tl.where(keep != 0, 1.0, 0.0).to(weight.dtype), pruned, PRECISION)
        h_ptrs += BLOCK_D * h_column
        weight_ptrs += BLOCK_D * weight_column
    if BIAS:
        bias = tl.load(bias_ptr + here.to(tl.int64) * bias_stride, mask=is_class, other=0.0).to(tl.float32)
        plain += bias[None, :]
        pruned += bias[None, :]
    if LOGITS:
        targets = logits_ptr + rows.to(tl.int64)[:, None] * classes + here[None, :]
        tl.store(targets, plain, mask=is_sample[:, None] & is_class[None, :])
    largest, total, position = tile_partials(tl.where(is_class[None, :], plain, -float("inf")), BLOCK_C)
    places = rows.to(tl.int64) * tiles + class_tile
    tl.store(partials_ptr + places * 4, largest, mask=is_sample)
    tl.store(partials_ptr + places * 4 + 1, total, mask=is_sample)
    tl.store(argmaxima_ptr + places, tl.minimum(class_tile * BLOCK_C + position, classes - 1), mask=is_sample)
    if PRUNED:
        largest, total, position = tile_partials(tl.where(is_class[None, :], pruned, -float("inf")), BLOCK_C)
    tl.store(partials_ptr + places * 4 + 2, largest, mask=is_sample)
    tl.store(partials_ptr + places * 4 + 3, total, mask=is_sample)


@triton.jit(do_not_specialize=["samples"])
def head_kernel(
    h_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits_ptr, partials_ptr, argmaxima_ptr,
    samples, classes, channels, tiles,
    h_row, h_column, weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
    BIAS: tl.constexpr, WEIGHT_MASK: tl.constexpr, NEURON_MASK: tl.constexpr, LOGITS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Run `head_program` for every tile: all sample tiles of a group before the next tile of classes, for reuse in L2."""
    program = tl.program_id(0)
    sample_tiles = tl.cdiv(samples, BLOCK_N)
    first = program // (GROUP * tiles) * GROUP
    height = tl.minimum(sample_tiles - first, GROUP)
    within = program % (GROUP * tiles)
    head_program(
        first + within % height, within // height,
        h_ptr, weight_ptr, bias_ptr, weight_mask_ptr, neuron_mask_ptr, logits_ptr, partials_ptr, argmaxima_ptr,
        samples, classes, channels, tiles,
        h_row, h_column, weight_row, weight_column, bias_stride, mask_row, mask_column, neuron_stride,
        BIAS, WEIGHT_MASK, NEURON_MASK, LOGITS, UNIT, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
    )  # fmt: skip


def head_partials(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    precision: str,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """First launch: logits of the full head, and partial results of both heads for each of T tiles of classes.

    Args:
        h: [N, D] fp32, fp16 or bf16, any strides.
        weight: [C, D], likewise.
        bias: [C] or None.
        weight_mask: bool [C, D], int32 [C, ceil(D / 32)] from `pack_mask` (an eighth of the bytes), or None.
        neuron_mask: bool [D], int32 [ceil(D / 32)], or None.
        precision: of matrix products, one of `PRECISIONS`.
        logits: fp32 [N, C] contiguous, written; None if unused later.

    Returns:
        (partials fp32 [N, T, 4]: max and sum of exp(z - max) of the full head, then of the pruned one, identical without
        masks; argmaxima int32 [N, T]: the tile's first class with the largest logit).
    """
    arguments = head_arguments(h, weight, bias, weight_mask, neuron_mask, precision, logits)
    launch(
        head_kernel,
        (cdiv(h.shape[0], arguments["BLOCK_N"]) * arguments["tiles"],),
        wide=_is_wide(h) and _is_wide(weight),
        **arguments,
    )
    return arguments["partials_ptr"], arguments["argmaxima_ptr"]


def head_arguments(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    precision: str,
    logits: Tensor | None,
) -> dict[str, Any]:
    """Arguments of `head_kernel` by name, tile included, with new tensors for partial results; see `head_partials`."""
    samples, channels = h.shape
    classes = weight.shape[0]
    tile = _head_tile(h, weight, weight_mask, precision)
    tiles = cdiv(classes, tile["BLOCK_C"])
    partials = h.new_empty((samples, tiles, 4), dtype=torch.float32)
    argmaxima = h.new_empty((samples, tiles), dtype=torch.int32)
    weight_kind, weight_bits = _mask_kind(weight_mask)
    neuron_kind, neuron_bits = _mask_kind(neuron_mask)
    return {
        "h_ptr": h,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "weight_mask_ptr": weight_bits,
        "neuron_mask_ptr": neuron_bits,
        "logits_ptr": logits,
        "partials_ptr": partials,
        "argmaxima_ptr": argmaxima,
        "samples": samples,
        "classes": classes,
        "channels": channels,
        "tiles": tiles,
        "h_row": h.stride(0),
        "h_column": h.stride(1),
        "weight_row": weight.stride(0),
        "weight_column": weight.stride(1),
        "bias_stride": 0 if bias is None else bias.stride(0),
        "mask_row": 0 if weight_bits is None else weight_bits.stride(0),
        "mask_column": 0 if weight_bits is None else weight_bits.stride(1),
        "neuron_stride": 0 if neuron_bits is None else neuron_bits.stride(0),
        "BIAS": bias is not None,
        "WEIGHT_MASK": weight_kind,
        "NEURON_MASK": neuron_kind,
        "LOGITS": logits is not None,
        "UNIT": math.gcd(channels, h.stride(0), weight.stride(0), 16),
        "PRECISION": precision,
        **tile,
    }


def masked_energy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse [N], pruned lse [N], p [N, C]) in fp32, as `reference.masked_energy`; arguments as for `head_partials`.

    Two launches per chunk of samples, with partial results of at most 32 MiB.
    """
    p = h.new_empty((h.shape[0], weight.shape[0]), dtype=torch.float32)
    return *_energies(h, weight, bias, weight_mask, neuron_mask, precision, p), p


def energies(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """(lse [N], pruned lse [N]), bitwise equal to `masked_energy`, without writing logits or p."""
    return _energies(h, weight, bias, weight_mask, neuron_mask, precision, None)


def _energies(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    precision: str,
    p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    samples, classes = h.shape[0], weight.shape[0]
    lse = h.new_empty((samples,), dtype=torch.float32)
    pruned_lse = torch.empty_like(lse)
    row_bytes = 20 * cdiv(classes, _head_tile(h, weight, weight_mask, precision)["BLOCK_C"])
    block = max(1, _PARTIAL_BYTES // row_bytes)
    for start in range(0, samples, block):
        rows = slice(start, start + block)
        part = None if p is None else p[rows]
        partials, _ = head_partials(h[rows], weight, bias, weight_mask, neuron_mask, precision, part)
        finalise(part, partials, lse[rows], pruned_lse[rows], classes)
    return lse, pruned_lse


def _head_tile(h: Tensor, weight: Tensor, weight_mask: Tensor | None, precision: str) -> dict[str, Any]:
    """Default tile of the head kernel: 16 samples for "ieee" on CUDA cores, 64 for wgmma on tensor cores.

    At small batches the weight dominates the traffic: with C = 1000, tiles of 32 classes give enough programs to saturate memory
    bandwidth; with many classes, tiles of 64 do.
    """
    classes, channels = weight.shape
    exact = precision == "ieee"
    # "tf32x3" holds each operand twice, and unaligned rows are loaded in small pieces: no registers for more.
    many = classes > 8192 and precision != "tf32x3" and channels % 8 == 0
    default: dict[str, int | str] = {
        "BLOCK_N": 16 if exact else 64,
        "BLOCK_C": 64 if many else 32 if classes > 16 else 16,
        "BLOCK_D": 16 if exact and many else 32,
        "GROUP": 32,
        "num_warps": 2 if exact and classes <= 16 else 4,
        "num_stages": 4,
    }
    shape: dict[str, int | str] = {
        "precision": precision,
        "mask": _mask_kind(weight_mask)[0],
        "classes": classes,
        "channels": channels,
        "itemsize": weight.element_size(),
        "feature_itemsize": h.element_size(),
    }
    return choose("masked_energy", shape, default, h.device)


def candidates(shape: Mapping[str, int | str]) -> Iterator[dict[str, int | str]]:
    """Tiles to time for a shape of `choose`, merged over the default; BLOCK_N is fixed."""
    widths = (16,) if int(shape["classes"]) <= 16 else (16, 32, 64)
    for classes, channels, warps, stages in itertools.product(widths, (16, 32, 64), (4, 8), (3, 5)):
        # Beyond this, accumulators and operands spill.
        if classes * channels <= (1024 if shape["precision"] == "ieee" else 2048) * warps // 4:
            yield {"BLOCK_C": classes, "BLOCK_D": channels, "num_warps": warps, "num_stages": stages}


def _mask_kind(mask: Tensor | None) -> tuple[str, Tensor | None]:
    """Storage of a mask, and its tensor as a kernel reads it."""
    if mask is None:
        return "none", None
    return ("bytes", mask.view(torch.uint8)) if mask.dtype == torch.bool else ("bits", mask)


def _is_wide(tensor: Tensor) -> bool:
    """Whether every row is contiguous and a multiple of 16 bytes."""
    bytes_a_row = math.gcd(tensor.shape[1], tensor.stride(0)) * tensor.element_size()
    return tensor.stride(1) == 1 and bytes_a_row % 16 == 0
