from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ood_kernels import reference
from ood_kernels.triton_kernels import pool_nap as family
from ood_kernels.triton_kernels.launch import arguments_for, record
from tests.ood_kernels.triton_kernels.conftest import LAYOUTS

EPS = 3.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_map(shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def truth(feature_map, rectify=False):
    """(h, mean that NAP sees, maximum, nap) of the reference, in fp64 and in the dtype of the map."""
    results = []
    for values in (feature_map.cpu().double(), feature_map.cpu()):
        statistics = reference.pool_statistics(values, rectify=rectify)
        nap, _ = reference.nap_from_statistics(statistics.nap_mean, statistics.maximum, EPS)
        results.append((statistics.h, statistics.nap_mean, statistics.maximum, nap))
    return results


def pool(feature_map, rectify=False):
    """The same four from the kernels."""
    h, mean, maximum = family.pool_statistics(feature_map, rectify)
    same_h, nap = family.pool_nap(feature_map, EPS, rectify)
    assert torch.equal(h.nan_to_num(7.0), same_h.nan_to_num(7.0))
    return h, mean, maximum, nap


def arguments_of(feature_map):
    with record() as launches:
        family.pool_nap(feature_map, EPS, False)
    return launches[0]


SHAPES = [
    (1, 1, 1, 1),
    (3, 40, 1, 1),
    (1, 1300, 1, 1),
    (2, 8, 1, 2),
    (2, 16, 2, 2),
    (2, 5, 3, 1),
    (1, 300, 7, 7),
    (2, 13, 4, 4),
    (1, 77, 9, 5),
    (1, 16, 14, 14),
    (1, 24, 15, 15),
    (1, 8, 33, 31),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("layout", "shape", "dtype", "rectify"),
    [(layout, (2, 24, 7, 7), DTYPES[index % 3], False) for index, layout in enumerate(LAYOUTS)]
    + [("contiguous", (2, 24, 7, 7), dtype, False) for dtype in DTYPES[1:]]
    + [("tokens", (2, 24, 7, 7), dtype, False) for dtype in DTYPES[:2]]
    + [("contiguous", shape, torch.bfloat16, index % 2 == 0) for index, shape in enumerate(SHAPES)]
    + [("channels last", shape, torch.bfloat16, index % 2 == 1) for index, shape in enumerate(SHAPES)]
    + [("contiguous", shape, torch.bfloat16, False) for shape in ((1, 16384, 1, 1), (1, 8, 55, 55), (1, 3, 100, 100))]
    + [("channels last", (1, 32, 99, 101), torch.bfloat16, False)],
    ids=str,
)
def test_as_good_as_torch(layout, shape, dtype, rectify, device, assert_as_good_as_torch):
    feature_map = LAYOUTS[layout](random_map(shape, dtype, device))
    exact, theirs = truth(feature_map, rectify)
    assert_as_good_as_torch(pool(feature_map, rectify), exact, theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "padded"])
@pytest.mark.parametrize("shape", [(1, 24, 7, 7), (1, 5, 4, 3)], ids=str)
def test_padding_of_tiles_counts_in_no_maximum_and_no_sum(layout, shape, device, assert_as_good_as_torch):
    feature_map = LAYOUTS[layout](random_map(shape, torch.float32, device).abs() + 0.5)
    maximum = family.pool_statistics(-feature_map, False)[2]
    assert torch.equal(maximum, -feature_map.amin((2, 3)))
    nap = family.pool_nap(feature_map, 0.0, False)[1]
    assert_as_good_as_torch(nap, reference.pool_nap(feature_map.cpu().double(), 0.0)[1])


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations(range(4)),
    steps=st.tuples(*[st.integers(1, 2)] * 4),
    rectify=st.booleans(),
)
def test_any_strides(shape, dtype, order, steps, rectify, device, assert_as_good_as_torch):
    stored = random_map([shape[axis] * steps[axis] for axis in order], dtype, device)
    feature_map = stored.permute([order.index(axis) for axis in range(4)])
    feature_map = feature_map[:: steps[0], :: steps[1], :: steps[2], :: steps[3]]
    assert feature_map.shape == shape
    exact, theirs = truth(feature_map, rectify)
    assert_as_good_as_torch(pool(feature_map, rectify), exact, theirs)


