"""Loads, stores and atomics of global and shared memory, parameters, fences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..memory import GLOBAL_BASE, Access
from ..parse import Instruction, Operand
from ..registers import TYPES, bits_of
from .table import Step, Where, operation

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["addresses", "lanes_of"]

_CACHE = r"ca cg cs lu cv wb wt nc evict_first evict_last L1::\w+ L2::\w+ relaxed weak volatile cta gpu sys"
_SCALAR = "b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64"


def lanes_of(where: Where) -> np.ndarray | slice:
    """The index of the threads that execute."""
    return slice(None) if where is True else np.flatnonzero(where)


def addresses(
    machine: Machine, instruction: Instruction, operand: Operand, space: str = "shared"
) -> Callable[[], np.ndarray]:
    """The addresses [threads] of an operand, as offsets from the start of its memory."""
    if operand.kind != "address" or operand.base is None:
        raise ValueError(f"expected an address, got {operand.text}")
    base, offset = operand.base, operand.offset - (GLOBAL_BASE if space == "global" else 0)
    wide = base.kind == "register" and machine.program.registers[base.text] == 64
    row = machine.registers.source(instruction, base, "s64" if wide else "u32")
    return lambda: np.add(row, offset, dtype=np.int64)


def _space(instruction: Instruction) -> str:
    for space in ("global", "shared"):
        if any(part == space or part.startswith(space + "::") for part in instruction.parts):
            return space
    raise ValueError("expected .global or .shared, generic addresses are not modelled")


def _elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if operand.kind == "vector" else (operand,)


@operation("ld", modifiers=rf"param global shared shared::cta v2 v4 v8 acquire {_CACHE} {_SCALAR}")
def bind_load(machine: Machine, instruction: Instruction) -> Step:
    """ld.param, ld.global, ld.shared; a wider register takes the value extended."""
    kind = instruction.parts[-1]
    if "param" in instruction.parts:
        return _bind_parameter(machine, instruction, kind)
    space = _space(instruction)
    elements = _elements(instruction.operands[0])
    targets = [machine.registers.target(instruction, element, kind) for element in elements]
    access = Access(instruction, bits_of(kind) // 8, len(targets), "acquire" in instruction.parts)
    machine.uses(space, access.width)
    address = addresses(machine, instruction, instruction.operands[1], space)
    wanted = TYPES[kind]

    def step(where: Where = True) -> None:
        lanes = lanes_of(where)
        at = address()[lanes]
        if not len(at):
            return
        warps = machine.warps[lanes]
        values = machine.memories[space].read(access, at, warps).view(wanted)
        for index, target in enumerate(targets):
            target[lanes] = values[:, index]
        if access.synchronises and space == "global":
            for one, warp in zip(at.tolist(), warps.tolist(), strict=True):
                machine.clock.synchronise(one, warp, acquires=True, releases=False, reads=True, writes=False)

    return step


def _bind_parameter(machine: Machine, instruction: Instruction, kind: str) -> Step:
    operand = instruction.operands[1]
    name, offset = operand.base.text if operand.base else "", operand.offset
    if name not in dict(machine.program.parameters):
        raise ValueError(f"parameter {name}")
    target = machine.registers.target(instruction, instruction.operands[0], kind)
    size = bits_of(kind) // 8

    def step(where: Where = True) -> None:
        stored = machine.parameters[name].to_bytes(8, "little")
        np.copyto(target, np.frombuffer(stored, TYPES[kind], 1, offset)[0], casting="unsafe", where=where)

    if offset + size > 8:
        raise ValueError(f"{size} bytes at {offset} of a parameter")
    return step


@operation("st", modifiers=rf"global shared shared::cta v2 v4 v8 release {_CACHE} {_SCALAR}")
def bind_store(machine: Machine, instruction: Instruction) -> Step:
    """st.global and st.shared."""
    kind = instruction.parts[-1]
    space = _space(instruction)
    plain = f"b{bits_of(kind)}"
    sources = [machine.registers.source(instruction, one, plain) for one in _elements(instruction.operands[1])]
    releases = "release" in instruction.parts
    access = Access(instruction, bits_of(kind) // 8, len(sources), releases)
    machine.uses(space, access.width)
    address = addresses(machine, instruction, instruction.operands[0], space)

    def step(where: Where = True) -> None:
        lanes = lanes_of(where)
        at = address()[lanes]
        if not len(at):
            return
        warps = machine.warps[lanes]
        values = np.stack([source[lanes] for source in sources], 1)
        machine.memories[space].write(access, at, warps, values)
        if releases and space == "global":
            for one, warp in zip(at.tolist(), warps.tolist(), strict=True):
                machine.clock.synchronise(one, warp, acquires=False, releases=True, reads=False, writes=True)

    return step


_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "cas": lambda old, expected, value: value if old == expected else old,
    "inc": lambda old, value: type(old)(0) if old >= value else old + type(old)(1),
    "dec": lambda old, value: value if old == 0 or old > value else old - type(old)(1),
}


@operation(
    "atom",
    "red",
    modifiers=rf"global shared shared::cta cta gpu sys relaxed acquire release acq_rel {' '.join(_ATOMIC)}"
    " b32 u32 s32 f32 b64 u64 s64 f64",
)
def bind_atomic(machine: Machine, instruction: Instruction) -> Step:
    """Atom and red, one thread after another in the order of threads."""
    parts, operands = instruction.parts, instruction.operands
    kind, space = parts[-1], _space(instruction)
    registers = machine.registers
    target = None if parts[0] == "red" else registers.target(instruction, operands[0], kind)
    operands = operands if target is None else operands[1:]
    values = [registers.source(instruction, operand, kind) for operand in operands[1:]]
    name = next(part for part in parts if part in _ATOMIC)
    update = _ATOMIC[name]
    if len(values) != 1 + (name == "cas"):
        raise ValueError(f"{len(values)} values")
    access = Access(instruction, bits_of(kind) // 8, synchronises=True)
    machine.uses(space, access.width)
    address = addresses(machine, instruction, operands[0], space)
    acquires = "acquire" in parts or "acq_rel" in parts
    releases = "release" in parts or "acq_rel" in parts

    def step(where: Where = True) -> None:
        memory = machine.memories[space]
        everyone = address()
        for lane in np.arange(len(everyone))[lanes_of(where)].tolist():
            at, warp = everyone[lane : lane + 1], machine.warps[lane : lane + 1]
            old = memory.read(access, at, warp).view(TYPES[kind])[0, 0]
            new = update(old, *(value[lane] for value in values))
            memory.write(access, at, warp, np.array([[new]], TYPES[kind]).view(f"u{access.size}"))
            if target is not None:
                target[lane] = old
            if space == "global":
                machine.clock.synchronise(int(at[0]), int(warp[0]), acquires, releases, reads=True, writes=True)

    return step


@operation("fence", "membar", modifiers="sc acq_rel cta gpu gl sys proxy async shared::cta global")
def bind_fence(machine: Machine, instruction: Instruction) -> Step:
    """Fence and membar order relaxed atomics around them; proxies are not modelled."""
    if "proxy" in instruction.parts:
        return _nothing
    everyone = np.unique(machine.warps)

    def step(where: Where = True) -> None:
        machine.clock.fence(everyone if where is True else np.unique(machine.warps[where]))

    return step


@operation("griddepcontrol", modifiers="wait launch_dependents")
def bind_nothing(machine: Machine, instruction: Instruction) -> Step:
    """griddepcontrol: launches follow each other."""
    return _nothing


def _nothing(where: Where = True) -> None:
    """A step without effect."""
