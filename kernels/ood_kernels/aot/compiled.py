"""Compilation of recorded launches for absent GPUs: registers, stack, shared memory, instructions, load width.

Launches are specialised exactly as by Triton's launcher (an integer 1 becomes a constant, multiples of 16 and aligned pointers
are marked), so the compiled binary is the one that would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..triton_kernels.launch import Launch, arguments_for

__all__ = ["TARGETS", "Job", "Resources", "Target", "compile_job", "specialise"]


class Target(NamedTuple):
    """A GPU architecture.

    Attributes:
        backend: "cuda" or "hip".
        arch: compute capability as a number, or the name of an AMD architecture.
        warp_size: threads per warp.
        shared_bytes: maximum shared memory per program.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


class Job(NamedTuple):
    """A kernel specialised for its arguments, as picklable data for another process.

    Attributes:
        module: defining module.
        kernel: name in that module.
        target: key of `TARGETS`.
        signature: type of every argument.
        constants: values of constant arguments, by path.
        attributes: properties of the others, such as divisibility by 16, by path.
        options: `num_warps`, `num_stages` and the like.
    """

    module: str
    kernel: str
    target: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The upper-case constants (tiles, precision and so on) and the options."""
        names = list(self.signature)
        named = {names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}
        return {name: value for name, value in named.items() if name.isupper()} | self.options


class Resources(NamedTuple):
    """Resource usage of a compiled kernel.

    Attributes:
        registers: per thread.
        stack: bytes per thread, for register spills.
        shared: bytes per program.
        tensor_core: tensor-core instruction: wgmma, tcgen05, mma or mfma; "" for none.
        reduced_dot: whether a matrix product has operands below fp32, as tensor cores need.
        load_bytes: widest load from global memory, per thread.
        file_bytes: size of the binary.
        miscompiled: whether the PTX has the pattern of `miscompiled`.
    """

    registers: int
    stack: int
    shared: int
    tensor_core: str
    reduced_dot: bool
    load_bytes: int
    file_bytes: int
    miscompiled: bool


def specialise(launch: Launch, target: str) -> Job:
    """The compilation job of a recorded launch for a target, specialised by Triton's own binder."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_gpu_target(target))
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    arguments = arguments_for(TARGETS[target].backend, launch.arguments)
    bound, specialisation, options = binder(**arguments)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, (name, (kind, known)) in enumerate(zip(bound, specialisation, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = bound[name]
        elif isinstance(known, str) and known:
            attributes[(index,)] = backend.parse_attr(known)
    function = launch.kernel.fn
    return Job(function.__module__, function.__name__, target, signature, constants, attributes, options)


def compile_job(job: Job) -> Resources:
    """Compile for the job's target, which need not be present, and extract resource usage."""
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    compiled = triton.compile(source, target=_gpu_target(job.target), options=job.options)
    text, shared = compiled.asm, compiled.metadata.shared
    reduced = has_reduced_dot(text["ttir"])
    if "cubin" in text:
        registers, stack = _cubin_usage(text["cubin"])
        listing = text["ptx"]
        size = len(text["cubin"])
    else:
        registers, stack = amdgcn_usage(text["amdgcn"])
        listing = text["amdgcn"]
        size = len(text["hsaco"])
    own = (tensor_core(listing), reduced, load_bytes(listing), size, miscompiled(listing))
    return Resources(registers, stack, shared, *own)


def _gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    backend, arch, warp_size, _ = TARGETS[name]
    return GPUTarget(backend, arch, warp_size)


def has_reduced_dot(ttir: str) -> bool:
    """Whether a kernel's Triton IR multiplies 16-bit matrices, or fp32 rounded to tf32."""
    dots = [line for line in ttir.splitlines() if " tt.dot " in line]
    return any("tf32" in line or re.search(r"tensor<[^>]*x(bf16|f16)\b[^>]*> \*", line) for line in dots)


def tensor_core(listing: str) -> str:
    """The tensor-core instruction in PTX or AMD assembly, or ""."""
    instructions = {"tcgen05": r"\btcgen05\.mma", "wgmma": r"\bwgmma\.mma", "mma": r"\bmma\.sync", "mfma": r"\bv_mfma"}
    return next((name for name, pattern in instructions.items() if re.search(pattern, listing)), "")


_AMD_LOAD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}


def load_bytes(listing: str) -> int:
    """Bytes of the widest per-thread load from global memory, in PTX or AMD assembly."""
    widths = [0]
    for vector, bits in re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d+))?\.[bfsu](\d+)\b", listing):
        widths.append(int(vector or 1) * int(bits) // 8)
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-fA-F]+|\d+)", listing):
        widths.append(int(size, 0))
    for kind in re.findall(r"\b(?:global|buffer|flat)_load_(?:lds_)?([a-z]+\d*)", listing):
        widths.append(_AMD_LOAD_BYTES.get(kind, 1))
    return max(widths)


def miscompiled(ptx: str) -> bool:
    """Whether 32-bit numbers packed into one register overflow into each other.

    The LLVM of Triton 3.6 may shift two of them as a vector, one by 28 bits or more, then multiply the packed pair as 64 bits: the
    unused lower product runs into the upper one, which so depends on the thread. Known by a wide product and a value shifted by
    at least 32 bits that are joined, where the upper half of the result is used.
    """
    products = set(re.findall(r"mul\.wide\.u32\s+(%rd\d+),", ptx))
    shifted = set(re.findall(r"shl\.b64\s+(%rd\d+), %rd\d+, (?:3[2-9]|[45]\d|6[0-3]);", ptx))
    for joined, *pair in re.findall(r"or\.b64\s+(%rd\d+), (%rd\d+), (%rd\d+);", ptx):
        is_packed = any(one in products and other in shifted for one, other in (pair, pair[::-1]))
        upper_half = rf"mov\.b64\s+\{{_, %r\d+\}}, {joined};|shr\.u64\s+%rd\d+, {joined}, 32;"
        if is_packed and re.search(upper_half, ptx):
            return True
    return False


def usage(listing: str) -> tuple[int, int]:
    """(registers, stack bytes) from the output of `cuobjdump -res-usage`."""
    counts: Mapping[str, str] = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing))
    return int(counts["REG"]), max(int(counts["STACK"]), int(counts.get("LOCAL", 0)))


def amdgcn_usage(listing: str) -> tuple[int, int]:
    """(vector registers, scratch bytes) from the metadata at the end of AMD assembly."""
    fields = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", listing))
    return int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"])


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    from triton.backends import nvidia

    (folder,) = nvidia.__path__
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(Path(folder) / "bin" / "cuobjdump"), "-res-usage", str(file)]
        return usage(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
