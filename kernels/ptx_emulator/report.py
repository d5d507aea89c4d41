"""What a run finds: accesses that a GPU would fault on or answer differently from run to run, each with its source lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .parse import Instruction

__all__ = ["EmulationError", "Finding", "Hang", "Report", "UnknownInstruction"]


class EmulationError(Exception):
    """A run cannot go on: a wait without end, or what is not modelled.

    Attributes:
        report: of the run until then, or None before any.
    """

    report: Report | None = None


class UnknownInstruction(EmulationError):
    """An instruction, modifier, operand or register that the emulator does not model."""


class Hang(EmulationError):
    """A CTA that executes more instructions than allowed, or threads that wait for each other."""


class Finding(NamedTuple):
    """One kind of fault at one place, or of a race at a pair of places.

    Attributes:
        kind: "out of bounds", "misaligned", "uninitialised", "race" or "race between CTAs".
        space: "global" or "shared".
        what: the fault in words.
        place: source line and instruction of the access.
        other: the same of the access it races with, or "".
    """

    kind: str
    space: str
    what: str
    place: str
    other: str = ""

    def __str__(self) -> str:
        other = f" and {self.other}" if self.other else ""
        return f"{self.kind}, {self.space} memory: {self.what}: {self.place}{other}"


class Report:
    """Findings and counts of the CTAs run so far.

    Attributes:
        kernel: its name.
        findings: each with the number of lanes concerned, the first CTA and a detail of the first.
        ctas: executed.
        instructions: executed, each counted once for all threads that execute it together.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.findings: dict[Finding, tuple[int, tuple[int, ...], str]] = {}
        self.ctas = 0
        self.instructions = 0
        self.cta: tuple[int, ...] = ()

    def add(self, finding: Finding, count: int, detail: str = "") -> None:
        """Count a finding in the CTA that runs."""
        known, first, told = self.findings.get(finding, (0, self.cta, detail))
        self.findings[finding] = (known + count, first, told)

    def lines(self) -> list[str]:
        """One line a finding."""
        return [
            f"{self.kernel}: {finding} ({count} times, first in CTA {first}{f': {detail}' if detail else ''})"
            for finding, (count, first, detail) in self.findings.items()
        ]


def place(instruction: Instruction) -> str:
    """Source line, line in the PTX and text of an instruction."""
    return f"{instruction.source or 'unknown source'} (line {instruction.line} of the PTX: {instruction.text})"


def refuse(instruction: Instruction, problem: str, known: Iterable[str] = ()) -> UnknownInstruction:
    """The error for what is not modelled."""
    listing = ", ".join(sorted(known))
    return UnknownInstruction(
        f"{problem} at line {instruction.line} of the PTX: '{instruction.text}'"
        + (f"; known are {listing}" if listing else "")
    )
