"""What does scoring add to a forward of torchvision's ResNet-50, in time and memory?"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ood_engine as oe
from ood_kernels.workloads import WORKLOADS, Cost, Operands, Workload

from .clocks import DEVICE
from .common import OURS, Case, Provider, planned
from .kernels import TOLERANCES
from .peers import import_beside_torch

FORWARD, ALONE, ALL = "forward alone", f"{OURS}, scores alone", f"{OURS}, all detectors"
COMPARED = f"{OURS}, scores verified"
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE, _CHECKED = TOLERANCES[DTYPE], 8


class Engines:
    """Engines around one model with random weights: with the default detectors, with all, and with all in fp64.

    They are fitted from random features at the scale of the model's own, so that the subspace has the anchors of a real one
    without the forwards that real features take. `trunk` makes the map of images [C, H, W], whose height and width are measured.
    """

    def __init__(self, size: Workload, model: nn.Module, trunk: nn.Module, image: Sequence[int]) -> None:
        model.eval().to(DEVICE, DTYPE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model, self.trunk, self._image = model, trunk.eval(), image
        images = self.images(8)
        feature_map = self.feature_map(images)
        self.size = size._replace(height=feature_map.shape[2], width=feature_map.shape[3])
        cached = self._features(feature_map.float().mean((0, 2, 3)).cpu())
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # Labels are random too. That fp32 scores differ a little is what they are compared with fp64 for.
            warnings.simplefilter("ignore", oe.OodEngineWarning)
            self.default, self.all = (
                oe.Engine(model, names, settings=subspace_settings(names, size)).fit_features(
                    cached, images[:2], force=True
                )
                for names in (oe.engine.DEFAULT_DETECTORS, oe.available_detectors())
            )
            path = Path(folder) / "state.safetensors"
            self.all.save(path)
            self.exact = oe.Engine.load(path, copy.deepcopy(model).double())

    def images(self, samples: int) -> Tensor:
        """Random images [N, C, H, W], channels_last."""
        images = torch.randn((samples, *self._image), generator=torch.Generator().manual_seed(samples))
        return images.to(DEVICE, DTYPE, memory_format=torch.channels_last)

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """What the model makes of images before it pools."""
        feature_map: Tensor = self.trunk(images)
        return feature_map

    def case(self, subject: str, feature_map: Tensor, providers: Sequence[Provider], layout: str) -> Case:
        """Every provider held to the first scores of a map in fp64, of those detectors that it has; the second is the reference."""
        size, exact = self.size, self.exact.score_features(feature_map[:_CHECKED].double())

        def check(found: Mapping[str, Tensor]) -> list[Tensor]:
            return [found[name][:_CHECKED] if name in found else right for name, right in exact.items()]

        sizes = {"N": len(feature_map), "D": size.channels, "C": size.classes, "H": size.height, "W": size.width}
        sizes |= {"n": size.anchors, "K": size.components}
        truth, held = [score.double() for score in exact.values()], [one._replace(check=check) for one in providers]
        steps, reference = self.steps(len(feature_map)), providers[1].name
        return Case(subject, size.name, sizes, held, reference, truth, steps, DTYPE, layout)

    def steps(self, samples: int) -> list[Cost]:
        """Minimal work of the scores."""
        return list(self.size.score(samples, DTYPE.itemsize, DTYPE.itemsize).values())

    def _features(self, scale: Tensor) -> oe.FeatureCache:
        size, generator = self.size, torch.Generator().manual_seed(1)
        noise = torch.randn((2 * size.anchors, size.channels), generator=generator)
        features = (scale * (1 + 0.3 * noise)).relu_()
        maximum = features * (1 + 3 * torch.rand(features.shape, generator=generator))
        # Several of each class, also where there are more classes than samples.
        labels = torch.arange(len(features)) % min(size.classes, size.anchors // 4)
        return oe.FeatureCache.from_features(features, labels, maximum=maximum)


def subspace_settings(names: Sequence[str], size: Workload) -> dict[str, dict[str, int]]:
    """Number of components and most anchors of every detector that reads gradient coordinates."""
    chosen = {"n_components": size.components, "max_anchors": size.anchors}
    return {name: chosen for name in names if name.startswith("low_dim_gradient")}


def forward_cost(model: nn.Module, images: Tensor) -> Cost:
    """Products and convolutions of a forward; its weights and images read once, nothing in between."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(images.to("meta"))
    return Cost(counter.get_total_flops(), sum(part.nbytes for part in (*model.parameters(), images)))


@cache
def engines() -> Engines:
    """Around a ResNet-50, fitted once a run; skips the case where torchvision is not installed."""
    try:
        import_beside_torch("torchvision")
        model = import_beside_torch("torchvision.models").resnet50()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    anchors, components = (4096, 512) if DEVICE.type == "cuda" else (1000, 256)
    size = WORKLOADS["R50"]._replace(anchors=anchors, components=components)
    return Engines(size, model, nn.Sequential(*list(model.children())[:-2]), (3, 224, 224))


def around_a_forward(make: Callable[[], Engines], samples: int) -> Case:
    """The forward alone, forward and scores, and the scores alone: of a map, and held to the features and logits of its forward."""
    made = make()
    images = made.images(samples)
    feature_map, forward = made.feature_map(images), forward_cost(made.model, images)
    captured = made.default.scorer.run(images)
    both = [forward, *made.steps(samples)]
    providers = [
        Provider(OURS, lambda: made.default.score(images), tolerance=TOLERANCE, steps=both, graph=False),
        Provider(FORWARD, lambda: made.model(images), tolerance=None, steps=[forward]),
        Provider(ALONE, lambda: made.default.score_features(feature_map), tolerance=TOLERANCE),
        Provider(COMPARED, lambda: made.default.scorer.score_captured(images, captured), tolerance=TOLERANCE),
        Provider(ALL, lambda: made.all.score(images), tolerance=TOLERANCE, graph=False, steps=both),
    ]
    return made.case("engine around a forward", feature_map, providers, "channels_last")


def memory(make: Callable[[], Engines], samples: int) -> Case:
    """Scores alone of one large batch: what matters is the memory beyond map, head and fitted state."""
    made = make()
    feature_map = Operands(made.size, samples, DTYPE, DEVICE).feature_map("rows")
    providers = [
        Provider(ALL, lambda: made.all.score_features(feature_map), tolerance=TOLERANCE),
        Provider(ALONE, lambda: made.default.score_features(feature_map), tolerance=TOLERANCE),
    ]
    return made.case("scores of a large batch", feature_map, providers, "rows")


def cases() -> Iterator[Any]:
    """ResNet-50 at 1 to 32 images, on a GPU 256; a batch of 1024 maps."""
    quick = (1, 256) if DEVICE.type == "cuda" else (1, 4)
    for samples in (*quick, 32):
        name = f"around a ResNet-50 N={samples}"
        yield planned(around_a_forward, engines, samples, name=name, quick=samples in quick)
    yield planned(memory, engines, 1024, name="large batch N=1024")


@pytest.mark.parametrize("make", list(cases()))
def test_engine(make: Callable[[], Case], measured: Callable[[Callable[[], Case]], None]) -> None:
    measured(make)
