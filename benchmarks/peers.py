"""pytorch-ood and oodeel beside this package: imported only when asked for, made and fitted by their own public methods.

They come at pinned versions, with --no-deps (constraints/peers.txt): oodeel 0.4.0 asks for NumPy below 2 and runs with NumPy 2 as
well. torch-uncertainty 0.13 has energy, MSP and maximum logit alone and needs Lightning, frouros 0.9 detects drift of data sets,
OpenOOD is not on the package index.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .cases import MissingProviderError, Provider, first_line

__all__ = ["FRACTION", "METHODS", "OODEEL", "PYTORCH_OOD", "Scene", "import_beside_torch", "import_peer", "peer"]

PYTORCH_OOD, OODEEL = "pytorch-ood", "oodeel"
FRACTION = 0.9
"""Of the activations below ReAct's threshold, of the weights that DICE masks."""

# oodeel imports its data handler when a detector is fitted.
_MODULES = {
    PYTORCH_OOD: ("pytorch_ood", "pytorch_ood.detector"),
    OODEEL: ("oodeel", "oodeel.methods", "oodeel.datasets.torch_data_handler"),
}
_OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_MOST_DICE_ELEMENTS = 2**29
_declared: list[torch.library.Library] = []


class Scene(NamedTuple):
    """What every provider of a case is given.

    Attributes:
        features: [N, D], to be scored.
        weight: [C, D] of the head.
        bias: [C] of the head.
        fit_features: [n, D] of ID samples.
        labels: [n], every class at least once.
        neighbours: k of KNN.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor
    fit_features: Tensor
    labels: Tensor
    neighbours: int = 50

    def linear(self) -> nn.Linear:
        """The head as a module over the same weights."""
        head = nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta")
        head.weight, head.bias = nn.Parameter(self.weight), nn.Parameter(self.bias)
        return head


def import_peer(name: str) -> ModuleType:
    """The top module of a peer, with the parts that the benchmarks use imported.

    Raises:
        MissingProviderError: it, or a library that it imports, is not installed or does not import here.
    """
    try:
        import_beside_torch("torchvision")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modules = [importlib.import_module(module) for module in _MODULES[name]]
            return modules[0]
    except Exception as error:
        raise MissingProviderError(name, f"{first_line(error)}; `make bench` installs it") from error


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
    """Provider: a peer's detector, fitted; its scores are turned to ours, higher = more in-distribution.

    Raises:
        MissingProviderError: it is not installed.
    """
    module = import_peer(name)
    with torch.enable_grad():
        return METHODS[name][method](module.detector if name == PYTORCH_OOD else module.methods, scene)


Make = Callable[[Any, Scene], Provider]


def _provider(call: Callable[[], Any], name: str = PYTORCH_OOD, scale: float = -1.0, **fields: Any) -> Provider:
    fields.setdefault("check", lambda scores: scale * torch.as_tensor(scores).double())
    return Provider(name, call, graph=False, **fields)


def _of_logits(name: str) -> Make:
    def make(detectors: Any, scene: Scene) -> Provider:
        detector = getattr(detectors, name)(scene.linear().requires_grad_(False))
        return _provider(lambda: detector.predict(scene.features))

    return make


def _gradnorm(detectors: Any, scene: Scene) -> Provider:
    detector = detectors.GradNorm(scene.linear(), param_filter=lambda name: name == "weight")
    return _provider(lambda: detector.predict(scene.features), note="vmap over 32 samples at a time")


def _react(detectors: Any, scene: Scene) -> Provider:
    detector = detectors.ReAct(None, scene.linear(), percentile=FRACTION)
    detector.fit_feature_maps(scene.fit_features, scene.labels)
    return _provider(lambda: detector.predict_feature_maps(scene.features))


def _dice(detectors: Any, scene: Scene) -> Provider:
    detector = detectors.DICE(None, scene.weight, scene.bias, FRACTION).to(scene.weight.device)
    detector.fit_features(scene.fit_features, scene.labels)
    features = scene.features[: max(1, _MOST_DICE_ELEMENTS // scene.weight.numel())]
    samples = None if len(features) == len(scene.features) else len(features)
    return _provider(lambda: detector.predict_features(features), samples=samples, note="holds N·C·D numbers at once")


def _knn(detectors: Any, scene: Scene) -> Provider:
    detector = detectors.KNN(None, k=scene.neighbours)
    detector.fit_features(scene.fit_features.cpu(), scene.labels.cpu())

    def similarity(distance: Any) -> Tensor:
        return 1 - torch.as_tensor(distance).double().square() / 2

    return _provider(lambda: detector.predict_features(scene.features), check=similarity, uses_numpy=True)


def _mahalanobis(detectors: Any, scene: Scene) -> Provider:
    detector = detectors.Mahalanobis(None)
    detector.fit_features(scene.fit_features, scene.labels)
    note = "half the distance, with the sum of the outer products for their mean"
    scale = -2.0 * len(scene.fit_features)
    return _provider(lambda: detector.predict_features(scene.features), scale=scale, note=note)


def _oodeel(make: Callable[[Any, Scene], Any], scale: float = -1.0, **fields: Any) -> Make:
    """The features go in as the model's input: it is nothing, whose output oodeel catches, and the head."""

    def fitted(methods: Any, scene: Scene) -> Provider:
        detector, model = make(methods, scene), nn.Sequential(nn.Identity(), scene.linear())
        batches = DataLoader(TensorDataset(scene.fit_features, scene.labels), batch_size=1000)
        layers = {"feature_layers_id": [0]} if detector.requires_internal_features else {}
        # A detector that needs no fit would still run the model over the data.
        needed = batches if detector.requires_to_fit_dataset or detector.use_react else None
        detector.fit(model, needed, **layers)
        return _provider(lambda: detector.score(scene.features)[0], OODEEL, scale, **fields)

    return fitted


METHODS: dict[str, dict[str, Make]] = {
    PYTORCH_OOD: {
        "energy": _of_logits("EnergyBased"),
        "msp": _of_logits("MaxSoftmax"),
        "max_logit": _of_logits("MaxLogit"),
        "gradnorm": _gradnorm,
        "react": _react,
        "dice": _dice,
        "knn": _knn,
        "mahalanobis": _mahalanobis,
    },
    OODEEL: {
        "energy": _oodeel(lambda methods, _: methods.Energy(), uses_numpy=True),
        "msp": _oodeel(lambda methods, _: methods.MLS(output_activation="softmax")),
        "max_logit": _oodeel(lambda methods, _: methods.MLS()),
        "react": _oodeel(lambda methods, _: methods.Energy(use_react=True, react_quantile=FRACTION), uses_numpy=True),
        "knn": _oodeel(
            lambda methods, scene: methods.DKNN(nearest=scene.neighbours),
            uses_numpy=True,
            check=lambda squared: 1 - torch.as_tensor(squared).double() / 2,
        ),
        "mahalanobis": _oodeel(lambda methods, _: methods.Mahalanobis(eps=0.0), scale=-2.0, note="half the distance"),
    },
}
"""Peer → method → maker of the provider."""
