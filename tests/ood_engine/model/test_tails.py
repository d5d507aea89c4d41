"""Maps that reach the head through modules of other widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import InputError
from ood_engine.features.cache import FeatureCache


class Net(nn.Module):
    """MobileNetV3 in small: a convolution and an activation in place between pooling and head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU())
        self.project, self.act, self.fc = nn.Conv2d(9, 14, 1), nn.Hardswish(inplace=True), nn.Linear(14, 5)

    def forward(self, x):
        return self.fc(self.act(self.project(self.body(x).mean((2, 3), keepdim=True))).flatten(1))


@pytest.fixture
def engine(id_batches, fresh_batches):
    with pytest.warns(oe.OodEngineWarning, match="overruled by force: the model predicts"):  # it is untrained
        engine = oe.Engine(Net(), oe.available_detectors()).fit(id_batches, force=True)
    return engine.calibrate(fresh_batches, 0.1)


def test_nap_reads_the_map_and_the_other_detectors_the_head_input(engine, test_images, fresh_batches, tmp_path):
    assert (engine.plan.feature_map, engine.plan.proven) == ("body", True)
    assert engine.plan.tail == (("project", (9, 1, 1)), ("act", (14, 1, 1)))
    model, scores = Net(), engine.score(test_images)
    with torch.no_grad():
        seen = model.body(test_images)
        torch.testing.assert_close(scores["energy"], model(test_images).logsumexp(1))
    torch.testing.assert_close(scores["nap"], (seen.amax((2, 3)) / (seen.mean((2, 3)) + 1)).square().mean(1))
    engine.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", model)
    assert all(torch.equal(score, scores[name]) for name, score in loaded.score(test_images).items())
    again = engine.score_features(seen.clone())
    assert all(torch.equal(score, scores[name]) for name, score in again.items())
    assert all(
        torch.equal(score, engine.score_loader(fresh_batches)[name]) for name, score in _cached(engine, fresh_batches)
    )


def _cached(engine, batches):
    return engine.scorer.score_cache(engine.extract(batches)).items()


def test_other_widths_are_refused(engine, test_images):
    with pytest.raises(
        InputError, match=r"\[33, 14, 6, 6\]: expected \[N, 9, H, W\] of a verified map; .* \[N, 14\] too"
    ):
        engine.score_features(torch.zeros(33, 14, 6, 6))


def test_the_mean_of_the_map_is_not_taken_for_the_features(engine, id_batches):
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.project, self.act, self.fc = nn.LayerNorm([9, 1, 1]), nn.Identity(), nn.Linear(9, 5)

    images = id_batches[0][0]
    rows = oe.Engine(Normed(), ["nap"]).fit([images]).cache.rows
    cache = FeatureCache.from_features(rows.features, maximum=rows.maximum)
    with pytest.raises(InputError, match="expected a cache with the mean of each channel of NAP's map"):
        oe.Engine(Normed(), ["nap"]).fit_features(cache, images)
