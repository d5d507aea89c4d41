"""Fitting: a gradient subspace from its anchors, the statistics of a cache of features, and a whole engine from such a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn

import ood_kernels as ok
from ood_kernels.workloads import WORKLOADS, Cost

from ...detectors import available_detectors
from ...engine import DEFAULT_DETECTORS, Engine
from ...features.cache import FeatureCache
from ...subspace import DualBasis, FitStatistics, gather
from ..cases import OURS, Case, Effort, Plan, Provider
from ..rivals import LIBRARY
from .engine import ALL_DETECTORS, held_to, subspace_settings

__all__ = ["SCIKIT_LEARN", "plans"]

SCIKIT_LEARN = "scikit-learn"

_MOST_GRADIENTS = {"quick": 2**21, "full": 2**23}
"""Most numbers in the gradients of the anchors for them to be formed at all."""
_HELD = 16
"""Samples whose coordinates are compared."""
_LEADING = 4
"""Components that are compared one by one; beyond, two of nearly equal variance may be rotated into each other."""
_ENGINE_ANCHORS = 512
_SECONDS = 0.5
"""A fit is done once: fewer calls of it will do."""


def plans(effort: Effort) -> Iterator[Plan]:
    """Each along n at a ResNet-18's sizes, the subspace along K too; in full also at a ResNet-50's."""
    anchors = (128, 512, 1024)
    yield from _plans(effort, "fit dual basis", _build_basis, "R18", "n", anchors, {"K": 64})
    yield from _plans(effort, "fit dual basis", _build_basis, "R18", "K", (16, 64, 256), {"n": 512})
    samples = (512, 2048, 8192) if effort.is_quick else (2048, 8192, 32768)
    yield from _plans(effort, "gather statistics", _build_statistics, "R18", "n", samples, {})
    samples = (128, 512, 1024) if effort.is_quick else (256, 512, 2048)
    yield from _plans(effort, "fit whole engine", _build_engine, "R18", "n", samples, {"K": 32})
    if not effort.is_quick:
        yield from _plans(effort, "fit dual basis", _build_basis, "R50", "n", (256, 1024, 2048), {"K": 200})
        yield from _plans(effort, "gather statistics", _build_statistics, "R50", "n", (2048,), {})


def _plans(
    effort: Effort,
    subject: str,
    build: Callable[[Effort, Mapping[str, int]], Case],
    workload: str,
    axis: str,
    points: Sequence[int],
    others: Mapping[str, int],
) -> Iterator[Plan]:
    known = WORKLOADS[workload]
    for point in points:
        sizes = {"D": known.channels, "C": known.classes, **others, axis: point}
        sweeps = (axis,) if len(points) > 1 else ()
        yield Plan(subject, workload, sizes, partial(build, effort, sizes), sweeps=sweeps, seconds=_SECONDS)


class _Samples:
    """A head, and ID samples of it: rectified mixtures of 64 directions, whose gradients have a decaying spectrum.

    Args:
        count: n.
        sizes: D and C.
        device: of everything.
    """

    def __init__(self, count: int, sizes: Mapping[str, int], device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(0)
        classes, features = sizes["C"], sizes["D"]
        self._mixing = self._normal(64, features) * torch.linspace(1, 0.1, 64)[:, None] / 4
        weight = self._normal(classes, features) * 3 / features**0.5
        self.head = ok.Head(weight.to(device), self._normal(classes).to(device))
        self.h, self.held_h = self._features(count).to(device), self._features(_HELD).to(device)
        self.p, self.held_p = softmax(self.head, self.h), softmax(self.head, self.held_h)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _features(self, count: int) -> Tensor:
        noise = 0.05 * self._normal(count, self._mixing.shape[1])
        return (self._normal(count, 64) @ self._mixing + noise + 0.4).relu_()


def softmax(head: ok.Head, h: Tensor) -> Tensor:
    """Of the head at features h, in their dtype: the gradient of the energy by the logits."""
    assert head.bias is not None
    return F.linear(h, head.weight.to(h.dtype), head.bias.to(h.dtype)).softmax(1)


def _build_basis(effort: Effort, sizes: Mapping[str, int]) -> Case:
    anchors, components = sizes["n"], sizes["K"]
    samples = _Samples(anchors, sizes, effort.device)
    p, h = samples.p, samples.h

    def check(basis: DualBasis) -> list[Tensor]:
        return _without_signs(basis.project(samples.held_p, samples.held_h))

    fitted = Provider(OURS, lambda: DualBasis.fit(p, h, n_components=components, max_anchors=anchors), check)
    providers = [fitted]
    if anchors * sizes["C"] * (sizes["D"] + 1) <= _MOST_GRADIENTS[effort.name]:
        providers.append(_scikit_learn(samples, components))
    truth = _without_signs(_principal_coordinates(samples, components))
    return Case(providers, truth, _basis_cost(sizes))


def _scikit_learn(samples: _Samples, components: int) -> Provider:
    """The recipe of arXiv 2310.17163: PCA of gradients that are formed; these in closed form, which is kinder than autograd."""
    p, h, held = (part.cpu().numpy() for part in (samples.p, samples.h, _gradients(samples.held_p, samples.held_h)))

    def fit() -> PCA:
        gradients = _gradients(torch.from_numpy(p), torch.from_numpy(h)).numpy()
        return PCA(components, svd_solver="full", copy=False).fit(gradients)

    def check(pca: PCA) -> list[Tensor]:
        return _without_signs(torch.from_numpy(pca.transform(held)).to(samples.h.device))

    note = "gradients of the anchors formed in closed form, and a full singular value decomposition"
    return Provider(SCIKIT_LEARN, fit, check, 1e-3, uses_numpy=True, note=note)


def _gradients(p: Tensor, h: Tensor) -> Tensor:
    """Gradients of the energy by weight and bias, [n, C·D̃]."""
    return (p[:, :, None] * F.pad(h, (0, 1), value=1.0)[:, None, :]).flatten(1)


def _principal_coordinates(samples: _Samples, components: int) -> Tensor:
    """Coordinates of the held-out samples from the centred Gram matrix of the anchors' gradients, in fp64."""
    p, held_p = samples.p.double(), samples.held_p.double()
    extended, held = (F.pad(part.double(), (0, 1), value=1.0) for part in (samples.h, samples.held_h))
    gram, across = (p @ p.T) * (extended @ extended.T), (held_p @ p.T) * (held @ extended.T)
    rows = gram.mean(0)
    values, vectors = torch.linalg.eigh(gram - rows[:, None] - rows + rows.mean())
    leading = vectors[:, -components:].flip(1) / values[-components:].flip(0).sqrt()
    # The eigenvectors sum to 0, so that what is the same for all anchors drops out.
    return (across - rows) @ leading


