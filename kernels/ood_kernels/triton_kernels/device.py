"""Shared device functions: products in a given precision, NaN-propagating maxima, the cotangent."""

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "cotangent", "greatest", "matmul", "maximum", "multiple", "rounded"]

# Read once, as @triton.jit does: the interpreter has bf16 as a storage type only and multiplies in fp32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def maximum(left, right):
    """NaN-propagating elementwise maximum, as in torch; the hardware instruction drops NaN."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(value, PRECISION: tl.constexpr):
    """Return the operand of a product in the type of PRECISION; under the interpreter, rounded to it but stored as fp32."""
    if PRECISION == "fp16":
        value = value.to(tl.float16)
    elif PRECISION == "tf32":
        # Tensor cores ignore the low 13 bits; truncation would bias every product of positive operands towards 0.
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = (bits + 0x1000) & -8192
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), float("nan"))
    elif PRECISION == "bf16":
        if INTERPRETED:
            # The interpreter's cast truncates.
            bits = value.to(tl.float32).to(tl.int32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), float("nan"))
        else:
            value = value.to(tl.bfloat16)
    return value.to(tl.float32) if INTERPRETED or (PRECISION != "fp16" and PRECISION != "bf16") else value


@triton.jit
def matmul(left, right, accumulator, PRECISION: tl.constexpr):
    """Return accumulator + left @ right in fp32, with the operands rounded to PRECISION.

    "ieee" keeps fp32, "tf32x3" splits each operand into two tf32 parts (about fp32 accuracy), "tf32" keeps 10 bits of
    mantissa, "fp16" and "bf16" round to those types.
    """
    left = rounded(left, PRECISION)
    right = rounded(right, PRECISION)
    if PRECISION == "tf32" or PRECISION == "tf32x3":
        return tl.dot(left, right, accumulator, input_precision=PRECISION)
    else:
        return tl.dot(left, right, accumulator, input_precision="ieee")


@triton.jit
def cotangent(p, classes, predicted, class_count, KIND: tl.constexpr):
    """Return the factor a of the gradient a ⊗ h̃ from the softmax p, see `reference.cotangent`; "given" returns p.

    p is [samples, classes]; `classes` [1, classes] holds class indices, `predicted` [samples, 1] the predicted class.
    """
    if KIND == "uniform":
        return p - 1.0 / class_count
    elif KIND == "sum_logits":
        return p * 0 + 1
    elif KIND == "max_logit":
        return tl.where(classes == predicted, 1.0, 0.0) + p * 0
    elif KIND == "predicted":
        return p - tl.where(classes == predicted, 1.0, 0.0)
    else:
        return p


@triton.jit
def multiple(value, UNIT: tl.constexpr):
    """Return value, a multiple of UNIT, in a form that shows this to the compiler.

    Triton itself detects only multiples of 16: rows of 1000 classes would be read 2 bytes at a time despite 16-byte alignment.
    """
    return value // UNIT * UNIT


@triton.jit
def greatest(values, AXIS: tl.constexpr):
    """NaN-propagating maximum along an axis; `tl.max` drops NaN."""
    if INTERPRETED:
        # The interpreter runs a custom reduction element by element.
        known = tl.max(tl.where(values == values, values, float("-inf")), AXIS)
        return tl.where(tl.sum((values != values).to(tl.int32), AXIS) > 0, float("nan"), known)
    else:
        return tl.reduce(values, AXIS, maximum)
