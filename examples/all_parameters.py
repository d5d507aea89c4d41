"""What the last layer leaves out: gradients of all parameters beside the closed form, on the demo's digits and network.

arXiv 2310.17163 differentiates y = lse(z) by every parameter; the engine takes the last layer, where the gradient is a product
of two vectors. Here is the slow and exact other side for networks small enough to hold a gradient a sample: per-sample gradients
by torch.func, `none` and `nfk` normalisation, PCA and class averages, written from the paper's formulas and not from the
engine's code. Anchors, the samples the heads are fitted on, and the heads are the same on both sides; all values are in fp64.

The reference restricted to the parameters of the last layer is compared with the closed form too; exits with 1 where its
coordinates are further off than 1e-9 of the largest.

    python examples/all_parameters.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ood_engine.demo import SmallCNN
from ood_engine.demo import run as demo
from ood_engine.detectors.heads import KNearestNeighbours, LinearProbe, Mahalanobis
from ood_engine.evaluation.metrics import auroc, fpr_at_tpr
from ood_engine.images.dataset import ImageDataset, open_dataset
from ood_engine.subspace import Basis, ClassAverageBasis, DualBasis, ExplicitBasis
from ood_engine.subspace.samples import count_components, fix_signs

ALL, LAST = "all parameters", "last layer"
LAST_LAYER = ("head.weight", "head.bias")
HEADS: dict[str, Any] = {"mahalanobis": Mahalanobis, "knn": KNearestNeighbours, "probe_energy": LinearProbe}
TOLERANCE = 1e-9
ID_TEST, OTHERS = "test", "others"
Row: TypeAlias = dict[str, Any]
LABELS = {"scope": "gradient of", "subspace": "subspace", "normalisation": "normalised", "components": "K"}


class Way(NamedTuple):
    """How a subspace is found: `wanted` components, None for a column a class."""

    subspace: str
    wanted: int | float | None
    normalisation: str


class Subspace(NamedTuple):
    """What gradients g [N, P] are projected on: (g - mean) · (I ∘ V)."""

    mean: Tensor
    """[P]"""
    vectors: Tensor
    """I ∘ V, [K, P]"""

    def project(self, gradients: Tensor) -> Tensor:
        """g_low [N, K]."""
        return (gradients - self.mean) @ self.vectors.T


class Digits(NamedTuple):
    """The demo's network in fp64 and its data; `sets` are images by name, `ID_TEST` and the OOD sets."""

    model: SmallCNN
    anchors: tuple[Tensor, Tensor]
    others: tuple[Tensor, Tensor]
    sets: dict[str, Tensor]


@torch.no_grad()
def gradients(model: nn.Module, images: Tensor, names: Sequence[str] = (), chunk: int = 64) -> Iterator[Tensor]:
    """Gradients of lse(z), `chunk` samples at a time: [n, P] over the parameters `names`, all by default, one after the other."""
    chosen = {name: p.detach() for name, p in model.named_parameters() if not names or name in names}

    def energy(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, parameters, (image[None],))
        return logits.logsumexp(1)[0]

    of_samples = vmap(grad(energy), in_dims=(None, 0))
    for part in images.split(chunk):
        found = of_samples(chosen, part)
        yield torch.cat([found[name].flatten(1) for name in chosen], 1)


def deviation(g: Tensor) -> Tensor:
    """Standard deviation [P] of gradients g [n, P]; exactly 0 where the variance is below the rounding of E[g²]."""
    variance, floor = g.var(0, correction=0), (len(g) + 8) * torch.finfo(g.dtype).eps * g.square().mean(0)
    return torch.where(variance > floor, variance, 0).sqrt()


def inverse(spread: Tensor) -> Tensor:
    """I = Var(g)^(-1/2) [P], infinite entries replaced by the largest finite one: `nfk` in the paper's code."""
    return torch.where(spread > 0, 1 / spread, (1 / spread[spread > 0]).max())


