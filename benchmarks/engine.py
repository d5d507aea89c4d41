"""What does scoring add to a forward of torchvision's ResNet-50, in time and memory?"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ood_engine as oe
from ood_kernels.workloads import WORKLOADS, Cost, Workload

from .cases import OURS, Case, Planned, Provider
from .clocks import DEVICE
from .kernels import TOLERANCES
from .peers import import_beside_torch

FORWARD, ALONE, ALL = "forward alone", f"{OURS}, scores alone", f"{OURS}, all detectors"
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
_IMAGE = (3, 224, 224)


class Engines:
    """A ResNet-50 with random weights, and engines around it: with the default detectors, with all, and with all in fp64.

    They are fitted from random features at the scale of the model's own, so that the subspace has the anchors of a real one
    without the forwards that real features take.

    Args:
        size: channels, classes, anchors and components; the map's height and width follow from the images.
        make: makes the model.
        trunk: what of the model makes the map.
        image: [C, H, W] of an image.
    """

    def __init__(
        self,
        size: Workload,
        make: Callable[[], nn.Module],
        trunk: Callable[[Any], nn.Module],
        image: tuple[int, int, int],
    ) -> None:
        torch.manual_seed(0)
        self.size, self.make, self._trunk, self._image = size, make, trunk, image
        self.model = make().eval().to(DEVICE, DTYPE)
        for weight in self.model.parameters():
            if weight.ndim == 4:
                weight.data = weight.contiguous(memory_format=torch.channels_last)
        cached, images = self._features(), self.images(2)
        self.default, self.all = (
            oe.Engine(self.model, names, settings=subspace_settings(names, size)).fit_features(cached, images)
            for names in (oe.engine.DEFAULT_DETECTORS, oe.available_detectors())
        )
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # That fp32 scores differ a little is what they are compared with fp64 for.
            warnings.simplefilter("ignore", oe.OodEngineWarning)
            path = Path(folder) / "state.safetensors"
            self.all.save(path)
            self.exact = oe.Engine.load(path, copy.deepcopy(self.model).double())

    def images(self, samples: int) -> Tensor:
        """Random images [N, C, H, W], channels_last."""
        images = torch.randn((samples, *self._image), generator=torch.Generator().manual_seed(samples))
        return images.to(DEVICE, DTYPE, memory_format=torch.channels_last)

    def feature_map(self, images: Tensor) -> Tensor:
        """What the model makes of images before it pools."""
        with torch.no_grad():
            feature_map: Tensor = self._trunk(self.model)(images)
        return feature_map

    def _features(self) -> oe.FeatureCache:
        size, generator = self.size, torch.Generator().manual_seed(1)
        scale = self.feature_map(self.images(8)).float().mean((0, 2, 3)).cpu()
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


def held_to(exact: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """Check: scores in the order of the exact ones; what an engine was not asked for it has not got wrong."""
    return lambda found: [found.get(name, right) for name, right in exact.items()]


def forward_cost(make: Callable[[], nn.Module], shape: Sequence[int], itemsize: int) -> Cost:
    """Products and convolutions of a forward; its weights and images read once, its logits written, nothing in between."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model, batch = make().eval(), torch.empty(*shape)
        logits = model(batch)
    elements = sum(tensor.numel() for tensor in (*model.parameters(), batch, logits))
    return Cost(counter.get_total_flops(), elements * itemsize)


def resnet50() -> nn.Module:
    """torchvision's, with random weights; skips the case where it is not installed."""
    try:
        import_beside_torch("torchvision")
        model: nn.Module = import_beside_torch("torchvision.models").resnet50()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    return model


@cache
def engines(anchors: int, components: int) -> Engines:
    """Around a ResNet-50, fitted once a run."""
    size = WORKLOADS["R50"]._replace(anchors=anchors, components=components)
    return Engines(size, resnet50, lambda model: nn.Sequential(*list(model.children())[:-2]), _IMAGE)


def around_a_forward(made: Engines, samples: int) -> Case:
    """The forward alone, forward and scores, and the scores alone from the map that the forward made."""
    images, size = made.images(samples), made.size
    feature_map = made.feature_map(images)
    exact = made.exact.score_features(feature_map.double())
    held, tolerance = held_to(exact), TOLERANCES[DTYPE]
    size = size._replace(height=feature_map.shape[2], width=feature_map.shape[3])
    forward = forward_cost(made.make, images.shape, DTYPE.itemsize)
    scores = list(size.score(samples, DTYPE.itemsize, DTYPE.itemsize).values())

    def run() -> Any:
        with torch.no_grad():
            return made.model(images)

    note = f"forward and {len(exact)} detectors; work is that of the default ones"
    both = [forward, *scores]
    providers = [
        Provider(OURS, lambda: made.default.score(images), held, tolerance, steps=both, graph=False),
        Provider(
            FORWARD, run, tolerance=None, steps=[forward], note=f"images of {'x'.join(map(str, images.shape[1:]))}"
        ),
        Provider(ALONE, lambda: made.default.score_features(feature_map), held, tolerance),
        Provider(ALL, lambda: made.all.score(images), held, tolerance, steps=both, graph=False, note=note),
    ]
    sizes = {"N": samples, "D": size.channels, "C": size.classes, "H": size.height, "W": size.width}
    sizes |= {"n": size.anchors, "K": size.components}
    truth = [score.double() for score in exact.values()]
    return Case("engine around a forward", size.name, sizes, providers, FORWARD, truth, scores, DTYPE, "channels_last")


def memory(made: Engines, samples: int) -> Case:
    """Scores alone of one large batch: what matters is the memory beyond map, head and fitted state."""
    size = made.size
    feature_map = torch.randn((samples, size.channels, size.height, size.width)).relu_().to(DEVICE, DTYPE)
    few = made.exact.score_features(feature_map[:8].double())
    held = held_to(few)

    def score(engine: oe.Engine) -> Callable[[], Mapping[str, Tensor]]:
        return lambda: engine.score_features(feature_map)

    def check(found: Mapping[str, Tensor]) -> list[Tensor]:
        return held({name: score[:8] for name, score in found.items()})

    tolerance, truth = TOLERANCES[DTYPE], [score.double() for score in few.values()]
    providers = [
        Provider(name, score(engine), check, tolerance) for name, engine in ((ALONE, made.default), (ALL, made.all))
    ]
    sizes = {"N": samples, "D": size.channels, "C": size.classes, "n": size.anchors, "K": size.components}
    steps = list(size.score(samples, DTYPE.itemsize, DTYPE.itemsize).values())
    return Case("scores of a large batch", size.name, sizes, providers, ALONE, truth, steps, DTYPE, "rows")


def cases() -> Iterator[Planned]:
    """ResNet-50 at 1, 8 and 64 images; a batch of 1024 maps."""
    anchors, components = (4096, 512) if DEVICE.type == "cuda" else (1000, 256)

    def around(samples: int) -> Case:
        return around_a_forward(engines(anchors, components), samples)

    for samples in (1, 8, 64):
        yield Planned(f"around a ResNet-50 N={samples}", partial(around, samples), samples < 64)
    yield Planned("large batch N=1024", lambda: memory(engines(anchors, components), 1024), False)


@pytest.mark.parametrize("planned", list(cases()), ids=str)
def test_engine(planned: Planned, measured: Callable[[Case], None]) -> None:
    measured(planned.build())
