"""The whole engine around a real model's forward: what scoring adds to a batch that is classified anyway."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ood_kernels.workloads import WORKLOADS, Cost, Workload

from ...demo import SmallCNN
from ...detectors import available_detectors
from ...engine import DEFAULT_DETECTORS, Engine
from ...errors import StateDriftWarning
from ...features.cache import FeatureCache
from ..cases import OURS, Case, Effort, Plan, Provider
from ..operands import tolerance_of
from ..resnet50 import ResNet50

__all__ = ["ALL_DETECTORS", "ALONE", "FORWARD", "forward_cost", "held_to", "load_exact", "plans", "subspace_settings"]

FORWARD, ALONE, ALL_DETECTORS = "forward alone", f"{OURS}, scores alone", f"{OURS}, all detectors"
"""Providers beside `OURS`, which is forward and scores."""

_SUBJECT = "engine around a forward"
_SUBSPACES = ((256, 128), (1000, 256), (4096, 512))
"""(anchors, components): of a quick run, of a full run on a CPU or a quick one on a GPU, and of a full one on a GPU."""


class _Model(NamedTuple):
    """A classifier with random weights, and what an engine around it is fitted with.

    Attributes:
        make: makes it.
        map_layer: name of the module whose output is the map.
        image: (channels, height, width).
        size: of map, head and basis.
    """

    make: Callable[[], nn.Module]
    map_layer: str
    image: tuple[int, int, int]
    size: Workload


def plans(effort: Effort) -> Iterator[Plan]:
    """The demo's small model and ResNet-50 along N; on a CPU a quick run gives the latter small images."""
    is_gpu = effort.device.type == "cuda"
    side = 64 if effort.is_quick and not is_gpu else 224
    anchors, components = _SUBSPACES[(not effort.is_quick) + is_gpu]
    small = Workload("SmallCNN", 64, 8, 8, classes=8, anchors=256, components=32)
    resnet50 = WORKLOADS["R50"]._replace(height=side // 32, width=side // 32, anchors=anchors, components=components)
    yield from _plans(
        effort, _Model(SmallCNN, "body", (1, 8, 8), small), (1, 4, 16) if effort.is_quick else (1, 4, 16, 64)
    )
    yield from _plans(effort, _Model(ResNet50, "features", (3, side, side), resnet50), (1, 4, 16))


def _plans(effort: Effort, model: _Model, batches: Sequence[int]) -> Iterator[Plan]:
    size, dtype = model.size, torch.bfloat16 if effort.device.type == "cuda" else torch.float32
    fixed = {"D": size.channels, "C": size.classes, "H": size.height, "W": size.width}
    fixed |= {"n": size.anchors, "K": size.components}
    engines = cache(partial(_Engines, model, dtype, effort.device))
    for samples in batches:
        build = partial(_build, engines, samples)
        yield Plan(_SUBJECT, size.name, {"N": samples, **fixed}, build, dtype, "channels_last", ("N",), seconds=0.5)


class _Engines:
    """A model and the engines around it: with the default detectors, with all, and with all in fp64.

    They are fitted from random features at the scale of the model's own, so that the subspace has the anchors of a real one
    without the forwards that real features take.
    """

    def __init__(self, model: _Model, dtype: torch.dtype, device: torch.device) -> None:
        self.kind, self.dtype, self.device = model, dtype, device
        torch.manual_seed(0)
        self.model = model.make().eval().to(device, dtype)
        for weight in self.model.parameters():
            if weight.ndim == 4:
                weight.data = weight.contiguous(memory_format=torch.channels_last)
        feature_cache, images = self._features(), self.images(2)
        self.default = self._engine(DEFAULT_DETECTORS).fit_features(feature_cache, images)
        self.all = self._engine(available_detectors()).fit_features(feature_cache, images)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            self.all.save(path)
            self.exact = load_exact(path, self.model)

    def images(self, samples: int) -> Tensor:
        """Random images [N, C, H, W], channels_last."""
        generator = torch.Generator().manual_seed(samples)
        images = torch.randn((samples, *self.kind.image), generator=generator)
        return images.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)

    def feature_map(self, images: Tensor) -> Tensor:
        """What the model makes of images before it pools."""
        with torch.no_grad():
            feature_map: Tensor = self.model.get_submodule(self.kind.map_layer)(images)
        return feature_map

    def _features(self) -> FeatureCache:
        size, generator = self.kind.size, torch.Generator().manual_seed(1)
        scale = self.feature_map(self.images(16)).float().mean((0, 2, 3)).cpu()
        count = 2 * size.anchors
        features = (scale * (1 + 0.3 * torch.randn((count, size.channels), generator=generator))).relu_()
        maximum = features * (1 + 3 * torch.rand((count, size.channels), generator=generator))
        # Several of each class, also where there are more classes than samples.
        labels = torch.arange(count) % min(size.classes, size.anchors // 4)
        return FeatureCache.from_features(features, labels, maximum=maximum)

    def _engine(self, names: Sequence[str]) -> Engine:
        size = self.kind.size
        return Engine(self.model, names, settings=subspace_settings(names, size.components, size.anchors))


def _build(engines: Callable[[], _Engines], samples: int) -> Case:
    made = engines()
    images = made.images(samples)
    feature_map, tolerance = made.feature_map(images), tolerance_of(made.dtype)
    exact = made.exact.score_features(feature_map.double())
    forward, scores = _costs(made.kind, samples, made.dtype.itemsize)
    both = Cost(forward.flops + scores.flops, forward.bytes + scores.bytes)

    def run_forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = made.model(images)
        return logits

    held = held_to(exact)
    image = "×".join(map(str, made.kind.image))
    providers = [
        Provider(FORWARD, run_forward, tolerance=None, captures=True, cost=forward, note=f"images of {image}"),
        Provider(OURS, lambda: made.default.score(images), held, tolerance, cost=both, note="forward and scores"),
        Provider(ALONE, lambda: made.default.score_features(feature_map), held, tolerance, captures=True),
        Provider(
            ALL_DETECTORS,
            lambda: made.all.score(images),
            held,
            tolerance,
            cost=both,
            note=f"forward and {len(exact)} detectors; bytes and flops are those of the default ones",
        ),
    ]
    return Case(providers, [score.double() for score in exact.values()], scores)


def _costs(model: _Model, samples: int, itemsize: int) -> tuple[Cost, Cost]:
    steps = model.size.score(samples, itemsize, itemsize).values()
    scores = Cost(sum(step.flops for step in steps), sum(step.bytes for step in steps))
    return forward_cost(model.make, (samples, *model.image), itemsize), scores


def load_exact(state: Path, model: nn.Module) -> Engine:
    """The engine of a state file around a copy of the model in fp64."""
    with warnings.catch_warnings():
        # That fp32 scores differ a little is what they are held to fp64 for.
        warnings.simplefilter("ignore", StateDriftWarning)
        return Engine.load(state, copy.deepcopy(model).double())


def held_to(exact: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """Check: scores in the order of the exact ones; what an engine was not asked for it has not got wrong."""
    return lambda found: [found.get(name, right) for name, right in exact.items()]


def subspace_settings(names: Sequence[str], components: int, anchors: int) -> dict[str, dict[str, int]]:
    """Settings of an engine: number of components and most anchors for every detector that reads gradient coordinates."""
    chosen = {"n_components": components, "max_anchors": anchors}
    return {name: chosen for name in names if name.startswith("low_dim_gradient")}


def forward_cost(make: Callable[[], nn.Module], images: tuple[int, ...], itemsize: int) -> Cost:
    """Products and convolutions of a forward; its weights and images read once, its logits written, nothing in between."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model, batch = make().eval(), torch.empty(images)
        logits = model(batch)
    elements = sum(tensor.numel() for tensor in (*model.parameters(), batch, logits))
    return Cost(counter.get_total_flops(), elements * itemsize)
