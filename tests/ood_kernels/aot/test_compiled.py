from __future__ import annotations

import pytest

from ood_kernels.aot import compiled
from ood_kernels.aot.compiled import TARGETS


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        ("ld.global.b32 %r1, [%rd1];", 4),
        ("ld.global.L1::evict_last.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];", 16),
        ("ld.global.L2::cache_hint.v2.b64 {%rd1, %rd2}, [%rd3], %rd4;", 16),
        ("ld.global.v8.b32 {%r1}, [%rd1];", 32),
        ("ld.global.u8 %rs1, [%rd1];\n ld.global.v2.b16 {%rs1, %rs2}, [%rd1];", 4),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", 4),
        ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];\n st.global.v4.b32 [%rd1], {%r1};", 0),
        ("global_load_dwordx4 v[0:3], v[4:5], off", 16),
        ("buffer_load_dwordx2 v[0:1], v2, s[0:3], 0 offen\nbuffer_load_ushort v0, v2, s[0:3]", 8),
        ("global_load_lds_dword v[0:1], off", 4),
        ("s_load_dwordx4 s[0:3], s[4:5], 0x0\nds_read_b128 v[0:3], v4", 0),
    ],
)
def test_widest_global_load(listing, expected):
    assert compiled.load_bytes(listing) == expected


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        ("wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 {", "wgmma"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "mma"),
        ("tcgen05.mma.cta_group::1.kind::f16 [", "tcgen05"),
        ("v_mfma_f32_32x32x8_bf16_1k a[0:15]", "mfma"),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", ""),
    ],
)
def test_tensor_core_instruction(listing, expected):
    assert compiled.tensor_core(listing) == expected


@pytest.mark.parametrize(
    ("operands", "expected"),
    [
        ("inputPrecision = tf32 : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>", True),
        ("inputPrecision = tf32x3 : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>", True),
        (": tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>", True),
        (": tensor<64x32xf16> * tensor<32x64xf16> -> tensor<64x64xf32>", True),
        (": tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>", False),
    ],
)
def test_products_in_less_than_fp32_are_seen(operands, expected):
    assert compiled.has_reduced_dot(f"    %1 = tt.dot %a, %b, %c {operands} loc(#loc)") is expected


def test_usage_of_a_cubin_and_of_amd_assembly():
    text = " Function kernel:\n  REG:168 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:596 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert compiled.usage(text) == (168, 24)
    metadata = "    .private_segment_fixed_size: 12\n    .sgpr_count:     30\n    .vgpr_count:     98\n"
    assert compiled.amdgcn_usage(metadata) == (98, 12)


def test_the_limits_are_those_of_the_devices():
    limits = {name: target.shared_bytes // 1024 for name, target in TARGETS.items()}
    assert limits == {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
