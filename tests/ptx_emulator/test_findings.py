"""Each kind of fault, with the lines of the source it names."""

from __future__ import annotations

import pytest
import torch

from ptx_emulator import EmulationError, Kernel
from tests.ptx_emulator.conftest import source

FOUR = "mad.wide.u32 %rd7, %r1, 4, %rd1;"


def numbers(count=32):
    return torch.arange(count, dtype=torch.int32)


def kinds(report):
    return [finding.kind for finding in report.findings]


def test_reads_and_writes_outside_of_an_argument(run):
    x, y = numbers(30), numbers(32)
    body = FOUR + "ld.global.b32 %r2, [%rd7]; mad.wide.u32 %rd8, %r1, 4, %rd2; st.global.b32 [%rd8 + 8], %r2;"
    report = run(body, x, y, names=["x_ptr", "y_ptr"])
    assert kinds(report) == ["out of bounds", "out of bounds"]
    assert "4 bytes at 120 of the 120 bytes of x_ptr" in report.lines()[0]
    assert "2 times, first in CTA (0, 0, 0)" in report.lines()[0]
    # The lanes within bounds went on, the others read 0.
    assert y.tolist() == [0, 1, *range(30)]


def test_a_view_is_bounded_by_itself_and_not_by_its_storage(run):
    whole = numbers(64)
    report = run(FOUR + "ld.global.b32 %r2, [%rd7];", whole[8:32])
    assert [count for count, *_ in report.findings.values()] == [8]
    assert run(FOUR + "ld.global.b32 %r2, [%rd7];", whole[8:32], whole[30:50]).lines() == []


@pytest.mark.parametrize("address", ["mov.b64 %rd7, 0;", "add.s64 %rd7, %rd1, -8;"])
def test_addresses_of_nothing(run, address):
    report = run(f"{address} ld.global.b32 %r2, [%rd7];", numbers())
    assert kinds(report) == ["out of bounds"]


def test_misaligned_vectors(run):
    report = run("mad.wide.u32 %rd7, %r1, 4, %rd1; ld.global.v2.b32 {%r2, %r3}, [%rd7];", numbers(40))
    assert kinds(report) == ["misaligned"]
    assert [count for count, *_ in report.findings.values()] == [16]


def test_shared_memory_that_nobody_wrote(run):
    body = "shl.b32 %r3, %r1, 2; setp.lt.u32 %p1, %r1, 20; @%p1 st.shared.b32 [%r3], %r1; ld.shared.b32 %r2, [%r3];"
    report = run(body, numbers(), shared=128, grid=(2,))
    assert kinds(report) == ["uninitialised"]
    assert [count for count, *_ in report.findings.values()] == [24]
    assert kinds(run(body, numbers(), shared=30)) == ["out of bounds", "out of bounds"]


EXCHANGE = """
    .file 1 "/somewhere/kernel.py"
    shl.b32 %r3, %r1, 2;
    xor.b32 %r4, %r3, 128;
    .loc 1 10 3
    st.shared.b32 [%r3], %r1;
    {between}
    .loc 1 12 5 // kernel.py:12:5 @[ caller.py:30:1 ]
    ld.shared.b32 %r2, [%r4];
    {after}
    add.s32 %r2, %r2, 1;
    .loc 1 14 7
    st.shared.b32 [%r3], %r2;
"""


def exchange(run, between="", after=""):
    text = EXCHANGE.format(between=between, after=after)
    lines = [line for line in text.splitlines() if ".file" not in line]
    file = next(line for line in text.splitlines() if ".file" in line)
    kernel = Kernel(source("\n".join(lines), 1, 64) + file, 256)
    return kernel.run((1,), [numbers()])


def test_races_name_both_lines(run):
    assert exchange(run, "bar.sync 0;", "bar.sync 0;").lines() == []
    (line,) = exchange(run, "", "bar.sync 0;").lines()
    what = "a warp reads what another wrote since the last barrier"
    assert line.startswith(f"tiny: race, shared memory: {what}: kernel.py:12, called at caller.py:30 (line ")
    assert " and kernel.py:10 (line " in line
    assert "st.shared.b32 [%r3], %r1)" in line
    (line,) = exchange(run, "bar.sync 0;", "").lines()
    assert "race" in line
    assert "overwrites what another read since the last barrier: kernel.py:14 (line " in line
    assert " and kernel.py:12, called at caller.py:30 (line " in line


