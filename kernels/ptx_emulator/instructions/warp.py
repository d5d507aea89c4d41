"""Exchange within a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..parse import Instruction
from ..registers import TYPES
from .table import Step, Where, operation

if TYPE_CHECKING:
    from ..machine import Machine


@operation("shfl", modifiers="sync up down bfly idx b32", together=32)
def bind_shuffle(machine: Machine, instruction: Instruction) -> Step:
    """shfl.sync: the value of another lane, the own one where that lies outside of the segment."""
    registers, operands = machine.registers, instruction.operands
    targets = operands[0].items if operands[0].kind == "vector" else (operands[0],)
    target = registers.target(instruction, targets[0], "b32")
    found = registers.target(instruction, targets[1], "pred") if len(targets) > 1 else None
    value = registers.source(instruction, operands[1], "b32")
    amount, limit = (registers.source(instruction, operand, "u32") for operand in operands[2:4])
    mode = instruction.parts[2]
    thread = np.arange(machine.program.threads)
    lane = thread % 32

    def step(where: Where = True) -> None:
        step_by, segment, clamp = (
            (amount & 31).astype(np.int64),
            (limit >> 8 & 31).astype(np.int64),
            (limit & 31).astype(np.int64),
        )
        last, first = lane & segment | clamp & ~segment, lane & segment
        if mode == "up":
            other = lane - step_by
            inside = other >= last
        else:
            other = {"down": lane + step_by, "bfly": lane ^ step_by, "idx": first | step_by & ~segment}[mode]
            inside = other <= last
        source = np.where(inside, thread - lane + other, thread)
        np.copyto(target, value[source], where=where)
        if found is not None:
            np.copyto(found, inside, where=where)

    if mode not in ("up", "down", "bfly", "idx"):
        raise ValueError(f"mode {mode}")
    return step


@operation("redux", modifiers="sync add min max and or xor b32 u32 s32", together=32)
def bind_reduction(machine: Machine, instruction: Instruction) -> Step:
    """redux.sync over the lanes of the mask, which must be all that execute."""
    kind, operands = instruction.parts[-1], instruction.operands
    function = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[instruction.parts[2]]  # fmt: skip
    value = machine.registers.source(instruction, operands[1], kind)
    target = machine.registers.target(instruction, operands[0], kind)
    mask = machine.registers.source(instruction, operands[2], "u32")
    lane = np.arange(machine.program.threads, dtype=np.uint32) % 32

    def step(where: Where = True) -> None:
        member = (mask >> lane & 1).astype(bool)
        for warp in range(0, len(lane), 32):
            lanes = (
                np.flatnonzero(member[warp : warp + 32] & (True if where is True else where[warp : warp + 32])) + warp
            )
            if lanes.size:
                target[lanes] = function.reduce(value[lanes], dtype=TYPES[kind])

    return step


@operation("vote", modifiers="sync all any uni ballot pred b32", together=32)
def bind_vote(machine: Machine, instruction: Instruction) -> Step:
    """vote.sync: all, any, uni, and the ballot of a warp."""
    mode, operands, registers = instruction.parts[2], instruction.operands, machine.registers
    predicate = registers.source(instruction, operands[1]._replace(negated=False), "pred")
    negated = operands[1].negated
    mask = registers.source(instruction, operands[2], "u32")
    target = registers.target(instruction, operands[0], "b32" if mode == "ballot" else "pred")
    lane = np.arange(machine.program.threads, dtype=np.uint32) % 32

    def step(where: Where = True) -> None:
        member = (mask >> lane & 1).astype(bool) & where
        votes = ((predicate ^ negated) & member).reshape(-1, 32)
        member = member.reshape(-1, 32)
        if mode == "ballot":
            result = (votes.astype(np.uint32) << lane.reshape(-1, 32)).sum(1, dtype=np.uint32)
        else:
            every, some = (votes == member).all(1), votes.any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        np.copyto(target, np.repeat(result, 32), where=where)

    return step


@operation("bar", "barrier", modifiers="warp sync", together=32)
def bind_warp_barrier(machine: Machine, instruction: Instruction) -> Step:
    """bar.warp.sync: threads of a warp wait for each other."""
    return lambda where=True: None
