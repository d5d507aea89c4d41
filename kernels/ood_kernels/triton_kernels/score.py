"""Single pass: NAP, energies, softmax and gradient coordinates of a batch, with one read of its feature map.

Large heads take three launches: `pool_partials`; the head pass, which for a factored basis also forms s = U_hᵀ h̃; and one in which
some programs project while others finish p, energies and NAP (`score_kernels`). Small heads take one launch (`score_small`), in
which each program streams the whole head and basis. One multiprocessor reads less than 100 bytes per nanosecond, and multiplies
fp32 on CUDA cores slower than that, so this beats two more launches only for a small head and basis: up to 64 KiB in fp32,
256 KiB on tensor cores. These are estimates; a tuned configuration of the family "score" replaces them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..bases import DualTensors, ExplicitTensors, FactoredTensors
from ..types import BasisTensors, Head, ScoreOutputs
from .launch import cdiv, choose, next_power_of_2
from .pool_nap import pool_partials
from .project_dual import dual_plan
from .project_explicit import explicit_plan
from .project_factored import factored_plan
from .score_launch import Projection, score_large, score_small

__all__ = ["candidates", "score"]

_WORKSPACE_BYTES = 64 * 2**20
_SMALL_CLASSES = 128


def score(
    feature_map: Tensor,
    eps: float,
    rectify: bool,
    weight: Tensor,
    bias: Tensor | None,
    weight_mask: Tensor | None,
    neuron_mask: Tensor | None,
    basis: BasisTensors | None,
    *,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, nap, lse, pruned lse, p, g_low) in fp32, as `reference.score`; inputs in fp32, fp16 or bf16.

    One launch for small heads, three for large ones. If logits and partial results would exceed 64 MiB, the batch is processed in
    chunks by the last two launches, or by the only one, so that the map is still read once.

    Args:
        feature_map: [N, D, H, W], any strides.
        eps: NAP's eps.
        rectify: NAP of the map's positive part.
        weight: [C, D].
        bias: [C] or None.
        weight_mask: bool [C, D], int32 [C, ceil(D / 32)] from `pack_mask`, or None.
        neuron_mask: bool [D], int32 [ceil(D / 32)], or None.
        basis: None leaves g_low [N, 0].
        precision: of matrix products, one of `PRECISIONS`.
    """
    (samples, channels), classes = feature_map.shape[:2], weight.shape[0]
    head = Head(weight, bias, weight_mask, neuron_mask)
    projection = _projection(basis, precision)

    def empty(*shape: int) -> Tensor:
        return feature_map.new_empty(shape, dtype=torch.float32)

    g_low = empty(samples, projection.components)
    if samples == 0:
        return empty(0, channels), empty(0), empty(0), empty(0), empty(0, classes), g_low
    parts = [*head, *([] if basis is None else basis.parts())]
    streamed = sum(part.nbytes for part in parts if part is not None)
    tile = _small_tile(feature_map, head, streamed, projection, precision)
    if streamed <= 1024 * tile.pop("LIMIT_KIB") and classes <= _SMALL_CLASSES:
        nap, h = empty(samples), empty(samples, channels)
        outputs = ScoreOutputs(h, nap, empty(samples), empty(samples), empty(samples, classes), g_low)
        rows = _rows_at_once(samples, classes, projection, tile["SAMPLES"], with_logits=False)
        score_small(feature_map, eps, rectify, head, projection, precision, tile, outputs, rows)
    else:
        most = _rows_at_once(samples, classes, projection, projection.block, with_logits=bool(projection.kind))
        turns = cdiv(samples, most)
        # Equal parts, of whole tiles: a short last one would leave most of the GPU idle.
        rows = cdiv(cdiv(samples, turns), projection.block) * projection.block if turns > 1 else samples
        # Each part's counters start at a multiple of 16 bytes, so that all run the same compiled kernel.
        counters = cdiv(1 + cdiv(rows, projection.block) * projection.component_tiles, 4) * 4
        tickets = feature_map.new_empty((turns, counters), dtype=torch.int32) if projection.kind else None
        h, squares = pool_partials(feature_map, eps, rectify, tickets)
        outputs = ScoreOutputs(h, empty(samples), empty(samples), empty(samples), empty(samples, classes), g_low)
        score_large(head, projection, precision, squares, tickets, outputs, rows)
    return tuple(outputs)  # type: ignore[return-value]