def fit(g: Tensor, labels: Tensor, way: Way) -> Subspace:
    """The subspace of anchor gradients g [n, P] with true classes labels [n]; its columns V have unit length."""
    mean, spread = g.mean(0), deviation(g)
    scale = inverse(spread) if way.normalisation == "nfk" else torch.ones_like(mean)
    # Where all gradients agree only rounding is left of g - mean, which a large I would make into a direction.
    normalised = torch.where(spread > 0, (g - mean) * scale, 0)
    if way.wanted is None:
        averages = torch.stack([normalised[labels == each].mean(0) for each in labels.unique()])
        vectors = averages / averages.norm(dim=1, keepdim=True)
    else:
        gram = normalised @ normalised.T
        eigenvalues, eigenvectors = (found.flip(-1) for found in torch.linalg.eigh(gram))
        kept = count_components(eigenvalues, gram, way.wanted)
        vectors = (fix_signs(eigenvectors[:, :kept]) / eigenvalues[:kept].sqrt()).T @ normalised
    return Subspace(mean, scale * vectors)


@torch.no_grad()
def forward(model: SmallCNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax p [N, C] and features h [N, D]."""
    h = model.flatten(model.pool(model.body(images)))
    return model.head(h).softmax(1), h


def fit_closed_form(p: Tensor, h: Tensor, labels: Tensor, way: Way) -> Basis:
    """The engine's basis of the same subspace, of the last layer alone."""
    options: dict[str, Any] = {"normalisation": way.normalisation, "max_anchors": len(p)}
    if way.wanted is None:
        return ClassAverageBasis.fit(p, h, labels=labels, **options)
    kind = ExplicitBasis if way.normalisation == "nfk" else DualBasis
    return kind.fit(p, h, n_components=way.wanted, **options)


def judge(head: str, x: Tensor, labels: Tensor, classes: int, seed: int) -> Any:
    """The head, fitted on coordinates x [m, K]; its scores are higher for ID."""
    known = {"mahalanobis": (x, labels), "knn": (x,), "probe_energy": (x, labels, classes, seed)}
    fitted = HEADS[head]()
    fitted.fit(*known[head])
    return fitted


def read_images(data: ImageDataset) -> Tensor:
    return torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in data.loader(demo.BATCH)]).double()


