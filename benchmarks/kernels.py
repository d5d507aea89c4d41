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
from ood_kernels.workloads import BASES, WORKLOADS, Basis, BasisKind, Layout, Operands, Workload

from .clocks import DEVICE
from .common import AUTOGRAD, COMPILED, OURS, PLAIN, REFERENCE, Case, Provider, first_line, planned

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PRECISIONS = {torch.float32: "ieee", torch.float16: "fp16", torch.bfloat16: "bf16"}
CALLS = f"{OURS}, call by call"
_LOOP_SAMPLES, _CHUNK = 4, 32


class Size(NamedTuple):
    """Of a case; `rivals` are those that are slow to set up: "compile", "autograd"."""

    workload: Workload
    samples: int = 64
    dtype: torch.dtype = torch.float32
    layout: Layout = "rows"
    rivals: frozenset[str] = frozenset()

    def __str__(self) -> str:
        size = self.workload
        words = f"{size.name} D={size.channels} H={size.height} n={size.anchors} K={size.components} N={self.samples}"
        return f"{words} {str(self.dtype).removeprefix('torch.')} {self.layout}"

    @property
    def operands(self) -> Operands:
        """Map, head and bases on the device."""
        return Operands(self.workload, self.samples, self.dtype, DEVICE)

    def case(self, subject: str, axes: str, providers: Sequence[Provider], **fields: Any) -> Case:
        """A case with those of the sizes that it has."""
        size = self.workload
        known = {"N": self.samples, "D": size.channels, "C": size.classes, "H": size.height, "W": size.width}
        known |= {"n": size.anchors, "K": size.components}
        sizes = {axis: known[axis] for axis in axes}
        return Case(subject, size.name, sizes, providers, REFERENCE, dtype=self.dtype, **fields)


def ours(size: Size, call: Callable[[str], Any]) -> Iterator[Provider]:
    """A call in the precision of the operands, on a GPU in a graph and without one."""
    one = Provider(OURS, partial(call, PRECISIONS[size.dtype]), tolerance=TOLERANCES[size.dtype])
    yield one
    if DEVICE.type == "cuda":
        yield one._replace(name=CALLS, graph=False)


def compiled(size: Size, function: Callable[..., Any], *arguments: Any) -> Iterator[Provider]:
    """torch.compile of a function, for the shapes of these arguments."""
    if "compile" not in size.rivals:
        return
    # What was compiled for other shapes counts towards a limit beyond which torch runs eagerly and says nothing.
    torch.compiler.reset()
    program = torch.compile(function, dynamic=False)
    try:
        program(*arguments)
        yield Provider(COMPILED, lambda: program(*arguments))
    except Exception as error:  # such as without a C++ compiler on a CPU
        yield Provider(COMPILED, missing=first_line(error))


def plain_products(p: Tensor, h: Tensor, basis: Basis) -> Tensor:
    """What a user would write, in the dtype of the basis: two products and what lies between, or gradients times vectors."""
    left, right = p.to(basis[0].dtype), h.to(basis[0].dtype)
    if isinstance(basis, ok.DualTensors):
        gram = (left @ basis.anchor_cotangents.T) * (right @ basis.anchor_features.T + 1)
        return (gram @ basis.coefficients).float() - basis.constants
    right = F.pad(right, (0, 1), value=1.0)
    if isinstance(basis, ok.FactoredTensors):
        left, right = left @ basis[0], right @ basis[1]
    vectors = (basis.core if isinstance(basis, ok.FactoredTensors) else basis[0]).flatten(1).T
    pairs = zip(left.split(_CHUNK), right.split(_CHUNK), strict=True)
    found = [torch.einsum("nc,nd->ncd", *pair).flatten(1) @ vectors for pair in pairs]
    return torch.cat(found).float() - basis.constants


