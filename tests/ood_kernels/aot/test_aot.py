from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ood_kernels
from ood_kernels.aot import __main__ as aot_command
from ood_kernels.aot.compiled import Job, Resources, miscompiled
from ood_kernels.aot.recording import Recorded
from ood_kernels.aot.rows import Row, table, violations

# Not importorskip: Triton must not be imported before the tests of its kernels have said whether to interpret them.
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (it exists for Linux only)"
)

GOOD = Resources(
    registers=64, stack=0, shared=1024, tensor_core="wgmma", reduced_dot=True, load_bytes=16, file_bytes=9000,
    miscompiled=False,
)  # fmt: skip
ROW = {"shape": {"precision": "bf16", "mask": "bits", "classes": 12}, "config": {"num_warps": 8}}


def row(target: str = "sm_90", wide: bool = True, **changes) -> Row:
    job = Job("module", "kernel", target, {"x_ptr": "*fp32", "BLOCK": "constexpr"}, {(1,): 64}, {}, {"num_warps": 4})
    return Row(Recorded("case", job, wide, ""), GOOD._replace(**changes), "")


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with kernels compiled, not interpreted, and nothing compiled earlier at hand."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(ood_kernels.__file__).parents[1])
    environment["TRITON_CACHE_DIR"] = str(cwd / "cache")
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("target", "changes", "expected"),
    [
        ("sm_90", {"stack": 8}, "kernel on sm_90 (case): 8 bytes of stack, expected none: registers spill"),
        ("gfx942", {"stack": 4}, "kernel on gfx942 (case): 4 bytes of stack"),
        ("sm_80", {"shared": 163 * 1024 + 1}, "166913 bytes of shared memory, expected at most 166912"),
        ("gfx942", {"shared": 65537}, "65537 bytes of shared memory, expected at most 65536"),
        ("sm_90", {"tensor_core": "mma"}, "no wgmma"),
        ("sm_90", {"miscompiled": True}, "packed 32-bit numbers overflow into each other"),
        ("sm_90", {"load_bytes": 8}, "widest load 8 bytes, expected 16"),
        ("sm_90", {}, None),
        ("sm_90", {"wide": False, "load_bytes": 2}, None),
        ("sm_80", {"tensor_core": "mma"}, None),
        ("sm_90", {"tensor_core": "", "reduced_dot": False}, None),
        ("sm_90", {"shared": 227 * 1024}, None),
    ],
)
def test_each_bound_is_held_where_it_means_something(target, changes, expected):
    lines = violations(row(target, **changes))
    assert [expected in line for line in lines] == ([True] if expected else [])


# As compiled by Triton 3.6: tid · 2^28, unused, below split · 16 in one register.
PACKED = """
    shl.b64 %rd1, %rd9, 36;
    mul.wide.u32 %rd2, %r1, 268435456;
    or.b64 %rd3, %rd1, %rd2;
    mov.b64 {_, %r2}, %rd3;
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("", ""), True),
        (("or.b64 %rd3, %rd1, %rd2", "or.b64 %rd3, %rd2, %rd1"), True),
        (("mov.b64 {_, %r2}, %rd3", "shr.u64 %rd4, %rd3, 32"), True),
        (("%rd9, 36", "%rd9, 31"), False),  # an address in 64 bits
        (("mov.b64 {_, %r2}, %rd3", "add.s64 %rd4, %rd3, 8"), False),
        (("or.b64 %rd3, %rd1, %rd2", "or.b64 %rd3, %rd1, %rd1"), False),
    ],
)
def test_packed_numbers_that_overflow_are_found_in_ptx(change, expected):
    assert miscompiled(PACKED.replace(*change)) is expected


def test_a_smaller_limit_of_shared_memory_counts_and_a_larger_one_does_not():
    assert "expected at most 1023" in violations(row(), 1023)[0]
    assert violations(row("gfx942", shared=65537), 10**6) != []


def test_a_kernel_that_does_not_compile_is_a_violation():
    failed = row()._replace(resources=None, error="CompilationError: no such thing")
    assert violations(failed) == ["kernel on sm_90 (case): does not compile: CompilationError: no such thing"]
    assert failed.as_json()["registers"] is None
    assert "-" in table([failed])


def test_a_row_for_machines_has_the_promised_keys():
    found = row().as_json()
    assert {"kernel", "target", "config", "registers", "stack", "shared", "wgmma", "load_bytes"} <= found.keys()
    assert found["wgmma"] is True
    assert found["config"] == {"BLOCK": 64, "num_warps": 4}
    assert json.loads(json.dumps(found)) == found


TOYS = """
import contextlib, io, json
import torch, triton, triton.language as tl
from ood_kernels import cases
from ood_kernels.aot import compiled
from ood_kernels.aot.__main__ import main as compile_kernels
from ood_kernels.aot.recording import Recorded, record_jobs
from ood_kernels.aot.rows import Row, violations
from ood_kernels.triton_kernels.launch import launch, record
from ood_kernels.workloads import WORKLOADS

@triton.jit
def spilling(x_ptr, rows, one, flag, nothing, scale, WIDTH: tl.constexpr):
    places = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + places * rows, mask=places < one * rows, other=0.0)
    tl.store(x_ptr + places, x * scale * tl.sum(x))

