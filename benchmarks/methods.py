"""What do the methods cost that pytorch-ood and oodeel have too, on the same samples and to the same values?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ood_engine as oe
import ood_kernels as ok
from ood_engine.detectors.heads import KNearestNeighbours, Mahalanobis
from ood_kernels.workloads import WORKLOADS, Cost

from .clocks import DEVICE
from .common import OURS, PLAIN, Case, Provider, planned
from .peers import FRACTION, METHODS, Scene, peer


class Method(NamedTuple):
    """Scores [N], higher = more in-distribution: a formula of features and operands, which are in fp64, and this package's."""

    formula: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    ours: Callable[[], Tensor]


def make_scene(sizes: Mapping[str, int]) -> Scene:
    """Rectified features about a mean for each class, those to be scored with twice the noise, and a head of random weights."""
    samples, width, classes = sizes["N"], sizes["D"], sizes["C"]
    fit_samples = max(sizes.get("n", 0), classes)
    normal = partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    means = normal(classes, width).abs_()
    labels = torch.arange(fit_samples, device=DEVICE) % classes
    fit_features = normal(fit_samples, width).mul_(0.5).add_(means[labels]).relu_()
    features = normal(samples, width).add_(means[torch.arange(samples, device=DEVICE) % classes]).relu_()
    weight, bias = normal(classes, width).mul_(3 / width**0.5), normal(classes).mul_(0.1)
    return Scene(features, weight, bias, fit_features, labels, min(50, fit_samples // 2))


def of_method(method: str, workload: str, **sizes: int) -> Case:
    """The case of one of `MAKERS`; D and C are the workload's where they are not given."""
    known = WORKLOADS[workload]
    sizes = {"N": sizes.pop("N"), "D": known.channels, "C": known.classes} | sizes
    scene = make_scene(sizes)
    features, (formula, exact, ours) = scene.features, MAKERS[method](scene)
    operands = [operand.float() for operand in exact]
    providers = [Provider(OURS, ours), Provider(PLAIN, lambda: formula(features, *operands))]
    providers += [peer(name, method, scene) for name in METHODS if method in METHODS[name]]
    elements = sum(operand.numel() for operand in exact)
    cost = Cost(2 * len(features) * elements, 4 * (elements + features.numel() + len(features)))
    truth = formula(features.double(), *exact)
    return Case(method, workload, sizes, providers, PLAIN, [truth], [cost])


def of_head(scene: Scene, formula: Callable[[Tensor, Tensor, Tensor], Tensor], ours: Callable[[], Tensor]) -> Method:
    return Method(formula, (scene.weight.double(), scene.bias.double()), ours)


def energy(scene: Scene) -> Method:
    """Logsumexp of the logits (arXiv 2010.03759); maximum logit and MSP cost the same product."""
    return of_head(scene, lambda h, *head: F.linear(h, *head).logsumexp(1), detector("energy", scene))


def detector(name: str, scene: Scene) -> Callable[[], Tensor]:
    """Scores of an engine that has this detector alone, around the head alone."""
    model = nn.Sequential(nn.Flatten(), scene.linear()).eval()
    engine = oe.Engine(model, [name])
    cache = oe.FeatureCache.from_features(scene.fit_features.cpu())
    engine.fit_features(cache, scene.features[:8, :, None, None])
    return lambda: engine.score_features(None, scene.features)[name]


def gradnorm(scene: Scene) -> Method:
    """‖∂ KL(u ‖ p) / ∂W‖₁ = ‖h‖₁ · Σ_c |p_c - 1/C|."""

    def formula(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return h.abs().sum(1) * (F.linear(h, weight, bias).softmax(1) - 1 / len(weight)).abs().sum(1)

    return of_head(scene, formula, detector("gradnorm", scene))


def react(scene: Scene) -> Method:
    """Energy of features clipped at a quantile of all ID activations (arXiv 2111.12797)."""
    top, h, head = float(scene.fit_features.quantile(FRACTION)), scene.features, (scene.weight, scene.bias)
    return of_head(
        scene,
        lambda h, *head: F.linear(h.clamp_max(top), *head).logsumexp(1),
        lambda: ok.masked_energy(h.clamp_max(top), *head)[0],
    )


def dice(scene: Scene) -> Method:
    """Energy of a head that keeps the weights of the largest mean contributions (arXiv 2111.09805)."""
    contributions = scene.fit_features.double().mean(0) * scene.weight.double()
    mask = contributions > contributions.quantile(FRACTION)
    our_mask = mask if DEVICE.type == "cpu" else ok.pack_mask(mask)
    return of_head(
        scene._replace(weight=scene.weight * mask),
        lambda h, *head: F.linear(h, *head).logsumexp(1),
        lambda: ok.masked_energy(scene.features, scene.weight, scene.bias, our_mask)[1],
    )


def knn(scene: Scene) -> Method:
    """1 - r²/2 with r the distance of normalised features to the k-th neighbour: their cosine (arXiv 2204.06507)."""
    head = KNearestNeighbours(scene.neighbours)
    head.fit(scene.fit_features)

    def formula(h: Tensor, bank: Tensor) -> Tensor:
        return (F.normalize(h) @ bank.T).topk(scene.neighbours).values[:, -1]

    return Method(formula, (F.normalize(scene.fit_features.double()),), lambda: head(scene.features))


def mahalanobis(scene: Scene) -> Method:
    """-min_c (h - μ_c)ᵀ Σ⁻¹ (h - μ_c) with one Σ for all classes (arXiv 1807.03888)."""
    x, width = scene.fit_features.double(), scene.fit_features.shape[1]
    counts = torch.bincount(scene.labels)
    means = x.new_zeros(len(counts), width).index_add_(0, scene.labels, x) / counts[:, None]
    centred = x - means[scene.labels]
    factor = torch.linalg.cholesky(centred.T @ centred / len(x))
    whitening = torch.linalg.solve_triangular(factor, torch.eye(width).to(x), upper=False).T.contiguous()

    def formula(h: Tensor, whitening: Tensor, means: Tensor) -> Tensor:
        z = h @ whitening
        return -(z.square().sum(1, keepdim=True) - 2 * z @ means.T + means.square().sum(1)).amin(1)

    head = Mahalanobis()
    head.fit(scene.fit_features, scene.labels)
    return Method(formula, (whitening, means @ whitening), lambda: head(scene.features))


MAKERS: dict[str, Callable[[Scene], Method]] = {
    make.__name__: make for make in (energy, gradnorm, react, dice, knn, mahalanobis)
}


def cases() -> Iterator[Any]:
    """ResNet-50's head; where a peer is slow to fit, the sizes of a small ResNet-18."""

    def plan(method: str, workload: str = "R50", quick: bool = False, **sizes: int) -> Any:
        words = " ".join(f"{name}={size}" for name, size in sizes.items())
        return planned(partial(of_method, method, workload, **sizes), name=f"{method} {workload} {words}", quick=quick)

    yield plan("energy", quick=True, N=64)
    yield plan("knn", quick=True, N=64, n=2000)
    yield plan("react", quick=True, N=64, n=1000)
    yield plan("gradnorm", quick=True, N=12)
    yield plan("mahalanobis", "R18", quick=True, N=64, n=4000)
    yield plan("dice", quick=True, N=32, n=1000)
    yield plan("energy", N=1024)
    yield plan("knn", N=256, n=4000)


@pytest.mark.parametrize("make", list(cases()))
def test_methods(make: Callable[[], Case], measured: Callable[[Callable[[], Case]], None]) -> None:
    measured(make)
