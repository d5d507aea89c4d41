from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_kernels.triton_kernels import project_explicit as family
from ood_kernels.triton_kernels.launch import PRECISIONS, record
from ood_kernels.triton_kernels.project_explicit import explicit_plan, project_explicit


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("elements", "class_step", "feature_step"), [(16, 1, 32), (60, 4, 32), (120, 7, 32), (200, 7, 64)]
)
def test_splits_over_classes_and_features(
    make_projection, assert_as_good_as_torch, exact, monkeypatch, elements, class_step, feature_step
):
    a, h, basis = make_projection("explicit", 3, 7, 70, 5)
    monkeypatch.setattr(family, "_ELEMENTS", elements)
    plan = explicit_plan(basis, "ieee")
    assert (plan.arguments["class_step"], plan.arguments["feature_step"]) == (class_step, feature_step)
    assert_as_good_as_torch(project_explicit(a, h, basis), exact(a, h, basis), basis.project(a, h))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)], ids=str)
def test_low_precision_rounds_features_and_vectors_and_nothing_else(
    make_projection, assert_as_good_as_torch, exact, precision, dtype
):
    a, h, basis = make_projection("explicit", 5, 3, 40)
    vectors = basis.components
    ours = project_explicit(a, h, basis, precision)
    rounded = basis._replace(components=torch.cat([vectors[..., :-1].to(dtype).float(), vectors[..., -1:]], 2))
    assert_as_good_as_torch(ours, exact(a, h.to(dtype), rounded))
    assert (ours.cpu().double() - exact(a, h, basis)).abs().max() > 1e-5


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30000), st.integers(1, 20000), st.integers(1, 5000), st.sampled_from(PRECISIONS))
def test_splits_cover_every_class_and_feature_once(classes, features, components, precision):
    vectors = torch.empty(components, classes, features, device="meta")
    plan = explicit_plan(ok.ExplicitTensors(vectors, vectors[:, 0, 0], bias=False), precision)
    class_step, feature_step = plan.arguments["class_step"], plan.arguments["feature_step"]
    assert feature_step % plan.arguments["BLOCK_D"] == 0
    feature_splits, class_splits = -(-features // feature_step), -(-classes // class_step)
    assert plan.splits == feature_splits * class_splits
    assert (feature_splits - 1) * feature_step < features
    assert (class_splits - 1) * class_step < classes
    assert plan.component_tiles * plan.splits <= max(512, plan.component_tiles)


def test_rows_that_16_bytes_divide_are_known_to_be_aligned():
    for vectors, bias, wide in (
        (torch.zeros(2, 3, 24), False, True),
        (torch.zeros(2, 3, 25), True, False),
        (torch.zeros(2, 3, 28)[..., :25], True, True),
        (torch.zeros(2, 3, 24, dtype=torch.bfloat16), False, True),
        (torch.zeros(2, 3, 28, dtype=torch.bfloat16), False, False),
        (torch.zeros(2, 24, 3).mT, False, False),
    ):
        assert explicit_plan(ok.ExplicitTensors(vectors, torch.zeros(2), bias=bias), "ieee").wide == wide


def test_giant_bases_are_addressed_with_64_bits(make_projection, monkeypatch):
    inputs = make_projection("explicit")
    expected = project_explicit(*inputs)
    monkeypatch.setattr(family, "is_far", lambda *_: True)
    with record() as launches:
        assert torch.equal(project_explicit(*inputs), expected)
    assert launches[0].arguments["FAR"]
    monkeypatch.undo()
    assert family.is_far(torch.empty(40, 21841, 4096, device="meta"), 32)
    assert not family.is_far(torch.empty(512, 1000, 2049, device="meta"), 32)
    assert family.is_far(torch.empty(2049, 1000, 2000, device="meta").movedim(0, -1), 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="more than 2^31 elements need a GPU")
def test_offsets_beyond_32_bits(device):
    vectors = torch.zeros((3, 2**12, 2**18), dtype=torch.bfloat16, device=device)
    vectors[2, -1, -300:] = 1
    a, h = torch.ones((2, 2**12), device=device), torch.ones((2, 2**18), device=device)
    ours = project_explicit(a, h, ok.ExplicitTensors(vectors, torch.zeros(3, device=device), bias=False))
    assert ours.tolist() == [[0.0, 0.0, 300.0]] * 2
