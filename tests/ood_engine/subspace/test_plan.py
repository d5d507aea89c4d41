from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_engine.errors import InputError
from ood_engine.subspace import DualBasis
from ood_engine.subspace.plan import Machine, plan

SIZES = st.integers(1, 5000)
IMAGENET = {"samples": 64, "anchors": 1000, "classes": 1000, "features": 2049, "components": 256}
CIFAR = {"samples": 64, "anchors": 4096, "classes": 10, "features": 513, "components": 20}


def test_the_dual_form_wins_for_many_classes_and_the_explicit_one_for_few():
    assert plan(**IMAGENET).choice == "dual"
    assert plan(**CIFAR).choice == "explicit"


def test_the_flop_ratio_is_the_one_of_the_closed_forms():
    costs = {cost.form: cost for cost in plan(**IMAGENET, budget=2**40).costs}
    assert costs["dual"].flops == 2 * 64 * (1000 * (1000 + 2049 + 256) + 1000 * 256)
    assert costs["explicit"].flops == 2 * 64 * 256 * 1000 * 2049
    assert costs["explicit"].bytes == 4 * 256 * 1000 * 2049


@settings(deadline=None)
@given(*[SIZES] * 5, st.tuples(SIZES, SIZES), st.integers(2**10, 2**36))
def test_the_choice_is_the_cheapest_that_fits(samples, anchors, classes, features, components, ranks, budget):
    sizes = dict(zip(IMAGENET, (samples, anchors, classes, features, components), strict=True))
    try:
        made = plan(**sizes, ranks=ranks, budget=budget)
    except InputError as error:
        assert "no basis of the subspace fits" in str(error)  # noqa: PT017
        return
    chosen = next(cost for cost in made.costs if cost.form == made.choice)
    assert chosen.fits
    assert all(chosen.seconds <= cost.seconds for cost in made.costs if cost.fits)
    assert [cost.seconds for cost in made.costs] == sorted(cost.seconds for cost in made.costs)


def test_a_tight_budget_changes_the_choice():
    free = plan(**CIFAR)
    explicit = next(cost for cost in free.costs if cost.form == "explicit")
    dual = {**CIFAR, "anchors": 20}
    assert plan(**dual, machine=Machine(1.0, 1e30), budget=2**30).choice == "dual"
    assert plan(**CIFAR, budget=explicit.bytes + explicit.workspace).choice == "explicit"
    with pytest.raises(InputError, match=r"no basis of the subspace fits 0 MiB: the smallest, explicit, takes"):
        plan(**CIFAR, budget=10)


def test_the_machine_decides_between_flops_and_bytes():
    sizes = {"samples": 1, "anchors": 100, "classes": 10, "features": 50, "components": 10}
    for machine in (Machine(1e9, 1e30), Machine(1e30, 1e9)):
        costs = {cost.form: cost.seconds for cost in plan(**sizes, machine=machine).costs}
        assert costs["explicit"] < costs["dual"]


def test_the_factored_form_needs_ranks_and_can_be_left_out():
    assert {cost.form for cost in plan(**IMAGENET).costs} == {"dual", "explicit"}
    with_ranks = plan(**IMAGENET, ranks=(8, 16))
    assert with_ranks.choice == "factored"
    assert plan(**IMAGENET, ranks=(8, 16), forms=("dual", "explicit")).choice == "dual"


def test_the_plan_can_be_read():
    lines = str(plan(**IMAGENET, budget=2**30)).splitlines()
    assert lines[0] == "a batch of 64 on cpu, at most 1024 MiB:"
    assert lines[1].startswith("→ dual")
    assert lines[2].endswith("beyond the budget")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples=0: expected a whole number of at least 1"),
        ({"forms": ("dense",)}, "basis 'dense': expected one of dual, explicit, factored"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        plan(**{**IMAGENET, **change})


def test_the_flops_are_those_that_the_basis_counts():
    import torch

    generator = torch.Generator().manual_seed(0)
    p, h = torch.randn(30, 4, generator=generator).softmax(1), torch.randn(30, 6, generator=generator)
    basis = DualBasis.fit(p, h, n_components=3)
    costs = {c.form: c for c in plan(samples=5, anchors=30, classes=4, features=7, components=3).costs}
    # The basis adds the bias as a number, the plan counts it as a feature.
    assert costs["dual"].flops - basis.flops(5) == 2 * 5 * 30
    assert costs["explicit"].flops == basis.to_explicit().flops(5)