@pytest.mark.parametrize(
    ("feature_map", "layout", "vec", "edges", "wide"),
    [
        (torch.empty(4, 2048, 7, 7, dtype=torch.bfloat16, device="meta"), "rows", 8, True, True),
        (torch.empty(4, 2048, 7, 7, device="meta")[1:2], "rows", 4, True, True),
        (torch.empty(2048 * 49, device="meta").as_strided((1, 2048, 7, 7), (3, 49, 7, 1)), "rows", 4, True, True),
        (torch.empty(4, 2048, 7, 7, device="meta").to(memory_format=torch.channels_last), "channels", 4, False, True),
        (torch.empty(4, 512, 4, 4, dtype=torch.float16, device="meta"), "rows", 8, False, True),
        (torch.empty(4, 512, 4, 4, device="meta")[:, 3:], "rows", 4, False, True),
        (torch.empty(4, 768, 196, 1, device="meta").transpose(1, 2).contiguous().transpose(1, 2), "channels", 4, False, True),
        (torch.empty(4, 776, 6, 6, device="meta").half().to(memory_format=torch.channels_last), "channels", 8, False, True),
        (torch.empty(4, 2047, 7, 7, device="meta"), "rows", 1, False, False),
        (torch.empty(4, 2048, 7, 7, device="meta")[:, 1:], "rows", 1, False, False),
        (torch.empty(4, 64, 8, 7, device="meta")[:, :, :-1], "rows", 1, False, False),
        (torch.empty(4, 2048, 8, 8, device="meta")[:, :, 1:-1, 1:-1], "rows", 1, False, False),
        (torch.empty(4, 77, 6, 6, device="meta").to(memory_format=torch.channels_last), "channels", 1, False, False),
        (torch.empty(4 * 64 * 49 + 1, device="meta")[1:].view(4, 64, 7, 7), "rows", 1, False, False),
        (torch.empty(4, 512, 1, 1, device="meta"), "channels", 4, False, True),
    ],
    ids=lambda value: f"{list(value.shape)} {value.stride()}" if isinstance(value, torch.Tensor) else str(value),
)  # fmt: skip
def test_strides_choose_how_the_map_is_read(feature_map, layout, vec, edges, wide):
    launch = arguments_of(feature_map)
    assert (launch.arguments["LAYOUT"], launch.arguments["VEC"], launch.arguments["EDGES"]) == (layout, vec, edges)
    assert launch.wide == wide


@pytest.mark.parametrize(("channels", "nvidia", "amd"), [(2048, 8, 4), (16, 1, 1)])
def test_tiles_are_made_for_a_number_of_threads(channels, nvidia, amd):
    arguments = arguments_of(torch.empty(4, channels, 7, 7, device="meta")).arguments
    assert arguments_for("cuda", arguments)["num_warps"] == nvidia
    assert arguments_for("hip", arguments)["num_warps"] == amd


# NumPy, which interprets the kernels, remarks on ∞ - ∞.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("layout", "rectify"), [("contiguous", False), ("contiguous", True), ("channels last", True), ("padded", False)]
)
def test_nan_and_inf_surface_in_their_sample_and_channel_only(layout, rectify, device, assert_as_good_as_torch):
    feature_map = LAYOUTS[layout](random_map((4, 16, 7, 7), torch.bfloat16, device))
    clean = pool(feature_map[:1], rectify)
    for sample, bad in ((1, torch.nan), (2, torch.inf), (3, -torch.inf)):
        feature_map[sample, 4, 6, 6] = bad
        feature_map[sample, 9, 0, 0] = bad
    ours = pool(feature_map, rectify)
    exact, _ = truth(feature_map, rectify)
    for value, right, before in zip(ours, exact, clean, strict=True):
        finite = right.isfinite()
        assert torch.equal(value.cpu()[~finite].nan_to_num(9.0), right[~finite].float().nan_to_num(9.0))
        assert_as_good_as_torch(value.cpu()[finite], right[finite], hair=1e-5)
        assert torch.equal(value[:1], before)
    assert ours[3].isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_denominator_that_is_not_positive_makes_nan(layout, device):
    feature_map = LAYOUTS[layout](random_map((2, 16, 7, 7), torch.float32, device).abs())
    feature_map[1, 3] = -EPS
    nap = family.pool_nap(feature_map, EPS, False)[1]
    assert nap.isnan().tolist() == [False, True]
    assert not family.pool_nap(feature_map, EPS, True)[1].isnan().any()


