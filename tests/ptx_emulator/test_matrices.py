"""Instructions on matrices, against products of the matrices their registers and descriptors stand for."""

from __future__ import annotations

import pytest
import torch

from ptx_emulator import Kernel, UnknownInstruction
from tests.ptx_emulator.conftest import source

LANE = torch.arange(32)
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def draw(*shape, kind="bf16", seed=0):
    """Multiples of 1/4 up to 2, which every type holds and whose sums are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(TYPES[kind]) / 4


def words(matrix):
    """32-bit words of a matrix, along its rows."""
    return matrix.contiguous().view(torch.int32)


def store_shared(count, argument=2, threads=32):
    """Copies `count` words of an argument to shared memory, and waits."""
    rows = []
    for start in range(0, count, threads):
        rows.append(
            f"add.s32 %r70, %r1, {start}; mad.wide.u32 %rd8, %r70, 4, %rd{argument}; ld.global.b32 %r71, [%rd8];"
            " shl.b32 %r70, %r70, 2; st.shared.b32 [%r70], %r71;"
        )
    return "\n".join([*rows, "fence.proxy.async.shared::cta;", "bar.sync 0;"])


def store_results(registers, threads=32):
    """Writes registers [registers, threads] to the first argument."""
    return "\n".join(
        f"add.s32 %r70, %r1, {threads * index}; mad.wide.u32 %rd8, %r70, 4, %rd1; st.global.b32 [%rd8], {register};"
        for index, register in enumerate(registers)
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(run, count, transposed):
    matrices = torch.arange(64 * count, dtype=torch.int16).view(count, 8, 8)
    out = torch.zeros(count, 32, dtype=torch.int32)
    registers = [f"%r{10 + index}" for index in range(count)]
    body = f"""
        {store_shared(32 * count)}
        shl.b32 %r5, %r1, 4;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{", ".join(registers)}}}, [%r5];
        {store_results(registers)}
    """
    assert run(body, out, words(matrices), shared=512).lines() == []
    expected = matrices.mT if transposed else matrices
    # Lane l holds elements 2 (l mod 4) and the next of row l / 4.
    pairs = out.view(torch.int16).view(count, 32, 2)
    for matrix, held in zip(expected, pairs, strict=True):
        assert torch.equal(held[:, 0], matrix[LANE // 4, 2 * (LANE % 4)])
        assert torch.equal(held[:, 1], matrix[LANE // 4, 2 * (LANE % 4) + 1])


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_inverse_of_ldmatrix(run, transposed):
    suffix = ".trans" if transposed else ""
    matrices = torch.arange(128, dtype=torch.int16)
    out = torch.zeros(2, 32, dtype=torch.int32)
    body = f"""
        {store_shared(64)}
        and.b32 %r5, %r1, 15; shl.b32 %r5, %r5, 4;
        ldmatrix.sync.aligned.m8n8.x2{suffix}.shared.b16 {{%r10, %r11}}, [%r5];
        bar.sync 0;
        stmatrix.sync.aligned.m8n8.x2{suffix}.shared.b16 [%r5 + 256], {{%r10, %r11}};
        bar.sync 0;
        shl.b32 %r6, %r1, 3;
        ld.shared.v2.b32 {{%r12, %r13}}, [%r6 + 256];
        mad.wide.u32 %rd8, %r1, 8, %rd1; st.global.v2.b32 [%rd8], {{%r12, %r13}};
    """
    assert run(body, out, words(matrices), shared=512).lines() == []
    assert torch.equal(out.flatten().view(torch.int16), matrices)


@pytest.mark.parametrize(("kind", "depth"), [("bf16", 16), ("bf16", 8), ("f16", 16), ("tf32", 8), ("tf32", 4)])
def test_mma(run, kind, depth):
    a, b, c = draw(16, depth, kind=kind), draw(depth, 8, kind=kind, seed=1), draw(16, 8, kind="tf32", seed=2)
    per, row, column = (1, LANE // 4, LANE % 4) if kind == "tf32" else (2, LANE // 4, 2 * (LANE % 4))
    halves = range(depth // (4 * per))

    def pack(values):
        return values.contiguous().view(torch.int32).view(-1)

    # Registers of A: rows, rows + 8, then the same of the next columns; of B: the next rows.
    ends = torch.arange(per)
    left = [
        pack(a[(row + 8 * low)[:, None], (column + 4 * per * high)[:, None] + ends])
        for high in halves
        for low in (0, 1)
    ]
    right = [pack(b.mT[row[:, None], (column + 4 * per * high)[:, None] + ends]) for high in halves]
    spread = [(LANE // 4 + 8 * (index // 2), 2 * (LANE % 4) + index % 2) for index in range(4)]
    constant = [pack(c[place]) for place in spread]
    operands = torch.stack([*left, *right, *constant])
    names = [f"%r{10 + index}" for index in range(len(operands))]
    loads = "\n".join(
        f"add.s32 %r70, %r1, {32 * index}; mad.wide.u32 %rd8, %r70, 4, %rd2; ld.global.b32 {name}, [%rd8];"
        for index, name in enumerate(names)
    )
    first, second = len(left), len(left) + len(right)
    parts = [", ".join(names[where]) for where in (slice(first), slice(first, second), slice(second, None))]
    target = ["%r40", "%r41", "%r42", "%r43"]
    out = torch.zeros(4, 32)
    body = f"""
        {loads}
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32
            {{{", ".join(target)}}}, {{{parts[0]}}}, {{{parts[1]}}}, {{{parts[2]}}};
        {store_results(target)}
    """
    assert run(body, out, operands).lines() == []
    expected = a.float() @ b.float() + c
    for held, place in zip(out, spread, strict=True):
        assert torch.equal(held, expected[place])


def test_tf32_operands_are_truncated(run):
    x = torch.full((32,), 1 + 2.0**-11 + 2.0**-12)
    out = torch.zeros(1, 32)
    body = f"""
        mad.wide.u32 %rd8, %r1, 4, %rd2; ld.global.b32 %r10, [%rd8];
        mov.b32 %r24, 0;
        mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32
            {{%r20, %r21, %r22, %r23}}, {{%r10, %r10}}, {{%r10}}, {{%r24, %r24, %r24, %r24}};
        {store_results(["%r20"])}
    """
    run(body, out, x)
    assert out.unique().tolist() == [4.0]


SWIZZLES = {128: 1, 64: 2, 32: 3}


def swizzled(matrix, pitch):
    """A matrix [rows, pitch bytes] as a descriptor with a swizzle expects it, from an address that is a multiple of 1024."""
    flat = matrix.contiguous().view(torch.uint8).flatten()
    place = torch.arange(len(flat))
    place = place ^ ((place >> 7 & pitch // 16 - 1) << 4)
    stored = torch.empty_like(flat)
    stored[place] = flat
    return stored


def descriptor(start, pitch, leading=16):
    """Blocks of 8 rows follow each other; a signed number, as PTX writes it."""
    bits = start >> 4 | (leading >> 4) << 16 | (8 * pitch >> 4) << 32 | SWIZZLES[pitch] << 62
    return bits - (bits >> 63 << 64)


def wgmma(kind, width, flags, a, b, waits="wgmma.wait_group.sync.aligned 0;"):
    registers = [f"%r{2 + index}" for index in range(width // 2)]
    depth = 8 if kind == "tf32" else 16
    return (
        registers,
        f"""
        setp.ne.b32 %p1, %r1, -1;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{width}k{depth}.f32.{kind}.{kind} {{{", ".join(registers)}}}, {a}, {b}, %p1, {flags};
        wgmma.commit_group.sync.aligned;
        {waits}
    """,
    )


def result_of(out, width):
    """[64, width] of registers [width / 2, 128]."""
    thread = torch.arange(128)
    matrix = torch.zeros(64, width)
    for register, held in enumerate(out):
        rows = thread // 32 * 16 + thread % 32 // 4 + 8 * (register % 4 // 2)
        matrix[rows, 8 * (register // 4) + 2 * (thread % 4) + register % 2] = held
    return matrix


@pytest.mark.parametrize(("kind", "pitch"), [("bf16", 128), ("f16", 64), ("bf16", 32), ("tf32", 128), ("tf32", 32)])
def test_wgmma_with_rows_along_the_depth(run, kind, pitch):
    size = TYPES[kind].itemsize
    wide, width = pitch // size, 16
    a, b = draw(64, wide, kind=kind), draw(width, wide, kind=kind, seed=1)
    shared = torch.cat([swizzled(a, pitch), swizzled(b, pitch)]).view(torch.int32)
    start, step = 64 * pitch, 32
    out = torch.zeros(width // 2, 128)
    flags = "1, 1" if kind == "tf32" else "1, 1, 0, 0"
    zero = "\n".join(f"mov.b32 %r{2 + index}, 0;" for index in range(width // 2))
    # Each step takes 32 bytes of the rows.
    registers, body = [], ""
    for offset in range(0, pitch, step):
        left, right = (descriptor(place + offset, pitch) for place in (0, start))
        registers, text = wgmma(kind, width, flags, "%rd5", "%rd6")
        body += f"mov.b64 %rd5, {left}; mov.b64 %rd6, {right}; {text}"
    body = store_shared(len(shared), threads=128) + zero + body + store_results(registers, 128)
    report = run(body, out, shared, threads=128, shared=len(shared) * 4)
    assert report.lines() == []
    assert torch.equal(result_of(out, width), a.float() @ b.float().mT)


@pytest.mark.parametrize("pitch", [128, 64, 32])
def test_wgmma_with_rows_along_the_width(run, pitch):
    width = pitch // 2
    a, b = draw(64, 16), draw(16, width, seed=1)
    # B is stored as 16 rows of its depth, of `width` elements each; A in registers.
    shared = swizzled(b, pitch).view(torch.int32)
    thread, out = torch.arange(128), torch.zeros(width // 2, 128)
    row, column = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
    ends = torch.arange(2)
    pieces = [a[(row + 8 * low)[:, None], (column + 8 * high)[:, None] + ends] for high in (0, 1) for low in (0, 1)]
    operands = torch.stack([piece.contiguous().view(torch.int32).flatten() for piece in pieces])
    zero = "\n".join(f"mov.b32 %r{2 + index}, 0;" for index in range(width // 2))
    loads = "\n".join(
        f"add.s32 %r70, %r1, {128 * index}; mad.wide.u32 %rd8, %r70, 4, %rd3; ld.global.b32 %r{60 + index}, [%rd8];"
        for index in range(4)
    )
    registers, text = wgmma("bf16", width, "1, 1, 1", "{%r60, %r61, %r62, %r63}", "%rd6")
    place = descriptor(0, pitch, leading=16 * pitch)
    body = store_shared(len(shared), threads=128) + zero + loads + f"mov.b64 %rd6, {place};" + text
    report = run(body + store_results(registers, 128), out, shared, operands, threads=128, shared=len(shared) * 4)
    assert report.lines() == []
    assert torch.equal(result_of(out, width), a.float() @ b.float())


@pytest.mark.parametrize(
    ("threads", "between", "expected"),
    [
        (128, "wgmma.wait_group.sync.aligned 0;", ""),
        (
            128,
            "wgmma.wait_group.sync.aligned 1;",
            "write to an operand of an asynchronous product that was not waited for",
        ),
        (256, "wgmma.wait_group.sync.aligned 0;", "a warp overwrites what another read since the last barrier"),
        (256, "wgmma.wait_group.sync.aligned 0; bar.sync 0;", ""),
    ],
)
def test_operands_may_be_overwritten_once_the_groups_that_read_them_waited(run, threads, between, expected):
    shared = torch.zeros(2560 // 4, dtype=torch.int32)
    a, b = (descriptor(place, 32) for place in (0, 2048))
    _, text = wgmma("bf16", 8, "1, 1, 0, 0", "%rd5", "%rd6", between)
    body = f"""
        {store_shared(len(shared), threads=128)}
        {text.replace("wgmma.fence", f"mov.b64 %rd5, {a}; mov.b64 %rd6, {b}; wgmma.fence")}
        shl.b32 %r70, %r1, 2; mov.b32 %r71, 1; setp.lt.u32 %p2, %r1, 32; @%p2 st.shared.b32 [%r70 + 2048], %r71;
    """
    # Both warp groups write and read the same operands.
    body = body.replace("add.s32 %r70, %r1, ", "and.b32 %r70, %r1, 127; add.s32 %r70, %r70, ")
    report = run(body, shared, shared, threads=threads, shared=2560)
    assert [expected in line for line in report.lines()] == ([True] if expected else [])


@pytest.mark.parametrize(("pending", "known"), [(0, True), (1, False)])
def test_accumulators_hold_nan_until_they_were_waited_for(run, pending, known):
    shared, out = torch.zeros(2560 // 4, dtype=torch.int32), torch.zeros(4, 128)
    a, b = (descriptor(place, 32) for place in (0, 2048))
    registers, text = wgmma("bf16", 8, "1, 1, 0, 0", "%rd5", "%rd6", f"wgmma.wait_group.sync.aligned {pending};")
    zero = "\n".join(f"mov.b32 {register}, 0;" for register in registers) + f"mov.b64 %rd5, {a}; mov.b64 %rd6, {b};"
    text = text.replace("wgmma.fence", zero + "wgmma.fence")
    body = store_shared(len(shared), threads=128) + text + store_results(registers, 128)
    run(body, out, shared, threads=128, shared=2560)
    assert out.isnan().all().item() is not known
    assert (out == 0).all().item() is known


def test_descriptors_that_are_not_modelled(run):
    shared = torch.zeros(2560 // 4, dtype=torch.int32)
    _, text = wgmma("bf16", 8, "1, 1, 0, 0", "%rd5", "%rd6")
    with pytest.raises(UnknownInstruction, match="descriptor 0x0 without swizzle"):
        run(text.replace("setp", "mov.b64 %rd5, 0; mov.b64 %rd6, 0; setp"), shared, threads=128, shared=2560)
    with pytest.raises(UnknownInstruction, match="whole warp groups"):
        Kernel(source(text, threads=64))
