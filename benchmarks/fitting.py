"""How long does fitting take, how does it grow, and is the form that the cost model chooses the faster one?"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ood_engine as oe
from ood_engine.subspace import DualBasis
from ood_kernels.workloads import WORKLOADS, Cost, Workload

from .clocks import DEVICE
from .common import OURS, PLAIN, Case, Provider, planned
from .engine import subspace_settings

CHOSEN, OTHER = f"{OURS}, chosen form", f"{OURS}, other form"
_HELD, _LEADING = 16, 4
"""Samples whose coordinates are compared; components compared one by one: beyond, two of nearly equal variance may be rotated."""


class Samples:
    """A head, and ID samples of it: rectified mixtures of 64 directions, whose gradients have a decaying spectrum."""

    def __init__(self, size: Workload, count: int) -> None:
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        mixing = normal(64, size.channels) * torch.linspace(1, 0.1, 64)[:, None] / 4
        self.weight, self.bias = normal(size.classes, size.channels) * 3 / size.channels**0.5, normal(size.classes)
        noise = 0.05 * normal(count + _HELD, size.channels)
        h = (normal(count + _HELD, 64) @ mixing + noise + 0.4).relu_()
        p = F.linear(h, self.weight, self.bias).softmax(1)
        (self.h, self.held_h), (self.p, self.held_p) = (part.to(DEVICE).split([count, _HELD]) for part in (h, p))


def without_signs(coordinates: Tensor) -> list[Tensor]:
    """What two bases of one subspace have in common: leading coordinates up to sign, and all inner products."""
    return [coordinates[:, :_LEADING].abs(), coordinates @ coordinates.T]


def dual_basis(size: Workload) -> Case:
    """PCA of gradients from their Gram matrix, beside all its eigenvectors in plain fp64."""
    anchors, components = size.anchors, size.components
    made = Samples(size, anchors)
    p, h = made.p, made.h

    def principal() -> Tensor:
        """Coordinates of the held-out samples in fp64; the eigenvectors sum to 0, so that what all anchors share drops out."""
        a, x, held_a, held_x = (part.double() for part in (p, h, made.held_p, made.held_h))
        gram, across = (a @ a.T) * (x @ x.T + 1), (held_a @ a.T) * (held_x @ x.T + 1)
        rows = gram.mean(0)
        values, vectors = torch.linalg.eigh(gram - rows[:, None] - rows + rows.mean())
        return (across - rows) @ (vectors[:, -components:].flip(1) / values[-components:].flip(0).sqrt())

    fit = partial(DualBasis.fit, p, h, n_components=components, max_anchors=anchors)
    providers = [
        Provider(OURS, fit, lambda basis: without_signs(basis.project(made.held_p, made.held_h)), graph=False),
        Provider(PLAIN, principal, without_signs, graph=False, note="all eigenvectors, in fp64"),
    ]
    # Gram matrix 2·n²·(C + D̃), Householder's reduction 4/3·n³, K eigenvectors 2·n²·K; anchors read, they and α written.
    flops = 2 * anchors**2 * (size.classes + size.channels + 1 + components) + 4 * anchors**3 // 3
    cost = Cost(flops, 4 * anchors * (2 * (size.classes + size.channels) + components))
    sizes = {"D": size.channels, "C": size.classes, "n": anchors, "K": components}
    return Case("fit dual basis", size.name, sizes, providers, PLAIN, without_signs(principal()), [cost])


def whole_engine(size: Workload, count: int, names: tuple[str, ...] = oe.engine.DEFAULT_DETECTORS) -> Case:
    """An engine from a cache of features, beside the second moments of features and gradients in plain products."""
    made = Samples(size, count)
    features, labels = made.h.cpu(), made.p.argmax(1).cpu()
    maximum = features * torch.linspace(1, 4, count)[:, None]
    narrow = oe.FeatureCache.from_features(features, labels, maximum=maximum)
    # The same anchors, which are chosen by fingerprint.
    of_anchors = {"maximum": maximum.double(), "fingerprints": narrow.rows.fingerprints}
    wide = oe.FeatureCache.from_features(features.double(), labels, **of_anchors)
    feature_map = made.held_h[:, :, None, None].expand(-1, -1, 2, 2).contiguous()

    def fit(cache: oe.FeatureCache, dtype: torch.dtype) -> oe.Engine:
        linear = nn.Linear(size.channels, size.classes)
        linear.weight.data, linear.bias.data = made.weight, made.bias
        model = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).eval().to(DEVICE, dtype)
        engine = oe.Engine(model, names, settings=subspace_settings(names, size))
        return engine.fit_features(cache, feature_map.to(dtype))

    def scores(engine: oe.Engine, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return list(engine.score_features(feature_map.to(dtype)).values())

    def products() -> list[Tensor]:
        p, h = made.p.double(), made.h.double()
        return [left.T @ right for left, right in ((p, h), (p, p), (h, h))]

    truth = [score.double() for score in scores(fit(wide, torch.float64), torch.float64)]
    note = "second moments of all samples in fp64"
    providers = [
        Provider(OURS, lambda: fit(narrow, torch.float32), scores, 1e-3, graph=False),
        Provider(PLAIN, products, tolerance=None, graph=False, note=note),
    ]
    sizes = {"samples": count, "D": size.channels, "C": size.classes, "n": size.anchors, "K": size.components}
    return Case("fit engine", size.name, sizes, providers, PLAIN, truth)


def photographs(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of 10 random images with labels."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(0, count, 10):
        yield torch.rand((10, 3, 224, 224), generator=generator), torch.arange(10)


def features_kept(name: str, count: int) -> Tensor:
    """Features of photographs, from the cache of an engine or from a loop of forwards."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.Conv2d(32, 512, 3, 4), nn.ReLU())
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval().to(DEVICE)
    if name == OURS:
        cache = oe.Engine(model, ("energy",)).fit(photographs(count)).cache
        assert cache is not None
        return cache.rows.features
    with torch.no_grad():
        return torch.cat([body(images.to(DEVICE)).mean((2, 3)).cpu() for images, _ in photographs(count)])


