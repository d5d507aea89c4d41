"""What happened before what: epochs between barriers within a CTA, releases and acquires between CTAs.

A stamp tells an access: its epoch, who made it (a warp or a warp group), and its instruction. Stamps order all accesses of a
launch, whose CTAs run one after another.
"""

from __future__ import annotations

import numpy as np

from .parse import Instruction

__all__ = ["EPOCH", "FIRST_GROUP", "IN_FLIGHT", "Clock", "instruction_of", "stamp", "who_of"]

FIRST_GROUP = 32
"""The first warp group, after at most 32 warps; wgmma reads and waits as a group, and its four warps know what it did."""
_WHO, _WHOM = 20, 64
EPOCH = _WHOM << _WHO
"""Difference of stamps between epochs."""
IN_FLIGHT = 1 << 62
"""Start of the stamps of asynchronous accesses that were not waited for; later than any other."""


def stamp(epoch: int, who: np.ndarray, instruction: Instruction) -> np.ndarray:
    """The stamps of accesses by warps or groups."""
    return (who << _WHO) + (epoch + instruction.number)


def who_of(stamps: np.ndarray) -> np.ndarray:
    """Warp or group of a stamp."""
    return stamps >> _WHO & _WHOM - 1


def instruction_of(stamps: np.ndarray) -> np.ndarray:
    """Number of the instruction of a stamp."""
    return stamps & (1 << _WHO) - 1


class Clock:
    """Epochs of a launch, and what the CTA that runs knows of the others.

    Attributes:
        now: first stamp of this epoch; all accesses from it on are unordered between warps.
        start: first stamp of this CTA.
    """

    def __init__(self) -> None:
        self.now = self.start = EPOCH
        self._starts: list[int] = []
        # [CTAs, warps]: a stamp below it happened before.
        self._known = np.zeros((0, _WHOM), np.int64)
        self._fenced: np.ndarray | None = None
        self._seen: np.ndarray | None = None
        self._released: dict[int, np.ndarray] = {}

    def begin(self) -> None:
        """Start the next CTA."""
        self.barrier()
        self.start = self.now
        self._starts.append(self.start)
        self._known = np.zeros((len(self._starts), _WHOM), np.int64)
        self._fenced = self._seen = None

    def barrier(self) -> None:
        """Order all that this CTA did before all it will do."""
        self.now += EPOCH

    def unordered(self, stamps: np.ndarray) -> np.ndarray:
        """Whether accesses of earlier CTAs, by their stamps, are not known to have happened before; 0 is no access."""
        owner = np.searchsorted(self._starts, stamps, "right") - 1
        foreign = (stamps > 0) & (stamps < self.start)
        return foreign & (stamps >= self._known[np.maximum(owner, 0), who_of(stamps)])

    def fence(self, warps: np.ndarray) -> None:
        """A fence: later relaxed atomics release what was done so far, and what earlier ones read is acquired."""
        self._fenced = _joined(self._fenced, self._snapshot(warps))
        if self._seen is not None:
            self._known = _joined(self._known, self._seen)

    def synchronise(self, address: int, warp: int, acquires: bool, releases: bool, reads: bool, writes: bool) -> None:
        """An atomic access, or a load that acquires or a store that releases, of one address."""
        released = self._released.get(address)
        if reads and released is not None:
            if acquires:
                self._known = _joined(self._known, released)
            else:
                self._seen = _joined(self._seen, released)
        if not writes:
            return
        ours = self._snapshot(np.array([warp])) if releases else self._fenced
        # An atomic update continues the releases before it, a store replaces them.
        kept = released if reads else None
        if ours is not None:
            self._released[address] = _joined(kept, ours)
        elif kept is None:
            self._released.pop(address, None)

    def _snapshot(self, warps: np.ndarray) -> np.ndarray:
        """What happened before a release by these warps."""
        known = self._known.copy()
        known[-1] = self.now
        known[-1, warps] = self.now + EPOCH
        return known


def _joined(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    if one is None:
        return other
    if len(one) < len(other):
        one, other = other, one
    joined = one.copy()
    np.maximum(joined[: len(other)], other, out=joined[: len(other)])
    return joined
