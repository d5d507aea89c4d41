from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ood_kernels as ok
from ood_kernels import reference
from ood_kernels.triton_kernels import combine
from ood_kernels.triton_kernels.launch import PRECISIONS, forced, record
from ood_kernels.triton_kernels.project_dual import dual_plan, project_dual

ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", ["neither", "shift", "linear"])
def test_bias_shift_and_linear_each_count(make_projection, project, assert_as_good_as_torch, exact, bias, part):
    a, h, basis = make_projection("shifted", bias=bias)
    basis = basis._replace(**dict.fromkeys({"shift", "linear"} - {part}))
    assert_as_good_as_torch(project("shifted", a, h, basis), exact(a, h, basis), basis.project(a, h))


@pytest.mark.parametrize("precision", ROUNDED)
def test_low_precision_rounds_operands_after_the_shift_and_the_linear_part_hardly_at_all(
    make_projection, project, assert_as_good_as_torch, exact, precision
):
    a, h, basis = make_projection("shifted", 5, 4, 40, 3, anchors=7)

    def rounded(tensor):
        # Through fp32, in which the kernel forms what it rounds: twice rounded is not once.
        return tensor.float().to(ROUNDED[precision]).double()

    features = rounded(h - basis.shift) @ rounded(basis.anchor_features).T
    gram = (rounded(a) @ rounded(basis.anchor_cotangents).T) * features
    expected = gram @ rounded(basis.coefficients) + a.double() @ basis.linear.double() - basis.constants.double()
    unrounded = (expected.cpu() - exact(a, h, basis)).abs().max() / expected.abs().max()
    ours = project("shifted", a, h, basis, precision)
    # Left over: the rounding of the Gram matrix itself.
    assert_as_good_as_torch(ours, expected, hair={"bf16": 1e-3, "fp16": 1e-4}[precision])
    assert unrounded > {"bf16": 1e-4, "fp16": 1e-5}[precision]


@pytest.mark.parametrize(("form", "count"), [("dual", 2), ("stored", 3)])
def test_launches(form, count, project):
    shapes = (4096, 1000), (4096, 2048), (4096, 512), (512,)
    basis = ok.DualTensors(*(torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes))
    with record() as launches:
        project(form, torch.empty(256, 1000, device="meta"), torch.empty(256, 2048, device="meta"), basis, "bf16")
    assert len(launches) == count
    assert all(launch.wide for launch in launches)
    if form == "dual":
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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("form", "count", "blocks"), [("shifted", 2, 3), ("stored", 3, 4)])
def test_a_small_workspace_changes_the_pieces_and_not_the_numbers(
    make_projection, project, assert_as_good_as_torch, exact, monkeypatch, form, count, blocks
):
    a, h, basis = make_projection(form, 40, 5, 9, 6, anchors=140)
    # Room for two blocks of anchors of one tile of 16 samples, so that 5 blocks make splits of 3 and the batch 3 parts.
    monkeypatch.setattr(combine, "WORKSPACE_BYTES", 2 * 4 * 16 * 6)
    with record() as launches:
        ours = project(form, a, h, basis)
    assert len(launches) == 3 * count
    assert launches[-2].arguments["BLOCKS"] == blocks
    assert_as_good_as_torch(ours, exact(a, h, basis), basis.project(a, h))


@pytest.mark.parametrize("form", ["dual", "stored"])
def test_a_gram_matrix_beyond_the_range_of_fp16_is_scaled(
    make_projection, project, assert_as_good_as_torch, exact, form
):
    a, h, basis = make_projection("dual", 5, 4, 64, 3)
    h, basis = 1000 * h, basis._replace(anchor_features=1000 * basis.anchor_features)
    h[0] = 0
    assert_as_good_as_torch(project(form, a, h, basis, "fp16"), exact(a, h, basis), hair=2e-3)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (4, 20, 40, 20))),
    anchors=st.integers(1, 40),
    shifted=st.booleans(),
)
def test_any_shape(make_projection, project, exact, sizes, anchors, shifted):
    a, h, basis = make_projection("shifted" if shifted else "dual", *sizes, anchors=anchors)
    expected = exact(a, h, basis)
    error = (project("dual", a, h, basis).cpu() - expected).abs().max()
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
    parts = [anchor_cotangents, anchor_features, coefficients, gram.mean(0) @ coefficients]
    shift = anchor_features.mean(0)
    parts += [shift, reference.linear_part(*parts[:3], shift)] if shifted else [None, None]
    expected = ok.DualTensors.from_parts(parts).project(a, h)
    basis = ok.DualTensors.from_parts([part if part is None else part.float().to(device) for part in parts])
    # Interpreted, every operation costs the same and larger tiles are faster.
    larger = {"BLOCK_A": 128, "BLOCK_R": 128} if device.type == "cpu" else {}
    with forced({"project_dual": larger}):
        error = project_dual(a.float().to(device), h.float().to(device), basis, precision).cpu().double() - expected
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
def test_anchors_beyond_two_to_the_31_elements(make_projection, device):
    anchors, channels = 131_200, 16_384
    a, h, basis = make_projection("dual", 2, 3, channels, 2, anchors=1, bias=False)
    features = torch.zeros(anchors, channels, device=device, dtype=torch.bfloat16)
    features[-3:] = 1
    cotangents, coefficients = (torch.rand(anchors, size, device=device).bfloat16() for size in (3, 2))
    basis = basis._replace(anchor_cotangents=cotangents, anchor_features=features, coefficients=coefficients)
    own = basis._replace(**{name: getattr(basis, name)[-3:] for name in basis._fields[:3]})
    torch.testing.assert_close(project_dual(a, h, basis), project_dual(a, h, own), rtol=1e-5, atol=1e-5)
