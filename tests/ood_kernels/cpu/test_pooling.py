from __future__ import annotations

import functools
import importlib.util
import itertools
import subprocess
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ood_kernels import reference
from ood_kernels.cpu import pooling

PATHS = ("compiled", "eager")
LAYOUTS = ("nchw", "channels_last", "tokens")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1, 1, 1),
    (3, 5, 1, 1),
    (2, 7, 7, 7),
    (4, 3, 1, 9),
    (5, 2, 5, 3),
    (2, 20, 4, 4),
    (1, 33, 2, 2),
    (2, 530, 3, 6),
    (1, 1040, 1, 2),
    (2, 4, 12, 13),
    (1, 3, 101, 100),
    (0, 4, 3, 3),
)


@pytest.fixture(scope="module")
def compiled() -> bool:
    return pooling.is_compiled()


@pytest.fixture
def path(request, monkeypatch, compiled) -> str:
    """Both ways to the result; the compiled one only where there is a compiler."""
    if request.param == "eager":
        monkeypatch.setattr(pooling, "_load", lambda: None)
    elif not compiled:
        pytest.skip("no C++ compiler")
    return request.param


def random_map(shape, dtype=torch.float32, seed=0, layout="nchw"):
    """Signed values over several powers of two; some channels are negative everywhere, some are zero or -0.0 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 4 ** torch.randn(shape[:2], generator=generator)[..., None, None]
    kinds = torch.randint(6, shape[:2], generator=generator)[..., None, None]
    values = torch.where(kinds == 0, -values.abs(), values.where(kinds != 1, 0.0).where(kinds != 2, -0.0))
    return laid_out(values.where(kinds != 3, values.relu()).to(dtype), layout)


def laid_out(values, layout):
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "tokens":
        samples, channels, height, width = values.shape
        tokens = values.flatten(2).transpose(1, 2).contiguous()
        return tokens.transpose(1, 2).unsqueeze(3).view(samples, channels, height * width, 1)
    return values.contiguous()


def check(feature_map, rectify=False):
    """Maximum equal to fp64's bit for bit; a mean off by no more than the rounding of a sum of its terms' sizes."""
    exact = feature_map.double()
    seen = exact.clamp_min(0) if rectify else exact
    got = pooling.pool_statistics(feature_map, rectify)
    bound = 4e-7 * exact.abs().mean((2, 3))
    assert torch.equal(got.maximum.double(), seen.amax((2, 3)))
    assert ((got.h.double() - exact.mean((2, 3))).abs() <= bound).all()
    assert ((got.nap_mean.double() - seen.mean((2, 3))).abs() <= bound).all()
    assert {value.dtype for value in got} == {torch.float32}
    assert all(value.shape == feature_map.shape[:2] and value.is_contiguous() for value in got)
    return got


@pytest.mark.pairwise("path", shape=SHAPES, path=PATHS, layout=LAYOUTS, dtype=FLOATS)
def test_equals_fp64_in_every_shape_dtype_and_layout(shape, path, layout, dtype):
    for rectify in (False, True):
        check(random_map(shape, dtype, layout=layout), rectify)


@pytest.mark.parametrize("path", PATHS, indirect=True)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    rectify=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_fp64_for_random_maps(path, shape, dtype, layout, rectify, seed):
    check(random_map(shape, dtype, seed, layout), rectify)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_any_strides(relayout, path):
    for dtype, rectify in itertools.product(FLOATS, (False, True)):
        check(relayout(random_map((4, 6, 5, 3), dtype)), rectify)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_some_of_the_channels_and_samples(path):
    for layout in LAYOUTS:
        check(random_map((7, 60, 5, 3), layout=layout)[1::2, 3:40])


def check_16_bit_values(dtype, layout, monkeypatch):
    monkeypatch.setattr(reference, "pool_statistics", lambda *_, **__: pytest.fail("a finite sum was not"))
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.abs() < 1e37].view(1, -1, 1, 1)  # 17 of them add up to a finite sum
    got = pooling.pool_statistics(laid_out(values.expand(-1, -1, 1, 17), layout))
    assert torch.equal(got.maximum, values.float().flatten(1))
    assert torch.allclose(got.h, values.float().flatten(1), rtol=1e-6, atol=0)


@pytest.mark.pairwise("path", path=PATHS, dtype=FLOATS[1:], layout=LAYOUTS[:2])
def test_every_16_bit_value_survives(monkeypatch, path, dtype, layout):
    check_16_bit_values(dtype, layout, monkeypatch)


def test_every_16_bit_value_survives_without_an_instruction_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("OOD_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "c++ -mno-avx512f")
    functions = pooling._load.__wrapped__()
    if functions is None:
        pytest.skip("no C++ compiler that knows the option")
    monkeypatch.setattr(pooling, "_load", lambda: functions)
    check_16_bit_values(torch.float16, "nchw", monkeypatch)
    check_16_bit_values(torch.bfloat16, "channels_last", monkeypatch)


def with_bits(pattern, dtype):
    """A value from its bits: the sign and the payload of a NaN do not survive arithmetic."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return torch.tensor(pattern, dtype=integers[dtype]).view(dtype)


