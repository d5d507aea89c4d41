from __future__ import annotations

import numpy as np
import pytest
import torch

import ood_kernels as ok
from ood_engine.errors import InputError
from ood_engine.features.cache import CacheRows, FeatureCache, fingerprint
from ood_engine.subspace import FitStatistics, gathering
from ood_engine.subspace.gathering import gather

HEAD = ok.Head(
    torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    torch.randn(4, generator=torch.Generator().manual_seed(1)),
)


def make_cache(count=50, dtype=torch.float32, seed=2):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(count, 6, generator=generator).relu().to(dtype)
    nothing = torch.empty(count, 0)
    labels = torch.randint(-1, 4, (count,), generator=generator)
    return FeatureCache(CacheRows(h, fingerprint(h.float()), labels, nothing, nothing))


def whole(cache, **options):
    h = cache.rows.features.float()
    p = (h @ HEAD.weight.T + HEAD.bias).softmax(1)
    return FitStatistics(4, 6, **options).update(p, h, cache.rows.fingerprints, cache.rows.labels)


def assert_equal(ours, theirs):
    assert ours.count == theirs.count
    torch.testing.assert_close(ours.gradient_sum, theirs.gradient_sum, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.feature_moment, theirs.feature_moment)
    assert torch.equal(ours.anchor_fingerprints, theirs.anchor_fingerprints)
    assert torch.equal(ours.anchor_h, theirs.anchor_h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block", [7, 50, 100])
def test_blocks_give_the_statistics_of_the_whole(dtype, block):
    cache = make_cache(dtype=dtype)
    assert_equal(gather(cache, HEAD, max_anchors=9, block=block), whole(cache, max_anchors=9))


def test_a_mapped_cache_in_half_precision_is_read_as_it_lies(tmp_path):
    cache = make_cache(dtype=torch.float16)
    array = np.memmap(tmp_path / "features.bin", dtype=np.float16, mode="w+", shape=(50, 6))
    array[:] = cache.rows.features.numpy()
    mapped = FeatureCache(cache.rows._replace(features=torch.from_numpy(array)))
    assert_equal(gather(mapped, HEAD, block=8), whole(cache))


def test_a_broken_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    cache, path = make_cache(), tmp_path / "checkpoint.safetensors"
    expected = whole(cache, max_anchors=9)
    monkeypatch.setattr(gathering, "_CHECKPOINT_BLOCKS", 2)
    update, calls = FitStatistics.update, []

    def breaking(self, *arguments):
        calls.append(len(arguments[0]))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return update(self, *arguments)

    monkeypatch.setattr(FitStatistics, "update", breaking)
    with pytest.raises(KeyboardInterrupt):
        gather(cache, HEAD, max_anchors=9, block=5, checkpoint=path)
    assert FitStatistics.load(path).count == 20
    assert_equal(gather(cache, HEAD, max_anchors=9, block=5, checkpoint=path), expected)
    assert len(calls) == 6 + 6  # four finished blocks were not read again
    gather(cache, HEAD, max_anchors=9, block=5, checkpoint=path)
    assert len(calls) == 12  # a finished run reads nothing


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    gather(make_cache(), HEAD, checkpoint=path)
    with pytest.raises(InputError, match="holds 50 samples, the cache 20"):
        gather(make_cache(20), HEAD, checkpoint=path)
    with pytest.raises(InputError, match="statistics cannot be merged"):
        gather(make_cache(), HEAD, checkpoint=path, cotangent="uniform")
