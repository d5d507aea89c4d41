"""What do the functions of `ood_kernels` cost beside plain torch, torch.compile, autograd and the limits of the machine?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ood_kernels as ok
from ood_kernels.workloads import WORKLOADS, BasisKind, Layout, Operands, Workload

from .cases import AUTOGRAD, OURS, PLAIN, REFERENCE, Case, Planned, Provider, providers_of
from .clocks import DEVICE
from .rivals import Recipe, compiled, plain_products

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PRECISIONS = {torch.float32: "ieee", torch.float16: "fp16", torch.bfloat16: "bf16"}
EXACT = TOLERANCES[torch.float32]
VMAP, CALLS, WARM = "autograd, vmap", f"{OURS}, call by call", f"{OURS}, warm cache"
_LOOP_SAMPLES, _VMAP_SAMPLES, _TRUTH_ELEMENTS = 4, 16, 2**24
_ANCHORS, _COMPONENTS = 1000, 256
"""Most of a CPU's cases, so that they fit into the time."""


class Size(NamedTuple):
    """A case's sizes, dtype and layout.

    Attributes:
        workload: see `ood_kernels.workloads`.
        samples: N.
        dtype: of map, head and basis.
        layout: of the map.
        others: rivals that are slow to set up, and kernels beside the usual one: "compile", "autograd", "precisions".
    """

    workload: Workload
    samples: int = 64
    dtype: torch.dtype = torch.float32
    layout: Layout = "rows"
    others: frozenset[str] = frozenset()

    def __str__(self) -> str:
        size = self.workload
        dtype = str(self.dtype).removeprefix("torch.")
        words = f"D={size.channels} H={size.height} n={size.anchors} K={size.components} N={self.samples} {dtype}"
        return f"{size.name} {words} {self.layout}"

    @property
    def operands(self) -> Operands:
        """Map, head and bases on the device."""
        return Operands(self.workload, self.samples, self.dtype, DEVICE)

    def case(self, subject: str, axes: str, makers: Sequence[Callable[[], Provider]], **fields: Any) -> Case:
        """A case with those of the sizes that it has."""
        size = self.workload
        known = {"N": self.samples, "D": size.channels, "C": size.classes, "H": size.height, "W": size.width}
        known |= {"n": size.anchors, "K": size.components}
        found, missing = providers_of(*makers)
        sizes = {axis: known[axis] for axis in axes}
        return Case(subject, size.name, sizes, found, REFERENCE, dtype=self.dtype, missing=missing, **fields)


def ours(size: Size, call: Callable[[str], Any]) -> list[Callable[[], Provider]]:
    """Providers: a call in a precision, on a GPU in a graph and without one, in further precisions, and on warm operands."""
    usual, tolerance = PRECISIONS[size.dtype], TOLERANCES[size.dtype]
    found = [Provider(OURS, partial(call, usual), tolerance=tolerance)]
    if DEVICE.type == "cuda":
        found.append(Provider(CALLS, partial(call, usual), tolerance=tolerance, graph=False))
        if size.samples == 1:
            found.append(Provider(WARM, partial(call, usual), tolerance=tolerance, flush=False))
        if "precisions" in size.others:
            # A product whose operands are rounded to TF32 is as far off as one in fp16, and tf32x3 is as good as fp32.
            more = {"tf32x3": EXACT, "tf32": TOLERANCES[torch.float16]}
            found += [Provider(f"{OURS}, {name}", partial(call, name), tolerance=most) for name, most in more.items()]
    return [partial(lambda provider: provider, provider) for provider in found]


def pool_nap(size: Size) -> Case:
    """Pooled features and NAP from the map."""
    feature_map = size.operands.feature_map(size.layout)
    makers: list[Callable[[], Provider]] = [
        *ours(size._replace(others=frozenset()), lambda _: ok.pool_nap(feature_map)),
        lambda: Provider(REFERENCE, lambda: ok.reference.pool_nap(feature_map)),
    ]
    if "compile" in size.others:
        makers.append(lambda: compiled(ok.reference.pool_nap, feature_map))
    steps = [size.workload.pool(size.samples, size.dtype.itemsize)]
    return size.case("pool_nap", "NDHW", makers, truth=pool_truth(feature_map), steps=steps, layout=size.layout)


