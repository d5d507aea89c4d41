"""Shared by the tests of the engine: a small trained CNN, image sets of its classes, and an engine with every detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ood_engine as oe

CLASSES = 5
CHANNELS = 12


class Cnn(nn.Sequential):
    """Two convolutions, global pooling and a linear head; counts its forwards."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, bias: bool = True) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            activation(),
            nn.Conv2d(8, CHANNELS, 3, padding=1, stride=2),
            activation(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(CHANNELS, CLASSES, bias=bias),
        )


class Doubled(nn.Module):
    """Pools a map to twice its mean, so that no map is proven."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*list(model)[:4]), model[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(2 * self.body(x).mean((2, 3)))


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 8, 8] in [0, 1]: a pattern a class, dimmed, with noise; and their classes."""
    patterns = torch.rand((CLASSES, 3, 8, 8), generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    strength = 0.3 + 0.7 * torch.rand((count, 1, 1, 1), generator=generator)
    noise = 0.2 * torch.rand((count, 3, 8, 8), generator=generator)
    return (patterns[labels] * strength + noise).clamp(0, 1), labels


def split(images: Tensor, labels: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """A loader of (images, labels)."""
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """A seeded, untrained CNN with the activation that is asked for."""

    def make(activation: type[nn.Module] = nn.ReLU, *, bias: bool = True, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Cnn(activation, bias).eval()

    return make


@pytest.fixture
def unproven_model(make_model) -> nn.Module:
    """A model whose map has to be named by hand: `body`."""
    return Doubled(make_model())


@pytest.fixture(scope="session")
def images() -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """images(count, seed) → images [n, 3, 8, 8] and labels [n]."""
    return make_images


@pytest.fixture(scope="session")
def loader() -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """loader(images, labels, size) → list of batches."""
    return split


@pytest.fixture(scope="session")
def model(make_model) -> nn.Module:
    """The CNN, trained for a moment."""
    model = make_model()
    x, y = make_images(256, seed=7)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    # Adds a constant to every logit: with it the energy is positive, as NAP asks.
    model[-1].bias.data += 5
    return model.eval()


@pytest.fixture(scope="session")
def id_batches() -> list[tuple[Tensor, Tensor]]:
    """What engines are fitted on: 240 images."""
    return split(*make_images(240, seed=1))


@pytest.fixture(scope="session")
def unlabelled_batches(id_batches) -> list[Tensor]:
    """The same images alone, for models that predict other classes."""
    return [images for images, _ in id_batches]


@pytest.fixture(scope="session")
def fresh_batches() -> list[tuple[Tensor, Tensor]]:
    """What engines are calibrated on: 100 other images."""
    return split(*make_images(100, seed=2))


@pytest.fixture(scope="session")
def test_images() -> Tensor:
    """33 images to score: ID, and noise at the end."""
    noise = torch.rand((8, 3, 8, 8), generator=torch.Generator().manual_seed(5))
    return torch.cat([make_images(25, seed=3)[0], noise])


@pytest.fixture(scope="session")
def engine(model, id_batches, fresh_batches) -> oe.Engine:
    """Every detector, fitted and calibrated. Not to be changed by a test; see `make_engine`."""
    return oe.Engine(model, oe.available_detectors()).fit(id_batches).calibrate(fresh_batches, 0.1)


@pytest.fixture(scope="session")
def state(engine, tmp_path_factory) -> Path:
    """The state of every detector. Not to be changed by a test."""
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    engine.information["note"] = "kept"
    engine.save(path)
    return path


@pytest.fixture
def make_engine(model, id_batches, fresh_batches) -> Callable[..., oe.Engine]:
    """An engine of its own, fitted and calibrated."""

    def make(detectors: tuple[str, ...] | None = None, **options: object) -> oe.Engine:
        names = oe.available_detectors() if detectors is None else detectors
        return oe.Engine(model, names, **options).fit(id_batches).calibrate(fresh_batches, 0.1)

    return make


@pytest.fixture
def count_forwards(monkeypatch) -> Iterator[list[int]]:
    """A list that grows by the batch size whenever a Cnn runs."""
    calls: list[int] = []
    original = Cnn.forward

    def forward(self: Cnn, x: Tensor) -> Tensor:
        calls.append(len(x))
        return original(self, x)

    monkeypatch.setattr(Cnn, "forward", forward)
    return calls


@pytest.fixture(scope="session")
def assert_same_scores() -> Callable[..., None]:
    """Assert that two sets of scores agree, relative to the largest magnitude of each score."""

    def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
        assert list(found) == list(expected)
        for name, score in expected.items():
            is_plain = name == "energy" or name == "nap"
            allowed = tolerance if tolerance is not None else 1e-6 if is_plain else 1e-5
            if allowed == 0:
                assert torch.equal(found[name], score), name
                continue
            worst = (found[name] - score).abs().max() / score.abs().max()
            assert worst <= allowed, f"{name}: {worst:.3g}"

    return check


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(p [n, C], signed features h [n, D], weight [C, D], bias [C]) in fp64, or the dtype asked for."""

    def make(
        samples: int = 40, classes: int = 4, width: int = 7, *, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        h, weight, bias = normal(samples, width), normal(classes, width), normal(classes)
        return F.linear(h, weight, bias).softmax(1).to(dtype), h.to(dtype), weight.to(dtype), bias.to(dtype)

    return make


SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "energy": lambda z: z.logsumexp(0),
    "predicted": lambda z: z.logsumexp(0) - z.max(),
    "uniform": lambda z: z.logsumexp(0) - z.mean(),
    "max_logit": lambda z: z.max(),
    "sum_logits": lambda z: z.sum(),
}


@pytest.fixture(scope="session")
def autograd_gradients() -> Callable[..., Tensor]:
    """Last-layer gradients [n, C, D̃] of a scalar of the logits, one sample at a time by torch.func."""

    def gradients(h: Tensor, weight: Tensor, bias: Tensor, cotangent: str, with_bias: bool) -> Tensor:
        def scalar(parameters: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
            return SCALARS[cotangent](F.linear(features, *parameters))

        by_weight, by_bias = torch.func.vmap(torch.func.grad(scalar), in_dims=(None, 0))((weight, bias), h)
        return torch.cat([by_weight, by_bias[:, :, None]], 2) if with_bias else by_weight

    return gradients
