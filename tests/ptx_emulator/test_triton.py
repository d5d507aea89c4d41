"""A kernel that Triton compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

# Compiled in another process: this one may have set the interpreter.
SCRIPT = """
import sys

import torch
import triton
import triton.language as tl
from ptx_emulator import Kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, size, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns, depth = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    a = tl.load(a_ptr + rows[:, None] * DEPTH + depth[None, :], mask=rows[:, None] < size, other=0.0)
    b = tl.load(b_ptr + depth[:, None] * BLOCK + columns[None, :])
    total = tl.dot(a, b)
    tl.store(c_ptr + rows[:, None] * BLOCK + columns[None, :], tl.exp(total), mask=rows[:, None] < size)


signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "size": "i32", "DEPTH": "constexpr", "BLOCK": "constexpr"}
aligned = {(index,): [["tt.divisibility", 16]] for index in range(3)}
for arch, instruction in ((90, "wgmma"), (80, "mma.sync")):
    source = ASTSource(product_kernel, signature, {(4,): 32, (5,): 64}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert instruction in compiled.asm["ptx"]
    kernel = Kernel.of_triton(compiled)
    torch.manual_seed(0)
    a, b, c = torch.randn(100, 32).bfloat16(), (torch.randn(32, 64) / 6).bfloat16(), torch.full((100, 64), torch.nan)
    report = kernel.run((2,), [a, b, c, 100], names=["a_ptr", "b_ptr", "c_ptr", "size"])
    assert report.lines() == [], report.lines()
    expected = (a.double() @ b.double()).exp()
    assert (c - expected).abs().max() <= 1e-6 * expected.max(), (c - expected).abs().max()
    (line,) = kernel.run((2,), [a, b, c[:99], 100], names=["a_ptr", "b_ptr", "c_ptr", "size"]).lines()
    assert "out of bounds" in line and f"product.py:{sys.argv[1]} (line" in line and "c_ptr" in line, line
"""


def test_a_product_of_a_triton_kernel_on_two_architectures(tmp_path):
    script = tmp_path / "product.py"
    script.write_text(SCRIPT)
    store = next(number for number, line in enumerate(SCRIPT.splitlines(), 1) if "tl.store" in line)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    paths = [path for path in sys.path if path] + [str(Path(__file__).parents[2] / "kernels")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, script, str(store)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
