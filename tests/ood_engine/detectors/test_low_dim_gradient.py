"""Low-dimensional gradients: the heads on the coordinates, anchors kept apart, the ensemble."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

import ood_engine as oe
from ood_engine.detectors import create_detector
from ood_engine.detectors.heads import KNearestNeighbours, LinearProbe, Mahalanobis
from ood_engine.detectors.low_dim_gradient import HEADS
from ood_engine.errors import InputError, OodEngineWarning
from ood_engine.features.fit_data import FitData
from ood_engine.runtime import Kernels


def vectors(count: int, width: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed))


def fitted(head, *arguments):
    head.fit(*arguments)
    return head


def test_knn_is_the_similarity_to_the_kth_neighbour():
    bank, x = vectors(50), vectors(9, seed=1)
    head = fitted(KNearestNeighbours(5), bank)
    neighbours = NearestNeighbors(n_neighbors=5).fit(F.normalize(bank).numpy())
    distance = neighbours.kneighbors(F.normalize(x).numpy())[0][:, -1]
    np.testing.assert_allclose(head(x).numpy(), 1 - distance**2 / 2, rtol=0, atol=1e-6)


def test_knn_in_blocks_equals_knn_at_once(monkeypatch):
    head = fitted(KNearestNeighbours(3), vectors(50))
    expected = head(vectors(40, seed=1))
    monkeypatch.setattr("ood_engine.detectors.heads.knn._BLOCK_ELEMENTS", 7 * 50)
    assert torch.allclose(head(vectors(40, seed=1)), expected, rtol=0, atol=1e-6)


def test_mahalanobis_equals_scikit_learns():
    x, labels = vectors(60).double(), torch.arange(60) % 3
    x += labels[:, None]
    head = fitted(Mahalanobis(), x, labels + 5)  # labels need not start at 0
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    covariance = EmpiricalCovariance(assume_centered=True).fit((x - means[labels]).numpy())
    fresh = vectors(20, seed=2).double()
    expected = np.min([covariance.mahalanobis((fresh - mean).numpy()) for mean in means], axis=0)
    np.testing.assert_allclose(head(fresh).numpy(), -expected, rtol=1e-9)
    assert head.fitted("means").dtype == torch.float64


def test_mahalanobis_of_fewer_samples_than_dimensions_is_finite():
    head = fitted(Mahalanobis(), vectors(5, 12), torch.tensor([0, 0, 1, 1, 1]))
    assert head(vectors(7, 12, seed=1)).isfinite().all()


@pytest.mark.parametrize(
    "x", [vectors(3), vectors(1).expand(3, -1), torch.zeros(3, 4), vectors(1).expand(3, -1) * 1e30]
)
def test_mahalanobis_asks_for_samples_that_differ_within_a_class(x):
    labels = torch.arange(3) if len(x.unique(dim=0)) == 3 else torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"a covariance of 3 samples in [13] classes: expected some that differ"):
        Mahalanobis().fit(x, labels)


def test_probe_is_the_trained_network_in_evaluation(monkeypatch):
    caught = {}
    from ood_engine.detectors.heads import linear_probe

    original = linear_probe._train
    monkeypatch.setattr(linear_probe, "_train", lambda probe, *a: caught.update(probe=probe) or original(probe, *a))
    x, labels = vectors(300), torch.arange(300) % 3
    x[torch.arange(300), labels] += 3
    for score in ("energy", "msp"):
        head = fitted(LinearProbe(score), x, labels, 4)
        with torch.no_grad():
            logits = caught["probe"].eval()(vectors(20, seed=1))
        expected = logits.logsumexp(1) if score == "energy" else logits.softmax(1).amax(1)
        assert torch.allclose(head(vectors(20, seed=1)), expected, rtol=1e-5)
    with torch.no_grad():
        accuracy = (caught["probe"](x).argmax(1) == labels).float().mean()
    assert float(head.fitted("accuracy")) == pytest.approx(float(accuracy))
    assert accuracy > 0.9


def test_probe_follows_the_seed_and_leaves_the_generator_alone():
    x, labels = vectors(100), torch.arange(100) % 3
    torch.manual_seed(123)
    state = torch.get_rng_state()
    weights = [fitted(LinearProbe(), x, labels, 3, seed).fitted("weight") for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert not weights[0].requires_grad


def test_probe_skips_a_last_batch_of_one():
    head = fitted(LinearProbe(epochs=1), vectors(129), torch.arange(129) % 2, 2)
    assert head.fitted("weight").isfinite().all()


@pytest.mark.parametrize(
    ("head", "arguments"),
    [(KNearestNeighbours(2), ()), (Mahalanobis(), (torch.arange(50) % 2,)), (LinearProbe(), (torch.arange(50) % 2, 2))],
)
def test_heads_keep_bad_values_in_their_row(head, arguments):
    fitted(head, vectors(50), *arguments)
    x = vectors(5, seed=1)
    sound = head(x)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[2, 1] = bad
        found = head(x)
        assert found.isfinite().tolist() == [True, True, False, True, True]
        assert torch.equal(found[[0, 1, 3, 4]], sound[[0, 1, 3, 4]])


@pytest.mark.parametrize("head", [head for head in HEADS if head not in ("vim", "projected_norm")])
def test_scores_are_the_heads_on_the_coordinates(head, engine, test_images):
    name = f"low_dim_gradient_{head}"
    detector = engine.detectors[name]
    signals = engine.scorer.signals(engine.scorer.run(test_images).feature_map, None)
    coordinates = detector.basis.project(signals.probabilities, signals.features)
    if head == "residual":
        expected = -detector.basis.residual_norm(signals.probabilities, signals.features)
    else:
        expected = detector.low(coordinates)
    assert torch.equal(engine.score(test_images)[name], expected.float())


def test_a_detector_can_be_sent_to_another_process(engine, test_images):
    signals = engine.scorer.signals(engine.scorer.run(test_images).feature_map, None)
    for name, detector in engine.detectors.items():
        assert torch.equal(pickle.loads(pickle.dumps(detector))(signals), detector(signals)), name


def test_default_is_mahalanobis_and_the_ensemble_probe_and_energy(engine, test_images):
    scores = engine.score(test_images)
    assert torch.equal(scores["low_dim_gradient"], scores["low_dim_gradient_mahalanobis"])
    expected = scores["low_dim_gradient_probe_energy"] + scores["energy"]
    assert torch.allclose(scores["low_dim_gradient_ensemble"], expected, rtol=1e-6)


def test_anchors_are_not_what_the_heads_are_fitted_on(make_engine):
    engine = make_engine(("low_dim_gradient_knn",), settings={"low_dim_gradient_knn": {"basis": "dual"}})
    detector = engine.detectors["low_dim_gradient_knn"]
    data = FitData(engine.cache, engine.head, Kernels())
    anchors, others = data.split(4096)
    assert len(anchors) == len(others) == 120
    found = detector.basis.fitted("anchor_features")
    assert torch.equal(found, engine.cache.rows.features[anchors])
    coordinates = torch.cat([signals.coordinates(detector.basis) for signals in data.signals(others)])
    assert torch.equal(detector.low.fitted("bank"), F.normalize(coordinates))


@pytest.mark.parametrize("head", ["probe_energy", "probe_msp", "knn", "mahalanobis"])
def test_ensemble_adds_the_forward_side(head, make_engine, test_images, monkeypatch):
    engine = make_engine(("low_dim_gradient", "energy", "msp"), settings={"low_dim_gradient": {"head": head, "a": 0.5}})
    detector = engine.detectors["low_dim_gradient"]
    scores = engine.score(test_images)
    signals = engine.scorer.signals(None, engine.scorer.run(test_images).head_input)
    low = detector.low(detector.basis.project(signals.probabilities, signals.features))
    if head.startswith("probe"):
        forward = scores["energy" if head == "probe_energy" else "msp"]
    else:
        forward = detector.forward_side(signals.features)
        _, others = FitData(engine.cache, engine.head, Kernels()).split(4096)
        if head == "knn":
            assert torch.equal(detector.forward_side.fitted("bank"), F.normalize(engine.cache.rows.features[others]))
    expected = low + 0.5 * forward
    assert torch.allclose(scores["low_dim_gradient"], expected.float(), rtol=1e-6)


def test_weight_of_the_forward_side_can_be_configured(make_engine, test_images):
    engine = make_engine(("low_dim_gradient_ensemble", "energy"))
    detector = engine.detectors["low_dim_gradient_ensemble"]
    before = engine.score(test_images)
    assert [entry["a"] for entry in detector.grid()] == [0.1, 0.3, 1.0, 3.0, 10.0]
    detector.configure(a=3.0)
    after = engine.score(test_images)["low_dim_gradient_ensemble"]
    assert torch.allclose(after, before["low_dim_gradient_ensemble"] + 2 * before["energy"], rtol=1e-5)
    assert create_detector("low_dim_gradient").grid() == ()
    with pytest.raises(InputError, match=r"a=1.0: the forward side was not fitted; use refit\(a=...\) instead"):
        create_detector("low_dim_gradient").configure(a=1.0)


def test_labels_are_used_where_a_head_needs_them_and_predicted_where_they_are_missing(model, id_batches):
    def fit(batches, name="low_dim_gradient_mahalanobis"):
        return oe.Engine(model, [name]).fit(batches).detectors[name].state_dict()

    images = [batch for batch, _ in id_batches]
    with pytest.warns(OodEngineWarning, match="120 samples have no label, so their predicted classes are used"):
        unlabelled = fit(images)
    labelled = fit([(batch, model(batch).argmax(1)) for batch in images])
    assert all(torch.equal(unlabelled[key], labelled[key]) for key in labelled)
    with pytest.warns(OodEngineWarning, match="labels of which the model predicts"):
        others = fit([(batch, labels.where(torch.arange(len(labels)) % 3 > 0, 0)) for batch, labels in id_batches])
    assert not torch.allclose(fit(id_batches)["low.means"], others["low.means"])
    fit(images, "low_dim_gradient_knn")  # which needs none, and warns of none


def test_components_cotangent_and_anchors_are_settings(make_engine):
    settings = {"n_components": 3, "cotangent": "uniform", "max_anchors": 50, "k": 4, "basis": "dual"}
    engine = make_engine(("low_dim_gradient_knn",), settings={"low_dim_gradient_knn": settings})
    detector = engine.detectors["low_dim_gradient_knn"]
    assert detector.basis.n_components == 3
    assert detector.basis.cotangent == "uniform"
    assert detector.basis.fitted("anchor_features").shape[0] == 50
    assert detector.low.k == 4
    assert detector.low.fitted("bank").shape == (190, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "svm"}, r"head='svm': expected one of " + ", ".join(HEADS)),
        ({"n_components": 1.5}, r"n_components=1.5: expected a whole number of at least 1, or a share in \(0, 1\)"),
        ({"n_components": 0}, r"n_components=0: expected a whole number"),
        ({"max_anchors": 1}, r"max_anchors=1: expected a whole number of at least 2"),
        ({"max_anchors": 2.5}, r"max_anchors=2.5: expected a whole number"),
        ({"cotangent": "x"}, r"cotangent='x': expected one of energy"),
        ({"head": "knn", "k": 0}, r"k=0: expected a whole number of at least 1"),
        ({"head": "probe_msp", "epochs": 0}, r"epochs=0: expected a whole number of at least 1"),
        ({"a": -1}, r"a=-1: expected a finite weight of at least 0"),
        ({"a": float("nan")}, r"a=nan: expected a finite weight"),
        ({"a": 1, "head": "residual"}, r"a=1 with the residual head: it has no forward side"),
        ({"a": 1, "head": "vim"}, r"a=1 with the vim head: it has no forward side"),
        ({"head": "probe_react", "react_from": -1}, r"react_from=-1: expected a dimension of at least 0"),
        ({"basis": "pca"}, "basis='pca': expected one of auto, dual, explicit, factored, class_average"),
        ({"normalisation": "nfk"}, "normalisation='nfk' with basis='auto': expected one of none, nfk-separable"),
        ({"basis": "dual", "normalisation": "x"}, "normalisation='x' with basis='dual': expected one of none, nfk-sep"),
        ({"anchors": "best"}, "anchors='best': expected one of first, class_balanced, pivoted"),
        ({"anchors": "pivoted", "basis": "factored"}, "anchors='pivoted' with basis='factored': expected 'first'"),
    ],
)
def test_settings_are_checked_before_anything_is_run(settings, message):
    with pytest.raises(InputError, match=message):
        create_detector("low_dim_gradient", **settings)


def test_react_clips_late_dimensions_at_a_training_quantile():
    x, labels = vectors(300), torch.arange(300) % 3
    plain, react = (fitted(head, x, labels, 3) for head in (LinearProbe(), LinearProbe(clamp="react", react_from=2)))
    # The probe is trained on the vectors as they are.
    assert torch.equal(plain.fitted("weight"), react.fitted("weight"))
    threshold = x[:, 2:].flatten().quantile(0.9)
    assert abs(float(react.fitted("upper")[-1] - threshold)) < 0.02
    clipped = vectors(20, seed=1)
    clipped[:, 2:] = clipped[:, 2:].clamp_max(react.fitted("upper")[-1])
    assert torch.equal(react(vectors(20, seed=1)), plain(clipped))
    assert not torch.equal(react(10 * vectors(20, seed=1)), plain(10 * vectors(20, seed=1)))


def test_bats_clamps_to_what_the_batch_norm_has_seen():
    x, labels = vectors(300) * 2 + 1, torch.arange(300) % 3
    head = fitted(LinearProbe(clamp="bats", epochs=30), x, labels, 3)
    assert torch.allclose(head.fitted("upper"), x.mean(0) + x.std(0), rtol=0.1, atol=0.2)
    assert torch.allclose(head.fitted("lower"), x.mean(0) - x.std(0), rtol=0.1, atol=0.2)
    far = torch.full((1, x.shape[1]), 1e6)
    assert torch.equal(head(far), head(far * 10))


def test_mahalanobis_pp_sees_directions_alone():
    head = fitted(Mahalanobis(normalise=True), vectors(60), torch.arange(60) % 2)
    x = vectors(5, seed=1)
    assert torch.allclose(head(x), head(7 * x), rtol=1e-4)
    plain = fitted(Mahalanobis(), F.normalize(vectors(60), dim=1), torch.arange(60) % 2)
    assert torch.equal(head(x), plain(F.normalize(x, dim=1)))


def test_vim_is_energy_less_the_scaled_residual(make_engine, test_images):
    engine = make_engine(("low_dim_gradient_vim", "low_dim_gradient_residual", "energy"))
    scores = engine.score(test_images)
    alpha = engine.detectors["low_dim_gradient_vim"].fitted("alpha")
    expected = scores["energy"].double() + alpha * scores["low_dim_gradient_residual"].double()
    assert torch.allclose(scores["low_dim_gradient_vim"], expected.float(), rtol=1e-5)
    data = FitData(engine.cache, engine.head, Kernels())
    _, others = data.split(4096)
    signals = next(data.signals(others))
    logits = F.linear(signals.features, engine.head.weight, engine.head.bias).amax(1)
    basis = engine.detectors["low_dim_gradient_residual"].basis
    residual = basis.residual_norm(signals.probabilities, signals.features)
    assert abs(float(alpha) - float(logits.sum() / residual.sum())) < 1e-4 * float(alpha)


def test_detectors_over_one_subspace_share_its_residual(make_engine, model, test_images, tmp_path, monkeypatch):
    detectors = ("low_dim_gradient_vim", "low_dim_gradient_residual")
    fitted = make_engine(detectors)
    fitted.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", model)
    kind = type(fitted.detectors["low_dim_gradient_vim"].basis)
    original, calls = kind.residual_norm, []
    monkeypatch.setattr(kind, "residual_norm", lambda *a: calls.append(len(a[1])) or original(*a))
    for engine in (fitted, loaded):
        calls.clear()
        engine.score(test_images)
        assert calls == [len(test_images)]
    # Of two subspaces, each has its own.
    other = make_engine(detectors, settings={detectors[0]: {"n_components": 2}})
    calls.clear()
    scores = other.score(test_images)
    assert calls == [len(test_images)] * 2
    alone = make_engine(detectors[1:]).score(test_images)
    assert torch.equal(scores[detectors[1]], alone[detectors[1]])


def test_projected_norm_is_the_length_of_the_coordinates(make_engine, test_images):
    engine = make_engine(("low_dim_gradient_projected_norm",))
    signals = engine.scorer.signals(None, engine.scorer.run(test_images).head_input)
    expected = signals.coordinates(engine.detectors["low_dim_gradient_projected_norm"].basis).norm(dim=1)
    assert torch.allclose(engine.score(test_images)["low_dim_gradient_projected_norm"], expected)


FORMS = {
    "dual": ("none", "nfk-separable"),
    "explicit": ("none", "nfk", "nfk-separable"),
    "factored": ("none", "nfk-separable"),
    "class_average": ("none", "nfk", "nfk-separable"),
}


@pytest.mark.parametrize(("form", "normalisation"), [(form, kind) for form, kinds in FORMS.items() for kind in kinds])
def test_every_basis_scores_and_survives_the_state_file(form, normalisation, make_engine, model, test_images, tmp_path):
    options = {"basis": form, "normalisation": normalisation}
    engine = make_engine(("low_dim_gradient",), settings={"low_dim_gradient": options})
    scores = engine.score(test_images)["low_dim_gradient"]
    assert scores.isfinite().all()
    engine.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", model)
    assert torch.equal(loaded.score(test_images)["low_dim_gradient"], scores)
    basis = engine.detectors["low_dim_gradient"].basis
    assert type(loaded.detectors["low_dim_gradient"].basis) is type(basis)
    assert form != "class_average" or basis.n_components == engine.head.weight.shape[0]


def test_the_cheaper_form_is_chosen_and_scores_alike(make_engine, engine, test_images):
    dual = make_engine(("low_dim_gradient",), settings={"low_dim_gradient": {"basis": "dual"}})
    for made in (engine, dual):
        assert made.detectors["low_dim_gradient"].basis.plan().choice == "explicit"
    assert type(engine.detectors["low_dim_gradient"].basis).__name__ == "ExplicitBasis"
    found, expected = (made.score(test_images)["low_dim_gradient"] for made in (dual, engine))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("anchors", ["class_balanced", "pivoted"])
def test_anchors_are_chosen_from_more_samples(anchors, model, id_batches):
    options = {"max_anchors": 8, "anchors": anchors, "n_components": 4}
    settings = {"low_dim_gradient": {"basis": "dual", **options}}
    engine = oe.Engine(model, ["low_dim_gradient"], settings=settings).fit(id_batches)
    data = FitData(engine.cache, engine.head, Kernels())
    candidates, _ = data.split(16 * 8)
    assert len(candidates) > 8
    signals = next(data.signals(candidates))
    expected = oe.subspace.DualBasis.fit(
        signals.probabilities, signals.features, labels=data.labels(candidates), **options
    ).fitted("anchor_features")
    found = engine.detectors["low_dim_gradient"].basis.fitted("anchor_features")
    assert torch.equal(found, expected)
    assert not torch.equal(found, signals.features[:8])
