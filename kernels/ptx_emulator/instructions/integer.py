"""Integers, bits and predicates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parse import Instruction
from ..registers import TYPES, bits_of
from .table import Step, Where, operation

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["apply", "bind_division", "bind_integer", "bind_product", "store"]

_INTEGERS = "u16 s16 u32 s32 u64 s64"
_BITS = "b16 b32 b64"


def store(target: np.ndarray, compute: Callable[[], Any]) -> Step:
    """The step that writes a computed array to a target."""

    def step(where: Where = True) -> None:
        np.copyto(target, compute(), casting="unsafe", where=where)

    return step


def apply(machine: Machine, instruction: Instruction, function: Callable[..., Any], kind: str, count: int) -> Step:
    """The step of a function of `count` arrays of one type; a ufunc writes to the target itself."""
    registers, operands = machine.registers, instruction.operands
    if len(operands) != 1 + count:
        raise ValueError(f"{len(operands)} operands")
    sources = [registers.source(instruction, operand, kind) for operand in operands[1:]]
    target = registers.target(instruction, operands[0], kind)
    if isinstance(function, np.ufunc):
        return partial(function, *sources, out=target)
    return store(target, lambda: function(*sources))


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * bits_of(kind)}"


def bind_integer(machine: Machine, instruction: Instruction) -> Step:
    """add, sub, min, max, neg, abs of integers."""
    function = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs
    }[instruction.parts[0]]  # fmt: skip
    return apply(machine, instruction, function, instruction.parts[-1], function.nin)


def bind_product(machine: Machine, instruction: Instruction) -> Step:
    """Mul and mad: lo, hi, wide."""
    kind, operands, registers = instruction.parts[-1], instruction.operands, machine.registers
    adds = instruction.parts[0] == "mad"
    if len(operands) != 3 + adds:
        raise ValueError(f"{len(operands)} operands")
    left, right = (registers.source(instruction, operand, kind) for operand in operands[1:3])
    if "wide" in instruction.parts:
        wide = _wide(kind)
        target, dtype = registers.target(instruction, operands[0], wide), TYPES[wide]
        if not adds:
            return partial(np.multiply, left, right, out=target, dtype=dtype)
        more = registers.source(instruction, operands[3], wide)
        return store(target, lambda: np.multiply(left, right, dtype=dtype) + more)
    target = registers.target(instruction, operands[0], kind)
    product: Callable[..., np.ndarray]
    if "hi" in instruction.parts:
        product = _high_64 if bits_of(kind) == 64 else partial(_high, kind)
    elif "lo" in instruction.parts:
        if not adds:
            return partial(np.multiply, left, right, out=target)
        product = np.multiply
    else:
        raise ValueError("expected .lo, .hi or .wide")
    if not adds:
        return store(target, lambda: product(left, right))
    more = registers.source(instruction, operands[3], kind)
    return store(target, lambda: product(left, right) + more)


def _high(kind: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The upper half of a product of 16 or 32 bits."""
    dtype = TYPES[_wide(kind)]
    return (np.multiply(left, right, dtype=dtype) >> dtype(bits_of(kind))).astype(TYPES[kind])


