"""Prepared plans give what the call as written gives, wherever it may differ: every operator, basis, layout and batch."""

from __future__ import annotations

import ctypes
import math
import sys

import pytest
import torch
from torch import Tensor

import ood_kernels as ok
from ood_kernels import functional, plans
from ood_kernels.triton_kernels import launch as launching

# NumPy, which interprets, warns of NaN - NaN in padding.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


class Replayed:
    """Stands for a compiled kernel: interprets it with tensors at the addresses that a plan hands over."""

    def __init__(self, kernel, arguments):
        self.kernel = kernel
        self.dtypes = [getattr(arguments[name], "dtype", None) for name in kernel.arg_names]

    def __getitem__(self, grid):
        assert len(grid) == 3

        def run(*arguments):
            assert not any(isinstance(argument, Tensor) for argument in arguments)
            pairs = zip(arguments, self.dtypes, strict=True)
            self.kernel[grid](*[value if dtype is None else at(value, dtype) for value, dtype in pairs])

        return run


def at(address, dtype):
    """A tensor at an address, of no known end; somewhere else for 0, which is that of no elements."""
    if address == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


@pytest.fixture(autouse=True)
def replays(monkeypatch):
    """Plans of interpreted kernels; the number of calls that ran by one."""
    if torch.cuda.is_available():
        pytest.skip("interpreted: on a GPU, plans are what all other tests run")
    call, counts = plans.Plan.__call__, [0]

    def execute(launch):
        launch.kernel[launch.grid](**launch.arguments)
        return Replayed(launch.kernel, launch.arguments)

    def counted(plan, moving):
        counts[0] += 1
        return call(plan, moving)

    monkeypatch.setattr(plans.Plan, "__call__", counted)
    monkeypatch.setattr(functional, "is_eager_on_gpu", lambda tensor: True)
    monkeypatch.setattr(plans, "_PLANS", {})
    with launching.executed_by(execute):
        yield counts


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


C, D, K, ANCHORS = 37, 40, 5, 70
WEIGHT_MASK = ok.pack_mask(normal(C, D, seed=4) > -1)
HEADS = {
    "plain": ok.Head(normal(C, D, seed=1)),
    "pruned": ok.Head(normal(C, D, seed=1), normal(C, seed=2), WEIGHT_MASK, normal(D, seed=5) > -1),
}
BASES = {
    "none": None,
    "dual": ok.DualTensors(normal(ANCHORS, C), normal(ANCHORS, D), normal(ANCHORS, K), normal(K)),
    "explicit": ok.ExplicitTensors(normal(K, C, D + 1), normal(K), "predicted"),
    "factored": ok.FactoredTensors(normal(C, 4), normal(D + 1, 7), normal(K, 4, 7), normal(K), "uniform"),
}
BASES["shifted"] = BASES["dual"]._replace(shift=normal(D), linear=normal(C, K))


def feature_maps(samples, seed=7):
    return normal(samples, D, 3, 3, seed=seed).relu()


CALLS = {
    "pool_nap": lambda rows: ok.pool_nap(rows, 0.5, backend="triton"),
    "pool_statistics": lambda rows: ok.pool_statistics(rows, rectify=True, backend="triton"),
    **{
        f"masked_energy {name}": lambda rows, head=head: ok.masked_energy(rows.mean((2, 3)), *head, backend="triton")
        for name, head in HEADS.items()
    },
    **{
        f"project {name}": lambda rows, basis=basis: (
            ok.project_gradients(
                rows.mean((2, 3))[:, :C].softmax(1),
                rows.mean((2, 3)),
                basis._replace(cotangent="energy"),
                backend="triton",
            ),
        )
        for name, basis in BASES.items()
        if basis is not None
    },
    **{
        f"score {name}": lambda rows, basis=basis: ok.score(rows, HEADS["pruned"], basis, backend="triton")
        for name, basis in BASES.items()
    },
    "score plain": lambda rows: ok.score(rows, HEADS["plain"], rectify=True, backend="triton"),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def written(monkeypatch, call, rows):
    with monkeypatch.context() as patch:
        patch.setattr(functional, "is_eager_on_gpu", lambda tensor: False)
        return call(rows)


@every_call
def test_a_plan_gives_the_bits_of_the_call_as_written(call, replays, poisoned, monkeypatch):
    first, *others = (feature_maps(3, seed) for seed in (7, 8, 9))
    call(first)
    assert replays == [0]
    for count, rows in enumerate(others, 1):
        outputs = call(rows)
        assert replays == [count]
        for value, right in zip(outputs, written(monkeypatch, call, rows), strict=True):
            assert torch.equal(value, right)


@every_call
def test_outputs_own_their_memory(call, replays):
    rows = feature_maps(2)
    call(rows)
    before, after = call(rows), call(rows)
    assert replays == [2]
    storages = [value.untyped_storage().data_ptr() for outputs in (before, after) for value in outputs if value.numel()]
    assert len(set(storages)) == len(storages)
    for value in before:
        assert value.untyped_storage().nbytes() == value.nbytes
        assert value.is_contiguous()


@pytest.mark.parametrize("limit", ["small", "large"])
def test_parts_of_a_batch_are_in_the_plan(limit, replays, poisoned, monkeypatch):
    monkeypatch.setattr("ood_kernels.triton_kernels.score._WORKSPACE_BYTES", 1)
    monkeypatch.setattr("ood_kernels.triton_kernels.score._SMALL_CLASSES", math.inf if limit == "small" else 0)
    call = CALLS["score shifted"]
    call(feature_maps(37))
    rows = feature_maps(37, 8)
    outputs = call(rows)
    assert replays == [1]
    assert all(map(torch.equal, outputs, written(monkeypatch, call, rows)))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:2],
        lambda rows: rows.to(memory_format=torch.channels_last),
        lambda rows: rows.bfloat16(),
        lambda rows: torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape),
        lambda rows: rows[..., :2],
        lambda rows: rows.flatten(2).mT,
    ],
    ids=["fewer", "strides", "dtype", "alignment", "size", "tokens"],
)
def test_another_layout_is_another_plan(change, replays, poisoned, monkeypatch):
    call, rows = CALLS["score dual"], change(feature_maps(3))
    call(feature_maps(3))
    outputs = call(rows)
    assert replays == [0]
    assert all(map(torch.equal, outputs, written(monkeypatch, call, rows)))
    assert all(map(torch.equal, call(rows), outputs))
    assert replays == [1]


