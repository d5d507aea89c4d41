"""Shared by the tests of commands: the files of one user, and a way to run a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ood_engine.cli import main
from ood_engine.demo import SmallCNN


class Place:
    """Files of one user: weights, image arrays and a calibrated state, and the commands that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = np.random.default_rng(0)
        patterns = generator.random((8, 8, 8))
        for name, count in (("fit", 200), ("test", 60)):
            labels = generator.integers(0, 8, count)
            images = 0.7 * patterns[labels] + 0.3 * generator.random((count, 8, 8))
            np.savez(folder / f"{name}.npz", images=images.astype(np.float32), labels=labels)
        np.save(folder / "noise.npy", generator.random((50, 8, 8)).astype(np.float32))
        save_file(_taught(np.load(folder / "fit.npz")).state_dict(), folder / "net.safetensors")
        self.spec = "ood_engine.demo:small_cnn"
        self.model = ["--model", self.spec, "--weights", self["net.safetensors"]]
        self.state = self["state.safetensors"]
        self.detectors = ["nap_energy", "low_dim_gradient"]
        assert main(self.fit(self.state, "--detectors", ",".join(self.detectors))) == 0

    def __getitem__(self, name: object) -> str:
        return str(self.folder / str(name))

    def fit(self, output: object, *more: str, data: object = "fit.npz") -> list[str]:
        preprocessing = ["--channels", "1", "--mean", "0.3", "--std", "0.35"]
        return ["fit", *self.model, "--data", self[data], *preprocessing, "--output", str(output), *more]

    def score(self, output: object, *more: str, data: object = "noise.npy", state: str | None = None) -> list[str]:
        use = ["--state", state or self.state, *self.model, "--batch-size", "8"]
        return ["score", *use, "--data", self[data], "--output", str(output), *more]

    def evaluate(
        self, output: object, *more: str, data: object = "test.npz", ood: str | None = None, state: str | None = None
    ) -> list[str]:
        sets = ["--id", self[data], "--ood", ood or f"noise={self['noise.npy']}"]
        return ["evaluate", "--state", state or self.state, *self.model, *sets, "--output", str(output), *more]


def _taught(archive: Mapping[str, np.ndarray]) -> SmallCNN:
    """A network whose head is the ridge regression of the labels on random features."""
    model = SmallCNN(seed=3).eval()
    images = (torch.from_numpy(archive["images"])[:, None] - 0.3) / 0.35
    with torch.no_grad():
        features = model.flatten(model.pool(model.body(images)))
        targets = torch.eye(8)[torch.from_numpy(archive["labels"])] - 1 / 8
        mean = features.mean(0)
        gram = (features - mean).T @ (features - mean)
        weight = 8 * torch.linalg.solve(gram + 1e-4 * gram.trace() / 64 * torch.eye(64), (features - mean).T @ targets)
        model.head.weight.copy_(weight.T)
        model.head.bias.copy_(5 - mean @ weight)
    return model


@pytest.fixture(scope="package")
def place(tmp_path_factory) -> Place:
    """Not to be changed by a test."""
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def call(capsys) -> Callable[[list[str]], tuple[int, str, str]]:
    """Runs a command: (exit code, standard output, standard error)."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def answer(call) -> Callable[[list[str]], dict[str, Any]]:
    """Runs a command that succeeds: its JSON."""

    def run(arguments: list[str]) -> dict[str, Any]:
        code, out, err = call([*arguments, "--json"])
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def refused(call) -> Callable[..., None]:
    """Asserts that a command ends with one line that holds some words."""

    def check(arguments: list[str], *words: str) -> None:
        code, out, err = call(arguments)
        assert code == 2
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("ood-engine: ")
        for word in words:
            assert word in err

    return check