def resident_growth(name: str, count: int) -> float:
    """MiB that the process of `features_kept` grows by between its first 100 photographs and all: what a fragmented heap takes."""
    features_kept(name, 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    features_kept(name, count)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def from_images(count: int) -> Case:
    """An engine from small batches of photographs, beside a loop that keeps the features; the memory is that of a new process."""

    def grown(name: str) -> float:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(resident_growth, name, count).result()

    make = partial(Provider, graph=False, note="resident growth")
    providers = [make(name, partial(features_kept, name, count), peak=partial(grown, name)) for name in (OURS, PLAIN)]
    truth = [features_kept(PLAIN, count).double()]
    return Case("fit from images", "photographs", {"samples": count}, providers, PLAIN, truth)


def forms(size: Workload, samples: int) -> Case:
    """The same batch projected onto one subspace in its dual and its explicit form; the cost model chooses one."""
    made = Samples(size, size.anchors + samples)
    dual = DualBasis.fit(made.p[samples:], made.h[samples:], n_components=size.components, max_anchors=size.anchors)
    explicit, p, h = dual.to_explicit(), made.p[:samples], made.h[:samples]
    chosen, other = (CHOSEN, OTHER) if dual.plan(samples).choice != "explicit" else (OTHER, CHOSEN)
    providers = [
        Provider(chosen, lambda: dual.project(p, h), note="dual"),
        Provider(other, lambda: explicit.project(p, h), note="explicit"),
    ]
    sizes = {"N": samples, "D": size.channels, "C": size.classes, "n": size.anchors, "K": dual.n_components}
    truth = [explicit.project(p.double(), h.double())]
    return Case("form of the subspace", size.name, sizes, providers, OTHER, truth)


def cases() -> Iterator[Any]:
    """Each along its number of samples, anchors or classes."""
    r18 = WORKLOADS["R18"]._replace(anchors=512, components=64)
    r50 = WORKLOADS["R50"]._replace(anchors=1024, components=200)
    yield planned(dual_basis, r18, name="dual basis R18 n=512", quick=True)
    yield planned(dual_basis, r50, name="dual basis R50 n=1024")
    small = r18._replace(components=32)
    for count in (1000, 4000, 16_000):
        yield planned(whole_engine, small, count, name=f"engine R18 n={count}", quick=count < 16_000)
    yield planned(from_images, 200, name="engine from 200 images", quick=True)
    yield planned(from_images, 800, name="engine from 800 images")
    for classes in (2, 10, 50, 200):
        size = r18._replace(name="forms", classes=classes, anchors=1000)
        yield planned(forms, size, 64, name=f"forms C={classes}", quick=classes == 10)


@pytest.mark.parametrize("make", list(cases()))
def test_fitting(make: Callable[[], Case], measured: Callable[[Callable[[], Case]], None]) -> None:
    measured(make)