@triton.jit
def product(x_ptr, stride, SAMPLES: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tl.arange(0, SAMPLES), tl.arange(0, 64)
    left = tl.load(x_ptr + rows[:, None] * stride + columns[None, :])
    right = tl.load(x_ptr + columns[:, None] * 64 + columns[None, :])
    out = tl.dot(left, right, input_precision=PRECISION)
    tl.store(x_ptr + rows[:, None] * 64 + columns[None, :], out)

def main():
    x = torch.empty(9, device="meta")
    more = dict(num_warps=1, num_stages=1)
    with record() as launches:
        launch(spilling, (1,), wide=True, x_ptr=x, rows=4800, one=1, flag=True, nothing=None, scale=0.5, WIDTH=8192, **more)
        launch(product, (1,), wide=True, x_ptr=x, stride=64, SAMPLES=64, PRECISION="tf32", num_warps=4, num_stages=1)
        launch(product, (1,), wide=True, x_ptr=x, stride=63, SAMPLES=16, PRECISION="tf32", num_warps=4, num_stages=1)
        launch(product, (1,), x_ptr=x, stride=64, SAMPLES=16, PRECISION="ieee", num_warps=4, num_stages=1)
    jobs = [compiled.specialise(one, "sm_90") for one in launches]
    lines = []
    for job, one in zip(jobs, launches):
        recorded = Recorded("toy", job, one.wide, "")
        lines.append(violations(Row(recorded, compiled.compile_job(job), "")))
    amd = [compiled.compile_job(compiled.specialise(one, "gfx942")) for one in launches[1:2]]
    types = [jobs[0].signature, list(map(list, jobs[0].constants.items())), [path[0] for path in jobs[0].attributes]]
    case = cases.Case("masked_energy", WORKLOADS["R18"])
    once, twice = (record_jobs([case] * times, ["sm_90", "gfx942"]) for times in (1, 2))
    assert once == twice and len({repr(one.job) for one in once}) == len(once)
    assert {one.job.target for one in once} == {"sm_90", "gfx942"}
    assert {one.job.kernel for one in record_jobs([case], ["sm_90"], ["head"])} == {"head_kernel"}
    assert not record_jobs([case], ["sm_90"], ["nothing"])

    with contextlib.redirect_stdout(io.StringIO()) as table:
        command = ["--kernel", "finalise", "--target", "gfx942", "--processes", "1"]
        status = compile_kernels(command, [case])
    print(json.dumps({"lines": lines, "types": types, "amd": amd, "status": status, "table": table.getvalue()}))

if __name__ == "__main__":
    main()
"""


def test_real_kernels_are_specialised_compiled_and_held_to_their_bounds(tmp_path):
    (tmp_path / "toys.py").write_text(TOYS)
    done = run_python("toys.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    spilling, wide_product, narrow_product, exact_product = found["lines"]
    assert [line.split(": ", 1)[1].split(", ")[1] for line in spilling] == [
        "expected none: registers spill",
        "expected 16",
    ]
    assert wide_product == exact_product == []
    assert len(narrow_product) == 1
    assert "no wgmma" in narrow_product[0]
    signature, constants, known = found["types"]
    assert signature == {
        "x_ptr": "*fp32",
        "rows": "i32",
        "one": "constexpr",
        "flag": "u1",
        "nothing": "constexpr",
        "scale": "fp32",
        "WIDTH": "constexpr",
    }
    assert constants == [[[2], 1], [[4], None], [[6], 8192]]
    assert known == [0, 1], "a pointer and a multiple of 16 are known to be divisible"
    ((registers, stack, _, tensor_core, reduced, load_bytes, size, _),) = found["amd"]
    assert registers > 0
    assert (stack, tensor_core, reduced, load_bytes) == (0, "mfma", True, 16)
    assert size > 1000
    assert found["status"] == 0, done.stderr
    header, line = found["table"].splitlines()
    assert header.split()[:4] == ["kernel", "case", "target", "registers"]
    assert line.startswith("finalise_kernel")
    assert " gfx942 " in line


def test_the_command_compiles_defaults_and_shipped_configurations_and_reports_a_broken_bound(tmp_path):
    (tmp_path / "some_gpu.json").write_text(json.dumps({"families": {"masked_energy": [ROW], "unknown": [ROW]}}))
    command = [
        "-m",
        "ood_kernels.aot",
        "--configs",
        ".",
        "--case",
        "masked_energy R18 bfloat16",
        "--kernel",
        "head_kernel",
    ]
    done = run_python(*command, "--target", "sm_90", "--json", "--shared", "4", "--processes", "2", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)
    assert sorted((row["target"], row["tuned"], row["config"]["num_warps"]) for row in rows) == [
        ("sm_90", "", 4),
        ("sm_90", "some_gpu.json", 8),
    ]
    assert all(row["kernel"] == "head_kernel" and row["registers"] > 0 and row["load_bytes"] == 16 for row in rows)
    assert all(row["wgmma"] is True for row in rows)
    broken = [line for line in done.stderr.splitlines() if "expected at most 4096" in line]
    assert len(broken) == 2
    assert "2 compiled, 2 bounds broken" in done.stderr


CRASH = """
import os
from ood_kernels.aot import rows
from ood_kernels.aot.compiled import Job
from ood_kernels.aot.recording import Recorded

def attempt(job):
    if job.kernel == "bad":
        os.abort()
    return None, f"{job.kernel} came back"

if __name__ == "__main__":
    jobs = [Job("", kernel, "sm_90", {}, {}, {}, {}) for kernel in ("first", "bad", "last")]
    rows._attempt = attempt
    for row in rows.compile_all([Recorded("case", job, False, "") for job in jobs], 2):
        print(row.error)
"""


def test_a_compiler_that_crashes_costs_one_row(tmp_path):
    (tmp_path / "crash.py").write_text(CRASH)
    done = run_python("crash.py", cwd=tmp_path)
    assert done.stdout.splitlines() == ["first came back", "the compiler crashed", "last came back"], done.stderr


def test_refusals_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot_command.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.setattr(aot_command, "find_spec", lambda name: None)
    assert aot_command.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert aot_command.main(["--case", "no such case"]) == 2
    assert "--case ['no such case']" in capsys.readouterr().err
