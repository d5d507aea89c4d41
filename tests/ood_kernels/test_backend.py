from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import ood_kernels as ok
from ood_kernels import backend

MAP = torch.rand(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
REMEMBERING = (backend._is_installed, backend._warn_once)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No wishes of the environment, nothing remembered."""
    monkeypatch.delenv("OOD_ENGINE_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for function in REMEMBERING:
        function.cache_clear()
    yield
    for function in REMEMBERING:
        function.cache_clear()


def test_plain_torch_answers_where_nothing_is_wished_for_and_no_gpu_holds_the_tensor():
    assert backend.kernels("pool_nap", MAP, "", preferred=False) is None


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_the_reference_can_be_wished_for_on_a_gpu(monkeypatch, by):
    monkeypatch.setenv("OOD_ENGINE_BACKEND", "reference" if by == "environment" else "triton")
    requested = "reference" if by == "argument" else ""
    assert backend.kernels("pool_nap", MAP, requested, preferred=True) is None


KNOWN, MISSING = "expected one of reference, triton", "Triton is not installed; pip install triton, or use 'reference'"
UNINTERPRETED = "for a tensor on cpu: .*TRITON_INTERPRET=1"


@pytest.mark.parametrize(
    ("given", "environment", "installed", "error", "message"),
    [
        ({"backend": "cuda"}, "", True, ValueError, f"backend='cuda': {KNOWN}"),
        ({}, "fast", True, ValueError, f"OOD_ENGINE_BACKEND='fast': {KNOWN}"),
        ({"precision": "fp8"}, "", True, ValueError, "precision='fp8': expected one of ieee, tf32x3, tf32, bf16, fp16"),
        ({"backend": "triton"}, "", True, RuntimeError, f"backend='triton' {UNINTERPRETED}"),
        ({}, "triton", True, RuntimeError, f"OOD_ENGINE_BACKEND='triton' {UNINTERPRETED}"),
        ({"backend": "triton"}, "", False, RuntimeError, MISSING),
    ],
)
def test_what_cannot_be_is_refused_and_another_argument_wins(
    monkeypatch, given, environment, installed, error, message
):
    monkeypatch.setattr(backend, "_is_installed", lambda: installed)
    monkeypatch.setenv("OOD_ENGINE_BACKEND", environment)
    h, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(error, match=message):
        ok.masked_energy(h, weight, **given)
    ok.masked_energy(h, weight, backend="reference")


def test_a_gpu_without_triton_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(backend, "_is_installed", lambda: False)
    with pytest.warns(RuntimeWarning, match="Triton is not installed") as caught:
        assert backend.kernels("pool_nap", MAP, "", preferred=True) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.kernels("score", MAP, "", preferred=True) is None


def test_importing_needs_no_triton():
    code = "import sys, ood_kernels, ood_engine; sys.exit('triton' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


INTERPRETED = """
import torch, ood_kernels as ok
from ood_kernels.triton_kernels import launch
feature_map = torch.rand(3, 8, 4, 4)
head = ok.Head(torch.randn(5, 8), torch.randn(5), torch.rand(5, 8) > 0.2, torch.rand(8) > 0.2)
with launch.record() as launches:
    ours = ok.score(feature_map, head)
assert launches, "no kernel ran"
for value, right in zip(ours, ok.score(feature_map, head, backend="reference")):
    torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)
with launch.record() as launches:
    ok.score(feature_map.double(), head)
assert not launches, "fp64 is for the reference"
"""


def test_the_environment_lets_kernels_be_interpreted_on_the_cpu():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    environment = {**os.environ, "OOD_ENGINE_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True)
