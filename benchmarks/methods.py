"""What do the methods cost that pytorch-ood and oodeel have too, on the same samples and to the same values?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ood_engine as oe
import ood_kernels as ok
from ood_engine.detectors.heads import KNearestNeighbours, Mahalanobis
from ood_kernels.workloads import WORKLOADS, Cost

from .cases import OURS, PLAIN, Case, Planned, Provider, providers_of
from .clocks import DEVICE
from .peers import FRACTION, METHODS, Scene, peer

_MASKED = "no detector of its own: masked_energy"


class Method(NamedTuple):
    """One method on one scene.

    Attributes:
        truth: [N] in fp64, higher = more in-distribution.
        plain: plain products and reductions.
        ours: this package's detector, or its functions.
        products: elements of the matrices that N rows are multiplied with.
        note: of ours.
    """

    truth: Tensor
    plain: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    products: int
    note: str | None = None


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
    made = MAKERS[method](scene)
    peers = [partial(peer, name, method, scene) for name in METHODS if method in METHODS[name]]
    ours, plain = partial(Provider, OURS, made.ours, note=made.note), partial(Provider, PLAIN, made.plain)
    found, missing = providers_of(ours, plain, *peers)
    samples, width = scene.features.shape
    cost = Cost(2 * samples * made.products, 4 * (made.products + samples * (width + 1)))
    return Case(method, workload, sizes, found, PLAIN, [made.truth], [cost], missing=missing)


def logits(scene: Scene, features: Tensor | None = None) -> Tensor:
    """[N, C] in fp64."""
    h = scene.features if features is None else features
    return h.double() @ scene.weight.double().T + scene.bias.double()


def of_logits(name: str, reduce: Callable[[Tensor], Tensor]) -> Callable[[Scene], Method]:
    return lambda scene: Method(
        reduce(logits(scene)),
        lambda: reduce(F.linear(scene.features, scene.weight, scene.bias)),
        detector(name, scene),
        scene.weight.numel(),
    )


def detector(name: str, scene: Scene) -> Callable[[], Tensor]:
    """Scores of an engine that has this detector alone, around the head alone."""
    model = nn.Sequential(nn.Flatten(), scene.linear()).eval()
    engine = oe.Engine(model, [name])
    cache = oe.FeatureCache.from_features(scene.fit_features.cpu(), scene.labels.cpu())
    engine.fit_features(cache, scene.features[:8, :, None, None])
    return lambda: engine.score_features(None, scene.features)[name]


def gradnorm(scene: Scene) -> Method:
    """‖∂ KL(u ‖ p) / ∂W‖₁ = ‖h‖₁ · Σ_c |p_c - 1/C|; the truth adds up the outer product itself."""
    uniform = 1 / len(scene.weight)
    cotangents = logits(scene).softmax(1) - uniform
    outer = [torch.outer(a, h).abs().sum() for a, h in zip(cotangents, scene.features.double(), strict=True)]

    def plain() -> Tensor:
        p = F.linear(scene.features, scene.weight, scene.bias).softmax(1)
        return scene.features.abs().sum(1) * (p - uniform).abs().sum(1)

    return Method(torch.stack(outer), plain, detector("gradnorm", scene), scene.weight.numel())


def quantile(values: Tensor, fraction: float) -> float:
    """By linear interpolation; torch.quantile takes no more than 16 million values."""
    return float(np.quantile(values.cpu().numpy(), fraction))


def react(scene: Scene) -> Method:
    """Energy of features clipped at a quantile of all ID activations (arXiv 2111.12797)."""
    threshold = quantile(scene.fit_features.double(), FRACTION)
    truth = logits(scene, scene.features.double().clamp_max(threshold)).logsumexp(1)

    def plain() -> Tensor:
        return F.linear(scene.features.clamp_max(threshold), scene.weight, scene.bias).logsumexp(1)

    def ours() -> Tensor:
        return ok.masked_energy(scene.features.clamp_max(threshold), scene.weight, scene.bias)[0]

    return Method(truth, plain, ours, scene.weight.numel(), _MASKED)


def dice(scene: Scene) -> Method:
    """Energy of a head that keeps the weights of the largest mean contributions (arXiv 2111.09805)."""
    contributions = scene.fit_features.double().mean(0) * scene.weight.double()
    mask = contributions > quantile(contributions, FRACTION)
    our_mask = mask if DEVICE.type == "cpu" else ok.pack_mask(mask)
    pruned = scene.weight * mask
    truth = (scene.features.double() @ pruned.double().T + scene.bias.double()).logsumexp(1)

    def plain() -> Tensor:
        return F.linear(scene.features, pruned, scene.bias).logsumexp(1)

    def ours() -> Tensor:
        return ok.masked_energy(scene.features, scene.weight, scene.bias, our_mask)[1]

    return Method(
        truth, plain, ours, scene.weight.numel(), f"{_MASKED}, which gives the plain energy and the softmax too"
    )


def knn(scene: Scene) -> Method:
    """1 - r²/2 with r the distance of normalised features to the k-th neighbour: their cosine (arXiv 2204.06507)."""
    head, bank = KNearestNeighbours(scene.neighbours), F.normalize(scene.fit_features)
    head.fit(scene.fit_features)

    def similarity(h: Tensor, bank: Tensor) -> Tensor:
        return (F.normalize(h) @ bank.T).topk(scene.neighbours).values[:, -1]

    truth = similarity(scene.features.double(), F.normalize(scene.fit_features.double()))
    return Method(truth, lambda: similarity(scene.features, bank), lambda: head(scene.features), bank.numel())


def mahalanobis(scene: Scene) -> Method:
    """-min_c (h - μ_c)ᵀ Σ⁻¹ (h - μ_c) with one Σ for all classes (arXiv 1807.03888)."""
    x, width = scene.fit_features.double(), scene.fit_features.shape[1]
    counts = torch.bincount(scene.labels)
    means = x.new_zeros(len(counts), width).index_add_(0, scene.labels, x) / counts[:, None]
    centred = x - means[scene.labels]
    factor = torch.linalg.cholesky(centred.T @ centred / len(x))
    whitening = torch.linalg.solve_triangular(factor, torch.eye(width).to(x), upper=False).T.contiguous()

    def distance(h: Tensor, whitening: Tensor, means: Tensor) -> Tensor:
        z = h @ whitening
        return -(z.square().sum(1, keepdim=True) - 2 * z @ means.T + means.square().sum(1)).amin(1)

    wide, head = (whitening, means @ whitening), Mahalanobis()
    single = wide[0].float(), wide[1].float()
    head.fit(scene.fit_features, scene.labels)
    truth, products = distance(scene.features.double(), *wide), width * (width + len(means))
    return Method(
        truth, lambda: distance(scene.features, *single), lambda: head(scene.features), products, "computes in fp64"
    )


MAKERS: dict[str, Callable[[Scene], Method]] = {
    "energy": of_logits("energy", lambda logits: logits.logsumexp(1)),
    "msp": of_logits("msp", lambda logits: logits.softmax(1).amax(1)),
    "max_logit": of_logits("max_logit", lambda logits: logits.amax(1)),
    "gradnorm": gradnorm,
    "react": react,
    "dice": dice,
    "knn": knn,
    "mahalanobis": mahalanobis,
}


def cases() -> Iterator[Planned]:
    """ResNet-50's head; where a peer is slow to fit, the sizes of a small ResNet-18."""

    def plan(method: str, workload: str, quick: bool = True, **sizes: int) -> Planned:
        words = " ".join(f"{name}={size}" for name, size in sizes.items())
        return Planned(f"{method} {workload} {words}", partial(of_method, method, workload, **sizes), quick)

    for quick, many, bank in ((True, 64, 2000), (False, 1024, 10_000)):
        yield plan("energy", "R50", quick, N=many)
        yield plan("knn", "R50", quick, N=many, n=bank)
        yield plan("react", "R50", quick, N=many, n=1000)
    yield plan("gradnorm", "R50", N=12)
    yield plan("mahalanobis", "R18", N=64, n=4000)
    yield plan("dice", "R50", N=64, n=1000)
    yield plan("gradnorm", "R50", False, N=64)
    yield plan("msp", "R50", False, N=1024)
    yield plan("max_logit", "R50", False, N=1024)
    yield plan("dice", "R50", False, N=1024, n=1000)


@pytest.mark.parametrize("planned", list(cases()), ids=str)
def test_methods(planned: Planned, measured: Callable[[Case], None]) -> None:
    measured(planned.build())
