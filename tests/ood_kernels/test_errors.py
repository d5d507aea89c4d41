"""Errors say what was expected and what came, before anything is computed."""

from __future__ import annotations

import pytest
import torch

import ood_kernels as ok

FEATURE_MAP, P, H, WEIGHT = torch.ones(2, 5, 3, 3), torch.ones(2, 4) / 4, torch.ones(2, 5), torch.ones(4, 5)
HEAD = ok.Head(WEIGHT, torch.ones(4))
DUAL = ok.DualTensors(torch.ones(6, 4), torch.ones(6, 5), torch.ones(6, 3), torch.ones(3))
SHIFTED = DUAL._replace(shift=torch.ones(5), linear=torch.ones(4, 3))
EXPLICIT = ok.ExplicitTensors(torch.ones(3, 4, 6), torch.ones(3))
FACTORED = ok.FactoredTensors(torch.ones(4, 2), torch.ones(6, 3), torch.ones(3, 2, 3), torch.ones(3))
MAP = "a floating point [N, D, H, W], or tokens [N, T, D]"
INTEGERS = (torch.int64, torch.uint8, torch.bool, torch.complex64)


def of_basis(basis):
    return lambda **changes: ok.project_gradients(P, H, basis._replace(**changes))


def of_samples(basis):
    return lambda **changes: ok.project_gradients(**({"p": P, "h": H, "basis": basis} | changes))


def energy(**changes):
    return ok.masked_energy(**({"h": H, "weight": WEIGHT, "bias": torch.ones(4)} | changes))


def scored(**changes):
    feature_map = changes.pop("feature_map", FEATURE_MAP)
    return ok.score(feature_map, HEAD._replace(**changes), DUAL)


# Argument, what is expected, calls that take it, and shapes or dtypes that do not fit.
UNFIT = [
    (
        "feature_map",
        MAP,
        (ok.pool_nap, ok.pool_statistics, scored),
        [(2, 3), (2, 0, 4), (2, 4, 0), (2, 3, 4, 4, 4), ()],
    ),
    ("feature_map", MAP, (ok.pool_nap, ok.pool_statistics, scored), [(2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)]),
    ("feature_map", MAP, (ok.pool_nap, ok.pool_statistics, scored), [((2, 3, 4, 4), dtype) for dtype in INTEGERS]),
    ("h", "floating point features [N, D]", (energy,), [((2, 5), torch.int64), (5,), (2, 5, 1)]),
    (
        "weight",
        "a floating point [C, 5], C and D > 0",
        (energy, scored),
        [(4, 6), (5,), (0, 5), ((4, 5), torch.int32)],
    ),
    ("bias", "a floating point [4]", (energy, scored), [(5,), (1,), (4, 1), ((4,), torch.int64)]),
    (
        "weight_mask",
        "bool [4, 5], or int32 [4, 1] of pack_mask",
        (energy, scored),
        [((5, 4), torch.bool), ((5,), torch.bool), (4, 5), ((4, 5), torch.uint8)],
    ),
    (
        "neuron_mask",
        "bool [5]",
        (energy, scored),
        [((4,), torch.bool), ((1, 5), torch.bool), (5,), ((5,), torch.int64)],
    ),
    *(
        (name, expected, (of_samples(basis),), found)
        for basis in (DUAL, EXPLICIT, FACTORED)
        for name, expected, found in (
            ("p", "softmax [N, 4]", [(4,), (2, 3), ((2, 4), torch.int64)]),
            ("h", "features [2, 5]", [(5,), (1, 5), (2, 4), (2, 6), ((2, 5), torch.int64)]),
        )
    ),
    ("constants", "[3]", tuple(map(of_basis, (DUAL, EXPLICIT, FACTORED))), [(1,)]),
    ("anchor_cotangents", "[n, C]", (of_basis(DUAL),), [(4,), (6, 0)]),
    ("anchor_features", "[6, D]", (of_basis(DUAL),), [(5,), (1, 5)]),
    ("coefficients", "[6, K]", (of_basis(DUAL),), [(3,), (5, 3)]),
    ("shift", "[5]", (of_basis(SHIFTED),), [(1,)]),
    ("linear", "[4, 3]", (of_basis(SHIFTED),), [(3,)]),
    ("components", "[K, C, D]", (of_basis(EXPLICIT),), [(4, 6), (3, 0, 6), (3, 4, 0)]),
]


