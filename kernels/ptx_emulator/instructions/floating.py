"""Floating point, and the opcodes it shares with integers.

fp32 and fp64 are IEEE; a fused multiply-add of fp32 is computed in fp64 and rounded once more, and approximate instructions
(ex2, lg2, rcp, sqrt, rsqrt, sin, cos, tanh, div.full) give what numpy gives, both within a last place of the exact result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parse import Instruction
from ..report import refuse
from .integer import apply, bind_division, bind_integer, bind_product
from .table import Step, Where, operation

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["from_bf16", "from_tf32", "to_bf16"]

_INTEGER = re.compile("u16|s16|u32|s32|u64|s64|lo|hi|wide")
_FLOAT = re.compile("rn|ftz|NaN|approx|full|f16|bf16|f16x2|bf16x2|f32|f64")
_BOTH = r"u16 s16 u32 s32 u64 s64 lo hi wide rn ftz NaN approx full f16 bf16 f16x2 bf16x2 f32 f64"
_FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
_SMALLEST = np.finfo(np.float32).smallest_normal


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """fp32 of the bits of bf16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of bf16 of fp32, rounded to the nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def from_tf32(bits: np.ndarray) -> np.ndarray:
    """fp32 as tensor cores read it: without the last 13 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def flushed(values: np.ndarray) -> np.ndarray:
    """fp32 with a zero of the same sign for subnormal numbers, as .ftz."""
    return np.where(np.abs(values) < _SMALLEST, np.copysign(np.float32(0), values), values)


def _fma_32(left: np.ndarray, right: np.ndarray, more: np.ndarray) -> np.ndarray:
    result = left.astype(np.float64)
    result *= right
    result += more
    return result.astype(np.float32)


def _fma(left: np.ndarray, right: np.ndarray, more: np.ndarray) -> np.ndarray:
    if left.dtype == np.float64:
        return (left.astype(np.longdouble) * right + more).astype(np.float64)
    return (left.astype(np.float64) * right + more).astype(left.dtype)


_FUNCTIONS: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": _fma,
    "mad": _fma,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda value: 1 / np.sqrt(value),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "copysign": lambda sign, value: np.copysign(value, sign),
}
_COUNTS = {"fma": 3, "mad": 3, "rsqrt": 1, "copysign": 2}


def bind_floating(machine: Machine, instruction: Instruction) -> Step:
    """A function of floating-point numbers of any type."""
    opcode, kind = instruction.parts[0], instruction.parts[-1]
    function = _FUNCTIONS[opcode]
    if "NaN" in instruction.parts:
        function = {"min": np.minimum, "max": np.maximum}[opcode]
    count = _COUNTS.get(opcode) or function.nin
    if kind == "f32" and function is _fma:
        function = _fma_32
    if kind.startswith("bf16"):
        plain = _fma_32 if function is _fma else function
        function = lambda *values: to_bf16(plain(*map(from_bf16, values)))  # noqa: E731
    if "ftz" in instruction.parts and kind == "f32":
        exact = function
        function = lambda *values: flushed(exact(*map(flushed, values)))  # noqa: E731
    step = apply(machine, instruction, function, kind, count)
    if not kind.endswith("x2"):
        return step
    return lambda where=True: step(where=where if where is True else np.repeat(where, 2))


@operation("add", "sub", "min", "max", "neg", "abs", "mul", "mad", "div", "rem", modifiers=_BOTH)
def bind_arithmetic(machine: Machine, instruction: Instruction) -> Step:
    """Arithmetic of integers or floating-point numbers."""
    opcode, kind = instruction.parts[0], instruction.parts[-1]
    allowed = _FLOAT if kind in _FLOATS else _INTEGER
    for modifier in instruction.parts[1:]:
        if not allowed.fullmatch(modifier):
            raise refuse(instruction, f"unknown modifier .{modifier} of {opcode}.{kind}", allowed.pattern.split("|"))
    if kind in _FLOATS:
        return bind_floating(machine, instruction)
    binders = {"mul": bind_product, "mad": bind_product, "div": bind_division, "rem": bind_division}
    return binders.get(opcode, bind_integer)(machine, instruction)


@operation(
    "fma", "ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "copysign",
    modifiers="rn approx ftz f16 bf16 f16x2 bf16x2 f32 f64",
)  # fmt: skip
def bind_function(machine: Machine, instruction: Instruction) -> Step:
    """Functions of floating-point numbers."""
    return bind_floating(machine, instruction)


_COMPARE: dict[str, np.ufunc] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {
    f"{name}u": function for name, function in _COMPARE.items() if name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_COMBINE: dict[str, np.ufunc] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@operation(
    "setp",
    modifiers=" ".join((*_COMPARE, *_UNORDERED, *_COMBINE))
    + " num nan ftz b16 u16 s16 b32 u32 s32 b64 u64 s64 f16 bf16 f16x2 bf16x2 f32 f64",
)
def bind_comparison(machine: Machine, instruction: Instruction) -> Step:
    """Comparisons; ordered ones are false with NaN, unordered ones true; a third predicate may be combined with the result.

    Packed types have two targets, for the lower and the upper half.
    """
    parts, operands, registers = instruction.parts, instruction.operands, machine.registers
    kind, name = parts[-1], parts[1]
    left, right = (registers.source(instruction, operand, kind) for operand in operands[1:3])
    items = operands[0].items if operands[0].kind == "vector" else operands[:1]
    targets = [registers.target(instruction, item, "pred") for item in items]
    packed = kind.endswith("x2")
    if len(targets) > 2 or packed != (len(targets) == 2):
        raise refuse(instruction, "number of targets", ["two of packed types, one of others"])
    is_float = kind in _FLOATS
    if not is_float and len(parts) == 3 and name in _COMPARE:
        unsigned = kind[0] == "b" or name in ("lo", "ls", "hi", "hs")
        sides = [side.view(side.dtype.str.replace("i", "u")) if unsigned else side for side in (left, right)]
        return partial(_COMPARE[name], *sides, out=targets[0])
    combine = next((_COMBINE[part] for part in parts[2:-1] if part in _COMBINE), None)
    more = registers.source(instruction, operands[3]._replace(negated=False), "pred") if combine else None
    inverted = combine is not None and operands[3].negated

    def compared() -> np.ndarray:
        sides = [from_bf16(side) for side in (left, right)] if kind.startswith("bf16") else [left, right]
        if "ftz" in parts and kind == "f32":
            sides = [flushed(side) for side in sides]
        nan = np.isnan(sides[0]) | np.isnan(sides[1]) if is_float else np.zeros(len(left), bool)
        if name in ("num", "nan"):
            return nan if name == "nan" else ~nan
        if name in _UNORDERED:
            return _UNORDERED[name](*sides) | nan
        return _COMPARE[name](*sides) & ~nan

    def step(where: Where = True) -> None:
        result = compared()
        for index, target in enumerate(targets):
            own = result[index :: len(targets)]
            if combine is not None and more is not None:
                own = combine(own, ~more if inverted else more)
            np.copyto(target, own, where=where)

    return step


@operation("selp", modifiers="b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64 f16 bf16")
def bind_selection(machine: Machine, instruction: Instruction) -> Step:
    """One of two values by a predicate."""
    operands, registers = instruction.operands, machine.registers
    kind = instruction.parts[-1]
    yes, no = (registers.source(instruction, operand, kind) for operand in operands[1:3])
    target = registers.target(instruction, operands[0], kind)
    predicate = registers.source(instruction, operands[3], "pred")
    return lambda where=True: np.copyto(target, np.where(predicate, yes, no), casting="unsafe", where=where)


@operation("testp", modifiers="finite infinite number notanumber normal subnormal f32 f64")
def bind_test(machine: Machine, instruction: Instruction) -> Step:
    """Kinds of floating-point numbers."""
    kind, name = instruction.parts[-1], instruction.parts[1]
    source = machine.registers.source(instruction, instruction.operands[1], kind)
    target = machine.registers.target(instruction, instruction.operands[0], "pred")
    smallest = np.finfo(source.dtype).smallest_normal
    tests: dict[str, Callable[[], np.ndarray]] = {
        "finite": lambda: np.isfinite(source),
        "infinite": lambda: np.isinf(source),
        "number": lambda: ~np.isnan(source),
        "notanumber": lambda: np.isnan(source),
        "normal": lambda: np.isfinite(source) & (np.abs(source) >= smallest),
        "subnormal": lambda: (np.abs(source) < smallest) & (source != 0),
    }
    test = tests[name]
    return lambda where=True: np.copyto(target, test(), where=where)
