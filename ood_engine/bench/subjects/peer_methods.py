"""The methods that pytorch-ood and oodeel have too, on the same features, head and fit samples, held to the same scores in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ood_kernels as ok
from ood_kernels.workloads import Cost

from ...detectors import create_detector
from ...detectors.heads.vector_heads import KNearestNeighbours, Mahalanobis
from ...features.signals import Signals
from ..cases import OURS, Case, Effort, Plan, Provider, providers_of
from ..operands import SAMPLES, series, sizes_of
from ..peer_detectors import FRACTION, OODEEL_METHODS, PYTORCH_OOD_METHODS, Scene, oodeel, pytorch_ood
from ..rivals import LIBRARY

__all__ = ["METHODS", "case_of", "make_scene", "plans"]

_FP32_BYTES = 4
_NEIGHBOURS = 50
_SECONDS = 0.07
_WEAK = 0.1
_WITHOUT_A_DETECTOR = "no detector of its own: plain torch, then masked_energy"


class Method(NamedTuple):
    """One method on one scene.

    Attributes:
        truth: [N] in fp64, higher = more in-distribution.
        library: plain products and reductions.
        cost: least of both, beyond features in and scores out, which `case_of` adds.
        ours: None where this package does not have the method.
        note: of ours.
    """

    truth: Tensor
    library: Callable[[], Tensor]
    cost: Cost
    ours: Callable[[], Tensor] | None = None
    note: str | None = None


def plans(effort: Effort) -> Iterator[Plan]:
    """ResNet-50's head; where a peer is slow to fit, the sizes of a small ResNet-18 for the quick run and the series."""
    many, bank = (SAMPLES, 2000) if effort.is_quick else (1024, 10_000)
    energy, gradnorm = ((16, 64, 256), (4, 12, 32)) if effort.is_quick else ((64, 256, 1024), (8, 24, 64))
    of_mahalanobis: dict[str, tuple[int, ...]] = {"N": (64, 256, 1024), "C": (10, 50, 200)}
    if effort.is_quick:
        of_mahalanobis = {"N": (SAMPLES,)}
    for sizes, sweeps in series({}, N=gradnorm):
        yield _plan(effort, "gradnorm", "R50", sizes, sweeps)
    for sizes, sweeps in series({}, N=energy):
        yield _plan(effort, "energy", "R50", sizes, sweeps)
    yield _plan(effort, "knn", "R50", {"N": many, "n": bank})
    for method in ("dice", "react"):
        yield _plan(effort, method, "R50", {"N": many, "n": 1000})
    for sizes, sweeps in series({"N": SAMPLES, "C": 10, "n": 4000}, **of_mahalanobis):
        yield _plan(effort, "mahalanobis", "R18", sizes, sweeps)
    yield _plan(effort, "vim", "R18", {"N": many, "n": 2000, "K": 128})
    yield _plan(effort, "vim, origin at the mean", "R18", {"N": many, "n": 2000, "K": 128})
    yield _plan(effort, "ash", "R50", {"N": many})
    if not effort.is_quick:
        yield _plan(effort, "msp", "R50", {"N": many})
        yield _plan(effort, "max_logit", "R50", {"N": many})
        yield _plan(effort, "vim", "R50", {"N": many, "n": 4000, "K": 512})
        yield _plan(effort, "mahalanobis", "R50", {"N": SAMPLES, "C": 100, "n": 4000})


def _plan(effort: Effort, method: str, workload: str, sizes: Mapping[str, int], sweeps: tuple[str, ...] = ()) -> Plan:
    all_sizes = sizes_of(workload, "DC", SAMPLES, effort.device) | dict(sizes)
    build = partial(_build, method=method, sizes=all_sizes, device=effort.device)
    return Plan(method, workload, all_sizes, build, sweeps=sweeps, seconds=_SECONDS)


def _build(*, method: str, sizes: Mapping[str, int], device: torch.device) -> Case:
    return case_of(method, make_scene(sizes, device))


def make_scene(sizes: Mapping[str, int], device: torch.device, neighbours: int = _NEIGHBOURS) -> Scene:
    """Rectified features about a mean for each class, those to be scored with twice the noise, and a head of random weights.

    Where there is a K, the features beyond it are weak, so that the first K principal directions are well defined.
    """
    samples, width, classes = sizes["N"], sizes["D"], sizes["C"]
    fit_samples, components = max(sizes.get("n", 0), classes), sizes.get("K", width)
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    means = normal(classes, width).abs_()
    labels = torch.arange(fit_samples, device=device) % classes
    fit_features = normal(fit_samples, width).mul_(0.5).add_(means[labels]).relu_()
    features = normal(samples, width).add_(means[torch.arange(samples, device=device) % classes]).relu_()
    for h in (fit_features, features):
        h[:, components:] *= _WEAK
    weight, bias = normal(classes, width).mul_(3 / width**0.5), normal(classes).mul_(0.1)
    return Scene(features, weight, bias, fit_features, labels, components, neighbours)


