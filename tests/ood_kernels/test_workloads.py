from __future__ import annotations

import pytest
import torch

from ood_kernels import reference
from ood_kernels.workloads import BASES, LAYOUTS, WORKLOADS, Cost, Operands, Workload

SMALL = Workload(
    "small", channels=3, height=2, width=5, classes=7, anchors=11, components=2, class_rank=4, feature_rank=2
)


def bytes_of(*shapes: tuple[int, ...], itemsize: int = 4) -> int:
    return sum(torch.empty(shape, device="meta").numel() * itemsize for shape in shapes)


def test_pool_reads_the_map_once_and_writes_features_and_scores():
    assert SMALL.pool(6, 2) == Cost(2 * 6 * 30, bytes_of((6, 3, 2, 5), itemsize=2) + bytes_of((6, 3), (6,)))


@pytest.mark.parametrize(("pruned", "products", "mask_bytes"), [(True, 2, 4), (False, 1, 0)])
def test_head_reads_the_weight_once_for_both_energies(pruned, products, mask_bytes):
    cost = SMALL.head(6, 2, pruned)
    assert cost.flops == products * 2 * 6 * 7 * 3
    assert cost.bytes == bytes_of((7, 3), itemsize=2) + mask_bytes + bytes_of((7,), (6, 3), (6, 7), (6,), (6,))


@pytest.mark.parametrize(
    ("basis", "shapes", "flops"),
    [
        ("dual", [(11, 7), (11, 3), (11, 2)], 2 * 11 * (7 + 3 + 2)),
        ("explicit", [(2, 7, 4)], 2 * 2 * 7 * 4),
        ("factored", [(7, 4), (4, 2), (2, 4, 2)], 2 * (7 * 4 + 4 * 2 + 2 * 4 * 2)),
    ],
)
def test_projection_reads_the_basis_once(basis, shapes, flops):
    cost = SMALL.projection(6, 2, basis)
    assert cost.flops == 6 * flops
    assert cost.bytes == bytes_of(*shapes, itemsize=2) + bytes_of((2,), (6, 7), (6, 3), (6, 2))


def test_the_roofline_is_the_larger_of_both_times():
    assert Cost(100, 10).seconds(flops_a_second=10, bytes_a_second=10) == 10
    assert Cost(10, 100).seconds(flops_a_second=10, bytes_a_second=20) == 5


def test_score_is_its_steps():
    steps = SMALL.score(6, 2, 4, "explicit")
    assert steps == {
        "pool": SMALL.pool(6, 2),
        "head": SMALL.head(6, 4),
        "projection": SMALL.projection(6, 4, "explicit"),
    }
    assert list(SMALL.score(6, 2, 4, None)) == ["pool", "head"]


def test_the_workloads_are_those_that_are_reported():
    sizes = {name: (size.channels, size.height * size.width, size.classes) for name, size in WORKLOADS.items()}
    assert sizes["R50"] == (2048, 49, 1000)
    assert sizes["R18"] == (512, 16, 10)
    assert sizes["W21k"] == (2048, 49, 21841)
    assert sizes["ViT"] == (768, 196, 1000)
    assert (WORKLOADS["R50"].anchors, WORKLOADS["R50"].components) == (4096, 512)
    assert (WORKLOADS["R18"].anchors, WORKLOADS["R18"].components) == (2048, 200)


def test_operands_are_the_same_at_every_run_and_of_the_workloads_sizes():
    made, again = (Operands(SMALL, 6, torch.bfloat16) for _ in range(2))
    for layout in LAYOUTS:
        feature_map = made.feature_map(layout)
        assert feature_map.shape == (6, 3, 2, 5)
        assert feature_map.dtype == torch.bfloat16
        assert feature_map.is_contiguous() == (layout == "rows")
        assert feature_map.equal(again.feature_map(layout))
        assert feature_map.min() == 0
    assert made.features.equal(again.features)
    assert made.features.dtype == torch.float32
    torch.testing.assert_close(made.softmax.sum(1), torch.ones(6))
    assert [tuple(part.shape) for part in made.head] == [(7, 3), (7,), (7, 3), (3,)]


def test_a_dual_basis_has_the_shift_of_a_fitted_one():
    made = Operands(SMALL, 6)
    basis = made.basis("dual")
    assert basis.anchor_features is made.basis("dual").anchor_features
    torch.testing.assert_close(basis.shift, basis.anchor_features.mean(0))
    assert basis.coefficients.sum(0).abs().max() < 1e-6
    plain = basis._replace(shift=None, linear=None)
    shifted, unshifted = (reference.project_gradients(made.softmax, made.features, one) for one in (basis, plain))
    torch.testing.assert_close(shifted, unshifted)
    assert made.basis("dual", shifted=False).shift is None


@pytest.mark.parametrize("kind", BASES)
def test_operands_on_the_meta_device_have_shapes_alone(kind):
    made = Operands(WORKLOADS["W21k"], 1000, torch.float16, "meta")
    real = Operands(SMALL, 6, torch.float16).basis(kind)
    for ours, theirs in zip(made.basis(kind), real, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours.device.type, ours.dtype, ours.ndim) == ("meta", theirs.dtype, theirs.ndim)
        else:
            assert ours == theirs