def test_two_warps_that_write_one_address(run):
    body = "mov.b32 %r3, {value}; st.shared.b32 [global_smem], %r3;"
    assert run(body.format(value=5), numbers(), threads=64, shared=4).lines() == []
    by_lane = run("st.shared.b32 [global_smem], %r1;", numbers(), threads=32, shared=4)
    assert "lanes of one instruction write different values" in by_lane.lines()[0]
    by_warp = """
        setp.eq.b32 %p1, %r1, 0; setp.eq.b32 %p2, %r1, 32;
        @%p1 st.shared.b32 [global_smem], %r1;
        @%p2 st.shared.b32 [global_smem], %r1;
    """
    assert "two warps write different values" in run(by_warp, numbers(), threads=64, shared=4).lines()[0]


COPY = """
    shl.b32 %r3, %r1, 2;
    {four}
    cp.async.ca.shared.global [%r3 + 0], [%rd7 + 0], 0x4, {size};
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r2, [%r3];
    {four} st.global.b32 [%rd7], %r2;
"""


def test_a_copy_is_there_after_it_was_waited_for(run):
    x = numbers()
    assert run(COPY.format(four=FOUR, size=4, wait="cp.async.wait_group 0;"), x, shared=128).lines() == []
    assert x.tolist() == list(range(32))
    report = run(COPY.format(four=FOUR, size=4, wait="cp.async.wait_group 1;"), x, shared=128)
    assert "target of an asynchronous copy that was not waited for" in report.lines()[0]


def test_a_copy_is_zero_beyond_its_source(run):
    x = numbers() + 1
    body = COPY.format(four=FOUR, size="%r5", wait="cp.async.wait_group 0;")
    run("setp.lt.u32 %p1, %r1, 9; selp.b32 %r5, 4, 0, %p1; " + body, x, shared=128)
    assert x.tolist() == [*range(1, 10), *[0] * 23]


def test_other_warps_see_a_copy_after_a_barrier(run):
    body = COPY.format(four=FOUR, size=4, wait="cp.async.wait_group 0; {barrier} xor.b32 %r3, %r3, 128;")
    x = numbers(64)
    assert run(body.format(barrier="bar.sync 0;"), x, threads=64, shared=256).lines() == []
    assert x.tolist() == [*range(32, 64), *range(32)]
    assert "reads what another wrote" in run(body.format(barrier=""), numbers(64), threads=64, shared=256).lines()[0]


# The first CTA writes a number and counts, the second waits and reads.
HAND_OVER = """
    mov.u32 %r3, %ctaid.x;
    setp.eq.b32 %p2, %r3, 0;
    setp.eq.b32 %p1, %r1, 0;
    @!%p2 bra $second;
    @%p1 st.global.b32 [%rd1], 42;
    bar.sync 0;
    @%p1 {arrive}
    ret;
$second:
    @%p1 {wait}
    bar.sync 0;
    ld.global.b32 %r2, [%rd1];
    mad.wide.u32 %rd7, %r1, 4, %rd3; st.global.b32 [%rd7], %r2;
"""
RELAXED = "atom.global.gpu.relaxed.add.u32 %r4, [%rd2], 1;"
RELEASE, ACQUIRE = RELAXED.replace("relaxed", "release"), "ld.global.gpu.acquire.b32 %r4, [%rd2];"


@pytest.mark.parametrize(
    ("arrive", "wait", "ordered"),
    [
        (RELEASE, ACQUIRE, True),
        (RELEASE, RELAXED.replace("relaxed", "acq_rel"), True),
        ("membar.gl; @%p1 " + RELAXED, RELAXED + "fence.acq_rel.gpu;", True),
        (RELAXED, ACQUIRE, False),
        (RELEASE, "ld.global.b32 %r4, [%rd2];", False),
        (RELEASE, ACQUIRE.replace("%rd2", "%rd2 + 4"), False),
    ],
)
def test_ctas_are_ordered_by_release_and_acquire(run, arrive, wait, ordered):
    out = numbers(64)
    report = run(
        HAND_OVER.format(arrive=arrive, wait=wait),
        numbers(1),
        torch.zeros(2, dtype=torch.int32),
        out,
        threads=64,
        grid=(2,),
    )
    assert out.tolist() == [42] * 64
    assert kinds(report) == ([] if ordered else ["race between CTAs"])


def test_arguments_that_do_not_fit(run):
    with pytest.raises(EmulationError, match="expected at most 1 arguments, got 2"):
        Kernel(source("ret;")).run((1,), [numbers(), 1])
    with pytest.raises(EmulationError, match="count is 18446744073709551616, expected a number of 64 bits"):
        Kernel(source("ret;")).run((1,), [2**64], names=["count"])
    with pytest.raises(EmulationError, match="expected a tensor on the CPU, got one on meta"):
        Kernel(source("ret;")).run((1,), [torch.empty(1, device="meta")])
