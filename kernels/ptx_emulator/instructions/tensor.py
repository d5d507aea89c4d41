"""Matrices: ldmatrix, stmatrix, mma.sync and wgmma, with sums in fp64 rounded to fp32 once an instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..clock import FIRST_GROUP
from ..memory import Access
from ..parse import Instruction, Operand
from ..report import refuse
from .floating import from_bf16, from_tf32
from .memory import addresses
from .table import Step, Where, operation

if TYPE_CHECKING:
    from ..machine import Machine

_FROM_BITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": from_bf16,
    "f16": lambda bits: bits.astype(np.uint16).view(np.float16).astype(np.float32),
    "tf32": from_tf32,
}


@operation("ldmatrix", "stmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16", together=32)
def bind_matrix_access(machine: Machine, instruction: Instruction) -> Step:
    """8×8 matrices of 16 bits: matrix j has its row addresses in lanes 8j to 8j + 7, each lane two of its elements."""
    loads = instruction.parts[0] == "ldmatrix"
    vector, place = instruction.operands if loads else reversed(instruction.operands)
    items = vector.items if vector.kind == "vector" else (vector,)
    count = len(items)
    if f"x{count}" not in instruction.parts:
        raise ValueError(f"{count} registers")
    file, indices = machine.registers.rows(instruction, items)
    places = np.array(indices)
    address = addresses(machine, instruction, place)
    access = Access(instruction, 2, 8)
    machine.uses("shared", 16)
    transposes = "trans" in instruction.parts
    warps = machine.program.threads // 32

    def step(where: Where = True) -> None:
        chosen = np.arange(warps) if where is True else np.flatnonzero(where.reshape(-1, 32).any(1))
        lanes = (chosen[:, None] * 32 + np.arange(8 * count)).ravel()
        at, owners = address()[lanes], machine.warps[lanes]
        threads = (chosen[:, None] * 32 + np.arange(32)).ravel()
        shared = machine.memories["shared"]
        if loads:
            matrices = shared.read(access, at, owners).reshape(len(chosen), count, 8, 8)
            if transposes:
                matrices = matrices.swapaxes(2, 3)
            pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(chosen), count, 32)
            file[places[:, None], threads] = pairs.swapaxes(0, 1).reshape(count, -1)
        else:
            pairs = np.ascontiguousarray(file[places[:, None], threads].reshape(count, len(chosen), 32).swapaxes(0, 1))
            matrices = pairs.view(np.uint16).reshape(len(chosen), count, 8, 8)
            if transposes:
                matrices = matrices.swapaxes(2, 3)
            shared.write(access, at, owners, np.ascontiguousarray(matrices).reshape(-1, 8))

    return step


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    """(M, N, K) of a product."""
    for part in instruction.parts:
        if found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part):
            return int(found[1]), int(found[2]), int(found[3])
    raise ValueError("no shape")


def _fragment(
    registers: np.ndarray, rows: int, depth: int, convert: Callable[[np.ndarray], np.ndarray], bits: int
) -> np.ndarray:
    """[warps, rows, depth] fp32 from [registers, warps · 32]: 8 rows of 4 lanes a register, then rows + 8, then depth."""
    warps = registers.shape[1] // 32
    packed = 32 // bits
    values = registers.reshape(-1, warps, 8, 4)
    parts = [convert(values >> np.uint32(bits * part) & np.uint32(2**bits - 1)) for part in range(packed)]
    blocks = np.stack(parts, -1).reshape(len(registers), warps, 8, 4 * packed)
    high = rows // 8
    # Registers count the halves of rows first, then those of depth.
    blocks = blocks.reshape(depth // (4 * packed), high, warps, 8, 4 * packed)
    return blocks.transpose(2, 1, 3, 0, 4).reshape(warps, rows, depth)


@operation("mma", modifiers="sync aligned m16n8k8 m16n8k16 m16n8k4 row col f32 bf16 f16 tf32", together=32)
def bind_product(machine: Machine, instruction: Instruction) -> Step:
    """mma.sync m16n8: D = A B + C of a warp, with accumulators in fp32."""
    _, _, depth = _shape(instruction)
    kinds = instruction.parts[-4:]
    if kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] != kinds[2] or instruction.parts[4:6] != ("row", "col"):
        raise refuse(instruction, "types of mma", ["row.col.f32.bf16.bf16.f32", "f16", "tf32"])
    convert, bits = _FROM_BITS[kinds[1]], 32 if kinds[1] == "tf32" else 16
    registers = machine.registers
    file, into = registers.rows(instruction, instruction.operands[0].items)
    _, left = registers.rows(instruction, instruction.operands[1].items)
    _, right = registers.rows(instruction, instruction.operands[2].items)
    constant = [registers.source(instruction, item, "f32") for item in instruction.operands[3].items]
    if len(into) != 4 or len(left) * 32 * 32 != 16 * depth * bits or len(right) * 32 * 32 != 8 * depth * bits:
        raise ValueError("number of registers")
    lane = np.arange(32)

    def step(where: Where = True) -> None:
        a = _fragment(file[left], 16, depth, convert, bits).astype(np.float64)
        b = _fragment(file[right], 8, depth, convert, bits).astype(np.float64)
        product = a @ b.swapaxes(1, 2)  # [warps, 16, 8]
        results = [
            (product[:, lane // 4 + 8 * (index // 2), 2 * (lane % 4) + index % 2].ravel() + constant[index]).astype(
                np.float32
            )
            for index in range(4)
        ]
        for row, result in zip(into, results, strict=True):
            np.copyto(file[row], result.view(np.uint32), where=where)

    return step


@operation(
    "wgmma",
    modifiers=r"mma_async fence commit_group wait_group sync aligned m64n\d+k(8|16) f32 bf16 f16 tf32",
    together=128,
)
def bind_group_product(machine: Machine, instruction: Instruction) -> Step:
    """wgmma: D = A B + D of each warp group, A in registers or shared memory, B in shared memory."""
    if "commit_group" in instruction.parts:
        return machine.in_flight.commit_products
    if "wait_group" in instruction.parts:
        return partial(machine.in_flight.wait_for_products, int(instruction.operands[0].text, 0))
    if "fence" in instruction.parts:
        return lambda where=True: None
    if machine.program.threads % 128:
        raise ValueError("a CTA of no whole warp groups")
    return _bind_mma_async(machine, instruction)


def _bind_mma_async(machine: Machine, instruction: Instruction) -> Step:
    _, width, depth = _shape(instruction)
    into, kind, other = instruction.parts[-3:]
    operands, registers = list(instruction.operands), machine.registers
    if into != "f32" or kind != other:
        raise refuse(instruction, "types of wgmma", ["f32.bf16.bf16", "f32.f16.f16", "f32.tf32.tf32"])
    size = 4 if kind == "tf32" else 2
    file, accumulators = registers.rows(instruction, operands[0].items)
    in_registers = operands[1].kind == "vector"
    # After the descriptors: whether D is added, the signs of A and B, and whether 16-bit operands are transposed.
    flags = [operand.text for operand in operands[4:]]
    transposed = [flag == "1" for flag in flags[2:]]
    expected = 2 + (0 if size == 4 else 1 if in_registers else 2)
    if len(flags) != expected or flags[:2] != ["1", "1"] or len(accumulators) != width // 2:
        raise ValueError("flags or number of registers")
    adds = registers.source(instruction, operands[3], "pred")
    read_b = _operand(machine, instruction, operands[2], width, depth, kind, bool(transposed) and transposed[-1])
    in_shared = None
    rows: list[int] = []
    if in_registers:
        _, rows = registers.rows(instruction, operands[1].items)
    else:
        in_shared = _operand(machine, instruction, operands[1], 64, depth, kind, bool(transposed) and transposed[0])

    def read_a(group: int) -> np.ndarray:
        if in_shared:
            return in_shared(group)
        threads = file[rows][:, 128 * group : 128 * group + 128]
        return _fragment(threads, 16, depth, _FROM_BITS[kind], 8 * size).reshape(64, depth)

    registers_of_d = tuple(accumulators)
    thread = np.arange(128)
    register = np.arange(width // 2)[:, None]
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register % 4 // 2)
    column = 8 * (register // 4) + 2 * (thread % 4) + register % 2

    def step(where: Where = True) -> None:
        for group in range(machine.program.threads // 128):
            threads = slice(128 * group, 128 * group + 128)
            if where is not True and not where[threads].any():
                continue
            product = read_a(group).astype(np.float64) @ read_b(group).astype(np.float64).T
            machine.in_flight.accumulate(group, registers_of_d, threads, product[row, column], adds[threads])

    return step


_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}


def _operand(
    machine: Machine, instruction: Instruction, operand: Operand, rows: int, depth: int, kind: str, transposed: bool
) -> Callable[[int], np.ndarray]:
    """Reads the matrix [rows, depth] of a warp group at a descriptor of shared memory, 16 bytes at a time."""
    descriptors = machine.registers.source(instruction, operand, "u64")
    size = 4 if kind == "tf32" else 2
    pack = 16 // size
    access = Access(instruction, size, pack)
    machine.uses("shared", 16)
    if transposed:
        row, column = np.arange(0, rows, pack)[:, None], np.arange(depth)[None, :]
    else:
        row, column = np.arange(rows)[:, None], np.arange(0, depth, pack)[None, :]

    def read(group: int) -> np.ndarray:
        descriptor = int(descriptors[128 * group])
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        swizzle, offset = descriptor >> 62, descriptor >> 49 & 7
        if swizzle not in _SWIZZLES or offset:
            raise refuse(instruction, f"descriptor {descriptor:#x} without swizzle or with a base offset")
        pitch, bits = _SWIZZLES[swizzle]
        if transposed:
            elements = pitch // size
            at = start + row // elements * leading + column // 8 * stride + column % 8 * pitch + row % elements * size
        else:
            at = start + row // 8 * stride + row % 8 * pitch + column * size
        at ^= (at >> 7 & bits) << 4
        places = at.ravel()
        shared = machine.memories["shared"]
        values = shared.read(access, places, np.full(len(places), FIRST_GROUP + group))
        if shared.checked(access, places) is None:
            machine.in_flight.read(access, places, FIRST_GROUP + group)
        values = _FROM_BITS[kind](values).reshape(*at.shape, pack)
        return values.swapaxes(1, 2).reshape(rows, depth) if transposed else values.reshape(rows, depth)

    return read
