"""The feature cache in memory and on disk, fingerprints, and the split into anchors and the rest."""

from __future__ import annotations

import errno
import gc
import io
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ood_engine as oe
import ood_kernels as ok
from ood_engine.errors import InputError, OodEngineError, OodEngineWarning
from ood_engine.features.cache import NO_LABEL, CacheRows, CacheWriter, FeatureCache, fingerprint
from ood_engine.features.fit_data import FitData
from ood_engine.runtime import Kernels


def make_rows(count: int, seed: int = 0, width: int = 3) -> CacheRows:
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand((count, width), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    return CacheRows(features, fingerprint(features), labels, features + 1, features[:, :0])


def written(batches: list[CacheRows], *arguments) -> FeatureCache:
    writer = CacheWriter(*arguments)
    for rows in batches:
        writer.append(rows)
    return writer.finish()


def test_mapped_equals_memory(tmp_path):
    batches = [make_rows(count, seed) for seed, count in enumerate((5, 1, 7))]
    memory, mapped = written(batches), written(batches, 0, tmp_path)
    assert memory.directory is None
    assert mapped.directory.parent == tmp_path
    assert len(memory) == len(mapped) == 13
    assert memory.nbytes == mapped.nbytes == 13 * (3 * 4 + 8 + 8 + 3 * 4)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(memory.rows, mapped.rows, strict=True))
    assert memory.has_map
    assert mapped.has_map


def test_blocks_hold_the_rows_of_many_small_batches():
    batches = [make_rows(10, seed) for seed in range(300)]
    for column, parts in zip(written(batches).rows, zip(*batches, strict=True), strict=True):
        assert torch.equal(column, torch.cat(parts))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident memory from /proc")
def test_small_batches_between_large_images_do_not_fragment_the_heap():
    program = """
import torch
from torch import nn
import ood_engine as oe

def batches():
    global before
    for number in range(60):
        if number == 10:
            before = resident()
        yield torch.rand(10, 3, 224, 224)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

body = nn.Sequential(nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.Conv2d(32, 512, 3, 4), nn.ReLU())
model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()
oe.Engine(model, ("nap", "energy")).fit(batches())
print(resident() - before)
"""
    grown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    # The images of one batch are 5.7 MiB; fragmented, the heap grew by that every batch.
    assert float(grown) < 60


def test_moves_to_disk_only_beyond_the_limit(tmp_path):
    rows = make_rows(10)
    assert written([rows, rows], 800, tmp_path).directory is None
    cache = written([rows, rows], 799, tmp_path)
    assert cache.directory is not None
    assert torch.equal(cache.rows.features, torch.cat([rows.features] * 2))


