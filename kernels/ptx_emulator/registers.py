"""The register file: a row of threads a register, and views of it in any type.

Every operand is resolved once, to the array that an instruction reads or writes at each execution.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .parse import Instruction, Operand, Program
from .report import refuse

__all__ = ["TYPES", "Registers", "bits_of"]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "f16x2": np.float16, "bf16x2": np.uint16,
}  # fmt: skip
"""Element type of each type of PTX; two elements a register for those in "x2"."""

_POISON = {16: 0x7FAD, 32: 0x7FC0DEAD, 64: 0x7FF8DEADDEADDEAD}
_SPECIAL = ("tid", "ntid", "ctaid", "nctaid")


def bits_of(kind: str) -> int:
    """Bits of a register of a type."""
    return 32 if kind.endswith("x2") else np.dtype(TYPES[kind]).itemsize * 8


class Registers:
    """Registers of all threads of a CTA.

    Args:
        program: whose registers.
    """

    def __init__(self, program: Program) -> None:
        self.threads = program.threads
        self._program = program
        self._place: dict[str, int] = {}
        counts = dict.fromkeys((0, 16, 32, 64), 0)
        for name, width in program.registers.items():
            width = 16 if width == 8 else width
            self._place[name] = counts[width]
            counts[width] += 1
        self._files = {
            0: np.zeros((counts[0], self.threads), bool),
            16: np.zeros((counts[16], self.threads), np.uint16),
            32: np.zeros((counts[32], self.threads), np.uint32),
            64: np.zeros((counts[64], self.threads), np.uint64),
        }
        tid = np.arange(self.threads, dtype=np.uint32)
        self._special = {f"%{name}.{axis}": np.ones(self.threads, np.uint32) for name in _SPECIAL for axis in "xyz"}
        self._special |= {"%laneid": tid % 32, "%warpid": tid // 32, "%tid.x": tid}
        self._special["%ntid.x"][:] = self.threads
        for axis in "yz":
            self._special[f"%tid.{axis}"][:] = 0

    def reset(self, cta: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Poison all registers and set those that tell a CTA's place."""
        self._files[0][:] = False
        for width, pattern in _POISON.items():
            self._files[width][:] = pattern
        for index, axis in enumerate("xyz"):
            self._special[f"%ctaid.{axis}"][:] = cta[index]
            self._special[f"%nctaid.{axis}"][:] = grid[index]

    def source(self, instruction: Instruction, operand: Operand, kind: str) -> np.ndarray:
        """What an instruction reads, [threads] or, of a packed type, [2 · threads]; wider registers give their low part."""
        if operand.negated:
            raise refuse(instruction, "negated operand")
        if operand.kind == "register":
            row, width = self._row(operand.text)
            wanted = 0 if kind == "pred" else bits_of(kind)
            if (width == 0) != (wanted == 0) or width < wanted:
                raise refuse(instruction, f"register {operand.text} of {width} bits for .{kind}")
            step = 1 if kind.endswith("x2") or not width else width // wanted
            return row if kind == "pred" else row.view(TYPES[kind])[::step]
        if operand.kind == "immediate":
            return self._constant(instruction, operand.text, kind)
        if operand.text in self._special and bits_of(kind) == 32:
            return self._special[operand.text].view(TYPES[kind])
        if operand.text in self._program.shared:
            return self._constant(instruction, "0", kind)
        raise refuse(instruction, f"operand {operand.text}", [*self._special, *self._program.shared])

    def target(self, instruction: Instruction, operand: Operand, kind: str) -> np.ndarray:
        """What an instruction writes; a wider register takes the value extended by the sign of its type."""
        if operand.text == "_":
            return np.zeros(self.threads * (2 if kind.endswith("x2") else 1), TYPES[kind])
        if operand.kind != "register":
            raise refuse(instruction, f"target {operand.text}, expected a register")
        row, width = self._row(operand.text)
        wanted = 0 if kind == "pred" else bits_of(kind)
        if width == wanted:
            return row if kind == "pred" else row.view(TYPES[kind])
        extends = instruction.parts[0] in ("ld", "cvt") and kind[0] in "bsu" and kind != "bf16"
        if not wanted or width < wanted or not extends:
            raise refuse(instruction, f"register {operand.text} of {width} bits for .{kind}")
        return row.view(f"i{width // 8}" if kind[0] == "s" else f"u{width // 8}")

    @property
    def words(self) -> np.ndarray:
        """All registers of 32 bits [registers, threads]."""
        return self._files[32]

    def rows(self, instruction: Instruction, operands: tuple[Operand, ...]) -> tuple[np.ndarray, list[int]]:
        """(all 32-bit registers [registers, threads], rows of these)."""
        for operand in operands:
            if operand.kind != "register" or self._row(operand.text)[1] != 32:
                raise refuse(instruction, f"operand {operand.text}, expected a register of 32 bits")
        return self._files[32], [self._place[operand.text] for operand in operands]

    def predicate(self, name: str) -> np.ndarray:
        """A predicate register."""
        return self._row(name)[0]

    def _row(self, name: str) -> tuple[np.ndarray, int]:
        width = self._program.registers[name]
        width = 16 if width == 8 else width
        return self._files[width][self._place[name]], width

    def _constant(self, instruction: Instruction, text: str, kind: str) -> np.ndarray:
        value = self._value(instruction, text, kind)
        if kind.endswith("x2"):
            return np.full(self.threads, value, np.uint32).view(TYPES[kind])
        return np.full(self.threads, value, TYPES[kind])

    def _value(self, instruction: Instruction, text: str, kind: str) -> Any:
        if found := re.match(r"0[fF]([0-9a-fA-F]{8})$", text):
            return self._bits(int(found[1], 16), 4, kind)
        if found := re.match(r"0[dD]([0-9a-fA-F]{16})$", text):
            return self._bits(int(found[1], 16), 8, kind)
        try:
            number = int(text.rstrip("U"), 0)
        except ValueError:
            if kind not in ("f32", "f64"):
                raise refuse(instruction, f"constant {text} for .{kind}") from None
            return float(text)
        if kind == "pred":
            return number != 0
        if kind in ("f32", "f64"):
            raise refuse(instruction, f"integer constant {text} for .{kind}")
        return self._bits(
            number & ((1 << bits_of(kind)) - 1), bits_of(kind) // 8, "b32" if kind.endswith("x2") else kind
        )

    @staticmethod
    def _bits(bits: int, size: int, kind: str) -> Any:
        """A constant by its bits; one of a larger float type is converted."""
        value = np.array(bits, f"u{size}")
        wanted = np.dtype(TYPES[kind])
        if wanted.itemsize == size:
            return value.view(wanted)[()]
        return value.view(f"f{size}").astype(wanted)[()]