def _projection(basis: BasisTensors | None, precision: str) -> Projection:
    none = Projection("", {}, {}, None, 0, 1, 0, True)
    if basis is None or not basis.n_components:
        return none
    if isinstance(basis, DualTensors):
        dual = dual_plan(basis, precision)
        plan = none._replace(arguments=dual.arguments, programs=dual.splits, wide=dual.wide)
    elif isinstance(basis, ExplicitTensors):
        explicit = explicit_plan(basis, precision)
        plan = none._replace(
            arguments=explicit.arguments,
            component_tiles=explicit.component_tiles,
            programs=explicit.splits,
            wide=explicit.wide,
        )
    elif isinstance(basis, FactoredTensors):
        factored = factored_plan(basis, precision)
        plan = none._replace(
            arguments=factored.projection,
            product=_product_arguments(factored.product),
            rank=factored.product["rank"],
            component_tiles=factored.component_tiles,
            programs=factored.splits,
            wide=factored.wide,
        )
    else:
        raise ValueError(
            f"basis: expected a type with a score kernel, got {type(basis).__name__}; use backend='reference'"
        )
    arguments = plan.arguments | {"KIND": basis.cotangent}
    return plan._replace(kind=basis.kind, arguments=arguments, constants=basis.constants.contiguous())


def _product_arguments(product: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `product_program`, renamed to avoid clashes with those of `head_program`."""
    names = {
        "factors_ptr": "factors_ptr",
        "stride_row": "factor_row",
        "stride_column": "factor_column",
        "BIAS": "FACTOR_BIAS",
        "H_UNIT": "H_UNIT",
        "UNIT": "FACTOR_UNIT",
        "BLOCK_N": "FACTOR_N",
        "BLOCK_Q": "FACTOR_Q",
        "BLOCK_D": "FACTOR_D",
    }
    return {renamed: product[name] for name, renamed in names.items()}


def _rows_at_once(samples: int, classes: int, projection: Projection, block: int, with_logits: bool) -> int:
    """Chunk size: samples whose workspace fits in 64 MiB, a multiple of `block` unless all fit; at least one tile."""
    numbers = projection.programs * projection.components + projection.rank
    # Partials of the head pass: five numbers per tile of at least 16 classes.
    numbers += 5 * cdiv(classes, 16) + (classes if with_logits else 0)
    tiles = max(1, _WORKSPACE_BYTES // (4 * numbers * block))
    return min(samples, tiles * block)


def _small_tile(
    feature_map: Tensor, head: Head, streamed: int, projection: Projection, precision: str
) -> dict[str, Any]:
    """Tile of the one-launch variant, with LIMIT_KIB, the largest head and basis for it."""
    classes, channels = head.weight.shape
    height, width = feature_map.shape[2:]
    shape: dict[str, int | str] = {
        "basis": projection.kind,
        "precision": precision,
        "classes": classes,
        "channels": channels,
        "components": projection.components,
        "streamed_kib": streamed // 1024,
        "spatial": height * width,
        "itemsize": head.weight.element_size(),
        "map_itemsize": feature_map.element_size(),
    }
    default = {
        "LIMIT_KIB": 64 if precision == "ieee" else 256,
        "SAMPLES": 4,
        "POOL_D": 32,
        "POOL_S": min(32 // feature_map.element_size(), next_power_of_2(height * width)),
        "num_warps": projection.arguments.get("num_warps", 4),
        "num_stages": 3,
    }
    return choose("score", shape, default, feature_map.device)


def candidates(shape: Mapping[str, int | str]) -> Iterator[dict[str, int | str]]:
    """Configurations to time for a shape of `choose`, merged over the default: three launches, and tiles of one launch."""
    yield {"LIMIT_KIB": 0}
    if int(shape["classes"]) <= _SMALL_CLASSES:
        for samples, warps in itertools.product((2, 4, 8, 16), (4, 8)):
            yield {"LIMIT_KIB": 2**20, "SAMPLES": samples, "num_warps": warps}