def prepare(seed: int, options: argparse.Namespace) -> Digits:
    """Images, split and training of `ood_engine.demo.run`; its fitting samples are divided by chance into anchors and others."""
    with TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        demo.write_images(images, seed, options.quick)
        fit_data = open_dataset(images / "fit", demo.PREPROCESS)
        model = demo.train(fit_data, seed, options.epochs, torch.device("cpu"), False).double()
        paths = {ID_TEST: ID_TEST, **demo.FOLDERS}
        sets = {name: read_images(open_dataset(images / path, demo.PREPROCESS)) for name, path in paths.items()}
        samples, labels = read_images(fit_data), torch.as_tensor(fit_data.labels)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    cut = min(options.anchors, len(order) // 2)
    anchors, others = ((samples[rows], labels[rows]) for rows in (order[:cut], order[cut:]))
    return Digits(model, anchors, others, sets)


def figures(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """AUROC and FPR95 (ID positive) of each OOD set, in percent."""
    found: dict[str, float] = {}
    for name in demo.FOLDERS:
        found[f"AUROC {name}"] = 100 * auroc(scores[ID_TEST], scores[name])
        found[f"FPR95 {name}"] = 100 * fpr_at_tpr(scores[ID_TEST], scores[name], positive="id")
    return found


@torch.no_grad()
def compare(digits: Digits, ways: Sequence[Way], seed: int) -> tuple[list[Row], float]:
    """The rows of both sides for one network, and how far apart both are on the last layer."""
    model, (images, labels) = digits.model, digits.anchors
    inputs = {OTHERS: digits.others[0], **digits.sets}
    signals = {name: forward(model, some) for name, some in inputs.items()}
    g = torch.cat(list(gradients(model, images)))
    references = {way: fit(g, labels, way) for way in ways}
    closed_forms = {way: fit_closed_form(*forward(model, images), labels, way) for way in ways}
    coordinates: dict[tuple[str, Way], dict[str, Tensor]] = {(scope, way): {} for way in ways for scope in (ALL, LAST)}
    for name, some in inputs.items():
        parts = [[reference.project(part) for reference in references.values()] for part in gradients(model, some)]
        for way, column in zip(ways, zip(*parts, strict=True), strict=True):
            coordinates[ALL, way][name] = torch.cat(column)
            coordinates[LAST, way][name] = closed_forms[way].project(*signals[name])
    energy = {name: model(some).logsumexp(1) for name, some in digits.sets.items()}
    rows: list[Row] = [{"scope": "no gradient", "head": "energy", **figures(energy)}]
    for (scope, way), sets in coordinates.items():
        subspace = way.subspace if way.wanted is None else f"{way.subspace} {way.wanted:g}"
        values = (scope, subspace, way.normalisation, sets[OTHERS].shape[1])
        for head in HEADS:
            score = judge(head, sets[OTHERS], digits.others[1], model.head.out_features, seed)
            found = figures({name: score(sets[name]) for name in digits.sets})
            rows.append({**dict(zip(LABELS, values, strict=True)), "head": head, **found})
    return rows, max(error_of(closed_form, digits, way) for way, closed_form in closed_forms.items())


@torch.no_grad()
def error_of(closed_form: Basis, digits: Digits, way: Way) -> float:
    """Largest difference of the closed form to the reference restricted to the last layer, by the largest coordinate."""
    test = digits.sets[ID_TEST]
    g, g_test = (torch.cat(list(gradients(digits.model, some, LAST_LAYER))) for some in (digits.anchors[0], test))
    expected = fit(g, digits.anchors[1], way).project(g_test)
    return float((closed_form.project(*forward(digits.model, test)) - expected).abs().max() / expected.abs().max())


def average(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of all seeds as one each: means, with `<figure> by seed` beside them."""
    merged = []
    for rows in zip(*runs, strict=True):
        row = dict(rows[0])
        for key in [key for key in row if key.startswith(("AUROC", "FPR95", "components"))]:
            row |= {key: statistics.mean(each[key] for each in rows), f"{key} by seed": [each[key] for each in rows]}
        merged.append(row)
    return merged


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Gradients of all parameters beside those of the last layer.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of split, training and OOD sets")
    parser.add_argument("--anchors", type=int, default=600, help="at most; never more than half of the samples")
    parser.add_argument("--components", type=json.loads, nargs="+", default=[0.99, 32], help="of PCA: K, or a share")
    parser.add_argument("--epochs", type=int, default=demo.EPOCHS, help="of training")
    parser.add_argument("--quick", action="store_true", help="fewer images; the figures mean little")
    parser.add_argument("--json", type=Path, help="write the rows")
    return parser.parse_args(argv)


def print_table(rows: Sequence[Row]) -> None:
    titles = {key: key for key in rows[0] if key.startswith(("AUROC", "FPR95")) and not key.endswith("by seed")}
    for row in [LABELS | {"head": "head"} | titles, *rows]:
        values = (row.get(key, "") for key in (*LABELS, "head", *titles))
        print("  ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in values))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    wanted = [*(("pca", each) for each in options.components), ("class average", None)]
    ways = [Way(*each, normalisation) for each in wanted for normalisation in ("none", "nfk")]
    digits = {seed: prepare(seed, options) for seed in options.seeds}
    runs, errors = zip(*(compare(digits[seed], ways, seed) for seed in digits), strict=True)
    rows = average(runs)
    print_table(rows)
    print(f"restricted to the last layer, the reference is {max(errors):.1e} from the closed form")
    if options.json:
        options.json.write_text(json.dumps({"seeds": options.seeds, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if max(errors) <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
