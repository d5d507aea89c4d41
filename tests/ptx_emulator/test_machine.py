"""Divergence, barriers and exchange between threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx_emulator import Hang, Kernel, ParseError, UnknownInstruction
from tests.ptx_emulator.conftest import source

STORE = "mad.wide.u32 %rd8, %r1, 4, %rd1; st.global.b32 [%rd8], %r2;"


def numbers(count=32):
    return torch.zeros(count, dtype=torch.int32)


def test_threads_part_and_meet(run):
    out = numbers()
    body = """
        mov.b32 %r2, 0;
        setp.lt.u32 %p1, %r1, 10;
        @%p1 bra $low;
        mov.b32 %r2, 5;
        bra.uni $meet;
    $low:
        mov.b32 %r2, 7;
    $meet:
        add.s32 %r2, %r2, 1;
    """
    assert run(body + STORE, out).lines() == []
    assert out.tolist() == [8] * 10 + [6] * 22


def test_a_loop_runs_as_often_as_each_thread_asks(run):
    out = numbers()
    body = """
        mov.b32 %r2, 0;
        mov.b32 %r3, 0;
    $loop:
        add.s32 %r2, %r2, %r3;
        add.s32 %r3, %r3, 1;
        setp.le.u32 %p1, %r3, %r1;
        @%p1 bra $loop;
    """
    report = run(body + STORE, out)
    assert out.tolist() == [thread * (thread + 1) // 2 for thread in range(32)]
    assert 32 * 4 < report.instructions < 33 * 6


def test_some_threads_end_early(run):
    out = numbers(64)
    body = "setp.ge.u32 %p1, %r1, 40; @%p1 ret; mov.b32 %r2, 3;"
    run(body + STORE, out, threads=64)
    assert out.tolist() == [3] * 40 + [0] * 24


def test_a_barrier_waits_for_threads_that_went_another_way(run):
    out = numbers(64)
    body = """
        shl.b32 %r3, %r1, 2;
        setp.lt.u32 %p1, %r1, 32;
        @%p1 bra $first;
        bar.sync 0;
        ld.shared.b32 %r2, [%r3 + -128];
        bra.uni $end;
    $first:
        add.s32 %r4, %r1, 100;
        st.shared.b32 [%r3], %r4;
        bar.sync 0;
        mov.b32 %r2, 1;
    $end:
    """
    assert run(body + STORE, out, threads=64, shared=256).lines() == []
    assert out.tolist() == [1] * 32 + list(range(100, 132))


def test_threads_that_wait_for_each_other(run):
    body = """
        setp.lt.u32 %p1, %r1, 16;
        @%p1 bra $half;
        shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;
        bra.uni $end;
    $half:
        bar.sync 0;
    $end:
    """
    with pytest.raises(Hang, match=r"threads wait for each other at .*shfl.*bar\.sync|bar\.sync.*shfl"):
        run(body + "mov.b32 %r2, 0;" + STORE, numbers())


def test_a_loop_without_end_names_its_place(run):
    with pytest.raises(Hang, match=r"tiny, CTA \(1, 0, 0\): no end .* bra"):
        run("mov.u32 %r3, %ctaid.x; setp.eq.b32 %p1, %r3, 1;\n$loop: @%p1 bra $loop;", numbers(), grid=(2,), limit=1000)


def test_every_cta_runs_once_in_any_order(run):
    body = """
        mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ctaid.y; mad.lo.s32 %r2, %r4, %r3, %r2;
        mad.wide.u32 %rd8, %r2, 4, %rd1;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 atom.global.gpu.relaxed.add.u32 %r5, [%rd2], 1;
        @%p1 st.global.b32 [%rd8], %r5;
    """
    out, count = numbers(6), numbers(1)
    assert run(body, out, count, grid=(3, 2)).ctas == 6
    assert out.tolist() == [0, 1, 2, 3, 4, 5]
    count.zero_()
    run(body, out, count, grid=(3, 2), order=np.random.default_rng(0))
    assert out.tolist() != [0, 1, 2, 3, 4, 5]
    assert sorted(out.tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", [lane ^ 1 for lane in range(32)]),
        ("shfl.sync.idx.b32 %r2, %r1, 5, 31, -1;", [5] * 32),
        # Segments of 8 lanes.
        ("shfl.sync.idx.b32 %r2, %r1, 5, 0x181f, -1;", [lane // 8 * 8 + 5 for lane in range(32)]),
        ("shfl.sync.up.b32 %r2, %r1, 3, 0, -1;", [max(lane - 3, lane if lane < 3 else 0) for lane in range(32)]),
        ("shfl.sync.down.b32 %r2, %r1, 3, 31, -1;", [lane + 3 if lane < 29 else lane for lane in range(32)]),
        ("shfl.sync.down.b32 %r3|%p1, %r1, 3, 31, -1; selp.b32 %r2, 1, 0, %p1;", [1] * 29 + [0] * 3),
        ("redux.sync.min.s32 %r2, %r1, -1;", [0] * 32),
        ("redux.sync.add.s32 %r2, %r1, 0xffffffff;", [496] * 32),
        ("setp.lt.u32 %p1, %r1, 4; vote.sync.ballot.b32 %r2, %p1, -1;", [15] * 32),
        ("setp.lt.u32 %p1, %r1, 4; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;", [1] * 32),
        ("setp.lt.u32 %p1, %r1, 4; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;", [0] * 32),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_exchange_within_a_warp(run, text, expected):
    out = numbers()
    run(text + STORE, out)
    assert out.tolist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "frob.b32 %r2, %r1;",
            r"unknown instruction frob at line \d+ of the PTX: 'frob.b32 %r2, %r1'; known are .*, add, ",
        ),
        ("add.sat.s32 %r2, %r1, %r1;", r"unknown modifier .sat of add at line \d+"),
        ("add.cc.u32 %r2, %r1, %r1;", r"unknown modifier .cc of add"),
        ("mov.u32 %r2, %clock;", r"operand %clock at line \d+ of the PTX.*; known are .*%tid.x"),
        ("ld.b32 %r2, [%rd1];", r"expected .global or .shared"),
        ("bar.sync 1, 64;", r"barrier of a part of the CTA"),
        ("add.s32 %rd2, %r1, %r1;", r"register %rd2 of 64 bits for .s32"),
        ("add.lo.f32 %r2, %r1, %r1;", r"unknown modifier .lo of add.f32 at line"),
        ("add.s64 %rd2, %r1, %rd1;", r"register %r1 of 32 bits for .s64"),
        ("wgmma.fence.sync.aligned;", r"whole warp groups|operands or modifiers of wgmma"),
    ],
)
def test_what_is_not_modelled_is_refused_before_anything_runs(text, expected):
    if text.startswith("wgmma"):
        text = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r2,%r3,%r4,%r5}, %rd1, %rd1, 1, 1, 1, 0, 0;"
    with pytest.raises(UnknownInstruction, match=expected):
        Kernel(source(text))


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        ("", "one kernel .* got 0"),
        (source("ret;") + source("ret;"), "one kernel .* got 2: tiny, tiny"),
        (source("ret;").replace(".reqntid 32", ""), "reqntid"),
        (source("ret;").rstrip().rstrip("}"), "closing brace"),
        (source("add.s32 %r2, %r1, %r1"), None),
    ],
)
def test_text_that_is_no_kernel(ptx, expected):
    if expected is None:
        with pytest.raises((ParseError, UnknownInstruction)):
            Kernel(ptx)
        return
    with pytest.raises(ParseError, match=expected):
        Kernel(ptx)


def test_names_of_inline_assembly_are_its_own(run):
    out = numbers()
    body = """
        { .reg .pred q; .reg .b32 t; setp.lt.u32 q, %r1, 3; selp.b32 t, 1, 2, q; mov.b32 %r2, t; }
        { .reg .b32 t; mov.b32 t, 10; add.s32 %r2, %r2, t; }
    """
    run(body + STORE, out)
    assert out.tolist() == [11] * 3 + [12] * 29