def test_options_and_replaced_tensors_are_other_plans_and_edits_in_place_are_seen(replays, monkeypatch):
    rows, head = feature_maps(2), HEADS["pruned"]

    def score(head, eps=1.0, precision="ieee"):
        return ok.score(rows, head, eps=eps, precision=precision, backend="triton")

    score(head)
    for changes in ({"eps": 2.0}, {"precision": "bf16"}):
        score(head, **changes)
    score(head._replace(bias=None))
    score(head._replace(weight=head.weight.clone()))
    assert replays == [0]
    weight = head.weight.clone()
    before = score(head._replace(weight=weight))
    weight.mul_(2)
    after = score(head._replace(weight=weight))
    assert replays == [1]
    right = written(monkeypatch, lambda _: score(head._replace(weight=weight)), rows)
    assert all(map(torch.equal, after, right))
    assert not torch.equal(before.lse, after.lse)


def test_a_copy_made_by_torch_is_made_in_every_call(replays, monkeypatch):
    basis = BASES["shifted"]
    strided = basis._replace(constants=normal(2 * K)[::2], shift=normal(2 * D, seed=3)[::2])
    for seed in (7, 8):
        call = lambda rows: ok.score(rows, HEADS["plain"], strided, backend="triton")  # noqa: E731
        rows = feature_maps(2, seed)
        assert all(map(torch.equal, call(rows), written(monkeypatch, call, rows)))
    assert replays == [0]
    assert list(plans._PLANS.values()) == [None]


def test_plain_torch_has_no_plan(replays):
    for _ in range(2):
        ok.score(feature_maps(2), HEADS["plain"], backend="reference")
        ok.pool_nap(feature_maps(2).double(), backend="triton")
    assert replays == [0]


def test_arguments_are_checked_before_there_is_a_plan(replays):
    with pytest.raises(ValueError, match="weight: expected"):
        ok.score(feature_maps(2), ok.Head(normal(C, D + 1)), backend="triton")
    assert plans._PLANS == {}


def test_the_oldest_plans_go_first(replays, monkeypatch):
    monkeypatch.setattr(plans, "_MOST", 2)
    for samples in (1, 2, 3, 3, 2, 1):
        CALLS["pool_nap"](feature_maps(samples))
    assert len(plans._PLANS) == 2
    assert replays == [2]


def test_a_plan_takes_few_python_calls(replays, monkeypatch):
    """At most 60 of `score`, with the six that a launch takes in Triton 3.6."""
    monkeypatch.setattr(Replayed, "__getitem__", lambda self, grid: len)
    monkeypatch.setattr(plans, "Step", lambda run, arguments, moving: (lambda *own: None, arguments, moving))
    rows, calls = feature_maps(2), []
    CALLS["score shifted"](rows)
    monkeypatch.setattr("ood_kernels.triton_kernels.score._SMALL_CLASSES", 0)
    for _ in range(2):
        calls.clear()
        sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
        try:
            CALLS["score shifted"](rows)
        finally:
            sys.setprofile(None)
    assert len(calls) <= 60 - 3 * 6, calls