def case_of(method: str, scene: Scene) -> Case:
    """The case of one of `METHODS` on a scene."""
    truth, library, cost, ours, note = METHODS[method](scene)
    found, missing = providers_of(
        *([] if ours is None else [lambda: Provider(OURS, ours, captures=True, note=note)]),
        lambda: Provider(LIBRARY, library, captures=True),
        *([lambda: pytorch_ood(method, scene)] if method in PYTORCH_OOD_METHODS else []),
        *([lambda: oodeel(method, scene)] if method in OODEEL_METHODS else []),
    )
    samples, width = scene.features.shape
    bytes_of_samples = _FP32_BYTES * samples * (width + 1)
    return Case(found, [truth], Cost(cost.flops, cost.bytes + bytes_of_samples), missing)


def _product(scene: Scene, *shapes: tuple[int, int]) -> Cost:
    """Of products of N rows with matrices of these shapes."""
    elements = sum(rows * columns for rows, columns in shapes)
    return Cost(2 * len(scene.features) * elements, _FP32_BYTES * elements)


def _head_cost(scene: Scene) -> Cost:
    classes, width = scene.weight.shape
    return _product(scene, (classes, width + 1))


def _logits(scene: Scene, features: Tensor | None = None) -> Tensor:
    """[N, C] in fp64."""
    h = scene.features if features is None else features
    return h.double() @ scene.weight.double().T + scene.bias.double()


def _of_detector(name: str, scene: Scene) -> Callable[[], Tensor]:
    detector, head = create_detector(name), ok.Head(scene.weight, scene.bias)

    def call() -> Tensor:
        scores: Tensor = detector(Signals(scene.features, head))
        return scores

    return call


def _of_logits(name: str, reduce: Callable[[Tensor], Tensor]) -> Callable[[Scene], Method]:
    def make(scene: Scene) -> Method:
        def library() -> Tensor:
            return reduce(F.linear(scene.features, scene.weight, scene.bias))

        return Method(reduce(_logits(scene)), library, _head_cost(scene), _of_detector(name, scene))

    return make


def _gradnorm(scene: Scene) -> Method:
    """‖∂ KL(u ‖ p) / ∂W‖₁ = ‖h‖₁ · Σ_c |p_c - 1/C|; the truth adds up the outer product itself."""
    uniform = 1 / len(scene.weight)
    cotangents = _logits(scene).softmax(1) - uniform
    outer = [torch.outer(a, h).abs().sum() for a, h in zip(cotangents, scene.features.double(), strict=True)]

    def library() -> Tensor:
        p = F.linear(scene.features, scene.weight, scene.bias).softmax(1)
        return scene.features.abs().sum(1) * (p - uniform).abs().sum(1)

    return Method(torch.stack(outer), library, _head_cost(scene), _of_detector("gradnorm", scene))


def _quantile(values: Tensor, fraction: float) -> float:
    """By linear interpolation; torch.quantile takes no more than 16 million values."""
    position = fraction * (values.numel() - 1)
    lower = int(position)
    low, high = (values.flatten().kthvalue(rank).values for rank in (lower + 1, min(lower + 2, values.numel())))
    return float(low + (position - lower) * (high - low))


def _react(scene: Scene) -> Method:
    """Energy of features clipped at a quantile of all ID activations (arXiv 2111.12797)."""
    threshold = _quantile(scene.fit_features.double(), FRACTION)

    def ours() -> Tensor:
        return ok.masked_energy(scene.features.clamp_max(threshold), scene.weight, scene.bias)[0]

    def library() -> Tensor:
        return F.linear(scene.features.clamp_max(threshold), scene.weight, scene.bias).logsumexp(1)

    truth = _logits(scene, scene.features.double().clamp_max(threshold)).logsumexp(1)
    return Method(truth, library, _head_cost(scene), ours, _WITHOUT_A_DETECTOR)