SIGNED_NANS = {torch.float32: -(2**22), torch.bfloat16: -64, torch.float16: -512}


@pytest.mark.pairwise(
    "path", path=PATHS, layout=LAYOUTS, bad=["nan", "signed nan", "inf", "-inf", "inf and -inf", "nan and inf"]
)
def test_bad_values_are_those_of_the_reference_and_stay_in_their_sample(path, layout, bad):
    for dtype, rectify, negative in itertools.product(FLOATS, (False, True), (False, True)):
        clean = random_map((5, 9, 3, 7), dtype)
        clean[2, 4] = -clean[2, 4].abs() - 1 if negative else clean[2, 4].abs()
        dirty = clean.clone()
        for position, word in enumerate(bad.split(" and ")):
            value = with_bits(SIGNED_NANS[dtype], dtype) if word == "signed nan" else float(word)
            dirty[2, 4, position, 5] = value
        assert not dirty[2].isfinite().all()
        assert dirty[2, 4, 0, 5].signbit() or bad not in ("signed nan", "-inf")
        clean, dirty = laid_out(clean, layout), laid_out(dirty, layout)
        expected = reference.pool_statistics(dirty, rectify=rectify)
        got = pooling.pool_statistics(dirty, rectify)
        untouched = pooling.pool_statistics(clean, rectify)
        for value, right, without in zip(got, expected, untouched, strict=True):
            assert torch.allclose(value, right, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert torch.equal(value[[0, 1, 3, 4]], without[[0, 1, 3, 4]])
        assert torch.equal(got.maximum.nan_to_num(7), expected.maximum.nan_to_num(7))


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_a_sum_that_overflows_is_the_references(path):
    feature_map = torch.full((2, 3, 4, 4), 1.0)
    feature_map[1, 2] = 3e38
    for values in (feature_map, laid_out(feature_map, "channels_last")):
        got = pooling.pool_statistics(values)
        assert torch.equal(got.h, reference.pool_statistics(values).h)
        assert torch.equal(got.maximum, values.amax((2, 3)))


@pytest.mark.pairwise("path", layout=LAYOUTS, dtype=FLOATS, path=PATHS)
def test_a_sample_alone_is_as_in_a_batch(layout, dtype, path):
    feature_map = random_map((37, 96, 7, 7), dtype, layout=layout)
    batch = pooling.pool_statistics(feature_map)
    for i in (0, 11, 36):
        alone = pooling.pool_statistics(feature_map[i : i + 1])
        assert torch.equal(alone.maximum[0], batch.maximum[i])
        assert torch.allclose(alone.h[0], batch.h[i], rtol=1e-6, atol=1e-7 * float(feature_map[i].abs().max()))
        assert path == "eager" or torch.equal(alone.h[0], batch.h[i])


@pytest.mark.pairwise(layout=LAYOUTS[:2], dtype=FLOATS, block=[40, 200, 700])
def test_eager_blocks_change_nothing(monkeypatch, layout, dtype, block):
    monkeypatch.setattr(pooling, "_load", lambda: None)
    monkeypatch.setattr(pooling, "_BLOCK_ELEMENTS_A_THREAD", block)
    monkeypatch.setattr(pooling, "_LARGEST_BLOCK_ELEMENTS", block)
    check(random_map((5, 8, 5, 7), dtype, layout=layout))


@pytest.mark.pairwise("path", path=PATHS, rectify=(False, True), dtype=FLOATS, shape=[(2, 3, 1, 1), (2, 3, 4, 4)])
def test_outputs_share_no_memory(assert_owned, path, rectify, dtype, shape):
    feature_map = random_map(shape, dtype)
    assert_owned([feature_map], lambda: pooling.pool_statistics(feature_map, rectify))


def test_fp64_is_the_reference():
    feature_map = random_map((3, 4, 5, 5)).double()
    for value, right in zip(pooling.pool_statistics(feature_map), reference.pool_statistics(feature_map), strict=True):
        assert torch.equal(value, right)
        assert value.dtype == torch.float64


def test_threads_at_once(compiled):
    """The first call compiles; calls that meet it wait."""
    feature_map = random_map((8, 64, 7, 7))
    expected = pooling.pool_statistics(feature_map)
    pooling._load.cache_clear()
    results = []
    threads = [threading.Thread(target=lambda: results.append(pooling.pool_statistics(feature_map))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))
    assert pooling._load.cache_info().misses == 1
    assert pooling.is_compiled() == compiled


@pytest.mark.parametrize("compile", ["0", "1"])
def test_without_a_compiler_plain_torch_does_it_and_says_so_once(monkeypatch, caplog, compile):
    monkeypatch.setattr(pooling, "_load", functools.cache(pooling._load.__wrapped__))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("OOD_ENGINE_COMPILE", compile)
    for _ in range(3):
        check(random_map((2, 3, 4, 5)))
    assert not pooling.is_compiled()
    assert len(caplog.records) == int(compile)


def test_import_compiles_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled at import"))
    again = importlib.util.spec_from_file_location("ood_kernels.cpu.pooling_again", pooling.__file__)
    module = importlib.util.module_from_spec(again)
    again.loader.exec_module(module)
    assert module._load.cache_info().currsize == 0
