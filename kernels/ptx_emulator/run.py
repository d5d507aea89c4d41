"""A compiled kernel, run on tensors in memory of the host."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .clock import Clock
from .machine import Machine
from .memory import GLOBAL_BASE, Global, Memory
from .parse import parse
from .report import EmulationError, Report

__all__ = ["Kernel"]

Argument = Tensor | int | float | None


class Kernel:
    """A kernel's PTX, parsed and bound once, to be run any number of times.

    Args:
        ptx: a module with one kernel.
        shared_bytes: dynamic shared memory of a CTA.

    Raises:
        ParseError: the text is no PTX with one kernel.
        UnknownInstruction: an instruction is not modelled.

    Example:
        >>> import torch
        >>> kernel = Kernel('''
        ... .version 8.0
        ... .target sm_90
        ... .address_size 64
        ... .visible .entry doubled(.param .u64 doubled_param_0)
        ... .reqntid 32
        ... {
        ...     .reg .b32 %r<3>; .reg .b64 %rd<3>;
        ...     ld.param.b64 %rd1, [doubled_param_0];
        ...     mov.u32 %r1, %tid.x;
        ...     mad.wide.u32 %rd2, %r1, 4, %rd1;
        ...     shl.b32 %r2, %r1, 1;
        ...     st.global.b32 [%rd2], %r2;
        ...     ret;
        ... }''')
        >>> x = torch.zeros(32, dtype=torch.int32)
        >>> kernel.run((1,), [x]).lines()
        []
        >>> x[:5].tolist()
        [0, 2, 4, 6, 8]
    """

    def __init__(self, ptx: str, shared_bytes: int = 0) -> None:
        self.program = parse(ptx)
        self.shared_bytes = shared_bytes
        self._machine = Machine(self.program)

    @classmethod
    def of_triton(cls, compiled: Any) -> Kernel:
        """The kernel that `triton.compile` returned for an NVIDIA target."""
        return cls(compiled.asm["ptx"], compiled.metadata.shared)

    def run(
        self,
        grid: Sequence[int],
        arguments: Sequence[Argument],
        *,
        names: Sequence[str] = (),
        order: np.random.Generator | None = None,
        limit: int = 2_000_000,
    ) -> Report:
        """Run all CTAs of a grid, one after another; tensors are changed in place.

        Args:
            grid: CTAs along x, y, z.
            arguments: of the parameters in order: tensors on the CPU, numbers, None for a null pointer; those left out are 0.
            names: of the arguments, for findings.
            order: shuffles the CTAs; None for x first, then y, then z.
            limit: instructions a CTA may execute.

        Returns:
            Findings and counts.

        Raises:
            EmulationError: arguments that do not fit the parameters.
            Hang: a CTA does not end.
            UnknownInstruction: an operand whose value is not modelled.
        """
        report, clock = Report(self.program.name), Clock()
        names = [*names, *(f"argument {index}" for index in range(len(names), len(arguments)))]
        memory, values = self._placed(arguments, names, clock, report)
        shared = Memory(self.shared_bytes, self._machine.granules["shared"], "shared", self.program, clock, report)
        self._machine.prepare({"global": memory, "shared": shared}, clock, report, self._parameters(values, names))
        x, y, z = [*grid, 1, 1][:3]
        ctas = [(i, j, k) for k, j, i in itertools.product(range(z), range(y), range(x))]
        places = range(len(ctas)) if order is None else order.permutation(len(ctas)).tolist()
        try:
            for place in places:
                self._machine.run(ctas[place], (x, y, z), limit)
        except EmulationError as error:
            error.report = report
            raise
        memory.write_back()
        return report

    def _placed(
        self, arguments: Sequence[Argument], names: Sequence[str], clock: Clock, report: Report
    ) -> tuple[Global, list[int | float]]:
        """Global memory with the tensors, and all arguments as numbers."""
        storages: dict[int, tuple[np.ndarray, list[tuple[int, int, str]]]] = {}
        for name, argument in zip(names, arguments, strict=True):
            if isinstance(argument, Tensor):
                if argument.device.type != "cpu":
                    raise EmulationError(f"{name}: expected a tensor on the CPU, got one on {argument.device}")
                storage = argument.untyped_storage()
                _, extents = storages.setdefault(storage.data_ptr(), (_bytes(storage), []))
                first = argument.data_ptr() - storage.data_ptr()
                extents.append((first, first + _extent(argument), name))
        regions = [(data, address % 256, extents) for address, (data, extents) in storages.items()]
        memory = Global(regions, self._machine.granules["global"], self.program, clock, report)
        starts = dict(zip(storages, memory.starts, strict=True))
        values: list[int | float] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                address = argument.untyped_storage().data_ptr()
                values.append(GLOBAL_BASE + starts[address] + argument.data_ptr() - address)
            else:
                values.append(0 if argument is None else argument)
        return memory, values

    def _parameters(self, values: Sequence[int | float], names: Sequence[str]) -> dict[str, int]:
        """Bits of each parameter."""
        parameters = self.program.parameters
        if len(values) > len(parameters):
            raise EmulationError(
                f"{self.program.name}: expected at most {len(parameters)} arguments, got {len(values)}"
            )
        bits = dict.fromkeys((name for name, _ in parameters), 0)
        for (parameter, kind), value, name in zip(parameters, values, names, strict=False):
            size = int(kind[1:]) // 8
            if kind[0] == "f" or isinstance(value, float):
                bits[parameter] = int.from_bytes(np.array(value, f"f{size}").tobytes(), "little")
                continue
            if not -(1 << 8 * size - 1) <= int(value) < 1 << 8 * size:
                raise EmulationError(f"{self.program.name}: {name} is {value}, expected a number of {8 * size} bits")
            bits[parameter] = int(value) & (1 << 8 * size) - 1
        return bits


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    """The memory of a storage, shared."""
    if storage.nbytes() == 0:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element of a tensor."""
    if tensor.numel() == 0:
        return 0
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + sum(steps)) * tensor.element_size()
