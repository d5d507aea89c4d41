"""The table of instructions: opcode to the function that binds one to a machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..parse import Instruction
from ..report import refuse

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["TABLE", "Operation", "Step", "Where", "bind", "operation"]

Where = Any
"""The mask [threads] of those that execute, or True."""
Step = Callable[..., Any]
"""One execution: `step()` by all threads, `step(where=mask)` by those of a mask [threads]."""
Binder = Callable[["Machine", Instruction], Step]


class Operation(NamedTuple):
    """One opcode.

    Attributes:
        bind: resolves the operands of an instruction and returns its step.
        modifiers: that are modelled, as a regular expression.
        together: threads that execute it at once: 1, 32 for a warp, 128 for a warp group.
    """

    bind: Binder
    modifiers: re.Pattern[str]
    together: int


TABLE: dict[str, Operation] = {}


def operation(*opcodes: str, modifiers: str, together: int = 1) -> Callable[[Binder], Binder]:
    """Register the binder of opcodes, with the modifiers that it models, words or regular expressions."""

    def register(binder: Binder) -> Binder:
        for opcode in opcodes:
            TABLE[opcode] = Operation(binder, re.compile("|".join(modifiers.split())), together)
        return binder

    return register


def bind(machine: Machine, instruction: Instruction) -> tuple[Step, int]:
    """The step of an instruction, and the threads that execute it at once.

    Raises:
        UnknownInstruction: opcode, modifier or operands are not modelled.
    """
    opcode, *modifiers = instruction.parts
    found = TABLE.get(opcode)
    if found is None:
        raise refuse(instruction, f"unknown instruction {opcode}", TABLE)
    for modifier in modifiers:
        if not found.modifiers.fullmatch(modifier):
            raise refuse(instruction, f"unknown modifier .{modifier} of {opcode}", found.modifiers.pattern.split("|"))
    try:
        return found.bind(machine, instruction), found.together
    except (IndexError, KeyError, ValueError) as error:
        raise refuse(instruction, f"operands or modifiers of {opcode} that are not modelled ({error})") from error