def _high_64(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The upper half of a product of 64 bits."""
    products = (int(one) * int(other) >> 64 for one, other in zip(left.tolist(), right.tolist(), strict=True))
    return np.array([product & (2**64 - 1) for product in products], np.uint64).view(left.dtype)


def bind_division(machine: Machine, instruction: Instruction) -> Step:
    """Quotient rounded towards zero, and what it leaves; PTX leaves a division by 0 open."""
    function = _quotient if instruction.parts[0] == "div" else np.fmod
    return apply(machine, instruction, function, instruction.parts[-1], 2)


def _quotient(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    # Floor division rounds down; subtracting the remainder first leaves nothing to round.
    return (left - np.fmod(left, right)) // np.where(right == 0, np.ones_like(right), right)


@operation("and", "or", "xor", "not", modifiers=f"pred {_BITS}")
def bind_bits(machine: Machine, instruction: Instruction) -> Step:
    """Bitwise operations."""
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[
        instruction.parts[0]
    ]
    return apply(machine, instruction, function, instruction.parts[-1], function.nin)


@operation("shl", "shr", modifiers=f"{_BITS} {_INTEGERS}")
def bind_shift(machine: Machine, instruction: Instruction) -> Step:
    """Shifts; by the width of the type or more they leave 0, or the sign."""
    kind, operands, registers = instruction.parts[-1], instruction.operands, machine.registers
    kind = f"u{bits_of(kind)}" if kind[0] == "b" else kind
    value, amount = registers.source(instruction, operands[1], kind), registers.source(instruction, operands[2], "u32")
    target = registers.target(instruction, operands[0], kind)
    bits, dtype = bits_of(kind), TYPES[kind]
    shift = np.left_shift if instruction.parts[0] == "shl" else np.right_shift
    if operands[2].kind == "immediate" and amount[0] < bits:
        return partial(shift, value, amount.astype(dtype), out=target)

    def shifted() -> np.ndarray:
        moved = shift(value, np.minimum(amount, bits - 1).astype(dtype))
        if kind[0] == "s" and shift is np.right_shift:
            return moved
        return np.where(amount < bits, moved, 0)

    return store(target, shifted)


@operation("shf", modifiers="l r wrap clamp b32")
def bind_funnel(machine: Machine, instruction: Instruction) -> Step:
    """Funnel shift of a pair of registers."""
    low, high, amount = (machine.registers.source(instruction, operand, "u32") for operand in instruction.operands[1:])
    target = machine.registers.target(instruction, instruction.operands[0], "u32")
    wraps, left = "wrap" in instruction.parts, "l" in instruction.parts

    def shifted() -> np.ndarray:
        count = (amount & 31 if wraps else np.minimum(amount, 32)).astype(np.uint64)
        pair = high.astype(np.uint64) << np.uint64(32) | low
        return pair << count >> np.uint64(32) if left else pair >> count

    return store(target, lambda: shifted() & np.uint64(0xFFFFFFFF))


@operation("bfe", modifiers="u32 s32 u64 s64")
def bind_extract(machine: Machine, instruction: Instruction) -> Step:
    """Extract a field of bits, extended by its sign."""
    kind, operands, registers = instruction.parts[-1], instruction.operands, machine.registers
    value = registers.source(instruction, operands[1], kind)
    start, length = (registers.source(instruction, operand, "u32") for operand in operands[2:])
    target = registers.target(instruction, operands[0], kind)
    bits = bits_of(kind)

    def extracted() -> np.ndarray:
        first, count = start.astype(np.int64) & 255, length.astype(np.int64) & 255
        last = np.clip(np.where(count == 0, 0, first + count - 1), 0, bits - 1)
        kept = np.minimum(count, np.maximum(bits - first, 0))
        wide = value.astype(np.int64).view(np.uint64)
        field = np.where(first < bits, wide >> np.minimum(first, 63).astype(np.uint64), 0)
        mask = np.where(
            kept >= 64, np.uint64(2**64 - 1), (np.uint64(1) << np.minimum(kept, 63).astype(np.uint64)) - np.uint64(1)
        )
        field = field & mask
        if kind[0] == "s":
            negative = (wide >> last.astype(np.uint64) & np.uint64(1)).astype(bool) & (count > 0)
            field = np.where(negative, field | ~mask, field)
        return field

    return store(target, extracted)


@operation("prmt", modifiers="b32")
def bind_permute(machine: Machine, instruction: Instruction) -> Step:
    """Pick four bytes of a pair of registers, or their signs."""
    low, high, selector = (
        machine.registers.source(instruction, operand, "u32") for operand in instruction.operands[1:]
    )
    target = machine.registers.target(instruction, instruction.operands[0], "u32")

    def permuted() -> np.ndarray:
        pair = high.astype(np.uint64) << np.uint64(32) | low
        picks = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15).astype(np.uint64)
        chosen = pair[:, None] >> (picks & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        signs = np.where(chosen >> np.uint64(7), 255, 0)
        return np.where(picks >> np.uint64(3), signs, chosen).astype(np.uint8).view(np.uint32)[:, 0]

    return store(target, permuted)


@operation("lop3", modifiers="b32")
def bind_logic(machine: Machine, instruction: Instruction) -> Step:
    """Any function of three bits, by its table."""
    one, two, three = (machine.registers.source(instruction, operand, "u32") for operand in instruction.operands[1:4])
    target = machine.registers.target(instruction, instruction.operands[0], "u32")
    table = int(instruction.operands[4].text, 0)

    def combined() -> np.ndarray:
        terms = [
            (one if index & 4 else ~one) & (two if index & 2 else ~two) & (three if index & 1 else ~three)
            for index in range(8)
            if table >> index & 1
        ]
        return np.bitwise_or.reduce([np.zeros_like(one), *terms])

    return store(target, combined)


@operation("popc", "clz", "brev", modifiers="b32 b64")
def bind_count(machine: Machine, instruction: Instruction) -> Step:
    """Set bits, leading zeros, bits in reverse."""
    opcode, kind, operands = instruction.parts[0], instruction.parts[-1], instruction.operands
    source = machine.registers.source(instruction, operands[1], kind)
    target = machine.registers.target(instruction, operands[0], kind if opcode == "brev" else "u32")
    bits = bits_of(kind)

    def counted() -> np.ndarray:
        digits = source[:, None] >> np.arange(bits, dtype=source.dtype) & 1  # lowest first
        if opcode == "popc":
            return digits.sum(1)
        if opcode == "clz":
            return np.where(digits.any(1), digits[:, ::-1].argmax(1), bits)
        return (digits << np.arange(bits - 1, -1, -1, dtype=source.dtype)).sum(1, dtype=source.dtype)

    return store(target, counted)
