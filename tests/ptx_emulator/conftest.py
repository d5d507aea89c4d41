"""Shared by the tests of the emulator: kernels of a few lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ptx_emulator import Kernel, Report

HEAD = """.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry tiny(
{parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<80>; .reg .b64 %rd<9>;
    mov.u32 %r1, %tid.x;
{pointers}
"""


def source(body: str, parameters: int = 1, threads: int = 32) -> str:
    """PTX around a body: %r1 is the thread, %rd1, %rd2, ... point to the arguments."""
    return (
        HEAD.format(
            parameters=",\n".join(f".param .u64 tiny_param_{index}" for index in range(parameters)),
            threads=threads,
            pointers="\n".join(f"ld.param.b64 %rd{index + 1}, [tiny_param_{index}];" for index in range(parameters)),
        )
        + body
        + "\nret;\n}\n"
    )


@pytest.fixture
def run() -> Callable[..., Report]:
    """Run a body on tensors with one CTA, or several."""

    def call(
        body: str, *tensors: Tensor, threads: int = 32, shared: int = 0, grid: Sequence[int] = (1,), **options: Any
    ):
        return Kernel(source(body, len(tensors), threads), shared).run(grid, tensors, **options)

    return call


_REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


@pytest.fixture
def evaluate(run) -> Callable[..., list[Any]]:
    """Values of %d in the first threads, after instructions on %a, %b, %c that hold a value of each input a thread."""

    def call(text: str, *inputs: Tensor, out: torch.dtype = torch.int32) -> list[Any]:
        result = torch.zeros(32, dtype=out)
        tensors, body = [result], []
        names = "abc"[: len(inputs)]
        for index, (name, values) in enumerate(zip(names, inputs, strict=True)):
            column = torch.zeros(32, dtype=values.dtype)
            column[: len(values)] = values
            tensors.append(column)
            size = values.element_size()
            body += [
                f".reg .{_REGISTERS[size]} %{name};",
                f"mad.wide.u32 %rd8, %r1, {size}, %rd{index + 2};",
                f"ld.global.b{8 * size} %{name}, [%rd8];",
            ]
        size = result.element_size()
        body += [f".reg .{_REGISTERS[size]} %d; .reg .pred %q;", text, f"mad.wide.u32 %rd8, %r1, {size}, %rd1;"]
        report = run("\n".join([*body, f"st.global.b{8 * size} [%rd8], %d;"]), *tensors)
        assert report.lines() == []
        return result[: len(inputs[0])].tolist()

    return call
