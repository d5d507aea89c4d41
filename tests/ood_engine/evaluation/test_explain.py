from __future__ import annotations

import pytest
import torch

import ood_engine as oe
from ood_engine.evaluation.explain import explain

HEADS = ("low_dim_gradient", "low_dim_gradient_projected_norm")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("cotangent", ["energy", "predicted"])
def test_contributions_add_up_to_the_score(make_engine, test_images, name, cotangent):
    engine = make_engine((name,), settings={name: {"cotangent": cotangent}})
    scores = engine.score(test_images[:4])[name].double()
    for image, score in zip(test_images[:4], scores, strict=True):
        explanation = oe.explain(engine, image, name)
        score = float(score if name == HEADS[0] else score.square())
        size = float(explanation.classes.abs().sum()) + abs(explanation.offset)
        assert abs(explanation.score - score) < 1e-4 * size
        # The features are the model's, in fp32; the places are summed from the map in fp64.
        for parts, tolerance in (
            (explanation.classes.sum(), 1e-9),
            (explanation.channels.sum() + explanation.bias, 1e-9),
            (explanation.places.sum(), 1e-6),
        ):
            assert abs(float(parts) + explanation.offset - explanation.score) < tolerance * size


def test_contributions_are_those_of_the_materialised_gradient(make_engine, test_images):
    engine = make_engine(("low_dim_gradient_projected_norm",))
    detector = engine.detectors["low_dim_gradient_projected_norm"]
    explanation = explain(engine, test_images[0], detector.name)
    captured = engine.scorer.run(test_images[:1])
    h = captured.head_input.double()
    weight, bias = engine.head.weight.double().requires_grad_(), engine.head.bias.double().requires_grad_()
    (h @ weight.T + bias).logsumexp(1).backward()
    gradient = torch.cat([weight.grad, bias.grad[:, None]], 1)
    centred = gradient - detector.basis.mean.double()
    components = detector.basis.to_explicit().fitted("components").double()
    coordinates = (components * centred).sum((1, 2))
    contributions = (coordinates[:, None, None] * components).sum(0) * centred
    scale = contributions.abs().sum()
    assert (explanation.classes - contributions.sum(1)).abs().max() < 1e-5 * scale
    assert (explanation.channels - contributions.sum(0)[:-1]).abs().max() < 1e-5 * scale
    assert explanation.predicted == int((h @ weight.T + bias).argmax())
    assert explanation.places.shape == captured.feature_map.shape[2:]
    assert float(explanation.places.std()) > 0


SUMS = ("energy", "max_logit", "opnp", "opp", "onp", "gradnorm", "exgrad", "nap")


@pytest.mark.parametrize("name", SUMS)
def test_energies_norms_and_nap_add_up_too(make_engine, test_images, name):
    engine = make_engine((name,), settings={"opnp": {"weight_range": (0.3, 0.9)}} if name == "opnp" else None)
    scores = engine.score(test_images[:4])[name]
    for image, score in zip(test_images[:4], scores, strict=True):
        explanation = oe.explain(engine, image, name)
        assert explanation.score == pytest.approx(float(score), rel=1e-5)
        rest = explanation.score - explanation.offset
        assert float(explanation.channels.sum()) + explanation.bias == pytest.approx(rest, rel=1e-9)
        assert (len(explanation.classes), explanation.places is None) == ((0, True) if name == "nap" else (5, False))
        if name != "nap":
            assert float(explanation.classes.sum()) == pytest.approx(rest, rel=1e-9)
            assert float(explanation.places.sum()) == pytest.approx(rest, rel=1e-9)


def test_places_of_an_energy_are_the_logits_of_each_position_weighted_by_probability(make_engine, test_images):
    engine = make_engine(("energy",))
    explanation = oe.explain(engine, test_images[0], "energy")
    feature_map = engine.scorer.run(test_images[:1]).feature_map[0].double()
    weight, bias = engine.head.weight.double(), engine.head.bias.double()
    p = (weight @ feature_map.mean((1, 2)) + bias).softmax(0)
    logits = torch.einsum("cd,dhw->chw", weight, feature_map) + bias[:, None, None]
    expected = torch.einsum("c,chw->hw", p, logits) / feature_map[0].numel()
    assert (explanation.places - expected).abs().max() < 1e-6 * expected.abs().max()
    assert explanation.offset == pytest.approx(-float((p * p.log()).sum()), rel=1e-5)


def test_a_rectified_map_is_explained_as_it_is_scored(make_model, unlabelled_batches, test_images):
    engine = oe.Engine(make_model(torch.nn.SiLU), ("nap",), rectify=True).fit(unlabelled_batches)
    score = float(engine.score(test_images[:1])["nap"])
    assert oe.explain(engine, test_images[0], "nap").score == pytest.approx(score, rel=1e-5)


def test_other_detectors_and_batches_are_refused(make_engine, test_images):
    engine = make_engine(("low_dim_gradient_knn", "msp", "nap_opnp"))
    for name in engine.detectors:
        with pytest.raises(oe.OodEngineError, match=f"explain '{name}': its score is no sum of contributions"):
            explain(engine, test_images[0], name)
    with pytest.raises(
        oe.OodEngineError, match=r"explain 'nap_opn': expected a detector of .* did you mean 'nap_opnp'"
    ):
        explain(engine, test_images[0], "nap_opn")
    engine = make_engine(("low_dim_gradient",))
    with pytest.raises(oe.OodEngineError, match=r"expected one image \[C, H, W\]"):
        explain(engine, test_images[:2])
