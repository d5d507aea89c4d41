from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import torch

from ood_kernels import cases, tune
from ood_kernels.cases import Case
from ood_kernels.triton_kernels import launch
from ood_kernels.triton_kernels.launch import Choice
from ood_kernels.tune import Tuned
from ood_kernels.workloads import WORKLOADS

# Not importorskip: Triton must not be imported before the tests of its kernels have said whether to interpret them.
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (it exists for Linux only)"
)

DEFAULT = {"BLOCK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3}
CASE = Case("masked_energy", WORKLOADS["R18"])
FACTS = {"device": "Test GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}


@pytest.fixture
def two_families(monkeypatch):
    """Let every case look up a tile in two families, the second with a shape of its own, and run nothing."""
    seen = []

    def run(case, values):
        first = launch.choose("one", {"classes": case.workload.classes}, DEFAULT, torch.device("meta"))
        second = launch.choose("two", {"channels": case.workload.channels}, DEFAULT, torch.device("meta"))
        seen.append((first, second))

    monkeypatch.setattr(tune, "run", run)
    monkeypatch.setattr(tune, "operands", lambda case, device: {})
    return seen


def faster_with(**wanted):
    """A fake measurement: 10 µs, and 1 µs less for every wanted constant that a family has."""

    def measure(case, configs):
        return 10.0 - sum(config.get(name) == value for config in configs.values() for name, value in wanted.items())

    return measure


def test_generic_candidates_change_warps_stages_and_grouping_only():
    found = tune.candidates(Choice("no such module", {}, DEFAULT))
    assert found[0] == DEFAULT
    assert {config["num_warps"] for config in found} == {2, 4, 8}
    assert {config["num_stages"] for config in found} == {2, 3, 4}
    assert {config["GROUP"] for config in found} == {4, 8, 16}
    assert {config["BLOCK"] for config in found} == {64}
    assert len(found) == 27 == len({json.dumps(config) for config in found})


def test_generic_candidates_stay_in_bounds():
    found = tune.candidates(Choice("no such module", {}, {"num_warps": 16, "num_stages": 1}))
    assert {config["num_warps"] for config in found} == {8, 16}
    assert {config["num_stages"] for config in found} == {1, 2}


def test_a_family_may_name_its_own_candidates(monkeypatch):
    from ood_kernels.triton_kernels import masked_energy

    own = lambda shape: [{"BLOCK": shape["classes"]}, {"BLOCK": 64}]  # noqa: E731
    monkeypatch.setattr(masked_energy, "candidates", own)
    found = tune.candidates(Choice("masked_energy", {"classes": 16}, DEFAULT))
    assert found == [DEFAULT, DEFAULT | {"BLOCK": 16}]


def test_the_fastest_configuration_is_kept(two_families):
    results = list(tune.tune([CASE], faster_with(num_warps=8, num_stages=2)))
    assert [(one.family, one.shape) for one in results] == [("one", {"classes": 10}), ("two", {"channels": 512})]
    for one in results:
        assert one.config == DEFAULT | {"num_warps": 8, "num_stages": 2}
    first, second = results
    assert (first.microseconds, first.default_microseconds) == (8.0, 10.0)
    assert (second.microseconds, second.default_microseconds) == (6.0, 8.0), "timed with the first family's best"


def test_the_default_wins_a_tie(two_families):
    assert all(one.config == DEFAULT for one in tune.tune([CASE], lambda case, configs: 5.0))


def test_a_shape_is_tuned_once_and_families_can_be_chosen(two_families):
    same = Case("pool_nap", WORKLOADS["R18"])
    assert len(list(tune.tune([CASE, same], faster_with()))) == 2
    assert len(list(tune.tune([CASE, Case("pool_nap", WORKLOADS["R50"])], faster_with()))) == 4
    assert {one.family for one in tune.tune([CASE], faster_with(), families=["two"])} == {"two"}


def test_wrong_or_impossible_candidates_are_passed_over(two_families):
    def measure(case, configs):
        is_wrong = any(config.get("num_warps") == 8 for config in configs.values())
        return math.inf if is_wrong else faster_with(num_stages=4)(case, configs)

    assert all(one.config["num_warps"] != 8 and one.config["num_stages"] == 4 for one in tune.tune([CASE], measure))


def test_a_default_that_is_wrong_is_an_error(two_families):
    with pytest.raises(
        RuntimeError, match=r"masked_energy R18 .*: does not run, or is wrong, with the default .* of one"
    ):
        list(tune.tune([CASE], lambda case, configs: math.inf))


def test_what_is_half_done_when_time_is_over_is_left_out(two_families):
    left = iter([True] * 30)
    results = list(tune.tune([CASE], faster_with(num_warps=2), lambda: next(left, False)))
    assert [one.family for one in results] == ["one"]


def test_what_a_case_forces_is_not_tuned(two_families):
    case = CASE._replace(forced=(("one", "num_warps", 1),))
    assert list(tune.tune([case], faster_with())) == []


def test_real_launchers_are_asked_without_a_gpu():
    measured = []
    results = list(tune.tune([CASE], lambda case, configs: measured.append(configs) or 1.0))
    assert {one.family for one in results} >= {"masked_energy"}
    assert all(one.shape and "num_warps" in one.config for one in results)
    assert len(measured) == sum(len(tune.candidates(Choice(*one[:3]))) for one in results)


def test_results_are_merged_into_one_file_that_choose_reads(tmp_path, monkeypatch):
    file = tmp_path / "configs" / "test_gpu.json"
    tune.merge(file, FACTS, Tuned("family", {"channels": 8}, {"num_warps": 1}, 3.14159, 4.0))
    tune.merge(file, FACTS, Tuned("family", {"channels": 512}, {"num_warps": 8}, 30.0, 40.0))
    tune.merge(file, FACTS | {"commit": "def"}, Tuned("family", {"channels": 8}, {"num_warps": 2}, 3.0, 4.0))
    tune.merge(file, FACTS | {"commit": "def"}, Tuned("other", {"channels": 8}, {"num_warps": 16}, 3.0, 4.0))
    content = json.loads(file.read_text())
    assert content["device"] == "Test GPU"
    assert content["commit"] == "def"
    assert [path.name for path in file.parent.iterdir()] == ["test_gpu.json"]
    assert content["families"]["family"] == [
        {"shape": {"channels": 512}, "config": {"num_warps": 8}, "microseconds": 30.0},
        {"shape": {"channels": 8}, "config": {"num_warps": 2}, "microseconds": 3.0},
    ]
    monkeypatch.setattr(launch, "CONFIGS", file.parent)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    launch._tuned.cache_clear()
    launch._device_name.cache_clear()
    chosen = launch.choose("family", {"channels": 400}, DEFAULT, torch.device("cuda", 0))
    launch._tuned.cache_clear()
    launch._device_name.cache_clear()
    assert chosen == DEFAULT | {"num_warps": 8}


def test_a_result_is_held_to_the_reference():
    truth = [torch.tensor([1.0, -4.0]), torch.zeros(0)]
    assert tune.is_close([torch.tensor([1.0, -4.0004]), torch.zeros(0)], truth, 1.1e-4)
    assert not tune.is_close([torch.tensor([1.001, -4.0]), torch.zeros(0)], truth, 1.1e-4)
    assert not tune.is_close([torch.tensor([torch.nan, -4.0]), torch.zeros(0)], truth, 1.0)


@pytest.mark.parametrize("function", ["masked_energy", "project_explicit"])
@pytest.mark.parametrize("mask", ["none", "bits", "bytes"])
def test_the_reference_takes_the_operands_of_a_launcher(function, mask, monkeypatch):
    case = Case(function, WORKLOADS["tiny"], torch.bfloat16, mask=mask, samples=4)
    values = cases.operands(case, torch.device("cpu"))
    truth = tune.tensors_of(cases.run_reference(case, values))
    assert all(bool(tensor.isfinite().all()) and tensor.shape[0] == 4 for tensor in truth)
    assert tune.is_close(tune.tensors_of(cases.run_reference(case, values)), truth, 0.0)
    if function == "masked_energy" and mask == "bits":
        assert values["weight_mask"].dtype == torch.int32
        assert not torch.equal(truth[0], truth[1])


def test_no_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    error = capsys.readouterr().err
    assert "no GPU here" in error
    assert error.count("\n") == 1


def test_an_interruption_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        yield Tuned("family", {"channels": 8}, {"num_warps": 1}, 1.0, 2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "_facts", lambda device: FACTS)
    monkeypatch.setattr(tune, "tune", interrupted)
    assert tune.main(["--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "test_gpu.json").read_text())["families"]["family"][0]["config"] == {"num_warps": 1}
    assert "2.0 → 1.0 µs" in capsys.readouterr().out