def test_the_folder_goes_with_the_cache(tmp_path):
    cache = written([make_rows(4)], 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    del cache
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_two_caches_in_one_directory_do_not_meet(tmp_path):
    rows = make_rows(4, 1)
    first = written([rows], 0, tmp_path)
    second = written([make_rows(4, 2)], 0, tmp_path)
    assert torch.equal(first.rows.features, rows.features)
    assert not torch.equal(second.rows.features, rows.features)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_batches_select_in_order(limit, tmp_path):
    cache = written([make_rows(13)], limit, tmp_path)
    index = torch.tensor([12, 0, 3, 3, 7])
    parts = list(cache.batches(index, size=2))
    assert [len(part.labels) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.features for part in parts]), cache.rows.features[index])
    assert torch.equal(torch.cat([part.features for part in cache.batches(size=4)]), cache.rows.features)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_disk_full_leaves_nothing_and_says_where(number, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(number, "no")

    monkeypatch.setattr("ood_engine.features.cache.open", Full, raising=False)
    if number == errno.ENOSPC:
        with pytest.raises(
            OodEngineError, match=rf"no space left in {tmp_path} for the feature cache .*cache_directory="
        ):
            written([make_rows(4)], 0, tmp_path)
    else:
        with pytest.raises(OSError, match="no"):
            written([make_rows(4)], 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_memory_and_disk_give_identical_fits(model, id_batches, test_images, tmp_path, assert_same_scores):
    engines = [
        oe.Engine(model, oe.available_detectors()).fit(id_batches, cache_limit_bytes=limit, cache_directory=tmp_path)
        for limit in (10**9, 0)
    ]
    assert [engine.cache.directory is None for engine in engines] == [True, False]
    assert_same_scores(engines[1].score(test_images), engines[0].score(test_images), 0)
    assert_same_scores(engines[1].refit(eps=0.5).score(test_images), engines[0].refit(eps=0.5).score(test_images), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_fingerprint_is_of_content_alone(dtype):
    tensor = (torch.rand((6, 3, 5, 4), generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    expected = fingerprint(tensor)
    assert expected.dtype == torch.int64
    assert expected.unique().numel() == 6
    assert torch.equal(fingerprint(tensor.flip(0)).flip(0), expected)
    assert torch.equal(fingerprint(tensor[2:3]), expected[2:3])
    strided = tensor.to(memory_format=torch.channels_last)
    assert strided.stride() != tensor.stride()
    assert torch.equal(fingerprint(strided), expected)
    assert torch.equal(fingerprint(torch.cat([tensor, tensor], 1)[:, :3]), expected)


def mix(value: int) -> int:
    """The finaliser of splitmix64, in Python's integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_fingerprint_is_the_formula():
    """State files hold fingerprints, so they must not change from one version to the next."""
    values = torch.tensor([[0.5, -1.25, 3.0]])
    bits = [int.from_bytes(struct.pack("<f", value), "little", signed=True) for value in values[0].tolist()]
    total = sum(mix((word + (place + 1) * 0x9E3779B97F4A7C15) % 2**64) for place, word in enumerate(bits)) % 2**64
    assert fingerprint(values).item() % 2**64 == mix(total)


@settings(deadline=None, max_examples=50)
@given(bit=st.integers(0, 31), place=st.integers(0, 9000), seed=st.integers(0, 1000))
def test_one_bit_changes_a_fingerprint(bit, place, seed):
    tensor = torch.rand((1, 9001), generator=torch.Generator().manual_seed(seed))
    changed = tensor.clone()
    bits = changed.view(torch.int32)
    bits[0, place] ^= -(2**31) if bit == 31 else 2**bit
    assert fingerprint(changed) != fingerprint(tensor)


@settings(deadline=None, max_examples=50)
@example(first=3, second=3 + 2**13)
@given(first=st.integers(0, 9000), second=st.integers(0, 9000))
def test_swapped_pixels_change_a_fingerprint(first, second):
    tensor = torch.arange(9001.0)[None]
    changed = tensor.clone()
    changed[0, first], changed[0, second] = second, first
    assert (fingerprint(changed) == fingerprint(tensor)) == (first == second)


def fit_data(prints: list[int], labels: list[int] | None = None) -> FitData:
    count = len(prints)
    features = torch.arange(1.0, 3 * count + 1).view(count, 3)
    labels = [NO_LABEL] * count if labels is None else labels
    nothing = features[:, :0]
    rows = CacheRows(features, torch.tensor(prints), torch.tensor(labels), nothing, nothing)
    return FitData(FeatureCache(rows), ok.Head(torch.eye(3)[:2], torch.zeros(2)), Kernels())


@settings(deadline=None, max_examples=100)
@given(prints=st.lists(st.integers(-5, 5), min_size=1, max_size=30), most=st.integers(2, 20))
def test_anchors_and_others_share_no_image(prints, most):
    data = fit_data(prints)
    anchors, others = data.split(most)
    assert sorted([*anchors.tolist(), *others.tolist()]) == list(range(len(prints)))
    assert len(anchors) <= min(most, len(prints) // 2)
    of_anchors, of_others = ({prints[i] for i in side.tolist()} for side in (anchors, others))
    assert of_anchors.isdisjoint(of_others)
    assert not of_anchors or max(of_anchors) < min(of_others)


def test_as_many_anchors_as_allowed_where_all_images_differ():
    data = fit_data([5, 3, 9, -2, 0, 4, 8])
    assert data.split(100)[0].tolist() == [3, 4, 1]
    assert data.split(2)[0].tolist() == [3, 4]
    assert data.split(2)[1].tolist() == [1, 5, 0, 6, 2]
    assert data.distinct == len(data) == 7


def test_missing_labels_are_predicted_and_said_once():
    data = fit_data([1, 2, 3, 4], [1, NO_LABEL, NO_LABEL, 0])
    index = torch.arange(4)
    with pytest.warns(OodEngineWarning, match="2 samples have no label, so their predicted classes are used"):
        assert data.labels(index).tolist() == [1, 1, 1, 0]
    assert data.labels(index).tolist() == [1, 1, 1, 0]


def test_signals_come_in_canonical_order_and_in_parts():
    data = fit_data([3, 1, 2])
    parts = list(data.signals(size=2))
    assert [len(part.features) for part in parts] == [2, 1]
    assert torch.cat([part.features for part in parts])[:, 0].tolist() == [4, 7, 1]


def test_what_is_shared_is_built_once():
    data, built = fit_data([1, 2]), []
    for _ in range(2):
        assert data.shared("key", lambda: built.append(1) or 7) == 7
    assert built == [1]


@pytest.mark.parametrize("label", [2, -2])
def test_labels_beyond_the_head_are_refused(label):
    with pytest.raises(InputError, match=rf"label {label} of sample 1 is out of range: expected 0 to 1, .* 2 classes"):
        fit_data([1, 2], [0, label])
