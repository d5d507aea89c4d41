from __future__ import annotations

import pytest
import torch

import ood_kernels as ok
from ood_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMS = ("dual", "shifted", "explicit", "factored")


@pytest.mark.pairwise(form=FORMS, kind=reference.COTANGENTS, dtype=DTYPES, rectify=(False, True))
def test_is_the_composition_of_its_parts(make_problem, form, kind, dtype, rectify):
    feature_map, head, basis = make_problem(form=form, dtype=dtype, cotangent=kind)
    out = ok.score(feature_map, head, basis, 0.5, rectify=rectify)
    h, nap = ok.pool_nap(feature_map, 0.5, rectify=rectify)
    lse, pruned_lse, p = ok.masked_energy(h, head.weight, head.bias, head.weight_mask, head.neuron_mask)
    expected = ok.ScoreOutputs(h, nap, lse, pruned_lse, p, ok.project_gradients(p, h, basis))
    assert out._fields == ("h", "nap", "lse", "pruned_lse", "p", "g_low")
    for value, right in zip(out, expected, strict=True):
        assert torch.equal(value, right)


def test_without_a_basis_there_are_no_coordinates(make_problem):
    feature_map, head, _ = make_problem()
    assert ok.score(feature_map, head).g_low.shape == (5, 0)
    assert reference.score(feature_map, head).g_low.shape == (5, 0)
