"""Detectors of the peers on the head and the features of a case, made and fitted by their own public methods."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .cases import Provider
from .peers import OODEEL, PYTORCH_OOD, import_peer

__all__ = ["FRACTION", "OODEEL_METHODS", "PYTORCH_OOD_METHODS", "Scene", "oodeel", "pytorch_ood"]

FRACTION = 0.9
"""Of the activations below ReAct's threshold, of those that ASH prunes, of the weights that DICE masks."""

_MOST_DICE_ELEMENTS = 2**29
_BATCH = 1000
_FITTED_IN_FP32 = "fitted in fp32, which mixes directions about the cut: within 1e-3"

ToOurs = Callable[[Tensor], Tensor]


class Scene(NamedTuple):
    """What every provider of a case is given.

    Attributes:
        features: [N, D], to be scored.
        weight: [C, D] of the head.
        bias: [C] of the head.
        fit_features: [n, D] of ID samples.
        labels: [n], every class at least once.
        components: of ViM's principal subspace.
        neighbours: k of KNN.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor
    fit_features: Tensor
    labels: Tensor
    components: int
    neighbours: int

    def linear(self) -> nn.Linear:
        """The head as a module over the same weights."""
        head = nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta")
        head.weight, head.bias = nn.Parameter(self.weight), nn.Parameter(self.bias)
        return head


def pytorch_ood(method: str, scene: Scene) -> Provider:
    """Provider: pytorch-ood's detector, one of `PYTORCH_OOD_METHODS`.

    Raises:
        MissingProviderError: it is not installed.
    """
    return PYTORCH_OOD_METHODS[method](import_peer(PYTORCH_OOD).detector, scene)


def oodeel(method: str, scene: Scene) -> Provider:
    """Provider: oodeel's detector, one of `OODEEL_METHODS`.

    Raises:
        MissingProviderError: it is not installed.
    """
    return OODEEL_METHODS[method](import_peer(OODEEL).methods, scene)


def _from_pytorch_ood(call: Callable[[], Any], to_ours: ToOurs = torch.neg, **fields: Any) -> Provider:
    return Provider(PYTORCH_OOD, call, check=lambda scores: to_ours(scores.double()), **fields)


def _of_logits(name: str) -> Callable[[ModuleType, Scene], Provider]:
    def make(detectors: ModuleType, scene: Scene) -> Provider:
        detector = getattr(detectors, name)(scene.linear().requires_grad_(False))
        return _from_pytorch_ood(lambda: detector.predict(scene.features))

    return make


def _gradnorm(detectors: ModuleType, scene: Scene) -> Provider:
    detector = detectors.GradNorm(scene.linear(), param_filter=lambda name: name == "weight")
    return _from_pytorch_ood(lambda: detector.predict(scene.features), note="vmap over 32 samples at a time")


def _react(detectors: ModuleType, scene: Scene) -> Provider:
    detector = detectors.ReAct(None, scene.linear(), percentile=FRACTION)
    detector.fit_feature_maps(scene.fit_features, scene.labels)
    return _from_pytorch_ood(lambda: detector.predict_feature_maps(scene.features))


def _ash(detectors: ModuleType, scene: Scene) -> Provider:
    head = nn.Sequential(nn.Flatten(), scene.linear())
    detector = detectors.ASH(None, head, variant="ash-s", percentile=FRACTION)
    return _from_pytorch_ood(lambda: detector.predict_feature_maps(scene.features[:, :, None, None]))


def _dice(detectors: ModuleType, scene: Scene) -> Provider:
    detector = detectors.DICE(None, scene.weight, scene.bias, FRACTION).to(scene.weight.device)
    detector.fit_features(scene.fit_features, scene.labels)
    most = max(1, _MOST_DICE_ELEMENTS // scene.weight.numel())
    if len(scene.features) <= most:
        return _from_pytorch_ood(lambda: detector.predict_features(scene.features))
    features = scene.features[:most]
    note = f"the first {most} samples: it holds N·C·D numbers at once"
    return _from_pytorch_ood(lambda: detector.predict_features(features), samples=most, note=note)


def _vim(detectors: ModuleType, scene: Scene) -> Provider:
    detector = detectors.ViM(None, scene.components, scene.weight, scene.bias)
    detector.fit_features(scene.fit_features, scene.labels)
    return _from_pytorch_ood(lambda: detector.predict_features(scene.features), tolerance=1e-3, note=_FITTED_IN_FP32)


def _knn(detectors: ModuleType, scene: Scene) -> Provider:
    detector = detectors.KNN(None, k=scene.neighbours)
    detector.fit_features(scene.fit_features.cpu(), scene.labels.cpu())

    def similarity(distance: Tensor) -> Tensor:
        return 1 - distance.square() / 2

    return _from_pytorch_ood(lambda: detector.predict_features(scene.features), similarity, uses_numpy=True)


def _mahalanobis(detectors: ModuleType, scene: Scene) -> Provider:
    detector, samples = detectors.Mahalanobis(None), len(scene.fit_features)
    detector.fit_features(scene.fit_features, scene.labels)
    return _from_pytorch_ood(
        lambda: detector.predict_features(scene.features),
        lambda score: -2 * samples * score,
        note="half the distance, with the sum of the outer products for their mean",
    )


PYTORCH_OOD_METHODS: dict[str, Callable[[ModuleType, Scene], Provider]] = {
    "energy": _of_logits("EnergyBased"),
    "msp": _of_logits("MaxSoftmax"),
    "max_logit": _of_logits("MaxLogit"),
    "gradnorm": _gradnorm,
    "react": _react,
    "ash": _ash,
    "dice": _dice,
    "vim": _vim,
    "knn": _knn,
    "mahalanobis": _mahalanobis,
}
"""Method → maker of the provider."""


def _fitted(scene: Scene, detector: Any, to_ours: ToOurs = torch.neg, **fields: Any) -> Provider:
    """The features go in as the model's input: it consists of nothing, whose output oodeel catches, and the head."""
    model = nn.Sequential(nn.Identity(), scene.linear())
    batches = DataLoader(TensorDataset(scene.fit_features, scene.labels), batch_size=_BATCH)
    layers = {"feature_layers_id": [0]} if detector.requires_internal_features else {}
    # A detector that needs no fit would still run the model over the data.
    needed = batches if detector.requires_to_fit_dataset or detector.use_react else None
    detector.fit(model, needed, **layers)
    return Provider(
        OODEEL,
        lambda: detector.score(scene.features)[0],
        check=lambda scores: to_ours(torch.as_tensor(scores, dtype=torch.float64, device=scene.features.device)),
        **fields,
    )