def masked_energy(size: Size) -> Case:
    """Energies of the head and of the pruned head, and the softmax, from pooled features."""
    made = size.operands
    h, head, kept = made.features, made.head, engine_head(made.head)
    weight, bias, weight_mask, neuron_mask = head
    assert weight_mask is not None
    assert neuron_mask is not None
    pruned = weight * weight_mask * neuron_mask

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        features = h.to(weight.dtype)
        logits, pruned_logits = (F.linear(features, matrix, bias).float() for matrix in (weight, pruned))
        return logits.logsumexp(1), pruned_logits.logsumexp(1), logits.softmax(1)

    makers: list[Callable[[], Provider]] = [
        *ours(size, lambda precision: ok.masked_energy(h, *kept, precision=precision)),
        lambda: Provider(REFERENCE, lambda: ok.reference.masked_energy(h, *head)),
        lambda: Provider(PLAIN, plain, tolerance=TOLERANCES[size.dtype], note="keeps the pruned weights too"),
    ]
    truth = ok.reference.masked_energy(h.double(), *head)
    steps = [size.workload.head(size.samples, size.dtype.itemsize)]
    return size.case("masked_energy", "NDC", makers, truth=truth, steps=steps)


def project(kind: BasisKind, size: Size) -> Case:
    """Coordinates of last-layer gradients in a basis of that kind."""
    made = size.operands
    h, p, basis = made.features, made.softmax, made.basis(kind)
    makers: list[Callable[[], Provider]] = [
        *ours(size, lambda precision: ok.project_gradients(p, h, basis, precision=precision)),
        lambda: Provider(REFERENCE, lambda: ok.reference.project_gradients(p, h, basis)),
        lambda: Provider(PLAIN, plain_products(p, h, basis), tolerance=TOLERANCES[size.dtype]),
    ]
    if "autograd" in size.others:
        recipe = Recipe(made.head, basis)
        few, more = h[:_LOOP_SAMPLES], h[:_VMAP_SAMPLES]
        # The vectors were rounded to the dtype of the basis.
        fields: dict[str, Any] = {"tolerance": max(1e-3, TOLERANCES[size.dtype]), "graph": False}
        makers.append(lambda: Provider(AUTOGRAD, lambda: recipe.one_by_one(few), samples=len(few), **fields))
        makers.append(lambda: Provider(VMAP, lambda: recipe.by_vmap(more), samples=len(more), **fields))
    truth = ok.reference.project_gradients(p.double(), h.double(), basis)
    steps = [size.workload.projection(size.samples, size.dtype.itemsize, kind)]
    axes = "NDCnK" if kind == "dual" else "NDCK"
    return size.case(f"project {kind}", axes, makers, truth=[truth], steps=steps)


def score(size: Size) -> Case:
    """All of it in one pass over the map, with a dual basis."""
    made = size.operands
    feature_map, basis, head, kept = (
        made.feature_map(size.layout),
        made.basis("dual"),
        made.head,
        engine_head(made.head),
    )
    h, nap = pool_truth(feature_map)
    energies = ok.reference.masked_energy(h, *head)
    truth = (h, nap, *energies, ok.reference.project_gradients(energies[2], h, basis))
    makers: list[Callable[[], Provider]] = [
        *ours(size, lambda precision: ok.score(feature_map, kept, basis, precision=precision)),
        lambda: Provider(REFERENCE, lambda: ok.reference.score(feature_map, head, basis)),
    ]
    if "compile" in size.others:
        makers.append(lambda: compiled(ok.reference.score, feature_map, head, basis))
    itemsize = size.dtype.itemsize
    steps = list(size.workload.score(size.samples, itemsize, itemsize).values())
    return size.case("score", "NDCHWnK", makers, truth=truth, steps=steps, layout=size.layout)


def engine_head(head: ok.Head) -> ok.Head:
    """The head as the engine keeps it: masks as bits for a GPU; plain torch would unpack them in every call."""
    if DEVICE.type == "cpu" or head.weight_mask is None:
        return head
    return head._replace(weight_mask=ok.pack_mask(head.weight_mask))


