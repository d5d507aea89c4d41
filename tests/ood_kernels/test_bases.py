from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ood_kernels as ok
from ood_kernels import ops, reference
from ood_kernels.bases import BASES
from ood_kernels.checks import check_shapes

# torch's own, at the first import of its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="session")
def make(make_problem):
    """A basis of any form over 4 classes, 5 features and 3 components."""

    def build(form, classes=4, channels=5, components=3, cotangent="energy", bias=True, dtype=torch.float32):
        options = {"cotangent": cotangent, "bias": bias, "dtype": dtype}
        return make_problem(1, channels, classes, form=form, components=components, **options)[2]

    return build


FORMS = ("dual", "shifted", "explicit", "factored")
sizes = st.integers(1, 6)


@given(st.sampled_from(FORMS), sizes, sizes, st.integers(0, 6), st.sampled_from(reference.COTANGENTS), st.booleans())
def test_parts_make_the_same_basis(make, form, classes, channels, components, cotangent, bias):
    basis = make(form, classes, channels, components, cotangent, bias)
    again = BASES[basis.kind].from_parts(basis.parts(), basis.cotangent, basis.bias)
    assert type(again) is type(basis)
    assert all(one is other for one, other in zip(again, basis, strict=True))
    assert (again.n_components, again.check()) == (components, (classes, channels))


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_the_tensors_and_nothing_else(make, form):
    basis = make(form)
    tensors = {id(part) for part in basis if isinstance(part, Tensor)}
    assert {id(part) for part in basis.parts() if part is not None} == tensors
    assert len(basis.parts()) == len(basis) - 2
    assert BASES[basis.kind] is type(basis)


@pytest.mark.parametrize("form", FORMS)
def test_another_dtype_is_for_what_is_large(make, form):
    basis = make(form, dtype=torch.float64)
    stored = basis.to(torch.bfloat16)
    for name, value in zip(stored._fields, stored, strict=True):
        if name in ("constants", "cotangent", "bias", "shift", "linear"):
            assert value is getattr(basis, name)
        else:
            assert torch.equal(value, getattr(basis, name).to(torch.bfloat16))
            assert value.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_a_double_among_the_operands_makes_the_result_double(make, form):
    p, h = normal(2, 4).softmax(1), normal(2, 5)
    basis = make(form)
    assert ok.project_gradients(p, h, basis).dtype == torch.float32
    for wide_p, wide_h in ((p.double(), h), (p, h.double())):
        assert ok.project_gradients(wide_p, wide_h, basis).dtype == torch.float64
    parts = basis.parts()
    for index, part in enumerate(parts):
        if part is not None:
            wide = type(basis).from_parts([*parts[:index], part.double(), *parts[index + 1 :]])
            assert ok.project_gradients(p, h, wide).dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
def test_an_unknown_cotangent_is_refused_before_anything_is_computed(make, form):
    basis = make(form)._replace(cotangent="loss")
    basis = type(basis)(*(part.to("meta") if isinstance(part, Tensor) else part for part in basis))
    with torch.device("meta"):
        p, h, head, feature_map = (
            torch.empty(2, 4),
            torch.empty(2, 5),
            ok.Head(torch.empty(4, 5)),
            torch.empty(2, 5, 1, 1),
        )
    known = "energy, predicted, uniform, max_logit, sum_logits"
    for call in (lambda: ok.project_gradients(p, h, basis), lambda: ok.score(feature_map, head, basis)):
        with pytest.raises(ValueError, match=f"^cotangent 'loss' is not known: expected one of {known}$"):
            call()


class PairTensors(NamedTuple):
    """V_k = left_k ⊗ right_k: a form that this package has not."""

    left: Tensor
    right: Tensor
    constants: Tensor
    cotangent: str = "energy"
    bias: bool = True

    @property
    def kind(self):
        return "pair"

    @property
    def n_components(self):
        return self.constants.shape[0]

    def parts(self):
        return [*self[:3]]

    @classmethod
    def from_parts(cls, parts, cotangent="energy", bias=True):
        return cls(*parts, cotangent, bias)

    def check(self):
        sizes = check_shapes(self, left="CK", right="DK", constants="K")
        return sizes["C"], sizes["D"] - self.bias

    def project(self, a, h):
        right = self.right[: h.shape[1]]
        return (a @ self.left) * (h @ right + self.bias * self.right[-1]) - self.constants

    def to(self, dtype):
        return self._replace(left=self.left.to(dtype), right=self.right.to(dtype))


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setitem(BASES, "pair", PairTensors)
    return PairTensors(normal(6, 3), normal(13, 3, seed=1), normal(3), "predicted")


def as_vectors(pair):
    return ok.ExplicitTensors(torch.einsum("ck,dk->kcd", pair.left, pair.right), *pair[2:])


def test_a_new_form_takes_one_line(pair, make_problem):
    feature_map, head, _ = make_problem()
    outputs = ok.score(feature_map, head, pair)
    for value, right in zip(outputs, ok.score(feature_map, head, as_vectors(pair)), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)
    for project in (ok.project_gradients, reference.project_gradients):
        assert torch.equal(project(outputs.p, outputs.h, pair), outputs.g_low)
    given = (pair.parts(), pair.kind, pair.cotangent, pair.bias)
    torch.library.opcheck(ops.project_gradients, (outputs.p, outputs.h, *given))
    torch.library.opcheck(ops.score, (feature_map, 1.0, False, *head, *given))


def test_a_new_form_compiles(pair, make_problem):
    feature_map, head, _ = make_problem()
    torch.compiler.reset()
    compiled = torch.compile(lambda batch: ok.score(batch, head, pair), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(feature_map).g_low, ok.score(feature_map, head, pair).g_low)
    torch.compiler.reset()


def test_a_new_form_is_checked_like_the_others(pair, make_problem):
    feature_map, head, _ = make_problem()
    with pytest.raises(ValueError, match=r"right: expected \[D, 3\], got torch.float32 \[13, 4\]"):
        ok.score(feature_map, head, pair._replace(right=normal(13, 4)))
    with pytest.raises(ValueError, match="cotangent 'loss' is not known"):
        ok.score(feature_map, head, pair._replace(cotangent="loss"))
    with pytest.raises(ValueError, match="FactoredTensors, PairTensors or an object"):
        ok.score(feature_map, head, "pair")


def test_a_form_that_is_not_registered_is_refused(make_problem):
    feature_map, head, _ = make_problem()
    with pytest.raises(ValueError, match=r"basis: expected .*, got PairTensors"):
        ok.score(feature_map, head, PairTensors(normal(6, 3), normal(13, 3), normal(3)))
