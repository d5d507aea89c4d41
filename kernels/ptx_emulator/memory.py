"""Global and shared memory that hold every access to account: bounds, alignment, initialisation, races.

Two warps that write the same bytes, or a write that changes nothing, are no race: compilers let replicated threads do that.
"""

from __future__ import annotations

import bisect

import numpy as np

from .clock import Clock
from .parse import Instruction, Program
from .report import Finding, Report, place
from .shadow import Shadow

__all__ = ["GLOBAL_BASE", "Access", "Global", "Memory"]

GLOBAL_BASE = 0x7F00_0000_0000
_GAP = 256
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_AT_ONCE = "lanes of one instruction write different values to one address"


class Access:
    """How one instruction accesses memory.

    Args:
        instruction: the instruction.
        size: bytes of an element.
        count: elements a lane, contiguous and aligned as a whole.
        synchronises: whether it is atomic, acquires or releases, and so takes part in no race.
    """

    def __init__(self, instruction: Instruction, size: int, count: int = 1, synchronises: bool = False) -> None:
        self.instruction, self.size, self.count, self.synchronises = instruction, size, count, synchronises
        self.width = size * count
        self._shift = size.bit_length() - 1
        self._elements = np.arange(count)

    def cells(self, at: np.ndarray) -> np.ndarray:
        """[lanes, count] indices of the elements at aligned addresses."""
        first = (at >> self._shift)[:, None]
        return first if self.count == 1 else first + self._elements


