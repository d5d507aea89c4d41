"""Runs the PTX of a compiled kernel on the CPU, and holds it to account.

    compiled = triton.compile(ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", 90, 32))
    report = ptx_emulator.Kernel.of_triton(compiled).run(grid, [x, y, x.numel()])
    print(*report.lines(), sep="\\n")

CTAs run one after another in any order, so that one which waits for a later one is a `Hang`; the threads of one run in lock step.
Modelled are integers, fp16 to fp64, predicates, divergence, barriers, shuffles, votes, atomics, cp.async, ldmatrix and stmatrix,
mma.sync, and wgmma with descriptors of shared memory: what Triton makes for sm_80 and sm_90 without TMA. Anything else is refused
by name before anything is executed.

A report names the lines in the kernel's source of

- accesses out of bounds of the arguments, or misaligned;
- reads of shared memory that nobody wrote;
- races between warps: two accesses to the same bytes, one of them a write, without a barrier in between;
- accesses to the target of a cp.async that was not waited for, and writes to operands of a wgmma that was not;
- races between CTAs: without a release and an acquire in between.

Registers and shared memory start with NaN, and accumulators of wgmma hold NaN until they were waited for. Not modelled: caches, the
asynchronous proxy (a missing fence.proxy), races within a warp, the schedule of warps and CTAs, and time. Approximate instructions
and the sums of tensor cores are rounded once from a more exact result, so their last bits differ from a GPU's.
"""

from .parse import ParseError
from .report import EmulationError, Finding, Hang, Report, UnknownInstruction
from .run import Kernel

__all__ = ["EmulationError", "Finding", "Hang", "Kernel", "ParseError", "Report", "UnknownInstruction"]
