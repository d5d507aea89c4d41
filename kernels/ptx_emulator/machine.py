"""One CTA: threads in lock step, their divergence, barriers.

Threads at the same instruction execute it together. Where they part, those furthest behind go on until others are met. Threads wait
at a barrier for all that have not ended, at an instruction of a whole warp or warp group for the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .clock import Clock
from .instructions import TABLE, bind
from .instructions.asynchronous import InFlight
from .instructions.table import Where
from .memory import Memory
from .parse import Instruction, Program
from .registers import Registers
from .report import Hang, Report, UnknownInstruction, place, refuse

__all__ = ["Machine"]

_CONTROL = ("bra", "ret", "exit", "bar", "barrier")


class Machine:
    """A program bound to a register file; runs one CTA after another.

    Args:
        program: a kernel.

    Raises:
        UnknownInstruction: the program has an instruction that is not modelled.
    """

    def __init__(self, program: Program) -> None:
        if program.threads % 32:
            raise UnknownInstruction(f"expected whole warps of 32 threads a CTA, got {program.threads} threads")
        self.program = program
        self.registers = Registers(program)
        self.warps = np.arange(program.threads) // 32
        self.granules = {"global": 16, "shared": 16}
        self.parameters: dict[str, int] = {}
        self.clock, self.report = Clock(), Report(program.name)
        self.memories: dict[str, Memory] = {}
        self.in_flight = InFlight(self)
        self._end, self._left = len(program.instructions), 0
        self._control: list[tuple[str, int] | None] = []
        self._together: list[int] = []
        self._steps: list[Callable[[], object]] = []
        self._masked: list[Callable[[np.ndarray], object]] = []
        for instruction in program.instructions:
            self._bind(instruction)
        # The next branch, barrier or end from each instruction on; and, where threads have parted, the next of a whole warp.
        self._stops = _next(self._end, [kind is not None for kind in self._control])
        self._halts = _next(
            self._end,
            [kind is not None or together > 1 for kind, together in zip(self._control, self._together, strict=True)],
        )

    def uses(self, space: str, width: int) -> None:
        """Note while binding that an instruction accesses `width` bytes."""
        self.granules[space] = min(self.granules[space], width)

    def prepare(self, memories: dict[str, Memory], clock: Clock, report: Report, parameters: dict[str, int]) -> None:
        """Set the memories, clock, report and parameters of a launch."""
        self.memories, self.clock, self.report, self.parameters = memories, clock, report, parameters

    def run(self, cta: tuple[int, int, int], grid: tuple[int, int, int], limit: int) -> None:
        """Run a CTA of a grid to its end.

        Raises:
            Hang: more than `limit` instructions, or threads that wait for each other.
        """
        self.report.cta = cta
        self.report.ctas += 1
        self.clock.begin()
        self.memories["shared"].data.fill(0xFF)
        self.registers.reset(cta, grid)
        self.in_flight.clear()
        self._left = limit
        with np.errstate(all="ignore"):
            index: int | None = 0
            while index is not None:
                at = self._run_together(index)
                index = None if at is None else self._run_apart(at)
            self.in_flight.wait_for_copies(0)
        self.report.instructions += limit - self._left

    def _bind(self, instruction: Instruction) -> None:
        control = self._control_of(instruction)
        step, together = (_nothing, 1) if control else bind(self, instruction)
        self._control.append(control)
        self._together.append(together)
        if instruction.guard is None:
            self._steps.append(step)
            self._masked.append(lambda mask: step(where=mask))
        else:
            guard = partial(
                self._guard, self.registers.predicate(instruction.guard.register), instruction.guard.negated
            )
            self._steps.append(lambda: step(where=guard()))
            self._masked.append(lambda mask: step(where=mask & guard()))

    @staticmethod
    def _guard(predicate: np.ndarray, negated: bool) -> np.ndarray:
        return ~predicate if negated else predicate

    def _control_of(self, instruction: Instruction) -> tuple[str, int] | None:
        """(kind, target of a branch) of an instruction that decides where threads go on, else None."""
        parts, operands = instruction.parts, instruction.operands
        if parts[0] == "bra" and set(parts[1:]) <= {"uni"}:
            return "branch", self.program.labels[operands[0].text]
        if parts[0] in ("ret", "exit") and set(parts[1:]) <= {"uni"}:
            return "end", self._end
        if parts[0] in ("bar", "barrier") and "warp" not in parts:
            texts = [operand.text for operand in operands]
            if not set(parts[1:]) <= {"sync", "cta", "aligned"} or texts not in (
                ["0"],
                ["0", str(self.program.threads)],
            ):
                raise refuse(instruction, "barrier of a part of the CTA", ["bar.sync 0"])
            return "barrier", 0
        if parts[0] in _CONTROL and "warp" not in parts:
            raise refuse(instruction, f"unknown form of {parts[0]}", [*_CONTROL, *TABLE])
        return None

    def _run_together(self, index: int) -> np.ndarray | None:
        """Run all threads from an instruction on; None at their end, else the instruction of each after they part."""
        while True:
            stop = self._stops[index]
            for step in self._steps[index:stop]:
                step()
            self._count(stop - index + 1, stop)
            if stop == self._end:
                return None
            kind, target = self._control[stop] or ("", 0)
            guard = self.program.instructions[stop].guard
            taken = None if guard is None else self._guard(self.registers.predicate(guard.register), guard.negated)
            if taken is not None and not taken.any():
                index = stop + 1
            elif taken is not None and not taken.all():
                return np.where(taken, stop if kind == "barrier" else target, stop + 1)
            elif kind == "barrier":
                self.clock.barrier()
                index = stop + 1
            elif kind == "end":
                return None
            else:
                index = target

    def _run_apart(self, at: np.ndarray) -> int | None:
        """Run threads from different instructions until all are at one, and return it; None at the end of all."""
        waiting = np.zeros(len(at), bool)
        while True:
            free = np.where(waiting, self._end, at)
            index = int(free.min())
            if index == self._end:
                if not waiting.any():
                    return None
                self._release(at, waiting)
                continue
            mask = free == index
            if mask.all():
                return index
            others = free[free > index]
            stop = min(self._halts[index], int(others.min()) if others.size else self._end)
            if stop > index:
                for step in self._masked[index:stop]:
                    step(mask)
                self._count(stop - index, index)
                at[mask] = stop
            elif self._control[index] is None:
                waiting |= mask
                self._run_whole_groups(index, at, waiting)
            else:
                self._divert(index, mask, at, waiting)
            self._count(1, index)

    def _divert(self, index: int, mask: np.ndarray, at: np.ndarray, waiting: np.ndarray) -> None:
        """A branch, barrier or end executed by some threads."""
        kind, target = self._control[index] or ("", 0)
        guard = self.program.instructions[index].guard
        taken = mask
        if guard is not None:
            taken = mask & self._guard(self.registers.predicate(guard.register), guard.negated)
        at[mask] = index + 1
        if kind == "barrier":
            at[taken] = index
            waiting |= taken
        else:
            at[taken] = target

    def _run_whole_groups(self, index: int, at: np.ndarray, waiting: np.ndarray) -> bool:
        """Execute an instruction of a warp or warp group in those whose threads are all there; whether there are any."""
        here = waiting & (at == index)
        there = (here | (at == self._end)).reshape(-1, self._together[index]).all(1)
        ready = here & np.repeat(there, self._together[index])
        if not ready.any():
            return False
        self._masked[index](ready)
        at[ready] = index + 1
        waiting[ready] = False
        return True

    def _release(self, at: np.ndarray, waiting: np.ndarray) -> None:
        """Let threads go on once all that have not ended wait."""
        indices = [int(index) for index in np.unique(at[waiting])]
        if all(self._control[index] is not None for index in indices):
            self.clock.barrier()
            at[waiting] += 1
            waiting[:] = False
            return
        if not any(self._control[index] is None and self._run_whole_groups(index, at, waiting) for index in indices):
            lines = "; ".join(place(self.program.instructions[index]) for index in indices)
            raise Hang(f"{self.program.name}, CTA {self.report.cta}: threads wait for each other at {lines}")

    def _count(self, executed: int, index: int) -> None:
        self._left -= executed
        if self._left < 0:
            last = self.program.instructions[min(index, self._end - 1)]
            raise Hang(
                f"{self.program.name}, CTA {self.report.cta}: no end within the limit of instructions, at {place(last)}; it waits"
                " for a CTA that runs later, or needs a larger limit"
            )


def _nothing(where: Where = True) -> None:
    """The step of a branch."""


def _next(end: int, marks: list[bool]) -> list[int]:
    """For each position, the first marked one from it on, else `end`."""
    found, result = end, []
    for index in range(end - 1, -1, -1):
        found = index if marks[index] else found
        result.append(found)
    return [*reversed(result), end]
