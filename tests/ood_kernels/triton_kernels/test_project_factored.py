from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_kernels.triton_kernels.launch import PRECISIONS, record
from ood_kernels.triton_kernels.project_factored import factored_plan, project_factored


def meta_basis(classes, features, ranks, components, bias=False):
    class_rank, feature_rank = ranks
    shapes = (classes, class_rank), (features + bias, feature_rank), (components, class_rank, feature_rank)
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


@pytest.mark.parametrize(
    ("classes", "features", "ranks", "components"),
    [(1000, 2048, (64, 128), 512), (10, 512, (8, 16), 200), (1000, 16384, (1000, 64), 4096)],
)
def test_three_launches_and_a_bounded_workspace(classes, features, ranks, components):
    basis = ok.FactoredTensors(
        *meta_basis(classes, features, ranks, components, bias=True), torch.empty(components, device="meta")
    )
    for samples in (1, 64, 1024):
        a, h = (torch.empty(shape, device="meta") for shape in ((samples, classes), (samples, features)))
        with record() as launches:
            project_factored(a, h, basis)
        partials = [launch.arguments["partial_ptr"] for launch in launches if "partial_ptr" in launch.arguments]
        largest = max(partial.numel() for partial in partials)
        assert 4 * largest <= 32 * 2**20
        assert all(launch.wide for launch in launches)
        parts = -(-samples // max(1, largest // (launches[2].arguments["splits"] * components)))
        assert len(launches) == 3 * parts


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 1000), st.integers(1, 500), st.integers(1, 5000), st.sampled_from(PRECISIONS))
def test_splits_cover_every_class_factor_once(class_rank, feature_rank, components, precision):
    basis = meta_basis(7, 9, (class_rank, feature_rank), components)
    plan = factored_plan(ok.FactoredTensors(*basis, torch.empty(components, device="meta"), bias=False), precision)
    step = plan.projection["BLOCK_R"]
    assert (plan.splits - 1) * step < class_rank <= plan.splits * step
    assert (plan.component_tiles - 1) * 32 < components <= plan.component_tiles * 32
    assert 4 * plan.splits * plan.projection["BLOCK_N"] * components <= 32 * 2**20
