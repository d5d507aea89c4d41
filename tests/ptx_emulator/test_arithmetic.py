"""One instruction at a time, against results derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

I16, I32, I64 = torch.int16, torch.int32, torch.int64
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LEAST, MOST = -(2**31), 2**31 - 1
NAN, INF = math.nan, math.inf


def ints(*values, dtype=I32):
    bits = torch.iinfo(dtype).bits
    return torch.tensor([(value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for value in values], dtype=dtype)


def floats(*values, dtype=F32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("text", "inputs", "expected"),
    [
        ("add.s32 %d, %a, %b;", ([1, MOST], [2, 1]), [3, LEAST]),
        ("sub.s32 %d, %a, 5;", ([1, LEAST],), [-4, MOST - 4]),
        ("mul.lo.s32 %d, %a, %b;", ([7, 2**20], [-3, 2**13]), [-21, 0]),
        ("mul.hi.s32 %d, %a, %b;", ([-1, 2**30], [1, 8]), [-1, 2]),
        ("mul.hi.u32 %d, %a, %b;", ([-1, 2**30], [2, 8]), [1, 2]),
        ("mad.lo.s32 %d, %a, -12, %b;", ([3, 0], [1, 9]), [-35, 9]),
        ("div.s32 %d, %a, %b;", ([7, -7, 7, -7], [2, 2, -2, -2]), [3, -3, -3, 3]),
        ("div.u32 %d, %a, %b;", ([-1, 9], [2, 4]), [MOST, 2]),
        ("rem.s32 %d, %a, %b;", ([7, -7, 7, -7], [2, 2, -2, -2]), [1, -1, 1, -1]),
        ("neg.s32 %d, %a;", ([5, LEAST],), [-5, LEAST]),
        ("abs.s32 %d, %a;", ([-5, 4],), [5, 4]),
        ("min.s32 %d, %a, %b;", ([-1, 3], [1, 2]), [-1, 2]),
        ("min.u32 %d, %a, %b;", ([-1, 3], [1, 2]), [1, 2]),
        ("max.s32 %d, %a, 1;", ([-1, 3],), [1, 3]),
        ("and.b32 %d, %a, %b;", ([12], [10]), [8]),
        ("or.b32 %d, %a, %b;", ([12], [10]), [14]),
        ("xor.b32 %d, %a, 10;", ([12],), [6]),
        ("not.b32 %d, %a;", ([0, 5],), [-1, -6]),
        ("shl.b32 %d, %a, %b;", ([1, 1, 3], [4, 32, 31]), [16, 0, LEAST]),
        ("shr.u32 %d, %a, %b;", ([-1, -1], [28, 40]), [15, 0]),
        ("shr.s32 %d, %a, %b;", ([-16, -16], [2, 40]), [-4, -1]),
        ("shr.s32 %d, %a, 31;", ([-16, 16],), [-1, 0]),
        ("shf.l.wrap.b32 %d, %a, %b, 8;", ([0x12345678], [0x0A0B0C0D]), [0x0B0C0D12]),
        ("shf.r.wrap.b32 %d, %a, %b, 8;", ([0x12345678], [0x0A0B0C0D]), [0x0D123456]),
        ("bfe.u32 %d, %a, 4, 3;", ([0x75, 0xF0],), [7, 7]),
        ("bfe.s32 %d, %a, 3, 1;", ([8, 0],), [-1, 0]),
        ("bfe.s32 %d, %a, 30, 8;", ([LEAST, 2**30],), [-2, 1]),
        ("prmt.b32 %d, %a, %b, 0x5410;", ([0x11112222], [0x33334444]), [0x44442222]),
        ("prmt.b32 %d, %a, 0, 0x000B;", ([-1],), [0x00FFFFFF | -(2**24)]),
        ("lop3.b32 %d, %a, %b, %c, 0x96;", ([12], [10], [7]), [12 ^ 10 ^ 7]),
        ("popc.b32 %d, %a;", ([255, -1],), [8, 32]),
        ("clz.b32 %d, %a;", ([1, 0, -1],), [31, 32, 0]),
        ("brev.b32 %d, %a;", ([1, 6],), [LEAST, 0x60000000]),
        ("setp.lt.s32 %q, %a, %b; selp.b32 %d, 1, 0, %q;", ([-1, 1], [1, -1]), [1, 0]),
        ("setp.lt.u32 %q, %a, %b; selp.b32 %d, 1, 0, %q;", ([-1, 1], [1, -1]), [0, 1]),
        ("setp.hs.u32 %q, %a, %b; @%q mov.b32 %d, 7; @!%q mov.b32 %d, 9;", ([-1, 1], [1, -1]), [7, 9]),
        (
            "setp.eq.b32 %q, %a, 1; setp.ne.and.b32 %q, %b, 5, !%q; selp.b32 %d, 1, 0, %q;",
            ([1, 2, 2], [4, 4, 5]),
            [0, 1, 0],
        ),
        (".reg .b64 %w; mul.wide.s32 %w, %a, %b; mov.b64 {_, %d}, %w;", ([-1, 2**30], [1, 8]), [-1, 2]),
        (
            ".reg .b64 %w; mov.b64 %w, {%a, %b}; shr.u64 %w, %w, 16; cvt.u32.u64 %d, %w;",
            ([0x55550000], [0x6666]),
            [0x66665555],
        ),
        (".reg .b16 %s; cvt.u16.u32 %s, %a; cvt.s32.s16 %d, %s;", ([0x18000],), [-32768]),
        (".reg .b16 %s; cvt.u16.u32 %s, %a; shl.b16 %s, %s, 3; cvt.u32.u16 %d, %s;", ([0x6001],), [8]),
        ("cvt.sat.s8.s32 %d, %a;", ([300, -300, 5],), [127, -128, 5]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_integers(evaluate, text, inputs, expected):
    assert evaluate(text, *(ints(*values) for values in inputs)) == expected


@pytest.mark.parametrize(
    ("text", "inputs", "expected"),
    [
        ("add.s64 %d, %a, -16;", ([2**40],), [2**40 - 16]),
        ("mul.lo.s64 %d, %a, %b;", ([2**33], [-3]), [-3 * 2**33]),
        ("mul.hi.s64 %d, %a, %b;", ([2**62, -1], [8, 1]), [2, -1]),
        ("mad.lo.s64 %d, %a, %b, %c;", ([2**33], [3], [1]), [3 * 2**33 + 1]),
        ("shr.s64 %d, %a, 63;", ([-1, 1],), [-1, 0]),
        ("shr.u64 %d, %a, 61;", ([-1],), [7]),
        ("div.s64 %d, %a, %b;", ([-(2**40) - 1], [2]), [-(2**39)]),
        (".reg .b32 %h; cvt.u32.u64 %h, %a; cvt.s64.s32 %d, %h;", ([2**31],), [-(2**31)]),
        (".reg .b32 %h; cvt.u32.u64 %h, %a; cvt.u64.u32 %d, %h;", ([2**31],), [2**31]),
        (".reg .b32 %h; cvt.u32.u64 %h, %a; mad.wide.s32 %d, %h, 2, %b;", ([-3], [10]), [4]),
        (".reg .b32 %h; cvt.u32.u64 %h, %a; mul.wide.u32 %d, %h, 4;", ([-1],), [2**34 - 4]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_integers_of_64_bits(evaluate, text, inputs, expected):
    assert evaluate(text, *(ints(*values, dtype=I64) for values in inputs), out=I64) == expected


ROUND = 2.0**-24


@pytest.mark.parametrize(
    ("text", "inputs", "expected"),
    [
        ("add.f32 %d, %a, %b;", ([1.0, 1.0], [ROUND, 3 * ROUND]), [1.0, 1 + 2 * ROUND * 2]),
        ("sub.f32 %d, %a, 0f3F800000;", ([2.5],), [1.5]),
        ("mul.f32 %d, %a, %b;", ([0.1, INF], [0.1, 0.0]), [0.010000000707805157, NAN]),
        # One rounding: (1 + 2^-23)^2 - 1 keeps 2^-46.
        ("fma.rn.f32 %d, %a, %a, 0fBF800000;", ([1 + 2.0**-23],), [2.0**-22 + 2.0**-46]),
        ("fma.rn.ftz.f32 %d, %a, %b, 0f00000000;", ([2.0**-100, 1.0], [2.0**-40, 2.0**-130]), [0.0, 0.0]),
        ("div.full.f32 %d, %a, %b;", ([1.0, 1.0], [4.0, 0.0]), [0.25, INF]),
        ("neg.f32 %d, %a;", ([1.5],), [-1.5]),
        ("abs.f32 %d, %a;", ([-1.5],), [1.5]),
        ("max.f32 %d, %a, %b;", ([NAN, 1.0], [2.0, 3.0]), [2.0, 3.0]),
        ("max.NaN.f32 %d, %a, %b;", ([NAN, 1.0], [2.0, 3.0]), [NAN, 3.0]),
        ("min.f32 %d, %a, %b;", ([NAN, 1.0], [2.0, 3.0]), [2.0, 1.0]),
        ("ex2.approx.f32 %d, %a;", ([3.0, -INF],), [8.0, 0.0]),
        ("lg2.approx.f32 %d, %a;", ([8.0, 0.0],), [3.0, -INF]),
        ("rcp.approx.f32 %d, %a;", ([8.0],), [0.125]),
        ("rsqrt.approx.f32 %d, %a;", ([16.0],), [0.25]),
        ("sqrt.rn.f32 %d, %a;", ([16.0],), [4.0]),
        ("selp.f32 %d, %a, %b, %q;", ([1.0], [2.0]), [2.0]),
        ("setp.lt.f32 %q, %a, %b; selp.f32 %d, %b, %a, %q;", ([1.0, NAN], [2.0, 2.0]), [2.0, NAN]),
        ("setp.ltu.f32 %q, %a, %b; selp.f32 %d, %b, %a, %q;", ([1.0, NAN], [2.0, 2.0]), [2.0, 2.0]),
        (
            "setp.ne.f32 %q, %a, %b; selp.f32 %d, %b, 0f00000000, %q;",
            ([1.0, NAN, 2.0], [2.0, 2.0, 2.0]),
            [2.0, 0.0, 0.0],
        ),
        (
            "setp.neu.f32 %q, %a, %b; selp.f32 %d, %b, 0f00000000, %q;",
            ([1.0, NAN, 2.0], [2.0, 2.0, 2.0]),
            [2.0, 2.0, 0.0],
        ),
        ("setp.nan.f32 %q, %a, %a; selp.f32 %d, 0f3F800000, 0f00000000, %q;", ([1.0, NAN],), [0.0, 1.0]),
        ("setp.num.f32 %q, %a, %a; selp.f32 %d, 0f3F800000, 0f00000000, %q;", ([1.0, NAN],), [1.0, 0.0]),
        ("cvt.rna.tf32.f32 %d, %a;", ([1 + 2.0**-11, 1 + 2.0**-12, NAN],), [1 + 2.0**-10, 1.0, NAN]),
        ("cvt.rzi.s32.f32 %d, %a; cvt.rn.f32.s32 %d, %d;", ([-2.7, 3e9, NAN],), [-2.0, 2.0**31, 0.0]),
        ("cvt.rmi.f32.f32 %d, %a;", ([-2.5],), [-3.0]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fp32(evaluate, text, inputs, expected):
    found = evaluate(text, *(floats(*values) for values in inputs), out=F32)
    torch.testing.assert_close(floats(*found), floats(*expected), rtol=0, atol=0, equal_nan=True)


def test_the_sign_of_a_flushed_number_stays(evaluate):
    found = evaluate("mul.ftz.f32 %d, %a, %b;", floats(-(2.0**-100)), floats(2.0**-40), out=F32)
    assert math.copysign(1, found[0]) == -1


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_precision_rounds_to_nearest_even(evaluate, dtype):
    name = "f16" if dtype == F16 else "bf16"
    step = torch.finfo(dtype).eps
    values = floats(1 + step / 2, 1 + 1.5 * step, 1 + 0.75 * step, INF)
    found = evaluate(f"cvt.rn.{name}.f32 %d, %a;", values, out=dtype)
    assert found == [1.0, 1 + 2 * step, 1 + step, INF]
    assert evaluate(f"cvt.f32.{name} %d, %a;", floats(1 + step, -3.0, dtype=dtype), out=F32) == [1 + step, -3.0]
    assert evaluate(f"mul.{name} %d, %a, %b;", floats(1.5, dtype=dtype), floats(-2.0, dtype=dtype), out=dtype) == [-3.0]
    fused = evaluate(
        f"fma.rn.{name} %d, %a, %a, %b;", floats(1 + step, dtype=dtype), floats(-1.0, dtype=dtype), out=dtype
    )
    assert fused == [2 * step * (1 + step / 2)] or fused == [2 * step]


@pytest.mark.parametrize(("dtype", "name"), [(F16, "f16x2"), (BF16, "bf16x2")])
def test_two_numbers_in_one_register(evaluate, dtype, name):
    packed = evaluate(f"cvt.rn.{name}.f32 %d, %a, %b;", floats(1.5, -2.0), floats(0.25, 8.0))
    pairs = torch.tensor(packed, dtype=I32).view(dtype).tolist()
    # The first operand is the upper half.
    assert pairs == [0.25, 1.5, 8.0, -2.0]
    doubled = evaluate(f"mul.{name} %d, %a, %a;", torch.tensor(packed, dtype=I32))
    assert torch.tensor(doubled, dtype=I32).view(dtype).tolist() == [0.0625, 2.25, 64.0, 4.0]


def test_fp64(evaluate):
    values = floats(1 / 3, dtype=F64), floats(3.0, dtype=F64)
    assert evaluate("mul.f64 %d, %a, %b;", *values, out=F64) == [1.0]
    assert evaluate("add.f64 %d, %a, 0d3FF0000000000000;", values[1], out=F64) == [4.0]
    assert evaluate("cvt.rn.f32.f64 %d, %a;", values[0], out=F32) == [float(torch.tensor(1 / 3))]
