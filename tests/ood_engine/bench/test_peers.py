"""The libraries beside which the methods are measured, at small sizes: their scores, mapped to ours, are the same in fp64."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from ood_engine.bench import peer_detectors, peers
from ood_engine.bench.cases import OURS, Effort, MissingProviderError
from ood_engine.bench.peer_detectors import OODEEL_METHODS, PYTORCH_OOD_METHODS
from ood_engine.bench.peers import OODEEL, PYTORCH_OOD, import_peer
from ood_engine.bench.rivals import LIBRARY
from ood_engine.bench.runner import errors
from ood_engine.bench.subjects import metrics, peer_methods

CPU = torch.device("cpu")
SIZES = {"N": 12, "D": 40, "C": 6, "n": 240, "K": 8}
PEERS = {PYTORCH_OOD: PYTORCH_OOD_METHODS, OODEEL: OODEEL_METHODS}
MODULES = {PYTORCH_OOD: "pytorch_ood", OODEEL: "oodeel"}
WITHOUT_OURS = {"ash", "vim", "vim, origin at the mean"}


def scene():
    return peer_methods.make_scene(SIZES, CPU, neighbours=5)


@functools.cache
def case(method):
    return peer_methods.case_of(method, scene())


@functools.cache
def metrics_case(subject, samples):
    return metrics.case_of(subject, samples)


def error_of(provider, case):
    truth = [part[: provider.samples] if provider.samples else part for part in case.truth]
    result = provider.call()
    return errors(result if provider.check is None else provider.check(result), truth)


def provider_of(name, case):
    """The provider of a case, or a skip that says why it is missing."""
    if name in case.missing:
        pytest.skip(case.missing[name])
    return next(provider for provider in case.providers if provider.name == name)


def without_peers(monkeypatch):
    def missing(name):
        raise MissingProviderError(name, "taken away")

    monkeypatch.setattr(peer_detectors, "import_peer", missing)
    monkeypatch.setattr(metrics, "import_peer", missing)


@pytest.mark.parametrize("name", MODULES)
def test_a_peer_that_is_not_installed_is_one_line_with_the_way_out(name, monkeypatch):
    monkeypatch.setattr(peers, "import_beside_torch", lambda name: None)
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(MissingProviderError) as raised:
        import_peer(name)
    asked, reason = raised.value.args
    assert asked == name
    assert reason.startswith(f"{MODULES[name]} is not installed: pip install 'ood-engine[peers]'")
    assert "\n" not in reason


def test_what_a_peer_imports_itself_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingProviderError, match="torchvision is not installed: pip install"):
        import_peer(PYTORCH_OOD)


def test_a_peer_that_does_not_import_is_one_line(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist\nand so on")

    monkeypatch.setattr(peers, "import_beside_torch", fail)
    with pytest.raises(MissingProviderError) as raised:
        import_peer(OODEEL)
    name, reason = raised.value.args
    assert name == OODEEL
    assert reason.startswith("does not import (RuntimeError: operator torchvision::nms does not exist)")
    assert "\n" not in reason


@pytest.mark.parametrize("method", peer_methods.METHODS)
def test_without_peers_what_is_ours_still_agrees_with_the_truth(method, monkeypatch):
    without_peers(monkeypatch)
    found = peer_methods.case_of(method, scene())
    assert [provider.name for provider in found.providers] == [LIBRARY] if method in WITHOUT_OURS else [OURS, LIBRARY]
    assert found.missing == {name: "taken away" for name, methods in PEERS.items() if method in methods}
    for provider in found.providers:
        assert error_of(provider, found) <= provider.tolerance


@pytest.mark.parametrize("subject", metrics.SUBJECTS)
def test_without_peers_metrics_are_ours_and_those_of_scikit_learn(subject, monkeypatch):
    without_peers(monkeypatch)
    found = metrics.case_of(subject, 500)
    assert [provider.name for provider in found.providers] == [OURS, metrics.SCIKIT_LEARN]
    assert all(error_of(provider, found) < 1e-12 for provider in found.providers)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, known in PEERS.items() for method in known])
def test_a_peers_scores_are_ours(name, method):
    provider = provider_of(name, case(method))
    assert error_of(provider, case(method)) <= provider.tolerance <= 1e-3


@pytest.mark.parametrize(
    ("name", "subject"),
    [(PYTORCH_OOD, metrics.ROC), (PYTORCH_OOD, metrics.ALL), (OODEEL, metrics.ROC)],
)
def test_a_peers_metrics_are_ours(name, subject):
    found = metrics_case(subject, 2000)
    provider = provider_of(name, found)
    assert error_of(provider, found) <= provider.tolerance <= 1e-2


def test_dice_of_many_samples_is_measured_on_the_first(monkeypatch):
    monkeypatch.setattr(peer_detectors, "_MOST_DICE_ELEMENTS", 5 * SIZES["C"] * SIZES["D"] + 1)
    found = peer_methods.case_of("dice", scene())
    provider = provider_of(PYTORCH_OOD, found)
    assert provider.samples == 5
    assert "first 5 samples" in provider.note
    assert error_of(provider, found) <= provider.tolerance


def test_the_quadratic_metrics_of_oodeel_are_not_run_on_many_scores():
    assert "quadratic" in metrics.case_of(metrics.ROC, 60_000).missing[OODEEL]


@pytest.mark.parametrize("name", ["quick", "full"])
@pytest.mark.parametrize("module", [peer_methods, metrics])
def test_series_are_long_enough_for_an_exponent(module, name):
    plans = list(module.plans(Effort(name, 1, 0.0, 0.1, CPU)))
    series = {}
    for plan in plans:
        for axis in plan.sweeps:
            series.setdefault((plan.subject, plan.workload, axis), []).append(plan.sizes[axis])
    long = {key: points for key, points in series.items() if len(points) > 1}
    assert long
    for points in long.values():
        assert len(set(points)) >= 3
        assert max(points) >= 8 * min(points)


def test_every_method_is_planned():
    quick, full = (
        {plan.subject for plan in peer_methods.plans(Effort(name, 1, 0.0, 0.1, CPU))} for name in ("quick", "full")
    )
    assert full == set(peer_methods.METHODS)
    # They cost what the energy does.
    assert quick == full - {"msp", "max_logit"}
