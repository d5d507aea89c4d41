from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_engine.errors import InputError
from ood_engine.subspace import DualBasis
from ood_engine.subspace.plan import _RATES, plan

SIZES = st.integers(1, 5000)
IMAGENET = {"anchors": 1000, "classes": 1000, "features": 2048, "components": 256}
CIFAR = {"anchors": 4096, "classes": 10, "features": 512, "components": 20}


class Sizes:
    """A dual basis, or with ranks (R, Q) a factored one, of these sizes; its tensors take no memory."""

    def __init__(self, anchors, classes, features, components, ranks=None):
        def empty(*shape):
            return torch.empty(()).expand(shape)

        shapes = (anchors, classes), (anchors, features), (anchors, components), (components,)
        self.made = ok.DualTensors(*(empty(*shape) for shape in shapes))
        if ranks is not None:
            r, q = ranks
            self.made = ok.FactoredTensors(
                empty(classes, r), empty(features + 1, q), empty(components, r, q), empty(components)
            )

    def tensors(self):
        return self.made


def test_the_dual_form_wins_for_many_classes_and_the_explicit_one_for_few():
    assert plan(Sizes(**IMAGENET)).choice == "dual"
    assert plan(Sizes(**CIFAR)).choice == "explicit"
    assert plan(Sizes(**IMAGENET, ranks=(8, 16))).choice == "factored"


def test_the_flop_ratio_is_the_one_of_the_closed_forms():
    costs = {cost.form: cost for cost in plan(Sizes(**IMAGENET)).costs}
    assert costs["dual"].flops == 2 * 64 * 1000 * (1000 + 2048 + 256)
    assert costs["explicit"].flops == 2 * 64 * 256 * 1000 * 2049
    assert costs["explicit"].bytes == 4 * 256 * 1000 * 2049


@settings(deadline=None)
@given(*[SIZES] * 5, st.none() | st.tuples(SIZES, SIZES), st.integers(2**10, 2**36))
def test_the_choice_is_the_cheapest_that_fits(samples, anchors, classes, features, components, ranks, budget):
    made = plan(Sizes(anchors, classes, features, components, ranks), samples=samples, budget=budget)
    chosen = next(cost for cost in made.costs if cost.form == made.choice)
    fitting = [cost.seconds for cost in made.costs if cost.fits]
    if fitting:
        assert chosen.fits
        assert chosen.seconds == min(fitting)
    else:
        assert chosen.bytes == min(cost.bytes for cost in made.costs)
    assert [cost.seconds for cost in made.costs] == sorted(cost.seconds for cost in made.costs)


def test_a_tight_budget_changes_the_choice():
    basis = Sizes(anchors=1000, classes=100, features=100, components=100)
    # The Gram matrix of the batch takes 190 MiB.
    choices = [plan(basis, samples=50_000, budget=mebibytes * 2**20).choice for mebibytes in (200, 100, 0)]
    assert choices == ["dual", "explicit", "dual"]
    with pytest.raises(InputError, match="samples=0: expected a whole number of at least 1"):
        plan(basis, samples=0)


@pytest.mark.parametrize("rates", [(1e9, 1e30), (1e30, 1e9)])
def test_the_machine_decides_between_flops_and_bytes(rates, monkeypatch):
    monkeypatch.setitem(_RATES, "cpu", rates)
    costs = {cost.form: cost.seconds for cost in plan(Sizes(100, 10, 50, 10), samples=1).costs}
    assert costs["explicit"] < costs["dual"]


def test_the_flops_are_those_that_the_basis_counts():
    generator = torch.Generator().manual_seed(0)
    p, h = torch.randn(30, 4, generator=generator).softmax(1), torch.randn(30, 6, generator=generator)
    basis = DualBasis.fit(p, h, n_components=3)
    costs = {cost.form: cost for cost in basis.plan(5).costs}
    assert costs["dual"].flops == basis.flops(5)
    assert costs["explicit"].flops == basis.to_explicit().flops(5)
