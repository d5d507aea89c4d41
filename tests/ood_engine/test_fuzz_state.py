"""States that another program changed and signed."""

from __future__ import annotations

import pytest

import ood_engine as oe
from tests.fuzz_state import run


@pytest.fixture(scope="module")
def small_state(model, id_batches, fresh_batches, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "state.safetensors"
    engine = oe.Engine(model, ["nap_energy", "opnp", "low_dim_gradient", "low_dim_gradient_knn", "grad_pca"])
    engine.fit(id_batches).calibrate(fresh_batches, 0.1).save(path)
    return path


@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_a_signed_mutation_is_refused_or_decides_the_same(first, small_state, model, test_images):
    faults = []
    outcomes = run(small_state, model, test_images, range(first, first + 250), faults.append)
    assert not faults, "\n".join(faults)
    assert outcomes["refused"] > 100
