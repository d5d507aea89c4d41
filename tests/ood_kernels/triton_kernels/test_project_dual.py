from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_kernels import reference
from ood_kernels.triton_kernels import combine
from ood_kernels.triton_kernels import project_dual as family
from ood_kernels.triton_kernels.launch import PRECISIONS, forced, record
from ood_kernels.triton_kernels.project_dual import dual_plan

ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(device, samples=5, anchors=7, classes=4, channels=33, components=3, *, shifted=False, dtype=torch.float32):
    """a, h, anchors, coefficients, constants, bias, shift and linear; the samples in fp32, the rest in `dtype`."""
    a, anchor_cotangents = normal(samples, classes).softmax(1), normal(anchors, classes, seed=1).softmax(1)
    h, anchor_features = normal(samples, channels, seed=2).relu(), normal(anchors, channels, seed=3).relu()
    coefficients, constants = normal(anchors, components, seed=4), normal(components, seed=5)
    shift = anchor_features.mean(0) if shifted else None
    parts = anchor_cotangents, anchor_features, coefficients
    linear = reference.linear_part(*parts, shift) if shifted else None
    stored = (None if part is None else part.to(dtype) for part in (*parts, constants))
    tensors = (a, h, *stored, shift, linear)
    placed = [None if part is None else part.to(device) for part in tensors]
    return (*placed[:6], True, *placed[6:])


def project_dual(a, h, *basis_and_precision, **options):
    """The launcher on a basis given as the reference takes it, from its anchors to bias, shift and linear."""
    (*parts, bias, shift, linear), precision = basis_and_precision[:7], basis_and_precision[7:]
    basis = ok.DualTensors(*parts, bias=bias, shift=shift, linear=linear)
    return family.project_dual(a, h, basis, *precision, **options)


def doubled(inputs):
    return [part.double() if isinstance(part, torch.Tensor) else part for part in inputs]