def _ash(scene: Scene) -> Method:
    """ASH-S on the pooled features: the largest stay, times exp(sum before / sum after) (arXiv 2209.09858)."""
    width = scene.features.shape[1]
    kept = width - round(FRACTION * width)

    def shape(h: Tensor) -> Tensor:
        values, index = h.topk(kept, dim=1)
        scale = (h.sum(1, keepdim=True) / values.sum(1, keepdim=True)).exp()
        return torch.zeros_like(h).scatter_(1, index, values * scale)

    def library() -> Tensor:
        return F.linear(shape(scene.features), scene.weight, scene.bias).logsumexp(1)

    return Method(_logits(scene, shape(scene.features.double())).logsumexp(1), library, _head_cost(scene))


def _dice(scene: Scene) -> Method:
    """Energy of a head that keeps the weights of the largest mean contributions (arXiv 2111.09805)."""
    contributions = scene.fit_features.double().mean(0) * scene.weight.double()
    mask = contributions > _quantile(contributions, FRACTION)
    our_mask = mask if mask.device.type == "cpu" else ok.pack_mask(mask)
    pruned = scene.weight * mask

    def ours() -> Tensor:
        return ok.masked_energy(scene.features, scene.weight, scene.bias, our_mask)[1]

    def library() -> Tensor:
        return F.linear(scene.features, pruned, scene.bias).logsumexp(1)

    truth = (scene.features.double() @ pruned.double().T + scene.bias.double()).logsumexp(1)
    note = "no detector of its own: masked_energy, which gives the plain energy and the softmax too"
    return Method(truth, library, _head_cost(scene), ours, note)


def _vim(scene: Scene, has_mean_origin: bool = False) -> Method:
    """Lse - α ‖(h - u) R‖ with R the directions of least variance about u = -W⁺ b (arXiv 2203.10807), or about the mean."""
    fit, h = scene.fit_features.double(), scene.features.double()
    weight = scene.weight.double()
    # Of a head with linearly independent rows W⁺ = Wᵀ (W Wᵀ)⁻¹.
    origin = fit.mean(0) if has_mean_origin else -weight.T @ torch.linalg.solve(weight @ weight.T, scene.bias.double())
    centred = fit - origin
    directions = torch.linalg.eigh(centred.T @ centred / len(fit)).eigenvectors
    residual = directions[:, : directions.shape[1] - scene.components]
    alpha = float(_logits(scene, fit).amax(1).mean() / (centred @ residual).norm(dim=1).mean())
    truth = _logits(scene).logsumexp(1) - alpha * ((h - origin) @ residual).norm(dim=1)
    origin, residual = origin.float(), residual.float().contiguous()

    def library() -> Tensor:
        lse = F.linear(scene.features, scene.weight, scene.bias).logsumexp(1)
        return lse - alpha * ((scene.features - origin) @ residual).norm(dim=1)

    classes, width = scene.weight.shape
    return Method(truth, library, _product(scene, (classes, width + 1), (width, residual.shape[1])))


def _knn(scene: Scene) -> Method:
    """1 - r²/2 with r the distance of normalised features to the k-th neighbour: their cosine (arXiv 2204.06507)."""
    detector = KNearestNeighbours(scene.neighbours)
    detector.fit(scene.fit_features)
    bank = F.normalize(scene.fit_features)

    def similarity(h: Tensor, bank: Tensor) -> Tensor:
        return (F.normalize(h) @ bank.T).topk(scene.neighbours).values[:, -1]

    truth = similarity(scene.features.double(), F.normalize(scene.fit_features.double()))
    cost = _product(scene, (bank.shape[0], bank.shape[1]))
    return Method(truth, lambda: similarity(scene.features, bank), cost, lambda: detector(scene.features))


def _mahalanobis(scene: Scene) -> Method:
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

    operands = whitening, means @ whitening
    truth = distance(scene.features.double(), *operands)
    single = operands[0].float(), operands[1].float()
    detector = Mahalanobis()
    detector.fit(scene.fit_features, scene.labels)
    cost = _product(scene, (width, width), (len(means), width))
    return Method(
        truth, lambda: distance(scene.features, *single), cost, lambda: detector(scene.features), "computes in fp64"
    )


METHODS: dict[str, Callable[[Scene], Method]] = {
    "energy": _of_logits("energy", lambda logits: logits.logsumexp(1)),
    "msp": _of_logits("msp", lambda logits: logits.softmax(1).amax(1)),
    "max_logit": _of_logits("max_logit", lambda logits: logits.amax(1)),
    "gradnorm": _gradnorm,
    "react": _react,
    "ash": _ash,
    "dice": _dice,
    "vim": _vim,
    "vim, origin at the mean": partial(_vim, has_mean_origin=True),
    "knn": _knn,
    "mahalanobis": _mahalanobis,
}
"""What is computed → how."""