@pytest.mark.parametrize(
    ("name", "expected", "calls", "found"),
    [(name, expected, calls, one) for name, expected, calls, every in UNFIT for one in every],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_what_does_not_fit_is_refused(name, expected, calls, found):
    shape, dtype = found if found[1:] and isinstance(found[1], torch.dtype) else (found, torch.float32)
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call(**{name: torch.ones(shape, dtype=dtype)})
        assert str(caught.value) == f"{name}: expected {expected}, got {dtype} {list(shape)}"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *((name, call) for name in ("weight", "bias", "neuron_mask") for call in (energy, scored)),
        *(("h", of_samples(basis)) for basis in (DUAL, EXPLICIT, FACTORED)),
        *((name, of_basis(SHIFTED)) for name in ("coefficients", "shift")),
    ],
)
def test_tensors_on_different_devices_are_refused_by_name(name, call):
    shapes = {"weight": (4, 5), "bias": (4,), "neuron_mask": (5,), "h": (2, 5), "coefficients": (6, 3), "shift": (5,)}
    dtype = torch.bool if name == "neuron_mask" else torch.float32
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on cpu, where .* is, got one on meta; move it"):
        call(**{name: torch.ones(shapes[name], dtype=dtype, device="meta")})


def test_a_head_without_features_is_refused():
    with pytest.raises(ValueError, match=r"weight: expected .* \[C, 0\], C and D > 0, got torch.float32 \[4, 0\]"):
        energy(h=torch.ones(2, 0), weight=torch.ones(4, 0))


@pytest.mark.parametrize("module", [ok.project_gradients, ok.score], ids=["project_gradients", "score"])
@pytest.mark.parametrize("basis", [torch.ones(3), tuple(DUAL), "pca"], ids=["Tensor", "tuple", "str"])
def test_what_is_no_basis_is_refused(module, basis):
    samples = (P, H) if module is ok.project_gradients else (FEATURE_MAP, HEAD)
    known = "expected DualTensors, ExplicitTensors, FactoredTensors or an object with .tensors()"
    with pytest.raises(ValueError) as caught:
        module(*samples, basis)
    assert str(caught.value) == f"basis: {known}, got {type(basis).__name__}"


def test_no_basis_is_none_for_a_projection():
    with pytest.raises(ValueError, match="got NoneType"):
        ok.project_gradients(P, H, None)


def test_tensors_that_do_not_belong_together_are_refused():
    together = "shift and linear of a dual basis belong together: expected both or neither, got one"
    for lonely in (SHIFTED._replace(linear=None), SHIFTED._replace(shift=None)):
        with pytest.raises(ValueError, match=together):
            ok.project_gradients(P, H, lonely)
    with pytest.raises(ValueError, match=r"h: expected features \[2, 6\], got torch.float32 \[2, 5\]"):
        ok.project_gradients(P, H, EXPLICIT._replace(bias=False))
    sizes = r"head.weight: expected the basis's \[C, D\] = \[{}\], got torch.float32 \[4, 5\]"
    with pytest.raises(ValueError, match=sizes.format("7, 5")):
        ok.score(FEATURE_MAP, HEAD, DUAL._replace(anchor_cotangents=torch.ones(6, 7)))
    with pytest.raises(ValueError, match=sizes.format("4, 8")):
        ok.score(FEATURE_MAP, HEAD, DUAL._replace(anchor_features=torch.ones(6, 8)))
