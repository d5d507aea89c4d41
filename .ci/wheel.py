"""The installed wheel imports from where pip put it, and computes."""

from __future__ import annotations

import importlib.util

import torch

import ood_engine
import ood_kernels

for package in (ood_engine, ood_kernels):
    assert "site-packages" in str(package.__file__), package.__file__
assert importlib.util.find_spec("kernels") is None, "the folder kernels/ became a package"
_, nap = ood_kernels.pool_nap(torch.ones(2, 3, 4, 4))
assert nap.tolist() == [0.25, 0.25], nap
print(f"wheel: {ood_engine.__version__}, {len(ood_engine.available_detectors())} detectors")
