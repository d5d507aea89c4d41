"""Who wrote and who read each granule of a memory last, compared at each access."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .clock import FIRST_GROUP, IN_FLIGHT, Clock, instruction_of, stamp, who_of
from .parse import Instruction, Program
from .report import Finding, Report, place

__all__ = ["Shadow"]

_READ_AFTER_WRITE = "a warp reads what another wrote since the last barrier"
_WRITE_AFTER_WRITE = "two warps write different values without a barrier in between"
_WRITE_AFTER_READ = "a warp overwrites what another read since the last barrier"
_COPY_IN_FLIGHT = "access to the target of an asynchronous copy that was not waited for"
_PRODUCT_IN_FLIGHT = "write to an operand of an asynchronous product that was not waited for"
_BETWEEN_CTAS = {
    _READ_AFTER_WRITE: "a CTA reads what another wrote, without acquiring its release",
    _WRITE_AFTER_WRITE: "two CTAs write different values, without an order",
    _WRITE_AFTER_READ: "a CTA overwrites what another read, without acquiring its release",
}
_UNWRITTEN = "shared memory that nobody wrote is read"


class Shadow:
    """Stamps of the last write, and of the last read by each warp and warp group.

    Args:
        size: bytes of the memory.
        granule: bytes that share a stamp, a power of 2.
        space: "global" or "shared".
        program: whose accesses.
        clock: order of accesses.
        report: where findings go.
    """

    def __init__(self, size: int, granule: int, space: str, program: Program, clock: Clock, report: Report) -> None:
        self._space, self._clock, self._report = space, clock, report
        self._shift = granule.bit_length() - 1
        self._instructions = program.instructions
        warps = program.threads // 32
        words, groups = size // granule, -(-warps // 4)
        who = np.array([*range(warps), *range(FIRST_GROUP, FIRST_GROUP + groups)])
        # The reader has a row of granules for each warp, then for each warp group.
        self._row_of = np.zeros(2 * FIRST_GROUP, np.int64)
        self._row_of[who] = np.arange(len(who)) * words
        self._who = who[:, None, None]
        self._writer = np.zeros(words, np.int64)
        self._reader = np.zeros(len(who) * words, np.int64)
        self._elements = {1 << power: np.arange(1 << power) for power in range(6)}

    def read(self, instruction: Instruction, at: np.ndarray, width: int, who: np.ndarray) -> None:
        """Compare reads of `width` bytes by warps or groups [lanes] with the writes before, and remember them."""
        words, clock = self._cells(at, width), self._clock
        written = self._writer[words]
        latest = int(np.maximum.reduce(written, None))
        if latest >= clock.now:
            self._check(instruction, _READ_AFTER_WRITE, written, who[:, None])
        if self._space == "shared":
            if int(np.minimum.reduce(written, None)) < clock.start:
                lanes = (written < clock.start).any(1)
                self._report.add(Finding("uninitialised", "shared", _UNWRITTEN, place(instruction)), int(lanes.sum()))
        elif latest:
            self._check_foreign(instruction, _READ_AFTER_WRITE, written)
        self._reader[words + self._row_of[who][:, None]] = clock.now + instruction.number

    def write(
        self,
        instruction: Instruction,
        at: np.ndarray,
        width: int,
        warps: np.ndarray,
        changes: Callable[[], np.ndarray],
        in_flight: bool = False,
    ) -> None:
        """Compare writes by warps [lanes] with the accesses before, and remember them; `changes` tells which alter memory."""
        words, clock = self._cells(at, width), self._clock
        written, read = self._writer[words], self._reader[words + self._row_of[self._who]]
        for before, what in ((written, _WRITE_AFTER_WRITE), (read, _WRITE_AFTER_READ)):
            latest = int(np.maximum.reduce(before, None))
            if not latest:
                continue
            who = who_of(before) if before is written else np.broadcast_to(self._who, read.shape)
            if latest >= clock.now:
                self._check(instruction, what, before, warps[:, None], who, changes)
            if self._space == "global":
                self._check_foreign(instruction, what, before, changes)
        self._writer[words] = stamp(IN_FLIGHT if in_flight else clock.now, warps, instruction)[:, None]

    def finish_write(self, instruction: Instruction, at: np.ndarray, width: int, warps: np.ndarray) -> None:
        """Asynchronous writes are complete: they were made in this epoch."""
        self._writer[self._cells(at, width)] = stamp(self._clock.now, warps, instruction)[:, None]

    def mark_read(self, instruction: Instruction, at: np.ndarray, width: int, group: int, in_flight: bool) -> None:
        """Asynchronous reads by a group are in flight, or were complete in this epoch."""
        words = self._cells(at, width) + self._row_of[group]
        self._reader[words] = (IN_FLIGHT if in_flight else self._clock.now) + instruction.number

    def _cells(self, at: np.ndarray, width: int) -> np.ndarray:
        """[lanes, granules] of accesses."""
        first = (at >> self._shift)[:, None]
        count = width >> self._shift
        return first if count <= 1 else first + self._elements[count]

    def _check(
        self,
        instruction: Instruction,
        what: str,
        before: np.ndarray,
        warps: np.ndarray,
        who: np.ndarray | None = None,
        changes: Callable[[], np.ndarray] | None = None,
    ) -> None:
        """Report accesses of this epoch by others: neither the same warp nor its group."""
        who = who_of(before) if who is None else who
        racing = (before >= self._clock.now) & (who != warps) & (who != FIRST_GROUP + warps // 4)
        # Nobody may touch what is in flight, not even who started it.
        racing |= before >= IN_FLIGHT
        if racing.any() and changes is not None:
            flying = racing & (before >= IN_FLIGHT)
            racing = racing & changes()[:, None] | flying
        if not racing.any():
            return
        in_flight = _PRODUCT_IN_FLIGHT if what == _WRITE_AFTER_READ else _COPY_IN_FLIGHT
        stamps = before[racing]
        for told, some in ((what, stamps[stamps < IN_FLIGHT]), (in_flight, stamps[stamps >= IN_FLIGHT])):
            self._report_pairs("race", instruction, told, some)

    def _check_foreign(
        self, instruction: Instruction, what: str, before: np.ndarray, changes: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Report accesses of other CTAs that are not ordered before."""
        racing = self._clock.unordered(before)
        if racing.any() and changes is not None:
            racing &= changes()[:, None]
        if racing.any():
            self._report_pairs("race between CTAs", instruction, _BETWEEN_CTAS[what], before[racing])

    def _report_pairs(self, kind: str, instruction: Instruction, what: str, stamps: np.ndarray) -> None:
        others, counts = np.unique(instruction_of(stamps), return_counts=True)
        for other, count in zip(others, counts, strict=True):
            finding = Finding(kind, self._space, what, place(instruction), place(self._instructions[other]))
            self._report.add(finding, int(count))
