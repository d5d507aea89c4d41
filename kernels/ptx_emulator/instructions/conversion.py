"""Moves and conversions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..parse import Instruction
from ..registers import TYPES, bits_of
from .floating import flushed, from_bf16, to_bf16
from .integer import store
from .table import Step, Where, operation

if TYPE_CHECKING:
    from ..machine import Machine

_TYPES = "pred b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64 f16 bf16 tf32 f16x2 bf16x2"
_ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil
}  # fmt: skip


@operation("mov", "cvta", modifiers=f"to global shared {_TYPES}")
def bind_move(machine: Machine, instruction: Instruction) -> Step:
    """mov, also of a register from and to its parts; cvta, where generic addresses are those of global memory."""
    registers, operands, kind = machine.registers, instruction.operands, instruction.parts[-1]
    if instruction.parts[0] == "cvta" and "global" not in instruction.parts:
        raise ValueError("expected .global")
    target, source = operands[0], operands[1]
    if target.kind == "vector":
        part = f"b{bits_of(kind) // len(target.items)}"
        whole = registers.source(instruction, source, f"b{bits_of(kind)}").view(TYPES[part])
        targets = [registers.target(instruction, item, part) for item in target.items]

        def split(where: Where = True) -> None:
            for index, one in enumerate(targets):
                np.copyto(one, whole[index :: len(targets)], where=where)

        return split
    if source.kind == "vector":
        part = f"b{bits_of(kind) // len(source.items)}"
        parts = [registers.source(instruction, item, part) for item in source.items]
        whole = registers.target(instruction, target, f"b{bits_of(kind)}")

        def join() -> np.ndarray:
            return np.stack(parts, 1).view(whole.dtype)[:, 0]

        return store(whole, join)
    into, value = registers.target(instruction, target, kind), registers.source(instruction, source, kind)
    return lambda where=True: np.copyto(into, value, where=where)


@operation("cvt", modifiers=f"rn rz rna rni rzi rmi rpi ftz sat {_TYPES}")
def bind_conversion(machine: Machine, instruction: Instruction) -> Step:
    """Cvt between integers and floating-point numbers of any width."""
    registers, operands = machine.registers, instruction.operands
    into, kind = instruction.parts[-2:]
    modifiers = instruction.parts[1:-2]
    if into.endswith("x2"):
        return _bind_packing(machine, instruction)
    target = registers.target(instruction, operands[0], into)
    if into == "tf32":
        bits = registers.source(instruction, operands[1], "b32")
        return store(target, lambda: _to_tf32(bits, modifiers[0]))
    source = registers.source(instruction, operands[1], kind)
    from_float, to_float = _is_float(kind), _is_float(into)
    if not set(modifiers) <= {"rn", "ftz", "sat", *(_ROUND if from_float else ())}:
        raise ValueError(f"rounding {'.'.join(modifiers)} from {kind} to {into}")
    rounding = next((_ROUND[modifier] for modifier in modifiers if modifier in _ROUND), None)
    saturates = "sat" in modifiers
    if from_float and not to_float and rounding is None:
        raise ValueError("expected a rounding to integers")

    def converted() -> np.ndarray:
        values = from_bf16(source) if kind == "bf16" else source
        if "ftz" in modifiers and values.dtype == np.float32:
            values = flushed(values)
        if rounding is not None:
            values = rounding(values)
        if from_float and not to_float:
            return _to_integer(values, into)
        if saturates and to_float:
            values = np.clip(np.where(np.isnan(values), 0, values), 0, 1)
        elif saturates:
            return _clipped(values, into)
        return to_bf16(values) if into == "bf16" else values.astype(TYPES[into])

    return store(target, converted)


def _is_float(kind: str) -> bool:
    return "f" in kind


def _to_integer(values: np.ndarray, into: str) -> np.ndarray:
    """Floating-point integers as integers: saturated, NaN as 0, or as the highest bit in 64 bits."""
    limits = np.iinfo(TYPES[into])
    inside = (values >= float(limits.min)) & (values < 2.0 ** (limits.bits - (limits.min < 0)))
    result = np.where(inside, values, 0).astype(TYPES[into])
    result = np.where(~inside & (values > 0), TYPES[into](limits.max), result)
    result = np.where(~inside & (values < 0), TYPES[into](limits.min), result)
    if limits.bits == 64:
        result = np.where(np.isnan(values), TYPES[into](limits.min or 1 << 63), result)
    return result


def _clipped(values: np.ndarray, into: str) -> np.ndarray:
    limits = np.iinfo(TYPES[into])
    own = np.iinfo(values.dtype)
    return np.clip(values, max(limits.min, own.min), min(limits.max, own.max)).astype(TYPES[into])


def _to_tf32(bits: np.ndarray, rounding: str) -> np.ndarray:
    """fp32 rounded to tf32: to the nearest, ties away from 0 (rna) or to even (rn), or towards 0 (rz)."""
    more = {
        "rna": np.uint32(0x1000),
        "rn": np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1)),
        "rz": np.uint32(0),
    }
    nearest = bits + more[rounding] & np.uint32(0xFFFFE000)
    return np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FFFE000), nearest)


def _bind_packing(machine: Machine, instruction: Instruction) -> Step:
    """Two fp32 rounded into one register, the first to its upper half."""
    into, kind = instruction.parts[-2:]
    if kind != "f32" or len(instruction.operands) != 3 or instruction.parts[1:-2] != ("rn",):
        raise ValueError("expected .rn of two operands in .f32")
    upper, lower = (machine.registers.source(instruction, operand, kind) for operand in instruction.operands[1:])
    target = machine.registers.target(instruction, instruction.operands[0], "b32").view(np.uint16)

    def rounded(values: np.ndarray) -> np.ndarray:
        return to_bf16(values) if re.match("bf16", into) else values.astype(np.float16).view(np.uint16)

    def step(where: Where = True) -> None:
        low, high = rounded(lower), rounded(upper)
        np.copyto(target[::2], low, where=where)
        np.copyto(target[1::2], high, where=where)

    return step
