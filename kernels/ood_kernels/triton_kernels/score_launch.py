"""Launches of the single pass: kernel arguments, and processing of large batches in chunks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import Head, ScoreOutputs
from .launch import cdiv, choose, launch, next_power_of_2
from .masked_energy import head_arguments, head_partials
from .score_kernels import (
    dual_score_kernel,
    explicit_score_kernel,
    factored_score_kernel,
    finish_kernel,
    head_product_kernel,
)
from .score_small import small_dual_kernel, small_explicit_kernel, small_factored_kernel, small_kernel

__all__ = ["Projection", "score_large", "score_small"]

_SMALL_ROWS = 16

_LARGE = {"dual": dual_score_kernel, "explicit": explicit_score_kernel, "factored": factored_score_kernel}
_SMALL = {
    "": small_kernel,
    "dual": small_dual_kernel,
    "explicit": small_explicit_kernel,
    "factored": small_factored_kernel,
}


class Projection(NamedTuple):
    """Kernel arguments for a basis of any kind.

    Attributes:
        kind: basis kind; "" without a basis.
        arguments: of the basis kind's program by name, tile included, without per-sample tensors and sizes.
        product: arguments of `product_program`, for a factored basis only.
        constants: [K].
        rank: Q of a factored basis, else 0.
        component_tiles: tiles of K, distributed over programs.
        programs: per tile of samples and components, one partial result each.
        wide: whether every row of the basis is aligned to 16 bytes.
    """

    kind: str
    arguments: dict[str, Any]
    product: dict[str, Any]
    constants: Tensor | None
    rank: int
    component_tiles: int
    programs: int
    wide: bool

    @property
    def components(self) -> int:
        """Subspace dimension K."""
        return 0 if self.constants is None else self.constants.shape[0]

    @property
    def block(self) -> int:
        """Samples per tile."""
        return int(self.arguments.get("BLOCK_N", 1))


def score_small(
    feature_map: Tensor,
    eps: float,
    rectify: bool,
    head: Head,
    projection: Projection,
    precision: str,
    tile: dict[str, Any],
    outputs: ScoreOutputs,
    rows: int,
) -> None:
    """One launch per chunk of `rows` samples, whose partial results fit in the workspace."""
    samples, classes = outputs.p.shape
    partial, reduced = _workspace(projection, rows, outputs.h)
    for start in range(0, samples, rows):
        part = slice(start, start + rows)
        own = ScoreOutputs(*(output[part] for output in outputs))
        launch(
            _SMALL[projection.kind],
            (cdiv(own.h.shape[0], tile["SAMPLES"]),),
            wide=projection.wide and _map_is_wide(feature_map),
            **_map_arguments(feature_map[part], eps, rectify),
            **_small_head(own, head, precision),
            **_small_projection(projection, own, partial, reduced),
            lse_ptr=own.lse,
            pruned_lse_ptr=own.pruned_lse,
            PRECISION=precision,
            FINAL_C=min(128, next_power_of_2(classes)),
            # Otherwise NVIDIA's compiler spills registers for an occupancy that is never reached.
            maxnreg=min(255, 2048 // tile["num_warps"]),
            **tile,
        )


def _map_arguments(feature_map: Tensor, eps: float, rectify: bool) -> dict[str, Any]:
    _, _, height, width = feature_map.shape
    stride_n, stride_d, stride_h, stride_w = feature_map.stride()
    if width == 1:
        stride_w = stride_h
    return {
        "feature_map_ptr": feature_map,
        "spatial": height * width,
        "width": width,
        "stride_n": stride_n,
        "stride_d": stride_d,
        "stride_h": stride_h,
        "stride_w": stride_w,
        "eps": float(eps),
        "RECTIFY": rectify,
        "FLAT": height == 1 or width == 1 or stride_h == width * stride_w,
    }


def _map_is_wide(feature_map: Tensor) -> bool:
    """Whether channels, or positions of a channel, are contiguous in multiples of 16 elements."""
    _, channels, height, width = feature_map.shape
    stride_n, stride_d, stride_h, stride_w = feature_map.stride()
    if stride_d == 1:
        return all(size % 16 == 0 for size in (channels, stride_n, stride_h, stride_w))
    return stride_w == 1 and stride_h == width and all(size % 16 == 0 for size in (height * width, stride_n, stride_d))


def _small_head(own: ScoreOutputs, head: Head, precision: str) -> dict[str, Any]:
    """Arguments of `head_program`, with logits written to p."""
    arguments = head_arguments(own.h, *head, precision, own.p)
    names = {
        "logits_ptr": "p_ptr",
        "tiles": "class_tiles",
        "BIAS": "HEAD_BIAS",
        "UNIT": "HEAD_UNIT",
        "BLOCK_N": "HEAD_N",
        "BLOCK_C": "HEAD_C",
        "BLOCK_D": "HEAD_D",
    }
    left_out = ("channels", "h_row", "h_column", "LOGITS", "PRECISION", "GROUP", "num_warps", "num_stages")
    renamed = {names.get(name, name): value for name, value in arguments.items() if name not in left_out}
    return renamed | {"nap_ptr": own.nap, "SOFTMAX_UNIT": math.gcd(head.weight.shape[0], 4)}


def _small_projection(projection: Projection, own: ScoreOutputs, partial: Tensor, reduced: Tensor) -> dict[str, Any]:
    """Arguments of the projection in a one-launch kernel."""
    channels = own.h.shape[1]
    if not projection.kind:
        return {"channels": channels}
    given = ("classes", "PRECISION", "num_warps", "num_stages")
    arguments = {name: value for name, value in projection.arguments.items() if name not in given} | projection.product
    # For so few samples, the 64 rows of wgmma would only cost registers.
    arguments["BLOCK_N"] = _SMALL_ROWS
    if projection.kind != "explicit":
        arguments["channels"] = channels
    if projection.kind != "dual":
        arguments["component_tiles"] = projection.component_tiles
    if projection.kind == "factored":
        arguments |= {"reduced_ptr": reduced, "FACTOR_N": _SMALL_ROWS, "FACTOR_D": 32}
    return arguments | {
        "partial_ptr": partial,
        "constants_ptr": projection.constants,
        "output_ptr": own.g_low,
        "programs": projection.programs,
        "OUTPUT_UNIT": math.gcd(projection.components, 16),
        "COMBINE_K": min(128, max(16, next_power_of_2(projection.components))),
    }


def _workspace(projection: Projection, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(partial results, s [rows, Q])."""
    partial = like.new_empty((projection.programs * rows * projection.components,), dtype=torch.float32)
    return partial, like.new_empty((rows * projection.rank,), dtype=torch.float32)


