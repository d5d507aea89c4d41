"""pytorch-ood and oodeel beside this package: imported only when asked for, made and fitted by their own public methods.

They come with --no-deps (constraints/peers.txt): oodeel 0.4.0 asks for NumPy below 2 and runs with NumPy 2 as well.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .clocks import DEVICE, Call
from .common import Provider, first_line

PYTORCH_OOD, OODEEL = "pytorch-ood", "oodeel"
FRACTION = 0.9
"""Of the activations below ReAct's threshold, of the weights that DICE masks."""

# oodeel imports its data handler when a detector is fitted.
_MODULES = {
    PYTORCH_OOD: ("pytorch_ood.detector",),
    OODEEL: ("oodeel.methods", "oodeel.datasets.torch_data_handler"),
}
_OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_declared: list[torch.library.Library] = []


class Scene(NamedTuple):
    """Features to be scored [N, D], a head [C, D] and [C], features and labels of n ID samples, and KNN's k."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    fit_features: Tensor
    labels: Tensor
    neighbours: int = 50

    def linear(self) -> nn.Linear:
        """The head as a module over the same weights."""
        head = nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta").requires_grad_(False)
        head.weight, head.bias = nn.Parameter(self.weight), nn.Parameter(self.bias)
        return head


def import_beside_torch(name: str) -> ModuleType:
    """Import torchvision, or a library that imports it, beside a torch of another build.

    torchvision's C++ operators are missing there, and its own import ends where it refers to them. No classifier runs them, so
    that their names are declared is enough.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (RuntimeError, AttributeError, OSError):
            if not _declared:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in (*_OPERATORS, *(f"_{known}_backward" for known in _OPERATORS)):
                    library.define(f"{operator}(Tensor x) -> Tensor")
                _declared.append(library)
            return importlib.import_module(name)


def peer(name: str, method: str, scene: Scene) -> Provider:
    """Provider: a peer's detector, fitted; `missing` where it cannot be imported."""
    try:
        _, detectors, *_ = [import_beside_torch(module) for module in ("torchvision", *_MODULES[name])]
    except Exception as error:
        return Provider(name, missing=f"{first_line(error)}; `make bench` installs it")
    to_ours = _TO_OURS.get((name, method), lambda scores, _: -scores)
    with torch.enable_grad():
        call = METHODS[name][method](detectors, scene)
    return Provider(name, call, lambda found: to_ours(torch.as_tensor(found).double(), scene), graph=False)


def _fitted(detector: Any, scene: Scene, kind: str = "features", device: str | None = None) -> Call:
    """Of pytorch-ood."""
    getattr(detector, f"fit_{kind}")(scene.fit_features.to(device), scene.labels.to(device))
    return partial(getattr(detector, f"predict_{kind}"), scene.features)


def _oodeel(detector: Any, scene: Scene) -> Call:
    """The features go in as the model's input: it is nothing, whose output oodeel catches, and the head."""
    model = nn.Sequential(nn.Identity(), scene.linear())
    batches = DataLoader(TensorDataset(scene.fit_features, scene.labels), batch_size=1000)
    layers = {"feature_layers_id": [0]} if detector.requires_internal_features else {}
    # A detector that needs no fit would still run the model over the data.
    needed = batches if detector.requires_to_fit_dataset or detector.use_react else None
    detector.fit(model, needed, **layers)
    return lambda: detector.score(scene.features)[0]


METHODS: dict[str, dict[str, Callable[[Any, Scene], Call]]] = {
    PYTORCH_OOD: {
        "energy": lambda its, scene: partial(its.EnergyBased(scene.linear()).predict, scene.features),
        "gradnorm": lambda its, scene: partial(
            its.GradNorm(scene.linear(), param_filter="weight".__eq__).predict, scene.features
        ),
        "react": lambda its, scene: _fitted(its.ReAct(None, scene.linear(), FRACTION), scene, "feature_maps"),
        "dice": lambda its, scene: _fitted(its.DICE(None, scene.weight, scene.bias, FRACTION).to(DEVICE), scene),
        "knn": lambda its, scene: _fitted(its.KNN(None, k=scene.neighbours), scene, device="cpu"),
        "mahalanobis": lambda its, scene: _fitted(its.Mahalanobis(None), scene),
    },
    OODEEL: {
        "energy": lambda its, scene: _oodeel(its.Energy(), scene),
        "react": lambda its, scene: _oodeel(its.Energy(use_react=True, react_quantile=FRACTION), scene),
        "knn": lambda its, scene: _oodeel(its.DKNN(nearest=scene.neighbours), scene),
        "mahalanobis": lambda its, scene: _oodeel(its.Mahalanobis(eps=0.0), scene),
    },
}
"""Peer → method → from its detectors and a scene to the scoring function of a fitted one."""

_TO_OURS: dict[tuple[str, str], Callable[[Tensor, Scene], Tensor]] = {
    (PYTORCH_OOD, "knn"): lambda distance, _: 1 - distance.square() / 2,
    (OODEEL, "knn"): lambda squared, _: 1 - squared / 2,
    # Half the distance, pytorch-ood's with the sum of the outer products for their mean.
    (PYTORCH_OOD, "mahalanobis"): lambda half, scene: -2 * len(scene.fit_features) * half,
    (OODEEL, "mahalanobis"): lambda half, _: -2 * half,
}
"""Where our score, higher = more in-distribution, is not just the negative of theirs."""
