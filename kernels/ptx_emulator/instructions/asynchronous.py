"""Copies (cp.async) and products (wgmma) in flight: what they touch is unordered until they are waited for.

Groups are those of the CTA, which is exact while all threads commit and wait together.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..memory import Access
from ..parse import Instruction
from .memory import addresses, lanes_of
from .table import Step, Where, operation

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["InFlight"]


class _Copy(NamedTuple):
    access: Access
    at: np.ndarray
    warps: np.ndarray
    values: np.ndarray


class _Read(NamedTuple):
    access: Access
    at: np.ndarray
    group: int


class _Sums(NamedTuple):
    threads: slice
    values: np.ndarray
    serial: int


class InFlight:
    """Groups of copies and of products that were committed, and the ones not committed yet."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._copies: list[list[_Copy]] = [[]]
        self._products: list[list[_Read]] = [[]]
        self._sums: dict[tuple[int, tuple[int, ...]], _Sums] = {}
        self._committed = 0

    def copy(self, access: Access, at: np.ndarray, warps: np.ndarray, values: np.ndarray) -> None:
        """Start a copy of bytes to shared memory."""
        shared = self._machine.memories["shared"]
        inside = shared.checked(access, at)
        if inside is not None:
            at, warps, values = at[inside], warps[inside], values[inside]
        if len(at):
            shared.shadow.write(
                access.instruction, at, access.width, warps, lambda: np.ones(len(at), bool), in_flight=True
            )
            self._copies[-1].append(_Copy(access, at, warps, values))

    def read(self, access: Access, at: np.ndarray, group: int) -> None:
        """Start to read operands of a product in shared memory, as a warp group."""
        self._machine.memories["shared"].shadow.mark_read(access.instruction, at, access.width, group, in_flight=True)
        self._products[-1].append(_Read(access, at, group))

    def accumulate(
        self, group: int, registers: tuple[int, ...], threads: slice, product: np.ndarray, adds: np.ndarray
    ) -> None:
        """Add a product [registers, threads] to accumulators of a warp group, which hold NaN until they are waited for."""
        file = self._machine.registers.words
        known = self._sums.pop((group, registers), None)
        old = file[registers, threads].view(np.float32) if known is None else known.values
        values = (np.where(adds, old, np.float32(0)) + product).astype(np.float32)
        self._sums[group, registers] = _Sums(threads, values, self._committed)
        file[registers, threads] = np.array(np.nan, np.float32).view(np.uint32)

    def commit_copies(self, where: Where = True) -> None:
        """Close a group of copies."""
        self._copies.append([])

    def commit_products(self, where: Where = True) -> None:
        """Close a group of products."""
        self._products.append([])
        self._committed += 1

    def wait_for_copies(self, pending: int, where: Where = True) -> None:
        """Finish all committed groups but the last `pending`."""
        shared = self._machine.memories["shared"]
        while len(self._copies) - 1 > pending:
            for access, at, warps, values in self._copies.pop(0):
                shared.put(access, at, values)
                shared.shadow.finish_write(access.instruction, at, access.width, warps)

    def wait_for_products(self, pending: int, where: Where = True) -> None:
        """Finish all committed groups but the last `pending`; others may still read the same operands."""
        shadow = self._machine.memories["shared"].shadow
        while len(self._products) - 1 > pending:
            for access, at, group in self._products.pop(0):
                shadow.mark_read(access.instruction, at, access.width, group, in_flight=False)
        file = self._machine.registers.words
        for (group, registers), sums in list(self._sums.items()):
            if sums.serial < self._committed - pending:
                file[registers, sums.threads] = sums.values.view(np.uint32)
                del self._sums[group, registers]
        for products in self._products:
            for access, at, group in products:
                shadow.mark_read(access.instruction, at, access.width, group, in_flight=True)


@operation(
    "cp",
    modifiers=r"async ca cg shared shared::cta global commit_group wait_group wait_all L1::\w+ L2::\w+",
)
def bind_copy(machine: Machine, instruction: Instruction) -> Step:
    """cp.async of 4, 8 or 16 bytes a thread, zero beyond its source size; cp.async.commit_group, wait_group, wait_all."""
    parts, operands = instruction.parts, instruction.operands
    flight = machine.in_flight
    if "commit_group" in parts:
        return flight.commit_copies
    if "wait_group" in parts:
        return partial(flight.wait_for_copies, int(operands[0].text, 0))
    if "wait_all" in parts:

        def wait_for_all(where: Where = True) -> None:
            flight.commit_copies()
            flight.wait_for_copies(0)

        return wait_for_all
    size = int(operands[2].text, 0)
    if size not in (4, 8, 16):
        raise ValueError(f"{size} bytes a thread")
    machine.uses("shared", size)
    machine.uses("global", size)
    target = addresses(machine, instruction, operands[0])
    source = addresses(machine, instruction, operands[1], "global")
    given = machine.registers.source(instruction, operands[3], "u32") if len(operands) > 3 else None
    whole, byte = Access(instruction, 4, size // 4), Access(instruction, 1)

    def step(where: Where = True) -> None:
        lanes = lanes_of(where)
        at, warps, start = target()[lanes], machine.warps[lanes], source()[lanes]
        if not len(at):
            return
        memory = machine.memories["global"]
        values = np.zeros((len(at), size // 4), np.uint32)
        known = np.full(len(at), size) if given is None else np.minimum(given[lanes], size)
        full = known == size
        if full.any():
            values[full] = memory.read(whole, start[full], warps[full])
        for lane in np.flatnonzero(~full & (known > 0)).tolist():
            count = int(known[lane])
            places = start[lane] + np.arange(count)
            values[lane].view(np.uint8)[:count] = memory.read(byte, places, np.repeat(warps[lane], count))[:, 0]
        flight.copy(whole, at, warps, values)

    return step
