"""The all-parameter reference: against autograd, the closed form, scikit-learn and the formula; and its script at tiny size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from examples import all_parameters as script
from ood_engine.demo import SmallCNN

KINDS = [("pca", 6), ("pca", 0.9), ("class average", None)]


@pytest.fixture
def model():
    """In fp64, with a third of its last channels dead and logits that are far from uniform."""
    model = SmallCNN(5).double().eval()
    with torch.no_grad():
        model.body[-2].bias[:20] = -100
        model.head.weight *= 20
    return model


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 5


def stacked(model, images, names=()):
    return torch.cat(list(script.gradients(model, images, names, chunk=7)))


def test_gradients_are_those_of_autograd(model):
    images, _ = draw(9)
    expected = []
    for image in images:
        found = torch.autograd.grad(model(image[None]).logsumexp(1).sum(), list(model.parameters()))
        expected.append(torch.cat([each.flatten() for each in found]))
    g = stacked(model, images)
    assert g.shape == (9, sum(parameter.numel() for parameter in model.parameters()))
    torch.testing.assert_close(g, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert stacked(model, images, script.LAST_LAYER).equal(g[:, -5 * 65 :])


@pytest.mark.parametrize("normalisation", ["none", "nfk"])
@pytest.mark.parametrize(("subspace", "wanted"), KINDS)
def test_restricted_to_the_last_layer_it_is_the_closed_form(model, subspace, wanted, normalisation):
    (images, labels), (fresh, _) = draw(40), draw(11, seed=1)
    way = script.Way(subspace, wanted, normalisation)
    found = script.fit(stacked(model, images, script.LAST_LAYER), labels, way)
    basis = script.fit_closed_form(*script.forward(model, images), labels, way)
    coordinates = basis.project(*script.forward(model, fresh))
    assert coordinates.shape[1] == len(found.vectors) > 1
    expected = found.project(stacked(model, fresh, script.LAST_LAYER))
    assert (coordinates - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert coordinates.std(0).min() > 1e-3 * coordinates.std(0).max()


def test_nfk_is_the_formula(model):
    g = stacked(model, draw(30)[0])
    variance = np.mean((g.numpy() - g.numpy().mean(0)) ** 2, axis=0)
    dead = variance == 0
    assert 0 < dead.sum() < dead.size
    expected = np.where(dead, 0, 1 / np.sqrt(np.where(dead, 1, variance)))
    expected[dead] = expected.max()
    found = script.inverse(script.deviation(g))
    assert bool(found.isfinite().all())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_a_constant_entry_gives_no_direction():
    g = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g[:, 2] = 0.1
    found = script.fit(g, torch.arange(30) % 3, script.Way("pca", 3, "nfk"))
    assert bool(found.vectors[:, 2].eq(0).all())
    assert bool(found.vectors[:, :2].abs().amax(0).gt(0).all())


@pytest.fixture
def tiny(monkeypatch):
    """The demo's data by chance: writing and reading images takes longer than all else."""

    def prepare(seed, options):
        torch.manual_seed(seed)
        (anchors, labels), (others, _), (test, _) = draw(40, seed), draw(40, seed + 1), draw(12, seed + 2)
        sets = {script.ID_TEST: test, **{name: test * (2 + i) for i, name in enumerate(script.demo.FOLDERS)}}
        return script.Digits(SmallCNN(5, seed).double().eval(), (anchors, labels), (others, labels), sets)

    monkeypatch.setattr(script, "prepare", prepare)
    return ["--seeds", "0", "1", "--components", "4"]


def test_script_writes_its_rows(tiny, tmp_path):
    path = tmp_path / "all_parameters.json"
    assert script.main([*tiny, "--json", str(path)]) == 0
    energy, *others = rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert energy["head"] == "energy"
    assert len(others) == 2 * 4 * len(script.HEADS)
    for row in rows:
        for name in script.demo.FOLDERS:
            by_seed = row[f"AUROC {name} by seed"]
            assert len(by_seed) == 2
            assert row[f"AUROC {name}"] == pytest.approx(sum(by_seed) / 2)
            assert 0 <= min(by_seed) <= max(by_seed) <= 100


def test_script_fails_where_the_reference_is_not_the_closed_form(tiny, monkeypatch):
    monkeypatch.setattr(script, "error_of", lambda *_: 2e-9)
    assert script.main([*tiny, "--seeds", "0"]) == 1


def test_demo_images_are_divided():
    digits = script.prepare(0, script.parse(["--quick", "--epochs", "1", "--anchors", "50"]))
    (anchors, anchor_labels), (others, labels) = digits.anchors, digits.others
    assert len(anchors) == len(anchor_labels) == 50
    assert len(others) == len(labels) > 100
    assert digits.sets.keys() == {script.ID_TEST, *script.demo.FOLDERS}
    assert anchors.dtype == torch.float64
