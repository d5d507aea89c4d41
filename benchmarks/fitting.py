"""How long does fitting take, how does it grow, and is the form that the cost model chooses the faster one?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn

import ood_engine as oe
import ood_kernels as ok
from ood_engine.subspace import DualBasis
from ood_kernels.workloads import WORKLOADS, Cost, Workload

from .cases import OURS, PLAIN, Case, Planned, Provider
from .clocks import DEVICE
from .engine import ALL, held_to, subspace_settings

SCIKIT_LEARN, CHOSEN, OTHER = "scikit-learn", f"{OURS}, chosen form", f"{OURS}, other form"
_MOST_GRADIENTS = 2**22
"""Most numbers in the gradients of the anchors for them to be formed at all."""
_HELD, _LEADING = 16, 4
"""Samples whose coordinates are compared; components compared one by one: beyond, two of nearly equal variance may be rotated."""


class Samples:
    """A head, and ID samples of it: rectified mixtures of 64 directions, whose gradients have a decaying spectrum.

    Args:
        size: channels, classes and anchors.
        count: samples.
    """

    def __init__(self, size: Workload, count: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._mixing = self._normal(64, size.channels) * torch.linspace(1, 0.1, 64)[:, None] / 4
        weight, bias = self._normal(size.classes, size.channels) * 3 / size.channels**0.5, self._normal(size.classes)
        self.head = ok.Head(weight.to(DEVICE), bias.to(DEVICE))
        self.h, self.held_h = self._features(count).to(DEVICE), self._features(_HELD).to(DEVICE)
        self.p, self.held_p = self.softmax(self.h), self.softmax(self.held_h)

    def softmax(self, h: Tensor) -> Tensor:
        """[n, C]: the gradient of the energy by the logits."""
        assert self.head.bias is not None
        return F.linear(h, self.head.weight.to(h.dtype), self.head.bias.to(h.dtype)).softmax(1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _features(self, count: int) -> Tensor:
        noise = 0.05 * self._normal(count, self._mixing.shape[1])
        return (self._normal(count, 64) @ self._mixing + noise + 0.4).relu_()


def extend(h: Tensor) -> Tensor:
    return F.pad(h, (0, 1), value=1.0)


def gradients(p: Tensor, h: Tensor) -> Tensor:
    """Of the energy by weight and bias, [n, C·D̃]."""
    return (p[:, :, None] * extend(h)[:, None, :]).flatten(1)


def without_signs(coordinates: Tensor) -> list[Tensor]:
    """What two bases of one subspace have in common: leading coordinates up to sign, and all inner products."""
    return [coordinates[:, :_LEADING].abs(), coordinates @ coordinates.T]


def dual_basis(size: Workload) -> Case:
    """PCA of gradients from their Gram matrix, beside all its eigenvectors in plain fp64, and PCA of formed gradients."""
    anchors, components = size.anchors, size.components
    made = Samples(size, anchors)
    p, h = made.p, made.h

    def principal() -> Tensor:
        """Coordinates of the held-out samples in fp64; the eigenvectors sum to 0, so that what all anchors share drops out."""
        a, held_a = p.double(), made.held_p.double()
        extended, held = extend(h.double()), extend(made.held_h.double())
        gram, across = (a @ a.T) * (extended @ extended.T), (held_a @ a.T) * (held @ extended.T)
        rows = gram.mean(0)
        values, vectors = torch.linalg.eigh(gram - rows[:, None] - rows + rows.mean())
        return (across - rows) @ (vectors[:, -components:].flip(1) / values[-components:].flip(0).sqrt())

    def scikit_learn() -> PCA:
        formed = gradients(p.cpu(), h.cpu()).numpy()
        return PCA(components, svd_solver="full", copy=False).fit(formed)

    def transformed(pca: PCA) -> list[Tensor]:
        held = gradients(made.held_p, made.held_h).cpu().numpy()
        return without_signs(torch.from_numpy(pca.transform(held)).to(DEVICE))

    def project(basis: DualBasis) -> list[Tensor]:
        return without_signs(basis.project(made.held_p, made.held_h))

    providers = [
        Provider(OURS, lambda: DualBasis.fit(p, h, n_components=components, max_anchors=anchors), project, graph=False),
        Provider(PLAIN, principal, without_signs, note="all eigenvectors, in fp64", graph=False),
    ]
    if anchors * size.classes * (size.channels + 1) <= _MOST_GRADIENTS:
        note = "gradients in closed form, full singular value decomposition"
        providers.append(
            Provider(SCIKIT_LEARN, scikit_learn, transformed, 1e-3, uses_numpy=True, note=note, graph=False)
        )
    width = size.channels + 1
    # Gram matrix 2·n²·(C + D̃), Householder's reduction 4/3·n³, K eigenvectors 2·n²·K; anchors read, they and α written.
    flops = 2 * anchors**2 * (size.classes + width + components) + 4 * anchors**3 // 3
    cost = Cost(flops, 4 * anchors * (2 * (size.classes + size.channels) + components))
    sizes = {"D": size.channels, "C": size.classes, "n": anchors, "K": components}
    return Case("fit dual basis", size.name, sizes, providers, PLAIN, without_signs(principal()), [cost])


def whole_engine(size: Workload, count: int, names: tuple[str, ...], provider: str = OURS) -> Case:
    """An engine from a cache of features, beside the second moments of features and gradients in plain products."""
    made = Samples(size, count)
    features, labels = made.h.cpu(), made.p.argmax(1).cpu()
    maximum = features * torch.linspace(1, 4, count)[:, None]
    narrow = oe.FeatureCache.from_features(features, labels, maximum=maximum)
    # The same anchors, which are chosen by fingerprint.
    wide = oe.FeatureCache.from_features(
        features.double(), labels, maximum=maximum.double(), fingerprints=narrow.rows.fingerprints
    )
    feature_map = made.held_h[:, :, None, None].expand(-1, -1, 2, 2).contiguous()

    def fit(cache: oe.FeatureCache, dtype: torch.dtype) -> oe.Engine:
        linear = nn.Linear(size.channels, size.classes)
        assert made.head.bias is not None
        linear.weight.data, linear.bias.data = made.head.weight.to(dtype), made.head.bias.to(dtype)
        model = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).eval()
        engine = oe.Engine(model, names, settings=subspace_settings(names, size))
        return engine.fit_features(cache, feature_map.to(dtype))

    def products() -> list[Tensor]:
        p, extended = made.softmax(made.h.double()), extend(made.h.double())
        return [left.T @ right for left, right in ((p, extended), (p, p), (extended, extended))]

    exact = fit(wide, torch.float64).score_features(feature_map.double())
    held = held_to(exact)
    note = f"{len(names)} detectors"
    providers = [
        Provider(
            provider,
            lambda: fit(narrow, torch.float32),
            lambda engine: held(engine.score_features(feature_map)),
            1e-3,
            note=note,
            graph=False,
        ),
        Provider(PLAIN, products, tolerance=None, note="second moments of all samples in fp64", graph=False),
    ]
    sizes = {"samples": count, "D": size.channels, "C": size.classes, "n": size.anchors, "K": size.components}
    return Case("fit engine", size.name, sizes, providers, PLAIN, [score.double() for score in exact.values()])


def forms(size: Workload, samples: int) -> Case:
    """The same batch projected onto one subspace in its dual and its explicit form; the cost model chooses one."""
    made = Samples(size, size.anchors + samples)
    dual = DualBasis.fit(made.p[samples:], made.h[samples:], n_components=size.components, max_anchors=size.anchors)
    bases = {"dual": dual, "explicit": dual.to_explicit()}
    p, h = made.p[:samples], made.h[:samples]
    choice = dual.plan(samples).choice
    chosen = choice if choice in bases else "dual"
    providers = [
        Provider(CHOSEN if form == chosen else OTHER, partial(bases[form].project, p, h), note=form)
        for form in sorted(bases, key=lambda form: form != chosen)
    ]
    sizes = {"N": samples, "D": size.channels, "C": size.classes, "n": size.anchors, "K": dual.n_components}
    return Case(
        "form of the subspace", size.name, sizes, providers, OTHER, [bases["explicit"].project(p.double(), h.double())]
    )


def cases() -> Iterator[Planned]:
    """Each along its number of samples, anchors or classes."""
    r18, r50 = WORKLOADS["R18"], WORKLOADS["R50"]
    for anchors in (512, 1024):
        size = r18._replace(anchors=anchors, components=64)
        yield Planned(f"dual basis R18 n={anchors}", partial(dual_basis, size), anchors == 512)
    for anchors in (1024, 2048):
        size = r50._replace(anchors=anchors, components=200)
        yield Planned(f"dual basis R50 n={anchors}", partial(dual_basis, size), False)
    small, default = r18._replace(anchors=512, components=32), oe.engine.DEFAULT_DETECTORS
    for count in (1000, 4000, 16_000):
        yield Planned(f"engine R18 n={count}", partial(whole_engine, small, count, default), count < 16_000)
    every = tuple(oe.available_detectors())
    yield Planned("engine, all detectors, R18 n=1000", partial(whole_engine, small, 1000, every, ALL), False)
    large = r50._replace(anchors=1024, components=256)
    yield Planned("engine R50 n=8000", partial(whole_engine, large, 8000, default), False)
    for classes in (2, 10, 50, 200):
        size = r18._replace(name="forms", classes=classes, anchors=1000, components=64)
        yield Planned(f"forms C={classes}", partial(forms, size, 64), classes == 10)


@pytest.mark.parametrize("planned", list(cases()), ids=str)
def test_fitting(planned: Planned, measured: Callable[[Case], None]) -> None:
    measured(planned.build())
