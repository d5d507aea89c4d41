"""GradPCA against dense PCA of class means of autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_engine as oe
import ood_kernels as ok
from ood_engine.detectors import create_detector, grad_pca
from ood_engine.errors import InputError, NotFittedError, OodEngineWarning
from ood_engine.features.cache import CacheRows, FeatureCache
from ood_engine.features.fit_data import FitData
from ood_engine.features.signals import Signals
from ood_engine.runtime import Kernels
from ood_engine.subspace import class_samples
from ood_kernels.reference import COTANGENTS


def data_of(h, labels, weight, bias):
    empty = h.new_empty((len(h), 0))
    rows = CacheRows(h, torch.arange(len(h)), labels, empty, empty)
    return FitData(FeatureCache(rows), ok.Head(weight, bias), Kernels())


def fitted(h, labels, weight, bias, *_, **options):
    detector = create_detector("grad_pca", **options)
    detector.fit(data_of(h, labels, weight, bias))
    return detector


def scores_of(detector, h, weight, bias):
    return detector(Signals(h, ok.Head(weight, bias), Kernels()))


def dense(gradients, labels, test, explained=0.99):
    """Scores [N] and the number of components, from gradients [n, C, D̃] themselves."""
    means = torch.stack([gradients[labels == each].mean(0) for each in labels.unique()]).flatten(1)
    mean = means.mean(0)
    _, s, v = torch.linalg.svd(means - mean, full_matrices=False)
    s = s[s > 1e-9 * s[0]]
    count = int((s.square().cumsum(0) / s.square().sum() < explained).sum()) + 1
    centred = test.flatten(1) - mean
    return (centred @ v[:count].T).norm(dim=1) / centred.norm(dim=1), count


FORMS = {"class means": 2**30, "anchors": 0}
"""The bytes that class means may take: held in memory, or beyond it written over anchors."""


@pytest.fixture
def problem(make_problem):
    """(h, labels, weight, bias, test features): five classes of unequal size, of which class 3 has no sample."""
    _, h, weight, bias = make_problem(60, 5)
    labels = torch.tensor([0, 1, 2, 4]).repeat(15)
    labels[:9] = 1
    return h[:40], labels[:40], weight, bias, h[40:]


@pytest.mark.pairwise(kind=COTANGENTS, explained=[0.5, 0.99, 1.0], dtype=[torch.float64, torch.float32], form=FORMS)
def test_score_is_that_of_autograds_class_means(kind, explained, dtype, form, problem, autograd_gradients, monkeypatch):
    monkeypatch.setattr(grad_pca, "_CLASS_MEAN_BYTES", FORMS[form])
    h, labels, weight, bias, test = problem
    rounded = (h.to(dtype), labels, weight.to(dtype), bias.to(dtype))
    detector = fitted(*rounded, cotangent=kind, explained=explained, anchors_per_class=100)
    score = scores_of(detector, test.to(dtype), *rounded[2:])
    gradients, of_test = (autograd_gradients(x, weight, bias, kind, True) for x in (h, test))
    expected, count = dense(gradients, labels, of_test, explained)
    assert score.dtype == dtype
    assert detector.n_components == count
    assert (score - expected).abs().max() < (1e-10 if dtype == torch.float64 else 1e-5)
    is_explicit = kind != "sum_logits" and form == "class means"
    assert isinstance(detector.tensors(), ok.ExplicitTensors if is_explicit else ok.DualTensors)


def test_sum_logits_is_pca_of_class_mean_features(problem):
    h, labels, weight, bias, test = problem
    expected, _ = dense(h, labels, test)
    assert (scores_of(fitted(*problem), test, weight, bias) - expected).abs().max() < 1e-10


def test_anchors_are_the_first_of_every_class(problem, autograd_gradients, monkeypatch):
    monkeypatch.setattr(grad_pca, "_CLASS_MEAN_BYTES", 0)
    monkeypatch.setattr(class_samples, "_GRAM_BLOCK", 5)
    h, labels, weight, bias, test = problem
    detector = fitted(*problem, cotangent="energy", anchors_per_class=3)
    kept = torch.cat([(labels == each).nonzero()[:3, 0] for each in labels.unique()])
    gradients, of_test = (autograd_gradients(x, weight, bias, "energy", True) for x in (h, test))
    expected, _ = dense(gradients[kept], labels[kept], of_test)
    assert len(detector.fitted("anchor_features")) == 12
    assert (scores_of(detector, test, weight, bias) - expected).abs().max() < 1e-10


def test_class_means_over_several_batches(problem, monkeypatch):
    *_, weight, bias, test = problem
    scores = []
    original = FitData.signals
    for size in (4096, 7):
        monkeypatch.setattr(FitData, "signals", lambda self, index=None, size=size: original(self, index, size))
        for kind in ("sum_logits", "predicted"):
            scores.append(scores_of(fitted(*problem, cotangent=kind), test, weight, bias))
    assert (scores[0] - scores[2]).abs().max() < 1e-10
    assert (scores[1] - scores[3]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["sum_logits", "predicted"])
def test_predicted_classes_stand_in_for_missing_labels(kind, problem):
    h, _, weight, bias, test = problem
    predicted = Signals(h, ok.Head(weight, bias), Kernels()).probabilities.argmax(1)
    labelled = fitted(h, predicted, weight, bias, cotangent=kind)
    with pytest.warns(OodEngineWarning, match="40 samples have no label"):
        unlabelled = fitted(h, torch.full_like(predicted, -1), weight, bias, cotangent=kind)
    assert torch.equal(*(scores_of(detector, test, weight, bias) for detector in (labelled, unlabelled)))


@pytest.mark.parametrize("kind", COTANGENTS)
def test_one_class_and_equal_samples_are_refused(kind, problem, monkeypatch):
    h, labels, weight, bias, _ = problem
    for most in FORMS.values():
        monkeypatch.setattr(grad_pca, "_CLASS_MEAN_BYTES", most)
        with pytest.raises(InputError, match="40 ID samples of 1 class: expected at least 2 classes"):
            fitted(h, torch.zeros_like(labels), weight, bias, cotangent=kind)
        with pytest.raises(InputError, match="the mean gradients of all 4 classes are equal"):
            fitted(h[:1].repeat(40, 1), labels, weight, bias, cotangent=kind)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    distinct=st.integers(2, 5),
    kind=st.sampled_from(("sum_logits", "energy")),
    max_bytes=st.sampled_from((0, 2**30)),
)
def test_duplicates_give_scores_between_0_and_1(make_problem, autograd_gradients, seed, distinct, kind, max_bytes):
    _, h, weight, bias = make_problem(distinct + 6, 5, seed=seed)
    labels = (torch.arange(distinct) % 5).repeat(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_pca, "_CLASS_MEAN_BYTES", max_bytes)
        detector = fitted(h[:distinct].repeat(4, 1), labels, weight, bias, cotangent=kind, explained=1.0)
    assert detector.n_components == distinct - 1
    score = scores_of(detector, h, weight, bias)
    assert ((score >= 0) & (score <= 1)).all()
    assert (score[:distinct] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_itself_is_in_distribution(dtype):
    h = torch.tensor([[1.0, 3.0, 5.0], [3.0, 5.0, 7.0]], dtype=dtype)
    head = torch.eye(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    detector = fitted(h, torch.tensor([0, 1]), *head)
    x = torch.stack([h.mean(0), h[0], h.mean(0) + h.new_tensor([1.0, -1.0, 0.0])])
    assert (scores_of(detector, x, *head) - h.new_tensor([1.0, 1.0, 0.0])).abs().max() < 1e-6
    assert scores_of(detector, h * torch.nan, *head).isnan().all()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"cotangent": "loss"}, "cotangent='loss': expected one of energy"),
        ({"explained": 0.0}, r"explained=0.0: expected a share in \(0, 1\]"),
        ({"explained": True}, "explained=True"),
        ({"explained": float("nan")}, "explained=nan"),
        ({"anchors_per_class": 0}, "anchors_per_class=0: expected a whole number"),
    ],
)
def test_bad_settings(settings_, message):
    with pytest.raises(InputError, match=message):
        create_detector("grad_pca", **settings_)


@pytest.mark.parametrize(("kind", "form"), [(kind, tuple(FORMS)[i % 2]) for i, kind in enumerate(COTANGENTS)])
def test_state_of_either_form_is_loaded_by_any_detector(
    kind, form, model, id_batches, test_images, tmp_path, monkeypatch
):
    monkeypatch.setattr(grad_pca, "_CLASS_MEAN_BYTES", FORMS[form])
    engine = oe.Engine(model, ["grad_pca"], settings={"grad_pca": {"cotangent": kind}})
    with pytest.raises(NotFittedError):
        create_detector("grad_pca").tensors()
    engine.fit(id_batches)
    engine.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", model)
    assert torch.equal(loaded.score(test_images)["grad_pca"], engine.score(test_images)["grad_pca"])


def test_refit_with_another_cotangent_leaves_no_buffers_of_the_old_form(problem):
    detector, other = fitted(*problem, cotangent="energy"), fitted(*problem)
    names = set(detector.state_dict())
    assert names == {"constants", "mean", "mean_square", "components"}
    other.load_state_dict(detector.state_dict())
    assert set(other.state_dict()) == names
