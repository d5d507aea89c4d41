"""`ood-engine bench`: what is called in which order, what is stored, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import ood_engine as oe
from ood_engine.cli import bench as bench_module
from ood_engine.cli.timing import WARM_UP, interleave, peak_mib, summary_ms
from ood_engine.demo import SmallCNN

CPU = torch.device("cpu")
DETECTORS = ["nap_energy", "energy"]
BENCH = ["bench", "--device", "cpu"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Three rounds a batch size."""
    monkeypatch.setattr(bench_module, "BATCHES", (1, 2))
    monkeypatch.setattr(bench_module, "QUICK", (0.0, 3))
    monkeypatch.setattr(bench_module, "BUILT_IN_IMAGES", 64)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's weights and states: fitted on one size, and on no one size."""
    folder = tmp_path_factory.mktemp("own")
    model = SmallCNN(seed=3).eval()
    images = torch.rand((64, 1, 8, 12), generator=torch.Generator().manual_seed(0))
    engine = oe.Engine(model, DETECTORS).fit([images], labels="predicted")
    engine.save(folder / "state.safetensors")
    engine.scorer.image_shape = None
    engine.save(folder / "sizes.safetensors")
    save_file(model.state_dict(), folder / "net.safetensors")
    arguments = ["--model", "ood_engine.demo:small_cnn", "--weights", folder / "net.safetensors"]
    return SimpleNamespace(model=arguments, state=folder / "state.safetensors", sizes=folder / "sizes.safetensors")


def test_calls_take_turns_and_the_warm_up_is_not_kept():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    rounds = interleave(calls, CPU, seconds=0, least_rounds=3)
    assert "".join(order) == "ab" * WARM_UP + "ab" + "ba" + "ab"
    assert [len(rounds[name]) for name in "ab"] == [3, 3]
    assert all(time > 0 for times in rounds.values() for time in times)
    assert len(interleave(calls, CPU, seconds=0.05, least_rounds=1)["a"]) > 10


def test_figures_of_known_rounds():
    figures = summary_ms([float(value) for value in range(100, -1, -1)])
    assert figures == {"median_ms": 50, "min_ms": 0, "p5_ms": 5, "p95_ms": 95}


def test_peak_memory_is_what_was_held_at_once():
    def two_after_each_other():
        torch.ones(2**20)
        return torch.ones(2**19)

    def two_at_once():
        return torch.ones(2**20), torch.ones(2**19)

    assert peak_mib(two_after_each_other, CPU) == pytest.approx(4, abs=0.01)
    assert peak_mib(two_at_once, CPU) == pytest.approx(6, abs=0.01)


def test_without_a_model_the_small_one_is_measured(call, tmp_path):
    code, shown, errors = call([*BENCH, "--quick", "--output", tmp_path / "out"])
    assert (code, errors) == (0, "")
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (document["model"], document["image_shape"]) == ("built-in SmallCNN", [1, 32, 32])
    assert [(row["batch"], row["rounds"]) for row in document["rows"]] == [(1, 3), (2, 3)]
    for row in document["rows"]:
        for name in ("forward", "with_scores"):
            figures = row[name]
            assert 0 < figures["min_ms"] <= figures["p5_ms"] <= figures["median_ms"] <= figures["p95_ms"]
            assert figures["images_per_second"] == pytest.approx(1000 * row["batch"] / figures["median_ms"])
        assert 0 < row["forward"]["peak_mib"] <= row["with_scores"]["peak_mib"]
    assert "built-in SmallCNN, images of 1×32×32" in shown
    assert shown.count("scores add") == 2


def test_what_scores_add_is_the_difference_within_rounds(call, own, tmp_path, monkeypatch):
    rounds = {"forward": [1.0, 2.0, 4.0], "with_scores": [2.0, 5.0, 5.0]}
    monkeypatch.setattr(bench_module, "interleave", lambda calls, device, **options: rounds)
    code, shown, _ = call([*BENCH, *own.model, "--state", own.state, "--output", tmp_path])
    assert code == 0
    row = json.loads((tmp_path / "bench.json").read_text())["rows"][1]
    assert (row["added"]["median_ms"], row["added"]["min_ms"], row["added"]["share_of_forward"]) == (1, 1, 0.5)
    assert (row["forward"]["images_per_second"], row["with_scores"]["images_per_second"]) == (1000, 400)
    assert "scores add 50.0 %" in shown


def test_a_model_of_ones_own_is_measured_on_images_as_in_the_state(answer, own, tmp_path, monkeypatch):
    seen = []
    forward = SmallCNN.forward

    def watched(self, images):
        seen.append(tuple(images.shape))
        return forward(self, images)

    monkeypatch.setattr(SmallCNN, "forward", watched)
    document = answer([*BENCH, *own.model, "--state", own.state, "--quick", "--output", tmp_path])
    assert document["detectors"] == DETECTORS
    assert document["files"] == [str(tmp_path / "bench.json")]
    calls = 2 * (WARM_UP + 3 + 1)
    # Loading scores four synthetic inputs.
    measured = [shape for shape in seen if shape[0] != 4]
    assert measured == [(1, 1, 8, 12)] * calls + [(2, 1, 8, 12)] * calls


def test_a_batch_that_the_device_cannot_hold_is_left_out(call, tmp_path, monkeypatch):
    score = oe.Engine.score
    largest = 1

    def full(self, images):
        if len(images) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, images)

    monkeypatch.setattr(oe.Engine, "score", full)
    code, _, errors = call([*BENCH, "--quick", "--output", tmp_path])
    assert code == 0
    assert errors == "warning: 2 images do not fit into the device's memory and are left out\n"
    assert [row["batch"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == [1]
    largest = 0
    code, _, errors = call([*BENCH, "--quick", "--output", tmp_path / "none"])
    assert code == 2
    assert "out of memory" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "ood_engine.demo:small_cnn"], "--model and --state belong together"),
        (["--state", "state.safetensors"], "--model and --state belong together"),
        (["--weights", "net.safetensors"], "--model and --state belong together"),
        (["--model", "nowhere:net", "--state", "nowhere"], "importing nowhere failed"),
        (["--model", "ood_engine.demo:small_cnn", "--state", "nowhere"], "no such state file"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--device", "meta"], "no values yet"),
        (["--output", __file__], "cannot be made a folder"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_arguments_are_one_line(refused, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused([*BENCH, *arguments], said)
    assert list(tmp_path.rglob("*.json")) == []


def test_a_state_of_other_weights_or_of_several_sizes_is_refused(refused, own, tmp_path):
    refused([*BENCH, *own.model[:2], "--state", own.state, "--output", str(tmp_path)], "fitted to another model")
    refused([*BENCH, *own.model, "--state", own.sizes, "--output", str(tmp_path)], "--size")
