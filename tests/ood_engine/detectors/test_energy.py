"""Energy, MSP and MaxLogit against their definitions on the model's own logits."""

from __future__ import annotations

import torch

import ood_kernels as ok
from ood_engine.detectors import create_detector
from ood_engine.features.signals import Signals
from ood_engine.runtime import Kernels


def test_equal_their_definitions(engine, model, test_images):
    with torch.no_grad():
        logits = model(test_images).double()
    scores = engine.score(test_images)
    expected = {"energy": logits.logsumexp(1), "msp": logits.softmax(1).amax(1), "max_logit": logits.amax(1)}
    for name, score in expected.items():
        assert scores[name].dtype == torch.float32
        assert (scores[name] - score).abs().max() <= 2e-6 * score.abs().max()


def test_max_logit_is_exact_for_very_different_logits():
    weight = torch.diag(torch.tensor([1e3, -1e3, 5.0]))
    signals = Signals(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -2.0]]), ok.Head(weight), Kernels())
    assert create_detector("max_logit")(signals).tolist() == [1000.0, 0.0, 0.0]


def test_energy_survives_logits_that_overflow_exp():
    signals = Signals(torch.tensor([[500.0], [-500.0]]), ok.Head(torch.tensor([[1.0], [1.0]])), Kernels())
    score = create_detector("energy")(signals)
    assert torch.allclose(score, torch.tensor([500.0, -500.0]) + torch.tensor(2.0).log())