@pytest.mark.parametrize(("layout", "rectify"), [("contiguous", False), ("channels last", True), ("padded", True)])
def test_splits_give_the_same_bits_as_one_launch(layout, rectify, device, monkeypatch):
    feature_map = LAYOUTS[layout](random_map((2, 1100, 3, 3), torch.float32, device))
    results = []
    # One program a sample; three; one for each block.
    for multiprocessors, launches in ((1, 1), (3, 2), (10**6, 2)):
        monkeypatch.setattr(family, "_multiprocessors", lambda device, count=multiprocessors: count)
        with record() as recorded:
            results.append(family.pool_nap(feature_map, EPS, rectify))
        assert len(recorded) == launches
    assert recorded[0].grid[1] > 2
    for h, nap in results[1:]:
        assert torch.equal(h, results[0][0])
        assert torch.equal(nap, results[0][1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("samples", [1, 3])
def test_partials_make_nap_and_zero_the_counters(samples, device):
    feature_map = random_map((samples, 520, 3, 3), torch.float16, device)
    counters = torch.full((2500,), 7, dtype=torch.int32, device=device)
    guarded = counters[1:-1]
    h, squares = family.pool_partials(feature_map, EPS, False, guarded)
    expected_h, nap = family.pool_nap(feature_map, EPS, False)
    assert torch.equal(h, expected_h)
    assert squares.shape[1] > 1
    torch.testing.assert_close(squares.sum(1) / 520, nap, rtol=1e-6, atol=0)
    assert not guarded.any()
    assert counters[[0, -1]].tolist() == [7, 7]


def test_no_partials_of_an_empty_batch(device):
    feature_map = torch.empty(0, 24, 7, 7, device=device)
    with record() as launches:
        partials = family.pool_partials(feature_map, EPS, False)
    assert launches == []
    assert partials[1].shape[0] == 0


def test_a_batch_that_fills_the_gpu_takes_one_launch_with_the_same_tiles():
    tiles = []
    for samples, count in ((1, 2), (256, 1), (1024, 1)):
        with record() as launches:
            family.pool_nap(torch.empty(samples, 2048, 7, 7, device="meta"), EPS, False)
        assert len(launches) == count
        arguments = launches[0].arguments
        tiles.append({name: value for name, value in arguments.items() if name.isupper() or name == "num_warps"})
    assert tiles[0] == tiles[1] == tiles[2]
    with record() as launches:
        family.pool_partials(torch.empty(1, 2048, 7, 7, device="meta"), EPS, False)
        family.pool_statistics(torch.empty(1, 2048, 7, 7, device="meta"), False)
    assert len(launches) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="5 GB and a kernel that is compiled")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_offsets_beyond_two_to_the_31(layout, device, assert_as_good_as_torch):
    shape = (2**31 // (2048 * 49) + 2, 2048, 7, 7)
    feature_map = LAYOUTS[layout](torch.zeros(shape, dtype=torch.bfloat16, device=device))
    feature_map[-1] = random_map((2048, 7, 7), torch.bfloat16, device)
    assert feature_map.numel() > 2**31
    h, nap = family.pool_nap(feature_map, EPS, False)
    exact, theirs = truth(feature_map[-1:])
    assert_as_good_as_torch((h[-1:], nap[-1:]), exact[::3], theirs[::3])
