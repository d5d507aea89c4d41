"""The subjects around `ood_kernels`: their plans, and that everyone in a case computes the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ood_kernels as ok
from ood_engine.bench import operands as shared
from ood_engine.bench.cases import OURS, Case, Effort, MissingProviderError, Plan
from ood_engine.bench.operands import Operands, as_vectors, pool_truth, series, sizes_of
from ood_engine.bench.rivals import AUTOGRAD, COMPILED, LIBRARY, REFERENCE, VMAP, compiled
from ood_engine.bench.rows import SIZES
from ood_engine.bench.runner import errors, run
from ood_engine.bench.scoring import THREE_CALLS
from ood_engine.bench.subjects import activation, head, latency, projection, single_pass

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SUBJECTS = (activation, head, projection, single_pass, latency)
QUICK, QUICK_ON_GPU, FULL, FULL_ON_GPU = EFFORTS = [
    Effort(name, 1, 0.0, 1.0, device) for name in ("quick", "full") for device in (CPU, CUDA)
]
SMALL = {"N": 6, "D": 29, "C": 7, "H": 3, "W": 2, "n": 16, "K": 5}
AXES = {
    "pool_nap": {"N", "D"},
    "masked_energy": {"N", "D", "C"},
    "project dual": {"N", "n", "C", "D", "K"},
    "project explicit": {"N", "C", "D", "K"},
    "project factored": {"N", "C", "D", "K"},
    "score": {"N"},
    "latency": set(),
}


def all_plans(effort: Effort) -> list[Plan]:
    return [plan for subject in SUBJECTS for plan in subject.plans(effort)]


def keywords_of(plan: Plan) -> dict[str, Any]:
    """What its operands are made from."""
    assert isinstance(plan.build, partial)
    return plan.build.keywords


def shrunk(plan: Plan, **options: Any) -> Plan:
    """The plan at sizes of a few, on the CPU."""
    sizes = {name: min(size, SMALL[name]) for name, size in plan.sizes.items()}
    changed = {"sizes": sizes, "device": CPU, "is_compiled": False} | options
    assert isinstance(plan.build, partial)
    return plan._replace(sizes=sizes, build=partial(plan.build.func, **plan.build.keywords | changed))


def different(plans: Iterable[Plan]) -> list[Plan]:
    """The plans at sizes of a few, those once that are then alike."""
    small = {f"{plan.subject} {sorted(keywords_of(plan).items(), key=str)}": plan for plan in map(shrunk, plans)}
    return list(small.values())


def check(case: Case) -> None:
    """Hold every provider to the truth."""
    for provider in case.providers:
        error = errors(provider.call(), [part[: provider.samples] for part in case.truth])
        assert provider.tolerance is not None
        assert error <= provider.tolerance, provider.name


def run_one(plan: Plan) -> dict[str, dict[str, Any]]:
    """Provider → its row."""
    rows: list[dict[str, Any]] = []
    run([plan], QUICK, {}, lambda _, found, __: rows.extend(found))
    return {row["provider"]: row for row in rows}


@pytest.mark.parametrize("effort", [QUICK, FULL_ON_GPU], ids=["fp32", "bf16"])
def test_everyone_agrees_with_the_truth_in_every_plan(effort: Effort) -> None:
    for plan in different(all_plans(effort)):
        case = plan.build()
        assert {OURS, REFERENCE} <= {provider.name for provider in case.providers}
        assert case.cost is not None
        assert min(case.cost) > 0
        check(case)


@pytest.mark.parametrize("effort", EFFORTS, ids=lambda effort: f"{effort.name} {effort.device}")
def test_plans_are_distinct_cheap_and_of_known_sizes(effort: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan made operands")

    monkeypatch.setattr(Operands, "__init__", refuse)
    monkeypatch.setattr(torch, "randn", refuse)
    plans = all_plans(effort)
    keys = [(p.subject, p.workload, p.shape, p.dtype, p.memory_format, p.cold) for p in plans]
    assert len(set(keys)) == len(keys)
    for plan in plans:
        assert set(plan.sizes) <= set(SIZES)
        assert set(plan.sweeps) <= set(plan.sizes)
        assert keywords_of(plan)["sizes"] == plan.sizes
    assert {plan.subject for plan in plans} == set(AXES)


@pytest.mark.parametrize("effort", EFFORTS, ids=lambda effort: f"{effort.name} {effort.device}")
def test_every_series_has_three_points_over_a_factor_of_eight(effort: Effort) -> None:
    points: dict[Any, list[int]] = defaultdict(list)
    for plan in all_plans(effort):
        for axis in plan.sweeps:
            fixed = tuple((name, size) for name, size in plan.sizes.items() if name != axis)
            points[plan.subject, axis, plan.workload, fixed, plan.dtype, plan.memory_format].append(plan.sizes[axis])
    for key, sizes in points.items():
        assert len(sizes) >= 3, key
        assert max(sizes) >= 8 * min(sizes), key
    found = {subject: {axis for name, axis, *_ in points if name == subject} for subject in AXES}
    few = {f"project {kind}": {"N", "K"} for kind in ("explicit", "factored")} if effort.is_quick else {}
    assert found == AXES | few


def test_the_workloads_and_providers_that_take_part() -> None:
    plans = all_plans(FULL)
    workloads = {subject: {plan.workload for plan in plans if plan.subject == subject} for subject in AXES}
    assert workloads["score"] == workloads["masked_energy"] == set(shared.WORKLOADS)
    assert workloads["pool_nap"] == set(shared.WORKLOADS) - {"W21k"}
    providers: dict[str, set[str]] = defaultdict(set)
    for plan in different(plans):
        providers[plan.subject] |= {provider.name for provider in plan.build().providers}
    assert providers == {
        "pool_nap": {OURS, REFERENCE},
        "masked_energy": {OURS, REFERENCE, LIBRARY},
        **{f"project {kind}": {OURS, REFERENCE, LIBRARY, AUTOGRAD, VMAP} for kind in ("dual", "explicit", "factored")},
        "score": {OURS, REFERENCE, THREE_CALLS, AUTOGRAD},
        "latency": {OURS, REFERENCE, THREE_CALLS},
    }


def test_states_of_the_caches_and_dtypes() -> None:
    for effort in EFFORTS:
        plans = all_plans(effort)
        assert {plan.cold for plan in plans if plan.subject == "pool_nap"} == {False, True}
        assert {plan.cold for plan in plans if plan.subject == "latency"} == {False, True}
        assert {plan.dtype for plan in plans if plan.subject == "pool_nap"} == {torch.float32, torch.bfloat16}
        main = torch.float32 if effort.device == CPU else torch.bfloat16
        assert {plan.dtype for plan in plans if plan.subject in ("latency", "project dual")} == {main}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.__name__.rpartition(".")[2])
def test_compiled_takes_part_in_few_cases(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plans = [plan for plan in subject.plans(FULL) if keywords_of(plan)["is_compiled"]]
    assert len(plans) == 1
    case = shrunk(plans[0], is_compiled=True).build()
    assert COMPILED in {provider.name for provider in case.providers}
    check(case)
    assert sum(keywords_of(plan)["is_compiled"] for plan in subject.plans(QUICK)) <= 1


def test_a_machine_that_cannot_compile_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nand a page of advice")

    monkeypatch.setattr(torch, "compile", lambda function, **_: no_compiler)
    with pytest.raises(MissingProviderError) as raised:
        compiled(ok.reference.pool_nap, torch.ones(1, 1, 1, 1))
    assert raised.value.args == (COMPILED, "torch.compile failed: no C++ compiler")
    plan = next(plan for plan in activation.plans(FULL) if keywords_of(plan)["is_compiled"])
    assert set(shrunk(plan, is_compiled=True).build().missing) == {COMPILED}


def _first(parts: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(parts) if isinstance(parts, Tensor) else (change(parts[0]), *parts[1:])


@pytest.mark.parametrize(
    ("subject", "function"),
    [(activation, "pool_nap"), (head, "masked_energy"), (projection, "project_gradients"), (single_pass, "score")],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("change", [lambda t: t * 1.001, lambda t: t[..., :-1], lambda t: t * torch.nan])
def test_the_row_of_a_wrong_result_is_refused(
    subject: Any, function: str, change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(ok, function)

    def wrong(*arguments: Any, **options: Any) -> Any:
        return _first(right(*arguments, **options), change)

    monkeypatch.setattr(ok, function, wrong)
    rows = run_one(shrunk(next(iter(subject.plans(QUICK)))))
    assert rows[OURS]["refused"].startswith("WrongResultError")
    assert {name for name, row in rows.items() if row["refused"]} == {OURS}
    assert {name for name, row in rows.items() if row["p50_ms"] is None} == {OURS}


def test_series_have_shared_sizes_once() -> None:
    base = {"N": 4, "D": 8}
    found = list(series(base, N=(1, 4), D=(8, 64)))
    assert found == [({"N": 1, "D": 8}, ("N",)), ({"N": 4, "D": 8}, ("N", "D")), ({"N": 4, "D": 64}, ("D",))]


def test_sizes_are_those_of_the_workload_with_fewer_anchors_on_a_cpu() -> None:
    assert sizes_of("R50", "NDCnK", 3, CUDA) == {"N": 3, "D": 2048, "C": 1000, "n": 4096, "K": 512}
    assert sizes_of("R50", "NDCnK", 3, CPU) == {"N": 3, "D": 2048, "C": 1000, "n": 1000, "K": 256}
    assert sizes_of("tiny", "NnK", 3, CPU) == {"N": 3, "n": 21, "K": 5}


def make_operands(**sizes: int) -> Operands:
    return Operands("R50", SMALL | sizes, torch.float32, CPU)


def test_operands_are_the_same_at_every_run_and_leave_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    one, two = make_operands(), make_operands()
    assert torch.equal(one.feature_map("NCHW"), two.feature_map("NCHW"))
    assert torch.equal(one.head.weight, two.head.weight)
    assert torch.equal(one.dual().coefficients, two.dual().coefficients)
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_formats_hold_the_same_map() -> None:
    nchw, channels_last, tokens = (make_operands().feature_map(name) for name in ("NCHW", "channels_last", "tokens"))
    assert nchw.is_contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(nchw, channels_last)
    assert torch.equal(tokens, nchw.flatten(2).transpose(1, 2))
    assert nchw.min() == 0


def test_operands_look_like_a_models() -> None:
    operands = make_operands(N=256, D=512, C=100, n=300, K=20)
    weight, bias, weight_mask, _ = operands.head
    assert bias is not None
    assert weight_mask is not None
    logits = operands.features @ weight.T + bias
    assert 2 < logits.std() < 4
    assert 0.89 < weight_mask.float().mean() < 0.91
    assert torch.allclose(operands.softmax, logits.softmax(1), atol=1e-5)
    assert operands.dual().coefficients.sum(0).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["dual", "explicit", "factored"])
def test_vectors_of_a_basis_give_its_coordinates(kind: Any) -> None:
    operands = make_operands()
    p, h, basis = operands.softmax, operands.features, operands.basis(kind)
    gradients = p[:, :, None] * torch.nn.functional.pad(h, (0, 1), value=1.0)[:, None]
    coordinates = gradients.flatten(1) @ as_vectors(basis).T - basis.constants
    torch.testing.assert_close(coordinates, ok.reference.project_gradients(p, h, basis), rtol=1e-4, atol=1e-5)


def test_the_truth_of_pooling_does_not_depend_on_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    feature_map = make_operands().feature_map("tokens")
    whole = pool_truth(feature_map)
    monkeypatch.setattr(shared, "_TRUTH_ELEMENTS", 2 * feature_map[0].numel())
    assert all(torch.equal(a, b) for a, b in zip(whole, pool_truth(feature_map), strict=True))
    assert whole[0].dtype == torch.float64


def test_products_in_parts_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = next(plan for plan in projection.plans(QUICK) if plan.subject == "project explicit")
    monkeypatch.setattr(projection, "_OUTER_ELEMENTS", 2 * 7 * 30)
    check(shrunk(plan).build())


def test_a_recipe_of_few_samples_has_times_but_no_rates() -> None:
    plan = next(plan for plan in single_pass.plans(QUICK) if plan.workload == "R18")
    row = run_one(shrunk(plan))[AUTOGRAD]
    assert row["samples_run"] == 4
    assert row["flops"] is None
    assert row["p50_ms"] > 0
