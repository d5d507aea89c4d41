"""NAP and its combinations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_engine as oe
import ood_kernels as ok
from ood_engine.detectors import create_detector
from ood_engine.detectors.nap import combine
from ood_engine.errors import InputError, OodEngineWarning
from ood_engine.features.signals import Signals
from ood_engine.runtime import Kernels

HEAD = ok.Head(torch.ones(2, 4), torch.tensor([3.0, 1.0]))
BASES = {"nap_energy": lambda z: z.logsumexp(1), "nap_msp": lambda z: z.softmax(1).amax(1)}


def signals_of(feature_map: torch.Tensor, head: ok.Head = HEAD) -> Signals:
    statistics = ok.pool_statistics(feature_map)
    return Signals(statistics.h, head, Kernels(), statistics=statistics)


@settings(deadline=None, max_examples=30)
@given(value=st.floats(0, 1e4), eps=st.floats(1e-3, 1e2))
def test_of_a_constant_map(value, eps):
    score = create_detector("nap", eps=eps)(signals_of(torch.full((2, 4, 3, 3), value, dtype=torch.float64)))
    assert torch.allclose(score, torch.full((2,), (value / (value + eps)) ** 2, dtype=torch.float64), rtol=1e-12)


def test_equals_its_definition(engine, test_images):
    feature_map = engine.scorer.run(test_images).feature_map.double()
    ratios = feature_map.amax((2, 3)) / (feature_map.mean((2, 3)) + 1)
    expected = ratios.square().mean(1)
    assert (engine.score(test_images)["nap"] - expected).abs().max() <= 1e-6 * expected.max()


@pytest.mark.parametrize("name", ["nap_energy", "nap_msp", "nap_opnp"])
def test_ends_and_middle_of_w(name):
    feature_map = torch.rand((6, 4, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(w: float) -> torch.Tensor:
        detector = create_detector(name, w=w)
        if name == "nap_opnp":
            detector.set_fitted(
                weight_ranks=torch.zeros(2, 4),
                neuron_ranks=torch.zeros(4),
                weight_mask=torch.tensor([[True] * 4, [False] * 4]),
                neuron_mask=torch.tensor([True, False, True, True]),
            )
        return detector(signals_of(feature_map))

    h = feature_map.mean((2, 3))
    if name == "nap_opnp":
        kept = h[:, [0, 2, 3]].sum(1)
        base = torch.stack([kept + 3, torch.ones_like(kept)], 1).logsumexp(1)
    else:
        base = BASES[name](h @ HEAD.weight.double().T + HEAD.bias.double())
    nap = create_detector("nap")(signals_of(feature_map))
    assert torch.equal(score(0), nap)
    assert torch.allclose(score(1), base, rtol=1e-12)
    assert torch.allclose(score(0.3), base**0.3 * nap**0.7, rtol=1e-12)
    detector = create_detector(name)
    assert detector.settings["w"] == {"nap_energy": 0.5, "nap_msp": 0.3, "nap_opnp": 0.5}[name]
    assert [settings["w"] for settings in detector.grid()] == pytest.approx([i / 10 for i in range(11)])


def test_a_base_that_is_not_positive_is_clamped_and_counted(model, id_batches, test_images):
    shifted = oe.Engine(model, ["nap_energy", "energy", "nap"])
    shifted.fit(id_batches)
    bias = model[-1].bias.data
    before = bias.clone()
    try:
        lse = shifted.score(test_images)["energy"]
        bias.sub_(lse.median())
        scores = shifted.score(test_images)
        low = scores["energy"] <= 0
        assert 0 < low.sum() < len(test_images)
        assert int(scores.clamped["nap_energy"]) == int(low.sum())
        assert scores["nap_energy"].isfinite().all()
        assert torch.allclose(scores["nap_energy"][low], (1e-6 * scores["nap"][low]).sqrt())
        with pytest.warns(
            OodEngineWarning, match=rf"nap_energy: the base score of {int(low.sum())} of 33 inputs is not pos"
        ):
            batched = shifted.score_loader(test_images.split(10))
        assert int(batched.clamped["nap_energy"]) == int(low.sum())
    finally:
        bias.copy_(before)


def test_nothing_is_clamped_at_the_ends_of_w(model, id_batches, test_images):
    for w in (0.0, 1.0):
        scores = oe.Engine(model, ["nap_energy"], settings={"nap_energy": {"w": w}}).fit(id_batches).score(test_images)
        assert scores.clamped == {}


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0])
def test_a_bad_map_is_nan_in_its_own_row(w, make_engine, test_images):
    engine = make_engine(("nap_energy", "nap"), settings={"nap_energy": {"w": w}})
    feature_map = engine.scorer.run(test_images).feature_map.clone()
    sound = engine.score_features(feature_map)
    kept = torch.arange(len(test_images)) != 4
    for bad in (torch.nan, torch.inf, -torch.inf):
        feature_map[4, 2, 1, 1] = bad
        scores = engine.score_features(feature_map)
        for name, score in scores.items():
            assert score.isnan().nonzero().flatten().tolist() == [4]
            assert torch.equal(score[kept], sound[name][kept])
        assert int(scores.bad_rows) == 1


def test_cached_path_equals_map_path(make_engine, fresh_batches, assert_same_scores):
    engine = make_engine(("nap", "nap_energy", "nap_opnp"))
    cache = engine.extract(fresh_batches)
    for eps in (0.3, 1.0, 4.0):
        engine.refit(eps=eps)
        assert_same_scores(engine.scorer.score_cache(cache), engine.score_loader(fresh_batches), 1e-6)


def test_several_eps_in_one_engine(make_engine, test_images, assert_same_scores):
    both = make_engine(("nap", "nap_energy"), settings={"nap": {"eps": 0.2}, "nap_energy": {"eps": 3.0}})
    scores = both.score(test_images)
    for name, eps in (("nap", 0.2), ("nap_energy", 3.0)):
        alone = make_engine((name,), settings={name: {"eps": eps}}).score(test_images)
        assert_same_scores({name: scores[name]}, alone, 1e-6)
    assert (scores["nap"] - make_engine(("nap",)).score(test_images)["nap"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["nap", "nap_energy", "nap_msp", "nap_opnp"])
def test_eps_is_positive_and_w_a_share(name):
    for eps in (0, -1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(InputError, match=r"eps=.*: expected a positive number; the paper's is 1.0"):
            create_detector(name, eps=eps)
    for w in (-0.1, 1.1, float("nan"), None) if name != "nap" else ():
        with pytest.raises(InputError, match=r"w=.*: expected a number in \[0, 1\]"):
            create_detector(name).configure(w=w)


@pytest.mark.parametrize("w", [0.0, 0.4, 1.0])
def test_neither_end_of_w_loses_a_nan(w):
    """An unproven map may hold NaN where the features that the head received do not, and the other way round."""
    base, nap = torch.tensor([torch.nan, 2.0, 2.0]), torch.tensor([3.0, torch.nan, 3.0])
    signals = Signals(torch.zeros(3, 4), HEAD, Kernels())
    assert combine(base, nap, w, signals, "x").isnan().tolist() == [True, True, False]