OODEEL_METHODS: dict[str, Callable[[ModuleType, Scene], Provider]] = {
    "energy": lambda methods, scene: _fitted(scene, methods.Energy(), uses_numpy=True),
    "msp": lambda methods, scene: _fitted(scene, methods.MLS(output_activation="softmax")),
    "max_logit": lambda methods, scene: _fitted(scene, methods.MLS()),
    "react": lambda methods, scene: _fitted(
        scene, methods.Energy(use_react=True, react_quantile=FRACTION), uses_numpy=True
    ),
    "ash": lambda methods, scene: _fitted(
        scene, methods.Energy(use_ash=True, ash_percentile=FRACTION), uses_numpy=True
    ),
    "vim, origin at the mean": lambda methods, scene: _fitted(
        scene, methods.VIM(princ_dims=scene.components), tolerance=1e-3, note=_FITTED_IN_FP32
    ),
    "knn": lambda methods, scene: _fitted(
        scene, methods.DKNN(nearest=scene.neighbours), lambda squared: 1 - squared / 2, uses_numpy=True
    ),
    "mahalanobis": lambda methods, scene: _fitted(
        scene, methods.Mahalanobis(eps=0.0), lambda score: -2 * score, note="half the distance"
    ),
}
"""Method → maker of the provider. Its ViM takes the mean of the features for the origin, whatever `pca_origin` says."""
