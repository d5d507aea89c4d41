from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ood_kernels as ok
from ood_engine.detectors import create_detector
from ood_engine.features.signals import Signals
from ood_engine.runtime import Kernels


def problem(samples=6, classes=5, width=7, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((samples, width), (classes, width), (classes,))
    )
    return h, weight * scale, bias


def norms_by_autograd(h, weight, bias, loss):
    """‖∂ loss(z) / ∂W‖₁ for every sample, one backward pass each."""
    norms = []
    for row in h:
        leaf = weight.clone().requires_grad_()
        loss(F.linear(row, leaf, bias)).backward()
        norms.append(leaf.grad.abs().sum())
    return torch.stack(norms)


def test_gradnorm_equals_autograd():
    h, weight, bias = problem()
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    expected = norms_by_autograd(h, weight, bias, lambda z: F.kl_div(z.log_softmax(0), uniform, reduction="sum"))
    ours = create_detector("gradnorm")(Signals(h, ok.Head(weight, bias), Kernels()))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_exgrad_equals_autograd():
    h, weight, bias = problem()
    p = F.linear(h, weight, bias).softmax(1)
    by_class = [norms_by_autograd(h, weight, bias, lambda z, y=y: -z.log_softmax(0)[y]) for y in range(5)]
    expected = -(torch.stack(by_class, 1) * p).sum(1)
    ours = create_detector("exgrad")(Signals(h, ok.Head(weight, bias), Kernels()))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["gradnorm", "exgrad"])
def test_a_flat_softmax_of_zero_features_is_scored_by_the_formula(name):
    score = create_detector(name)(Signals(torch.zeros(2, 3), ok.Head(torch.ones(4, 3)), Kernels()))
    assert torch.equal(score, torch.zeros(2))


def test_a_peaked_softmax_scores_higher_by_both():
    h = torch.tensor([[1.0, 0.0], [0.6, 0.4]])
    head = ok.Head(10 * torch.eye(2))
    for name in ("gradnorm", "exgrad"):
        peaked, flat = create_detector(name)(Signals(h, head, Kernels()))
        assert peaked > flat
