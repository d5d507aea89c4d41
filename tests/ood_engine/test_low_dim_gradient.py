"""Low-dimensional gradients: the heads on the coordinates, anchors kept apart, the ensemble."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

import ood_engine as oe
from ood_engine.detectors import create_detector
from ood_engine.detectors.vector_heads import KNearestNeighbours, LinearProbe, Mahalanobis
from ood_engine.errors import InputError, OodEngineWarning
from ood_engine.fitting import FitData

HEADS = ("probe_energy", "probe_msp", "knn", "mahalanobis", "residual")


def vectors(count: int, width: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed))


def test_knn_is_the_similarity_to_the_kth_neighbour():
    bank, x = vectors(50), vectors(9, seed=1)
    head = KNearestNeighbours(5)
    head.fit(bank)
    neighbours = NearestNeighbors(n_neighbors=5).fit(F.normalize(bank).numpy())
    distance = neighbours.kneighbors(F.normalize(x).numpy())[0][:, -1]
    np.testing.assert_allclose(head(x).numpy(), 1 - distance**2 / 2, rtol=0, atol=1e-6)


def test_knn_in_blocks_equals_knn_at_once(monkeypatch):
    head = KNearestNeighbours(3)
    head.fit(vectors(50))
    expected = head(vectors(40, seed=1))
    monkeypatch.setattr("ood_engine.detectors.vector_heads._BLOCK_ELEMENTS", 7 * 50)
    assert torch.allclose(head(vectors(40, seed=1)), expected, rtol=0, atol=1e-6)


def test_mahalanobis_equals_scikit_learns():
    x, labels = vectors(60).double(), torch.arange(60) % 3
    x += labels[:, None]
    head = Mahalanobis()
    head.fit(x, labels + 5)  # labels need not start at 0
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    covariance = EmpiricalCovariance(assume_centered=True).fit((x - means[labels]).numpy())
    fresh = vectors(20, seed=2).double()
    expected = np.min([covariance.mahalanobis((fresh - mean).numpy()) for mean in means], axis=0)
    np.testing.assert_allclose(head(fresh).numpy(), -expected, rtol=1e-9)
    assert head.fitted("means").dtype == torch.float64


def test_mahalanobis_of_fewer_samples_than_dimensions_is_finite():
    head = Mahalanobis()
    head.fit(vectors(5, 12), torch.tensor([0, 0, 1, 1, 1]))
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
    from ood_engine.detectors import vector_heads

    original = vector_heads._train
    monkeypatch.setattr(vector_heads, "_train", lambda probe, *a: caught.update(probe=probe) or original(probe, *a))
    x, labels = vectors(300), torch.arange(300) % 3
    x[torch.arange(300), labels] += 3
    for score in ("energy", "msp"):
        head = LinearProbe(score)
        head.fit(x, labels, 4)
        with torch.no_grad():
            logits = caught["probe"].eval()(vectors(20, seed=1))
        expected = logits.logsumexp(1) if score == "energy" else logits.softmax(1).amax(1)
        assert torch.allclose(head(vectors(20, seed=1)), expected, rtol=1e-5)
    with torch.no_grad():
        assert (caught["probe"](x).argmax(1) == labels).float().mean() > 0.9


def test_probe_follows_the_seed_and_leaves_the_generator_alone():
    x, labels = vectors(100), torch.arange(100) % 3
    torch.manual_seed(123)
    state = torch.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        head = LinearProbe()
        head.fit(x, labels, 3, seed)
        weights.append(head.fitted("weight"))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert not weights[0].requires_grad


def test_probe_skips_a_last_batch_of_one():
    head = LinearProbe(epochs=1)
    head.fit(vectors(129), torch.arange(129) % 2, 2)
    assert head.fitted("weight").isfinite().all()


@pytest.mark.parametrize("make", [lambda: KNearestNeighbours(2), Mahalanobis, LinearProbe])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_heads_keep_bad_values_in_their_row(make, bad):
    head = make()
    arguments = {KNearestNeighbours: (), Mahalanobis: (torch.arange(50) % 2,), LinearProbe: (torch.arange(50) % 2, 2)}
    head.fit(vectors(50), *arguments[type(head)])
    x = vectors(5, seed=1)
    sound = head(x)
    x[2, 1] = bad
    found = head(x)
    assert found.isfinite().tolist() == [True, True, False, True, True]
    assert torch.equal(found[[0, 1, 3, 4]], sound[[0, 1, 3, 4]])


@pytest.mark.parametrize("head", HEADS)
def test_scores_are_the_heads_on_the_coordinates(head, engine, test_images):
    name = f"low_dim_gradient_{head}"
    detector = engine.detectors[name]
    signals = engine.signals(engine.run(test_images).feature_map, None)
    coordinates = detector.basis.project(signals.probabilities, signals.features)
    if head == "residual":
        p, h = signals.probabilities.double(), signals.features.double()
        gradients = p[:, :, None] * torch.cat([h, torch.ones_like(h[:, :1])], 1)[:, None]
        centred = (gradients - detector.basis.mean).flatten(1)
        basis = detector.basis.to_explicit().fitted("components").flatten(1).double()
        expected = -(centred - centred @ basis.T @ basis).norm(dim=1)
        tolerance = 1e-4
    else:
        expected, tolerance = detector.low(coordinates), 0
    found = engine.score(test_images)[name]
    assert (found - expected.float()).abs().max() <= tolerance * expected.abs().max()


def test_default_is_mahalanobis(engine, test_images):
    scores = engine.score(test_images)
    assert torch.equal(scores["low_dim_gradient"], scores["low_dim_gradient_mahalanobis"])


def test_anchors_are_not_what_the_heads_are_fitted_on(engine):
    detector = engine.detectors["low_dim_gradient_knn"]
    data = FitData(engine.cache, engine.head)
    anchors, others = data.split(4096)
    assert len(anchors) == len(others) == 120
    found = detector.basis.fitted("anchor_features")
    assert torch.equal(found, engine.cache.rows.features[anchors])
    coordinates = torch.cat([signals.coordinates(detector.basis) for signals in data.signals(others)])
    assert torch.equal(detector.low.fitted("bank"), F.normalize(coordinates))


def test_detectors_share_one_basis(engine, test_images):
    bases = {id(engine.detectors[f"low_dim_gradient_{head}"].basis) for head in HEADS}
    assert len(bases) == 1


@pytest.mark.parametrize("head", ["probe_energy", "probe_msp", "knn", "mahalanobis"])
def test_ensemble_adds_the_forward_side(head, make_engine, test_images, monkeypatch):
    engine = make_engine(("low_dim_gradient", "energy", "msp"), settings={"low_dim_gradient": {"head": head, "a": 0.5}})
    detector = engine.detectors["low_dim_gradient"]
    scores = engine.score(test_images)
    signals = engine.signals(engine.run(test_images).feature_map, None)
    low = detector.low(detector.basis.project(signals.probabilities, signals.features))
    if head.startswith("probe"):
        forward = scores["energy" if head == "probe_energy" else "msp"]
    else:
        forward = detector.forward_side(signals.features)
        _, others = FitData(engine.cache, engine.head).split(4096)
        if head == "knn":
            assert torch.equal(detector.forward_side.fitted("bank"), F.normalize(engine.cache.rows.features[others]))
    expected = low + 0.5 * forward
    assert torch.allclose(scores["low_dim_gradient"], expected.float(), rtol=1e-6)


def test_ensemble_of_probe_and_energy(engine, test_images):
    scores = engine.score(test_images)
    expected = scores["low_dim_gradient_probe_energy"] + scores["energy"]
    assert torch.allclose(scores["low_dim_gradient_ensemble"], expected, rtol=1e-6)


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


def test_knn_needs_no_labels_and_says_nothing_of_them(model, id_batches):
    oe.Engine(model, ["low_dim_gradient_knn"]).fit([images for images, _ in id_batches])


def test_labels_that_are_missing_are_predicted(model, id_batches):
    images = [batch for batch, _ in id_batches]
    with pytest.warns(OodEngineWarning, match="120 samples have no label, so their predicted classes stand in"):
        unlabelled = oe.Engine(model, ["low_dim_gradient_mahalanobis"]).fit(images)
    predicted = [(batch, model(batch).argmax(1)) for batch in images]
    labelled = oe.Engine(model, ["low_dim_gradient_mahalanobis"]).fit(predicted)
    states = [engine.detectors["low_dim_gradient_mahalanobis"].state_dict() for engine in (unlabelled, labelled)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_labels_are_used(make_engine, model, id_batches):
    true = oe.Engine(model, ["low_dim_gradient_mahalanobis"]).fit(id_batches)
    others = oe.Engine(model, ["low_dim_gradient_mahalanobis"]).fit([(x, y.flip(0)) for x, y in id_batches])
    means = [engine.detectors["low_dim_gradient_mahalanobis"].low.fitted("means") for engine in (true, others)]
    assert not torch.allclose(means[0], means[1])


def test_components_cotangent_and_anchors_are_settings(make_engine):
    engine = make_engine(
        ("low_dim_gradient_knn",),
        settings={"low_dim_gradient_knn": {"n_components": 3, "cotangent": "uniform", "max_anchors": 50, "k": 4}},
    )
    detector = engine.detectors["low_dim_gradient_knn"]
    assert detector.basis.n_components == 3
    assert detector.basis.cotangent == "uniform"
    assert detector.basis.fitted("anchor_features").shape[0] == 50
    assert detector.low.k == 4
    assert detector.low.fitted("bank").shape == (190, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "svm"}, r"head='svm': expected one of probe_energy, probe_msp, knn, mahalanobis, residual"),
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
    ],
)
def test_settings_are_checked_before_anything_is_run(settings, message):
    with pytest.raises(InputError, match=message):
        create_detector("low_dim_gradient", **settings)