class Memory:
    """Bytes, and a shadow that tells who accessed them. Addresses are offsets from its start.

    Args:
        size: in bytes.
        granule: bytes that share a shadow, at most the smallest access.
        space: "global" or "shared".
        program: whose accesses.
        clock: order of accesses.
        report: where findings go.
    """

    _inside = "the memory of the CTA"

    def __init__(self, size: int, granule: int, space: str, program: Program, clock: Clock, report: Report) -> None:
        self.size, self.space, self.report = size, space, report
        padded = -(-size // 16) * 16
        self.data = np.zeros(padded, np.uint8)
        self.shadow = Shadow(padded, granule, space, program, clock, report)
        self._views = {width: self.data.view(kind) for width, kind in _UNSIGNED.items()}

    def read(self, access: Access, at: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """[lanes, count] unsigned elements; 0 where an access is out of bounds or misaligned."""
        inside = self.checked(access, at)
        if inside is None:
            if not access.synchronises:
                self.shadow.read(access.instruction, at, access.width, warps)
            return self.get(access, at)
        values = np.zeros((len(at), access.count), _UNSIGNED[access.size])
        if inside.any():
            values[inside] = self.read(access, at[inside], warps[inside])
        return values

    def write(self, access: Access, at: np.ndarray, warps: np.ndarray, values: np.ndarray) -> None:
        """Store [lanes, count] unsigned elements, the last lane winning; none where out of bounds or misaligned."""
        inside = self.checked(access, at)
        if inside is not None:
            at, warps, values = at[inside], warps[inside], values[inside]
        if not len(at):
            return
        cells, view = access.cells(at), self._views[access.size]
        if not access.synchronises:
            self.shadow.write(access.instruction, at, access.width, warps, lambda: (view[cells] != values).any(1))
        view[cells] = values
        if len(at) > 1:
            lost = view[cells] != values
            if lost.any():
                finding = Finding("race", self.space, _AT_ONCE, place(access.instruction))
                self.report.add(finding, int(lost.any(1).sum()))

    def get(self, access: Access, at: np.ndarray) -> np.ndarray:
        """[lanes, count] elements at valid addresses, without any check."""
        return self._views[access.size][access.cells(at)]

    def put(self, access: Access, at: np.ndarray, values: np.ndarray) -> None:
        """Store elements at valid addresses, without any check."""
        self._views[access.size][access.cells(at)] = values

    def checked(self, access: Access, at: np.ndarray) -> np.ndarray | None:
        """The lanes whose access is within bounds and aligned; None if all are."""
        width = access.width
        is_aligned = not np.bitwise_or.reduce(at) & width - 1
        if is_aligned and self._all_inside(int(np.minimum.reduce(at)), int(np.maximum.reduce(at)) + width):
            return None
        inside, aligned = self._each_inside(at, width), at % width == 0
        if inside.all() and aligned.all():
            return None
        if not inside.all():
            finding = Finding(
                "out of bounds",
                self.space,
                f"{width} bytes a lane outside of {self._inside}",
                place(access.instruction),
            )
            self.report.add(finding, int((~inside).sum()), self.describe(int(at[~inside][0]), width))
        if not aligned.all():
            what = f"{width} bytes a lane at no multiple of {width}"
            self.report.add(Finding("misaligned", self.space, what, place(access.instruction)), int((~aligned).sum()))
        return inside & aligned

    def describe(self, address: int, width: int) -> str:
        """An address out of bounds, in words."""
        return f"{width} bytes at {address} of {self.size} bytes"

    def _all_inside(self, first: int, end: int) -> bool:
        """Whether a range lies in the memory; False if unknown."""
        return first >= 0 and end <= self.size

    def _each_inside(self, at: np.ndarray, width: int) -> np.ndarray:
        """Whether each access lies in the memory."""
        return (at >= 0) & (at <= self.size - width)


class Global(Memory):
    """Global memory with the tensors of a launch, with gaps between them.

    Args:
        regions: (bytes of a storage, address modulo 256, [(first byte, end, name of the argument), ...]).
        granule: bytes that share a shadow.
        program: whose accesses.
        clock: order of accesses.
        report: where findings go.
    """

    _inside = "all arguments"

    def __init__(
        self,
        regions: list[tuple[np.ndarray, int, list[tuple[int, int, str]]]],
        granule: int,
        program: Program,
        clock: Clock,
        report: Report,
    ) -> None:
        self._storages: list[tuple[int, np.ndarray]] = []
        end = _GAP
        for storage, remainder, _ in regions:
            start = -(-end // _GAP) * _GAP + remainder
            self._storages.append((start, storage))
            end = start + len(storage) + _GAP
        super().__init__(end + _GAP, granule, "global", program, clock, report)
        self._valid = np.zeros(self.size, bool)
        self._named: list[tuple[int, int, str]] = []
        for (start, storage), (_, _, extents) in zip(self._storages, regions, strict=True):
            self.data[start : start + len(storage)] = storage
            for first, stop, name in extents:
                self._valid[start + first : start + stop] = True
                self._named.append((start + first, start + stop, name))
        self._named.sort()

    @property
    def starts(self) -> list[int]:
        """Offset of each storage."""
        return [start for start, _ in self._storages]

    def describe(self, address: int, width: int) -> str:
        """An address by the argument nearest to it."""
        if not self._named or not -_GAP <= address < self.size:
            return f"{width} bytes at address {address + GLOBAL_BASE:#x}, far from any argument"
        start, stop, name = self._named[self._nearest(address)]
        if address < start:
            return f"{width} bytes {start - address} before {name}"
        return f"{width} bytes at {address - start} of the {stop - start} bytes of {name}"

    def write_back(self) -> None:
        """Copy the storages to where they came from."""
        for start, storage in self._storages:
            storage[:] = self.data[start : start + len(storage)]

    def _nearest(self, address: int) -> int:
        return max(0, bisect.bisect_right(self._named, (address, self.size, "")) - 1)

    def _all_inside(self, first: int, end: int) -> bool:
        if not self._named:
            return False
        start, stop, _ = self._named[self._nearest(first)]
        return start <= first and end <= stop

    def _each_inside(self, at: np.ndarray, width: int) -> np.ndarray:
        inside = super()._each_inside(at, width)
        known = np.where(inside, at, 0)
        return inside & self._valid[known] & self._valid[known + width - 1]