def score_large(
    head: Head,
    projection: Projection,
    precision: str,
    squares: Tensor,
    tickets: Tensor | None,
    outputs: ScoreOutputs,
    rows: int,
) -> None:
    """After the activation pass: two launches per chunk of `rows` samples, which fit in the workspace."""
    samples, classes = outputs.p.shape
    if tickets is None:
        for start in range(0, samples, rows):
            part = slice(start, start + rows)
            own = ScoreOutputs(*(output[part] for output in outputs))
            partials, _ = head_partials(own.h, *head, precision, own.p)
            _finish(own, partials, squares[part])
        return
    logits = outputs.h.new_empty((rows, classes), dtype=torch.float32)
    partial, reduced = _workspace(projection, rows, outputs.h)
    for index, start in enumerate(range(0, samples, rows)):
        part = slice(start, start + rows)
        own = ScoreOutputs(*(output[part] for output in outputs))
        here = logits[: own.h.shape[0]]
        if projection.kind == "factored":
            partials, argmaxima = _head_and_product(own.h, head, precision, here, projection, reduced)
        else:
            partials, argmaxima = head_partials(own.h, *head, precision, here)
        _project(own, here, partials, argmaxima, squares[part], tickets[index], projection, partial, reduced)


def _final_tile(classes: int, device: torch.device) -> dict[str, Any]:
    default = {"FINAL_N": 4, "FINAL_C": min(512, next_power_of_2(classes)), "num_warps": 4, "num_stages": 2}
    return choose("score_finish", {"classes": classes}, default, device)


