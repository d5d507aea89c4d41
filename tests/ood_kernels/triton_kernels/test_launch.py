from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_kernels.triton_kernels import launch as subject

CUDA = torch.device("cuda", 0)
DEFAULT = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}


class Kernel:
    """Stands in for a `triton.jit` function and remembers what it was started with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid):
        return lambda **arguments: self.calls.append((grid, arguments))


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Write rows of a family for the GPU "Test GPU 1", which this machine then has."""
    monkeypatch.setattr(subject, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU 1")
    subject._tuned.cache_clear()
    subject._device_name.cache_clear()

    def write(rows: list[dict[str, Any]], device: str = "test_gpu_1") -> None:
        (tmp_path / f"{device}.json").write_text(json.dumps({"device": device, "families": {"family": rows}}))

    yield write
    subject._tuned.cache_clear()
    subject._device_name.cache_clear()


BY_SIZE = [({"channels": 512, "spatial": 16}, {"num_warps": 2}), ({"channels": 2048, "spatial": 49}, {"num_warps": 8})]
BY_RATIO = [({"channels": 16}, {"BLOCK": 16}), ({"channels": 4096}, {"BLOCK": 256})]
BY_WORD = [({"layout": "rows", "channels": 8}, {"BLOCK": 1})]


@pytest.mark.parametrize(
    ("rows", "asked", "expected"),
    [
        (BY_SIZE, {"channels": 2048, "spatial": 49}, {"num_warps": 8}),
        (BY_SIZE, {"channels": 1500, "spatial": 36}, {"num_warps": 8}),
        (BY_SIZE, {"channels": 600, "spatial": 20}, {"num_warps": 2}),
        (BY_RATIO, {"channels": 1024}, {"BLOCK": 256}),
        (BY_WORD, {"layout": "rows", "channels": 9999}, {"BLOCK": 1}),
        (BY_WORD, {"layout": "channels", "channels": 8}, {}),
    ],
)
def test_the_tuned_shape_nearest_by_ratio_lies_over_the_default_where_words_match(tuned, rows, asked, expected):
    tuned([{"shape": shape, "config": config} for shape, config in rows])
    assert subject.choose("family", asked, DEFAULT, CUDA) == DEFAULT | expected


@pytest.mark.parametrize(
    ("family", "device", "of_gpu"),
    [
        ("other", CUDA, "test_gpu_1"),
        ("family", CUDA, "another_gpu"),
        ("family", torch.device("cpu"), "test_gpu_1"),
        ("family", torch.device("meta"), "test_gpu_1"),
    ],
)
def test_default_for_what_was_not_tuned(tuned, family, device, of_gpu):
    tuned([{"shape": {"channels": 8}, "config": {"num_warps": 1}}], of_gpu)
    chosen = subject.choose(family, {"channels": 8}, DEFAULT, device)
    assert chosen == DEFAULT
    assert chosen is not DEFAULT


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**5), st.integers(1, 10**4)), min_size=1, unique=True), st.data())
def test_an_exact_shape_is_the_nearest(sizes, data):
    shapes = [{"channels": channels, "spatial": spatial} for channels, spatial in sizes]
    wanted = data.draw(st.sampled_from(shapes))
    assert min(shapes, key=lambda shape: subject.distance(shape, wanted)) == wanted


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"), ("AMD/Instinct-MI300X", "amd_instinct_mi300x")],
)
def test_file_name(name, expected):
    assert subject.file_name(name) == expected


def test_forced_configurations_win_and_the_look_up_is_collected(tuned):
    tuned([{"shape": {"channels": 8}, "config": {"num_warps": 1}}])
    with subject.forced({"family": {"num_warps": 16}}) as choices:
        assert subject.choose("family", {"channels": 8}, DEFAULT, CUDA) == DEFAULT | {"num_warps": 16}
        assert subject.choose("other", {"channels": 9}, DEFAULT, CUDA) == DEFAULT
    assert choices == [("family", {"channels": 8}, DEFAULT), ("other", {"channels": 9}, DEFAULT)]
    assert subject.choose("family", {"channels": 8}, DEFAULT, CUDA)["num_warps"] == 1


def test_launch_starts_the_kernel_with_its_arguments():
    kernel, x = Kernel(), torch.ones(3)
    subject.launch(kernel, [2, 3], x_ptr=x, BLOCK=4)
    ((grid, arguments),) = kernel.calls
    assert grid == (2, 3)
    assert arguments["x_ptr"] is x
    assert arguments["BLOCK"] == 4


def test_an_empty_grid_starts_nothing():
    kernel = Kernel()
    with subject.record() as launches:
        subject.launch(kernel, (0, 4), x_ptr=torch.ones(0))
    assert kernel.calls == launches == []


def test_record_collects_in_order_and_runs_real_tensors_only():
    kernel = Kernel()
    with subject.record() as launches:
        subject.launch(kernel, (1,), x_ptr=torch.ones(3), BLOCK=1)
        subject.launch(kernel, (2,), wide=True, x_ptr=torch.ones(3, device="meta"), BLOCK=2)
    assert [(one.grid, one.wide, one.arguments["BLOCK"]) for one in launches] == [((1,), False, 1), ((2,), True, 2)]
    assert [grid for grid, _ in kernel.calls] == [(1,)]
    subject.launch(kernel, (3,), x_ptr=torch.ones(3))
    assert len(launches) == 2


def test_launches_are_handed_to_another_executor():
    kernel, x, handed = Kernel(), torch.ones(3), []
    with subject.executed_by(handed.append), subject.record() as launches:
        subject.launch(kernel, (2,), x_ptr=x, BLOCK=1)
        subject.launch(kernel, (2,), x_ptr=x.to("meta"), BLOCK=1)
    assert [one.arguments["x_ptr"] for one in handed] == [x]
    assert len(launches) == 2
    assert kernel.calls == []
    subject.launch(kernel, (3,), x_ptr=x)
    assert [grid for grid, _ in kernel.calls] == [(3,)]


def test_recordings_nest():
    kernel = Kernel()
    with subject.record() as outer:
        with subject.record() as inner:
            subject.launch(kernel, (1,), x_ptr=torch.ones(1))
        subject.launch(kernel, (2,), x_ptr=torch.ones(1))
    assert [one.grid for one in inner] == [(1,)]
    assert [one.grid for one in outer] == [(2,)]


@pytest.mark.parametrize(
    ("backend", "precision", "expected"),
    [("cuda", "tf32x3", "tf32x3"), ("hip", "tf32x3", "ieee"), ("hip", "bf16", "bf16")],
)
def test_arguments_are_what_the_backend_knows(backend, precision, expected):
    given = {"PRECISION": precision, "BLOCK": 4, "num_warps": 8}
    taken = subject.arguments_for(backend, given)
    # fp32 in AMD's matrix cores takes the small tiles of tf32x3 with half the warps, which have 64 threads each.
    warps = 4 if expected != precision else 8
    assert taken == {"PRECISION": expected, "BLOCK": 4, "num_warps": warps, "enable_fp_fusion": True}
    assert given == {"PRECISION": precision, "BLOCK": 4, "num_warps": 8}