def autograd(size: Size, h: Tensor, head: ok.Head, basis: Basis) -> Iterator[Provider]:
    """Coordinates as arXiv 2310.17163 computes them: the gradient of the energy by weight and bias, times the vectors, centred."""
    if "autograd" not in size.rivals:
        return
    assert head.bias is not None
    parameters = torch.cat([head.weight.float(), head.bias.float()[:, None]], 1).requires_grad_()
    extended = F.pad(h[:_LOOP_SAMPLES], (0, 1), value=1.0)
    if isinstance(basis, ok.DualTensors):
        cotangents, features, coefficients = (part.float() for part in basis[:3])
        anchors = F.pad(features, (0, 1), value=1.0)
        vectors = torch.stack([((cotangents.T * column) @ anchors).flatten() for column in coefficients.T])
    else:
        vectors = basis[0].float().flatten(1)

    def one_by_one() -> Tensor:
        with torch.enable_grad():
            energies = [(parameters @ h_tilde).logsumexp(0) for h_tilde in extended]
        found = [torch.autograd.grad(energy, parameters)[0].flatten() for energy in energies]
        return torch.stack([vectors @ gradient for gradient in found]) - basis.constants

    # The vectors were rounded to the dtype of the basis.
    tolerance = max(1e-3, TOLERANCES[size.dtype])
    yield Provider(AUTOGRAD, one_by_one, samples=len(extended), tolerance=tolerance, graph=False)


def pool_nap(size: Size) -> Case:
    """Pooled features and NAP from the map."""
    feature_map = size.operands.feature_map(size.layout)
    providers = [
        *ours(size, lambda _: ok.pool_nap(feature_map)),
        Provider(REFERENCE, lambda: ok.reference.pool_nap(feature_map)),
        *compiled(size, ok.reference.pool_nap, feature_map),
    ]
    steps = [size.workload.pool(size.samples, size.dtype.itemsize)]
    return size.case("pool_nap", "NDHW", providers, truth=pool_truth(feature_map), steps=steps, layout=size.layout)


def masked_energy(size: Size) -> Case:
    """Energies of the head and of the pruned head, and the softmax, from pooled features."""
    h, head = size.operands.features, size.operands.head
    kept, truth = engine_head(head), ok.reference.masked_energy(h.double(), *head)
    providers = [
        *ours(size, lambda precision: ok.masked_energy(h, *kept, precision=precision)),
        Provider(REFERENCE, lambda: ok.reference.masked_energy(h, *head)),
    ]
    steps = [size.workload.head(size.samples, size.dtype.itemsize)]
    return size.case("masked_energy", "NDC", providers, truth=truth, steps=steps)


def project(kind: BasisKind, size: Size) -> Case:
    """Coordinates of last-layer gradients in a basis of that kind."""
    made = size.operands
    h, p, basis = made.features, made.softmax, made.basis(kind)
    providers = [
        *ours(size, lambda precision: ok.project_gradients(p, h, basis, precision=precision)),
        Provider(REFERENCE, lambda: ok.reference.project_gradients(p, h, basis)),
        Provider(PLAIN, lambda: plain_products(p, h, basis), tolerance=TOLERANCES[size.dtype]),
        *autograd(size, h, made.head, basis),
    ]
    truth = ok.reference.project_gradients(p.double(), h.double(), basis)
    steps = [size.workload.projection(size.samples, size.dtype.itemsize, kind)]
    return size.case(f"project {kind}", "NDCnK" if kind == "dual" else "NDCK", providers, truth=[truth], steps=steps)


def score(size: Size) -> Case:
    """All of it in one pass over the map, with a dual basis."""
    made = size.operands
    feature_map, basis, head = made.feature_map(size.layout), made.basis("dual"), made.head
    kept, (h, nap) = engine_head(head), pool_truth(feature_map)
    energies = ok.reference.masked_energy(h, *head)
    truth = (h, nap, *energies, ok.reference.project_gradients(energies[2], h, basis))
    providers = [
        *ours(size, lambda precision: ok.score(feature_map, kept, basis, precision=precision)),
        Provider(REFERENCE, lambda: ok.reference.score(feature_map, head, basis)),
        *compiled(size, ok.reference.score, feature_map, head, basis),
    ]
    itemsize = size.dtype.itemsize
    steps = list(size.workload.score(size.samples, itemsize, itemsize).values())
    return size.case("score", "NDCHWnK", providers, truth=truth, steps=steps, layout=size.layout)