def _without_signs(coordinates: Tensor) -> list[Tensor]:
    """What two bases of one subspace have in common: leading coordinates up to sign, and all inner products."""
    return [coordinates[:, :_LEADING].abs(), coordinates @ coordinates.T]


def _basis_cost(sizes: Mapping[str, int]) -> Cost:
    """Gram matrix 2·n²·(C + D̃), Householder's reduction 4/3·n³, K eigenvectors 2·n²·K; anchors read, they and α written."""
    classes, width, anchors, components = sizes["C"], sizes["D"] + 1, sizes["n"], sizes["K"]
    flops = 2 * anchors**2 * (classes + width + components) + 4 * anchors**3 // 3
    return Cost(flops, 4 * anchors * (2 * (classes + width - 1) + components))


def _build_statistics(effort: Effort, sizes: Mapping[str, int]) -> Case:
    samples = _Samples(sizes["n"], sizes, effort.device)
    head, h = samples.head, samples.h
    cache = FeatureCache.from_features(h.cpu())

    def check(statistics: FitStatistics) -> list[Tensor]:
        return [statistics.gradient_sum, statistics.cotangent_moment, statistics.feature_moment]

    def products() -> list[Tensor]:
        extended, p = F.pad(h.double(), (0, 1), value=1.0), softmax(head, h.double())
        return [(left.T @ right).cpu() for left, right in ((p, extended), (p, p), (extended, extended))]

    return Case(
        [
            Provider(OURS, lambda: gather(cache, head), check, note="in blocks, with anchors"),
            Provider(LIBRARY, products, note="all samples at once in fp64, no anchors"),
        ],
        products(),
        _statistics_cost(sizes),
    )


def _statistics_cost(sizes: Mapping[str, int]) -> Cost:
    """Logits and three sums: 2·n·(C·D + C·D̃ + C² + D̃²); features read, sums written in fp64."""
    classes, features, count = sizes["C"], sizes["D"], sizes["n"]
    sums = classes * (features + 1) + classes**2 + (features + 1) ** 2
    return Cost(2 * count * (classes * features + sums), 4 * count * features + 8 * sums)


def _build_engine(effort: Effort, sizes: Mapping[str, int]) -> Case:
    kinds: dict[str, Sequence[str]] = {OURS: DEFAULT_DETECTORS}
    if not effort.is_quick:
        kinds[ALL_DETECTORS] = available_detectors()
    samples = _Samples(sizes["n"], sizes, effort.device)
    features, labels = samples.h.cpu(), samples.p.argmax(1).cpu()
    maximum = features * torch.linspace(1, 4, len(features))[:, None]
    cache = FeatureCache.from_features(features, labels, maximum=maximum)
    # The same anchors, which are chosen by fingerprint.
    wide_cache = FeatureCache.from_features(
        features.double(), labels, maximum=maximum.double(), fingerprints=cache.rows.fingerprints
    )
    feature_map = samples.held_h[:, :, None, None].expand(-1, -1, 2, 2).contiguous()
    exact = _engine(kinds.get(ALL_DETECTORS, DEFAULT_DETECTORS), samples.head, sizes, torch.float64).fit_features(
        wide_cache, feature_map.double()
    )
    right = exact.score_features(feature_map.double())
    held = held_to(right)

    def fit(names: Sequence[str]) -> Engine:
        return _engine(names, samples.head, sizes, torch.float32).fit_features(cache, feature_map)

    def check(engine: Engine) -> list[Tensor]:
        return held(engine.score_features(feature_map))

    note = f"from features, at most {_ENGINE_ANCHORS} anchors"
    providers = [Provider(name, partial(fit, names), check, 1e-3, note=note) for name, names in kinds.items()]
    return Case(providers, [score.double() for score in right.values()])


def _engine(names: Sequence[str], head: ok.Head, sizes: Mapping[str, int], dtype: torch.dtype) -> Engine:
    """An engine around nothing but a pooling and a head: what it is fitted from is there already."""
    assert head.bias is not None
    linear = nn.Linear(sizes["D"], sizes["C"])
    linear.weight.data, linear.bias.data = head.weight.to(dtype), head.bias.to(dtype)
    model = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).eval()
    return Engine(model, names, settings=subspace_settings(names, sizes["K"], _ENGINE_ANCHORS))