def truth(*inputs):
    return reference.project_dual(*doubled(inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", ["neither", "shift", "linear"])
def test_bias_shift_and_linear_each_count(device, assert_as_good_as_torch, bias, part):
    *inputs, shift, linear = make(device, shifted=True)
    inputs[-1] = bias
    inputs += [shift if part == "shift" else None, linear if part == "linear" else None]
    assert_as_good_as_torch(project_dual(*inputs), truth(*inputs), reference.project_dual(*inputs))


@pytest.mark.parametrize("precision", ROUNDED)
def test_low_precision_rounds_operands_after_the_shift_and_the_linear_part_hardly_at_all(
    device, assert_as_good_as_torch, precision
):
    inputs = make(device, 5, 7, 4, 40, 3, shifted=True)
    a, _, anchor_cotangents, anchor_features, coefficients, constants, _, _, linear = doubled(inputs)

    def rounded(tensor):
        # Through fp32, in which the kernel forms what it rounds: twice rounded is not once.
        return tensor.float().to(ROUNDED[precision]).double()

    features = rounded((inputs[1] - inputs[7]).double()) @ rounded(anchor_features).T
    gram = (rounded(a) @ rounded(anchor_cotangents).T) * features
    expected = gram @ rounded(coefficients) + a @ linear - constants
    unrounded = (expected - truth(*inputs)).abs().max() / expected.abs().max()
    ours = project_dual(*inputs, precision)
    # Left over: the rounding of the Gram matrix itself.
    assert_as_good_as_torch(ours, expected, hair={"bf16": 1e-3, "fp16": 1e-4}[precision])
    assert unrounded > {"bf16": 1e-4, "fp16": 1e-5}[precision]


@pytest.mark.parametrize(("variant", "count"), [("fused", 2), ("stored", 3)])
def test_launches(device, variant, count):
    with forced({"project_dual": {"VARIANT": variant}}), record() as launches:
        project_dual(*make("meta", 256, 4096, 1000, 2048, 512, dtype=torch.bfloat16), "bf16")
    assert len(launches) == count
    assert all(launch.wide for launch in launches)
    if variant == "fused":
        assert launches[0].grid == (4, 32)


def test_splits_do_not_depend_on_the_batch_and_fit_the_workspace():
    for anchors, components in [(1, 1), (4096, 512), (50_000, 1000), (300_000, 8192)]:
        shapes = (anchors, 10), (anchors, 16), (anchors, components), (components,)
        basis = ok.DualTensors(*(torch.empty(shape, device="meta") for shape in shapes))
        for precision in PRECISIONS:
            plan = dual_plan(basis, precision)
            covered = plan.splits * plan.arguments["BLOCKS"] * plan.arguments["BLOCK_A"]
            assert anchors <= covered < anchors + 2 * plan.splits * plan.arguments["BLOCK_A"]
            assert 4 * plan.splits * plan.arguments["BLOCK_N"] * components <= 32 * 2**20


@pytest.mark.parametrize("variant", ["fused", "stored"])
def test_a_small_workspace_changes_the_pieces_and_not_the_numbers(
    device, poisoned, monkeypatch, assert_as_good_as_torch, variant
):
    inputs = make(device, 40, 140, 5, 9, 6, shifted=True)
    # Room for two blocks of anchors of one tile of 16 samples, so that 5 blocks make splits of 3 and the batch 3 parts.
    monkeypatch.setattr(combine, "WORKSPACE_BYTES", 2 * 4 * 16 * 6)
    with forced({"project_dual": {"VARIANT": variant}}), record() as launches:
        ours = project_dual(*inputs)
    assert len(launches) == 3 * (2 if variant == "fused" else 3)
    assert launches[-2].arguments["BLOCKS"] == (3 if variant == "fused" else 4)
    assert_as_good_as_torch(ours, truth(*inputs), reference.project_dual(*inputs))


@pytest.mark.parametrize("variant", ["fused", "stored"])
def test_a_gram_matrix_beyond_the_range_of_fp16_is_scaled(device, assert_as_good_as_torch, variant):
    inputs = list(make(device, 5, 7, 4, 64, 3))
    inputs[1], inputs[3] = 1000 * inputs[1], 1000 * inputs[3]
    inputs[1][0] = 0
    with forced({"project_dual": {"VARIANT": variant}}):
        assert_as_good_as_torch(project_dual(*inputs, "fp16"), truth(*inputs), hair=2e-3)


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 20), st.integers(1, 40), st.integers(1, 20), st.booleans())
def test_any_shape(device, samples, anchors, classes, channels, components, shifted):
    inputs = make(device, samples, anchors, classes, channels, components, shifted=shifted)
    expected = truth(*inputs)
    error = (project_dual(*inputs) - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max() + 1e-5


def relative_errors(device, precision, shifted):
    """Root mean square error of each component, as a part of the component's own, where features share a large mean.

    A PCA basis of n = 512 anchors, D = 512, C = 100, K = 64.
    """
    samples, anchors, classes, channels, components = 64, 512, 100, 512, 64
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    centres, mean = random(classes, channels), random(channels).abs() + 0.3
    weight = 2 * random(classes, channels) / channels**0.5 + 0.05 * centres
    labels = torch.randint(classes, (anchors + samples,), generator=generator)
    features = (mean + 0.5 * centres[labels] + 0.4 * random(anchors + samples, channels)).relu()
    anchor_features, h = features.split([anchors, samples])
    cotangents = ((features - anchor_features.mean(0)) @ weight.T).softmax(1)
    anchor_cotangents, a = cotangents.split([anchors, samples])
    gram = (anchor_cotangents @ anchor_cotangents.T) * (anchor_features @ anchor_features.T + 1)
    centring = torch.eye(anchors, dtype=torch.float64) - 1 / anchors
    values, vectors = torch.linalg.eigh(centring @ gram @ centring)
    coefficients = centring @ (vectors[:, -components:] / values[-components:].sqrt()).flip(1)
    basis = (anchor_cotangents, anchor_features, coefficients)
    shift = anchor_features.mean(0) if shifted else None
    linear = reference.linear_part(*basis, shift) if shifted else None
    inputs = (a, h, *basis, gram.mean(0) @ coefficients, True, shift, linear)
    expected = reference.project_dual(*inputs)
    placed = [part.float().to(device) if isinstance(part, torch.Tensor) else part for part in inputs]
    # Interpreted, every operation costs the same and larger tiles are faster.
    larger = {"BLOCK_A": 128, "BLOCK_R": 128} if device.type == "cpu" else {}
    with forced({"project_dual": larger}):
        error = project_dual(*placed, precision).cpu().double() - expected
    return error.square().mean(0).sqrt() / expected.square().mean(0).sqrt()


@pytest.mark.parametrize(
    ("precision", "plain", "shifted"), [("bf16", (2e-3, 6e-3), (3e-4, 8e-4)), ("fp16", (3e-4, 3e-3), (4e-5, 4e-4))]
)
def test_error_of_each_component_and_what_a_shift_saves(device, precision, plain, shifted):
    for is_shifted, (median, largest) in enumerate((plain, shifted)):
        errors = relative_errors(device, precision, bool(is_shifted))
        assert errors.median() <= median
        assert errors.max() <= largest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="interpreted, addresses do not overflow")
def test_anchors_beyond_two_to_the_31_elements(device):
    anchors, channels = 131_200, 16_384
    inputs = list(make(device, 2, 1, 3, channels, 2))
    inputs[2] = torch.rand(anchors, 3, device=device).bfloat16()
    inputs[3] = torch.zeros(anchors, channels, device=device, dtype=torch.bfloat16)
    inputs[4] = torch.rand(anchors, 2, device=device).bfloat16()
    inputs[3][-3:] = 1
    own = [part[-3:] if index in (2, 3, 4) else part for index, part in enumerate(inputs)]
    own[6] = inputs[6] = False
    torch.testing.assert_close(project_dual(*inputs), project_dual(*own), rtol=1e-5, atol=1e-5)