def engine_head(head: ok.Head) -> ok.Head:
    """The head as the engine keeps it: masks as bits for a GPU; plain torch would unpack them in every call."""
    mask = head.weight_mask
    return head if DEVICE.type == "cpu" or mask is None else head._replace(weight_mask=ok.pack_mask(mask))


def pool_truth(feature_map: Tensor) -> tuple[Tensor, Tensor]:
    """What `pool_nap` returns, in fp64, of a few samples at a time."""
    h, nap = zip(*(ok.reference.pool_nap(part.double())[:2] for part in feature_map.split(_CHUNK)), strict=True)
    return torch.cat(h), torch.cat(nap)


FUNCTIONS: dict[str, Callable[[Size], Case]] = {"score": score, "pool_nap": pool_nap, "masked_energy": masked_energy}
FUNCTIONS |= {f"project_{kind}": partial(project, kind) for kind in BASES}


def plan(name: str, *sizes: Size, quick: bool = False) -> list[Any]:
    """Parameters of the test: a function at these sizes."""
    return [planned(FUNCTIONS[name], size, name=f"{name} {size}", quick=quick) for size in sizes]


def cpu_cases() -> Iterator[Any]:
    """On a CPU: fp32 most of all, N up to 256, at most 1000 anchors and 256 components but where memory is the question."""
    bf16, fp16 = torch.bfloat16, torch.float16

    def size(name: str, samples: int = 64, *rivals: str) -> Size:
        known = WORKLOADS[name]
        known = known._replace(anchors=min(known.anchors, 1000), components=min(known.components, 256))
        return Size(known, samples, layout="tokens" if known.tokens else "rows", rivals=frozenset(rivals))

    r50, r18 = size("R50"), size("R18")
    columns = r50._replace(layout="channels_last")
    halves = [one._replace(dtype=dtype) for dtype in (bf16, fp16) for one in (r50, columns)]
    yield from plan("score", *(size("R50", samples) for samples in (1, 4, 16)), r50, r18, size("tiny"), quick=True)
    yield from plan("score", size("R50", 256), columns._replace(rivals=frozenset({"compile"})))
    yield from plan("score", size("ViT"), size("MobileNetV2"), size("W21k", 16))
    yield from plan("pool_nap", r50, columns, *halves, size("ViT"), r18, quick=True)
    yield from plan("pool_nap", size("R50", 1), size("R50", 256))
    yield from plan("masked_energy", r50, r18, quick=True)
    yield from plan("masked_energy", size("R50", 256), size("W21k", 16))
    few = size("R50", 64, "autograd")
    yield from plan("project_dual", r50, quick=True)
    yield from plan("project_dual", few._replace(workload=few.workload._replace(components=64)), size("R50", 256))
    yield from plan("project_explicit", size("R18", 64, "autograd"), quick=True)
    yield from plan("project_factored", r18, quick=True)


def cuda_cases() -> Iterator[Any]:
    """On a GPU: what the targets ask for, and every workload, batch size, dtype and layout."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    r50 = WORKLOADS["R50"]
    main = [
        Size(r50, 256, bf16, "channels_last", frozenset({"compile", "autograd"})),
        Size(r50, 256, bf16, "rows"),
        Size(r50, 1, bf16, "channels_last"),
        Size(r50, 256, fp32, "rows"),
        Size(r50, 1024, bf16, "channels_last"),
    ]
    rest = [
        Size(workload, samples, dtype, "tokens" if workload.tokens else "channels_last")
        for samples, dtype in ((256, bf16), (1, bf16), (1024, bf16), (8, bf16), (64, bf16), (256, fp16), (256, fp32))
        for workload in (WORKLOADS[name] for name in ("R50", "ViT", "R18", "W21k"))
    ]
    known = {str(size): size for size in (*main, *rest, *main)}
    for size in known.values():
        names = FUNCTIONS if size.layout != "rows" and size.workload.name == "R18" else list(FUNCTIONS)[:4]
        for name in names:
            yield from plan(name, size, quick=size in main)


@pytest.mark.parametrize("make", list(cuda_cases() if DEVICE.type == "cuda" else cpu_cases()))
def test_kernels(make: Callable[[], Case], measured: Callable[[Callable[[], Case]], None]) -> None:
    measured(make)
