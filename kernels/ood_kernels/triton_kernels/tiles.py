"""Tile loads shared by the projections: matrix tiles, and cotangents, given or formed from logits."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import cotangent, multiple
from .softmax import row_argmax, row_softmax

__all__ = ["cotangent_tile", "matrix_tile", "softmax_rows"]


@triton.jit
def softmax_rows(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """Return (largest logit, Σ exp(z - largest), predicted class) of each row; zeros if the cotangents are given."""
    largest = tl.zeros(rows.shape, tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    predicted = tl.zeros(rows.shape, tl.int32)
    # WIDTH tiles at a time: wider reads would take registers from the projection.
    if KIND != "given":
        largest, total = row_softmax(partials_ptr, rows, valid, class_tiles, 0, WIDTH)
        if KIND == "predicted" or KIND == "max_logit":
            predicted = row_argmax(partials_ptr, argmaxima_ptr, rows, valid, class_tiles, WIDTH)
    return largest, total, predicted


@triton.jit
def matrix_tile(
    pointer, row_start, column_start, height, width, row_stride, column_stride,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return a tile [ROWS, COLUMNS] of a matrix [height, width], padded with 0; UNIT divides the width and the row stride."""
    row_stride = multiple(row_stride, UNIT)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # 64-bit arithmetic only for the start of the tile: 32-bit offsets inside it leave registers for the accumulators.
    first = pointer + tl.cast(row_start, tl.int64) * row_stride + tl.cast(column_start, tl.int64) * column_stride
    inside = (row_start + rows < height)[:, None] & (column_start + columns < multiple(width, UNIT))[None, :]
    return tl.load(first + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def cotangent_tile(
    a_ptr, row_start, class_start, samples, classes, largest, total, predicted,
    KIND: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a tile of the cotangents at `a_ptr`, or of those formed from logits at `a_ptr`; padded with 0."""
    values = matrix_tile(a_ptr, row_start, class_start, samples, classes, classes, 1, UNIT, BLOCK_N, BLOCK_R)
    if KIND == "given":
        return values
    else:
        here = (class_start + tl.arange(0, BLOCK_R))[None, :]
        p = tl.exp(values.to(tl.float32) - largest[:, None]) / total[:, None]
        return tl.where(here < classes, cotangent(p, here, predicted[:, None], classes, KIND), 0.0)