def pool_truth(feature_map: Tensor) -> tuple[Tensor, Tensor]:
    """What `pool_nap` returns, in fp64, of a few samples at a time."""
    rows = max(1, _TRUTH_ELEMENTS // feature_map[0].numel())
    parts = [ok.reference.pool_nap(part.double()) for part in feature_map.split(rows)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def cpu_cases() -> Iterator[Planned]:
    """On a CPU: fp32 most of all, N up to 256, at most 1000 anchors and 256 components but where memory is the question."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16

    def size(name: str, samples: int = 64, *others: str, **fields: Any) -> Size:
        known = WORKLOADS[name]
        anchors, components = min(known.anchors, _ANCHORS), min(known.components, _COMPONENTS)
        layout: Layout = "tokens" if known.tokens else "rows"
        return Size(
            known._replace(anchors=anchors, components=components), samples, layout=layout, others=frozenset(others)
        )._replace(**fields)

    def plan(function: Callable[[Size], Case], *sizes: Size, quick: bool = True, name: str = "") -> Iterator[Planned]:
        for one in sizes:
            yield Planned(f"{name or function.__name__} {one}", partial(function, one), quick)

    yield from plan(score, *(size("R50", samples) for samples in (1, 4, 16, 64)), size("R18"), size("tiny"))
    yield from plan(score, size("R50", 256), size("R50", 64, "compile", layout="channels_last"), quick=False)
    yield from plan(score, *(size(name) for name in ("ViT", "MobileNetV2", "W21k")), quick=False)
    largest = Size(WORKLOADS["R50"]._replace(components=_COMPONENTS), 1024)
    yield from plan(score, largest, quick=False)
    layouts: tuple[Layout, ...] = ("rows", "channels_last")
    every = [size("R50", dtype=dtype, layout=layout) for dtype in (fp32, bf16, fp16) for layout in layouts]
    yield from plan(pool_nap, *every, size("ViT"), size("R18"))
    wide = [
        WORKLOADS["R50"]._replace(name="stage", channels={14: 512, 56: 256}[side], height=side, width=side)
        for side in (14, 56)
    ]
    more = [Size(one, 64, dtype, layout) for one in wide for dtype in (fp32, bf16) for layout in layouts]
    yield from plan(pool_nap, *more, size("R50", 1), size("R50", 256), size("MobileNetV2"), quick=False)
    yield from plan(masked_energy, size("R50"), size("R18"))
    yield from plan(masked_energy, size("R50", 4), size("R50", 256), size("W21k"), quick=False)
    dual = partial(project, "dual")
    yield from plan(dual, size("R50"), name="project_dual")
    recipe = size("R50", 64, "autograd")
    few = recipe._replace(workload=recipe.workload._replace(components=64))
    wider = size("R50", 256)
    yield from plan(dual, few, wider, size("R50", 1), size("W21k"), quick=False, name="project_dual")
    kinds: tuple[BasisKind, ...] = ("explicit", "factored")
    for kind in kinds:
        yield from plan(partial(project, kind), size("R18", 64, "autograd"), name=f"project_{kind}")
    narrow = size("R50")._replace(workload=WORKLOADS["R50"]._replace(components=16))
    yield from plan(partial(project, "explicit"), narrow, quick=False, name="project_explicit")
    yield from plan(partial(project, "factored"), size("R50"), quick=False, name="project_factored")


def cuda_cases() -> Iterator[Planned]:
    """On a GPU: what the targets ask for first, then every workload, batch size, dtype and layout; `--quick` is the first part."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    last: tuple[Layout, ...] = ("channels_last", "rows")
    r50 = WORKLOADS["R50"]
    main = [
        Size(r50, 256, bf16, "channels_last", frozenset({"compile", "autograd"})),
        Size(r50, 256, bf16, "rows"),
        Size(r50, 1, bf16, "channels_last"),
        Size(r50, 256, fp32, "rows", frozenset({"precisions"})),
        Size(r50, 1024, bf16, "channels_last"),
    ]
    rest = [
        Size(WORKLOADS[name], samples, dtype, layout)
        for samples in (256, 1, 1024, 64, 8)
        for dtype in (bf16, fp16, fp32)
        for name in ("R50", "ViT", "R18", "W21k")
        for layout in (("tokens",) if WORKLOADS[name].tokens else last)
    ]
    seen = {one._replace(others=frozenset()) for one in main}
    for one in (*main, *(one for one in rest if one not in seen)):
        quick = one in main
        for function in (score, pool_nap):
            yield Planned(f"{function.__name__} {one}", partial(function, one), quick)
        if one.layout == "rows":
            continue
        yield Planned(f"masked_energy {one}", partial(masked_energy, one), quick)
        yield Planned(f"project_dual {one}", partial(project, "dual", one), quick)
        if one.samples == 256 and one.workload.name in ("R50", "R18"):
            plain = one._replace(others=frozenset())
            yield Planned(f"project_explicit {one}", partial(project, "explicit", plain), False)
            yield Planned(f"project_factored {one}", partial(project, "factored", plain), False)


CASES = list(cuda_cases() if DEVICE.type == "cuda" else cpu_cases())


@pytest.mark.parametrize("planned", CASES, ids=str)
def test_kernels(planned: Planned, measured: Callable[[Case], None]) -> None:
    measured(planned.build())
