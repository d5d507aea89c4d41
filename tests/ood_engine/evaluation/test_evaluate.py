from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ood_engine.evaluation.confidence import HeadConfidence
from ood_engine.evaluation.evaluate import evaluate, write_report
from ood_engine.evaluation.metrics import expected_calibration_error
from ood_engine.evaluation.report import markdown_table
from ood_engine.features.cache import NO_LABEL
from ood_engine.images.dataset import open_dataset
from ood_engine.images.preprocess import Preprocess
from ood_engine.runtime import Kernels, Runtime


@pytest.fixture
def datasets(images, tmp_path):
    """(ID set with labels, the same without, OOD set) of images on disk."""
    pixels, labels = images(150, 5)
    np.savez(tmp_path / "id.npz", images=pixels.numpy(), labels=labels.numpy())
    np.save(tmp_path / "bare.npy", pixels.numpy())
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).random((40, 3, 8, 8)).astype(np.float32))
    return [open_dataset(tmp_path / name, Preprocess()) for name in ("id.npz", "bare.npy", "noise.npy")]


def test_the_calibration_error_of_the_unpruned_and_of_every_pruned_head_is_reported(
    make_engine, images, datasets, tmp_path
):
    engine = make_engine(("energy", "opnp", "opp"))
    evaluation, _ = evaluate(engine, datasets[0], {"noise": datasets[2]}, batch_size=64)
    pixels, labels = images(150, 5)
    h, head = engine.scorer.run(pixels).head_input, engine.head

    def error(weight_mask, neuron_mask):
        p = F.linear(h.double() * neuron_mask, head.weight.double() * weight_mask, head.bias.double()).softmax(1)
        return expected_calibration_error(p, labels)

    expected = {"unpruned": error(1, 1)} | {name: error(*engine.detectors[name].masks) for name in ("opnp", "opp")}
    assert evaluation.ece == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 4) for value in expected.values()}) == 3
    files = write_report(evaluation, tmp_path / "report")
    assert json.loads(files[0].read_text())["ece"] == evaluation.ece
    page = files[1].read_text(encoding="utf-8")
    for name, words in {"unpruned": "unpruned head", "opnp": "pruned by opnp", "opp": "pruned by opp"}.items():
        assert f"{words} {100 * expected[name]:.2f} %" in page
    note = f"Expected calibration error of the head: unpruned {100 * expected['unpruned']:.2f}, opnp"
    assert note in markdown_table(evaluation)
    assert evaluation.only(("energy", "opp")).ece.keys() == {"unpruned", "opp"}


def test_without_labels_or_without_a_pruned_head_there_is_no_calibration_error(make_engine, datasets):
    ood = {"noise": datasets[2]}
    assert evaluate(make_engine(("energy", "opp")), datasets[1], ood)[0].ece == {}
    evaluation, _ = evaluate(make_engine(("energy", "msp")), datasets[0], ood)
    assert evaluation.ece == {}
    assert "alibration error" not in markdown_table(evaluation)


def test_samples_without_a_label_or_a_finite_confidence_do_not_count(engine):
    h = torch.rand(20, 12)
    labels = torch.arange(20) % 5
    one, other = (HeadConfidence(engine.head, Kernels(Runtime())) for _ in range(2))
    one.add(h, labels)
    for part, of_part in zip(h.split(7), labels.split(7), strict=True):
        other.add(part, of_part)
    other.add(torch.full((3, 12), torch.nan), torch.zeros(3, dtype=torch.int64))
    other.add(torch.rand(4, 12), torch.full((4,), NO_LABEL))
    assert one.ece == other.ece
    assert HeadConfidence(engine.head, Kernels(Runtime())).ece is None
