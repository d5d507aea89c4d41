"""What holds for the launcher of every operator alike, in each of its plans and for every form of basis."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ood_kernels import reference
from ood_kernels.masks import pack_mask
from ood_kernels.triton_kernels import masked_energy, pool_nap, score
from ood_kernels.triton_kernels.launch import forced, record

# NumPy, which interprets, warns of Inf - Inf where a NaN is what shall come out.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")

EPS = 4.0


class Launcher(NamedTuple):
    """A launcher, its plan (of a score: the KiB of the largest head for one launch) and the form of its basis."""

    function: str
    form: str = ""
    precision: str = "ieee"
    limit: int = 0
    samples: int = 18
    side: int = 2

    def __str__(self):
        return " ".join(str(value) for value in self if value != "")


POOLING = [Launcher("pool_nap", side=side, samples=3) for side in (4, 7, 15)]
POOLING.append(Launcher("pool_statistics", side=7, samples=3))
ENERGY = [Launcher("masked_energy", precision=precision, samples=70) for precision in ("ieee", "bf16")]
PROJECTIONS = [
    *(Launcher("project", form, "ieee", samples=18) for form in ("stored", "explicit", "factored")),
    *(Launcher("project", form, "bf16", samples=70) for form in ("shifted", "stored", "explicit", "factored")),
    Launcher("project", "shifted", samples=70),
    Launcher("project", "explicit", "tf32x3", samples=70),
    Launcher("project", "factored", "tf32", samples=70),
    Launcher("project", "factored", "fp16", samples=70),
]
SCORES = [
    *(Launcher("score", form, limit=2**30, samples=6) for form in ("", "dual", "shifted", "explicit", "factored")),
    *(Launcher("score", form) for form in ("", "dual", "shifted", "factored")),
    Launcher("score", "explicit", samples=6),
    *(Launcher("score", "dual", "bf16", limit, samples=6) for limit in (0, 2**30)),
]
LAUNCHERS = [*POOLING, *ENERGY, *PROJECTIONS, *SCORES]
every_launcher = pytest.mark.parametrize("launcher", LAUNCHERS, ids=str)


@pytest.fixture
def make(make_problem, device):
    """The operands of a launcher, those with a row a sample first; a weight is kept in column 3, pruned in 4, its neuron in 5."""

    def build(launcher, samples=0):
        form = "shifted" if launcher.form == "stored" else launcher.form
        samples = samples or launcher.samples
        feature_map, head, basis = make_problem(samples, 20, 6, launcher.side, form=form, anchors=40, components=5)
        head.weight_mask[:, 3:6] = torch.tensor([True, False, True])
        head.neuron_mask[3:6] = torch.tensor([True, True, False])
        h = feature_map.mean((2, 3))
        p = reference.masked_energy(h, head.weight, head.bias)[2]
        packed = head._replace(weight_mask=pack_mask(head.weight_mask))
        operands = {
            "masked_energy": ((h,), packed),
            "project": ((p, h), basis),
            "score": ((feature_map,), packed, basis),
        }
        chosen = operands.get(launcher.function, ((feature_map,),))
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), chosen)

    return build


@pytest.fixture
def run(project):
    """Call a launcher; its outputs as a tuple."""

    def call(launcher, rows, *rest):
        if launcher.function == "pool_nap":
            return pool_nap.pool_nap(*rows, EPS, False)
        if launcher.function == "pool_statistics":
            return pool_nap.pool_statistics(*rows, True)
        if launcher.function == "masked_energy":
            return masked_energy.masked_energy(*rows, *rest[0], launcher.precision)
        if launcher.function == "project":
            return (project(launcher.form, *rows, *rest, launcher.precision),)
        head, basis = rest
        with forced({"score": {"LIMIT_KIB": launcher.limit}}):
            outputs = score.score(*rows, EPS, True, *head, basis, precision=launcher.precision)
        return outputs if basis is not None else outputs[:5]

    return call


def assert_equal(outputs, expected):
    for value, right in zip(outputs, expected, strict=True):
        assert torch.equal(value, right)


@every_launcher
def test_a_sample_is_bitwise_the_same_in_any_batch_and_place(make, run, launcher):
    rows, *rest = make(launcher)
    order = torch.randperm(launcher.samples, generator=torch.Generator().manual_seed(0))
    together = run(launcher, rows, *rest)
    for some in (slice(None), slice(1, 2), slice(-1, None), order):
        picked = [part[some] for part in rows]
        assert_equal(run(launcher, picked, *rest), [value[some] for value in together])


@pytest.mark.parametrize("launcher", [*POOLING, *SCORES[:1], *SCORES[5:6]], ids=str)
def test_so_it_is_in_a_map_of_another_layout(make, run, launcher):
    (feature_map,), *rest = make(launcher, 3)
    room = feature_map.new_full((6, 21, launcher.side + 2, launcher.side + 2), torch.nan)
    cropped = room[::2, 1:, 1:-1, 1:-1].copy_(feature_map)
    for moved in (feature_map.to(memory_format=torch.channels_last), cropped):
        together = run(launcher, [moved], *rest)
        for some in (slice(2, 3), slice(1, None)):
            assert_equal(run(launcher, [moved[some]], *rest), [value[some] for value in together])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.pairwise(
    launcher=[*ENERGY, *PROJECTIONS, *SCORES], bad=(torch.nan, torch.inf, -torch.inf), channel=(3, 4, 5)
)
def test_a_bad_value_reaches_its_own_sample_alone_even_where_it_is_pruned(make, run, launcher, bad, channel):
    rows, *rest = make(launcher, 6)
    clean, others = run(launcher, rows, *rest), [0, 1, 2, 3, 5]
    for which in range(len(rows)):
        dirty = [part.clone() for part in rows]
        dirty[which][(4, channel, 1, 1)[: dirty[which].ndim]] = bad
        outputs = run(launcher, dirty, *rest)
        assert_equal([value[others] for value in outputs], [value[others] for value in clean])
        if launcher.function == "project":
            assert not outputs[0][4].isfinite().any()
        else:
            # The features of a score keep what is not NaN.
            assert all(value[4].isnan().all() for value in outputs[launcher.function == "score" :])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("launcher", [one for one in (*ENERGY, *PROJECTIONS) if one.precision == "ieee"], ids=str)
def test_any_layout_of_the_operands(make, run, relayout, launcher):
    def moved(tensor):
        return relayout(tensor) if tensor.ndim > 1 else relayout(tensor.expand(2, -1))[0]

    operands = tree_map_only(Tensor, moved, make(launcher, 5))
    still = tree_map_only(Tensor, Tensor.contiguous, operands)
    assert_equal(run(launcher, *operands), run(launcher, *still))


@every_launcher
def test_nothing_is_launched_for_an_empty_batch_and_inputs_stay_as_they_were(make, run, assert_owned, launcher):
    rows, *rest = make(launcher, 3)
    inputs = [leaf for leaf in tree_leaves((rows, rest)) if isinstance(leaf, Tensor)]
    outputs: list[Tensor] = []
    assert_owned(inputs, lambda: outputs.extend(run(launcher, rows, *rest)) or outputs)
    with record() as launches:
        empty = run(launcher, [part[:0] for part in rows], *rest)
    assert launches == []
    assert [value.shape for value in empty] == [(0, *value.shape[1:]) for value in outputs]