def _finish(own: ScoreOutputs, partials: Tensor, squares: Tensor) -> None:
    samples, classes = own.p.shape
    tile = _final_tile(classes, partials.device)
    launch(
        finish_kernel,
        (cdiv(samples, tile["FINAL_N"]), cdiv(classes, tile["FINAL_C"])),
        wide=classes % 4 == 0,
        **_finish_arguments(own, partials, squares),
        classes=classes,
        channels=own.h.shape[1],
        **tile,
    )


def _finish_arguments(own: ScoreOutputs, partials: Tensor, squares: Tensor) -> dict[str, Any]:
    return {
        "p_ptr": own.p,
        "partials_ptr": partials,
        "lse_ptr": own.lse,
        "pruned_lse_ptr": own.pruned_lse,
        "partial_squares_ptr": squares,
        "nap_ptr": own.nap,
        "samples": own.h.shape[0],
        "class_tiles": partials.shape[1],
        "square_blocks": squares.shape[1],
        "SOFTMAX_UNIT": math.gcd(own.p.shape[1], 4),
    }


def _head_and_product(
    h: Tensor, head: Head, precision: str, logits: Tensor, projection: Projection, reduced: Tensor
) -> tuple[Tensor, Tensor]:
    """The head pass and s in one launch; returns (partials, argmaxima)."""
    arguments = head_arguments(h, *head, precision, logits)
    arguments.pop("GROUP")
    # With more stages, the combined kernel spills.
    arguments["num_stages"] = min(3, arguments["num_stages"])
    product = projection.product
    programs = cdiv(h.shape[0], arguments["BLOCK_N"]) * arguments["tiles"]
    programs += cdiv(h.shape[0], product["FACTOR_N"]) * cdiv(projection.rank, product["FACTOR_Q"])
    launch(
        head_product_kernel,
        (programs,),
        wide=projection.wide and arguments["UNIT"] * head.weight.element_size() >= 16,
        **arguments,
        **product,
        reduced_ptr=reduced,
        rank=projection.rank,
    )
    return arguments["partials_ptr"], arguments["argmaxima_ptr"]


def _project(
    own: ScoreOutputs,
    logits: Tensor,
    partials: Tensor,
    argmaxima: Tensor,
    squares: Tensor,
    tickets: Tensor,
    projection: Projection,
    partial: Tensor,
    reduced: Tensor,
) -> None:
    """Write g_low, p, the energies and NAP from the logits."""
    (samples, classes), arguments = own.p.shape, projection.arguments
    final = _final_tile(classes, logits.device)
    across = min(128, arguments["BLOCK_K"], max(16, next_power_of_2(projection.components)))
    down = min(arguments["BLOCK_N"], 512 // across)
    programs = cdiv(samples, arguments["BLOCK_N"]) * projection.component_tiles * projection.programs
    programs += cdiv(samples, final["FINAL_N"]) * cdiv(classes, final["FINAL_C"])
    programs += cdiv(samples, down) * cdiv(projection.components, across)
    is_factored = projection.kind == "factored"
    extra: dict[str, Any] = {"reduced_ptr": reduced, "channels": own.h.shape[1]} if is_factored else {"h_ptr": own.h}
    # Otherwise NVIDIA's compiler spills registers for one more program per multiprocessor.
    if arguments["PRECISION"] == "ieee":
        extra["maxnreg"] = min(200 if is_factored else 168, 2048 // arguments["num_warps"])
    elif projection.kind == "dual":
        extra["maxnreg"] = min(255, 2048 // arguments["num_warps"])
    launch(
        _LARGE[projection.kind],
        (programs,),
        wide=projection.wide,
        **_finish_arguments(own, partials, squares),
        **arguments,
        **extra,
        tickets_ptr=tickets,
        a_ptr=logits,
        argmaxima_ptr=argmaxima,
        partial_ptr=partial,
        constants_ptr=projection.constants,
        output_ptr=own.g_low,
        component_tiles=projection.component_tiles,
        programs=projection.programs,
        OUTPUT_UNIT=math.gcd(projection.components, 16),
        WARPS=arguments["num_warps"],
        FINAL_N=final["FINAL_N"],
        FINAL_C=final["FINAL_C"],
        COMBINE_N=down,
        COMBINE_K=across,
    )
