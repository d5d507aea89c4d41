"""Projection on a dual basis: g = ((A Aₐᵀ) ∘ ((H - μ) Hₐᵀ)) · coefficients + A · linear - constants, the Gram tile on chip.

A program computes the Gram tile of a tile of samples and a block of anchors, and multiplies it by all components before the next
one: with the components distributed over programs, each would repeat the products over C and D, which dominate. The price is one
partial result per split of the anchors, added by `combine_program` in the order of the anchors. The variant "stored" instead
writes the Gram matrix to memory for an ordinary product. A · linear is a product of the same shape with one Gram column per class,
so the classes are distributed over the blocks of anchors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bases import DualTensors
from . import combine as combining
from .combine import combine, samples_at_once
from .dual_kernels import dual_kernel, gram_kernel, product_kernel
from .launch import cdiv, choose, launch, next_power_of_2

__all__ = ["DualPlan", "dual_plan", "project_dual"]


class DualPlan(NamedTuple):
    """Split of the sum over anchors, independent of the number of samples.

    Attributes:
        arguments: of `dual_kernel` by name, tile included, without per-sample tensors and sizes.
        splits: partial results, and programs per tile of samples.
        wide: whether every row of the basis is aligned to 16 bytes.
        stored: whether the Gram matrix is written to memory.
    """

    arguments: dict[str, Any]
    splits: int
    wide: bool
    stored: bool


def dual_plan(basis: DualTensors, precision: str) -> DualPlan:
    """Tile, splits and arguments for a basis."""
    anchor_cotangents, anchor_features, coefficients = (
        basis.anchor_cotangents,
        basis.anchor_features,
        basis.coefficients,
    )
    shift, linear = basis.shift, basis.linear
    (anchors, classes), channels, components = anchor_cotangents.shape, anchor_features.shape[1], coefficients.shape[1]
    shape: dict[str, int | str] = {
        "precision": precision,
        "itemsize": anchor_features.element_size(),
        "anchors": anchors,
    }
    shape |= {"classes": classes, "channels": channels, "components": components}
    itemsize = anchor_features.element_size()
    is_aligned = _unit(anchor_cotangents) * itemsize >= 16
    default = _default_tile(anchors, components, itemsize, precision, is_aligned)
    tile = choose("project_dual", shape, default, anchor_features.device)
    stored = tile.pop("VARIANT") == "stored"
    blocks = max(1, cdiv(anchors, tile["BLOCK_A"]))
    # More than one block per split only if the partial results of one tile of samples would exceed the workspace.
    most = max(1, combining.WORKSPACE_BYTES // (4 * tile["BLOCK_N"] * components))
    tile["BLOCKS"] = max(min(4, blocks) if stored else 1, cdiv(blocks, most))
    tile["CLASS_BLOCKS"] = cdiv(classes, tile["BLOCK_R"] * blocks)
    arguments = {
        "shift_ptr": anchor_features if shift is None else shift.contiguous(),
        "anchor_cotangents_ptr": anchor_cotangents,
        "anchor_features_ptr": anchor_features,
        "coefficients_ptr": coefficients,
        "linear_ptr": coefficients if linear is None else linear.contiguous(),
        "anchors": anchors,
        "classes": classes,
        "channels": channels,
        "components": components,
        "cotangent_row": anchor_cotangents.stride(0),
        "cotangent_column": anchor_cotangents.stride(1),
        "feature_row": anchor_features.stride(0),
        "feature_column": anchor_features.stride(1),
        "coefficient_row": coefficients.stride(0),
        "coefficient_column": coefficients.stride(1),
        "BIAS": basis.bias,
        "SHIFT": shift is not None,
        "LINEAR": linear is not None,
        "PRECISION": precision,
        "A_UNIT": math.gcd(classes, 16),
        "H_UNIT": math.gcd(channels, 16),
        "COTANGENT_UNIT": _unit(anchor_cotangents),
        "FEATURE_UNIT": _unit(anchor_features),
        "COEFFICIENT_UNIT": _unit(coefficients),
        "LINEAR_UNIT": math.gcd(components, 16),
    }
    wide = all(_unit(part) * part.element_size() >= 16 for part in (anchor_cotangents, anchor_features, coefficients))
    return DualPlan(arguments | tile, cdiv(blocks, tile["BLOCKS"]), wide, stored)


def project_dual(
    a: Tensor,
    h: Tensor,
    basis: DualTensors,
    precision: str = "ieee",
    *,
    kind: str = "given",
    partials: Tensor | None = None,
    argmaxima: Tensor | None = None,
) -> Tensor:
    """Centred coordinates [N, K] in a dual basis in fp32, see `reference.project_dual`; inputs in fp32, fp16 or bf16.

    Two launches per chunk of samples, three with a stored Gram matrix, with a workspace of at most 32 MiB.

    Args:
        a: [N, C] cotangents; fp32 logits instead if `kind` names a cotangent, see `reference.cotangent`.
        h: [N, D] penultimate features.
        basis: any strides; contiguous rows of anchors and coefficients are fast.
        precision: one of `PRECISIONS`, for both operands of each product, including h - shift and the Gram matrix; in the
            product with `linear`, operands keep at least 16 bits. With a common feature mean, the median component of a PCA
            (n = D = 512, C = 100, K = 64) has an error, relative to its own RMS, of 1.5e-3 in bf16 and 1.6e-4 in fp16, with a
            shift 1.9e-4 and 1.9e-5, and 8e-8 in "ieee". fp16 needs features and coefficients within its range.
        kind: "given", or the cotangent to form.
        partials: [N, T, 4] of the logits, from `masked_energy.head_partials`; None for "given".
        argmaxima: int32 [N, T], likewise.
    """
    samples, components, anchors = h.shape[0], basis.n_components, basis.anchor_features.shape[0]
    output = h.new_empty((samples, components), dtype=torch.float32)
    if output.numel() == 0:
        return output
    plan = dual_plan(basis, precision)
    a, h = a.contiguous(), h.contiguous()
    width = plan.splits * components + (anchors if plan.stored else 0)
    at_once = samples_at_once(samples, 1, width, plan.arguments["BLOCK_N"])
    partial = h.new_empty((plan.splits * at_once * components,), dtype=torch.float32)
    gram_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    gram = h.new_empty((at_once, anchors), dtype=gram_dtype) if plan.stored else None
    for start in range(0, samples, at_once):
        rows = slice(start, start + at_once)
        own = {
            "a_ptr": a[rows],
            "h_ptr": h[rows],
            "partials_ptr": a if partials is None else partials[rows],
            "argmaxima_ptr": a if argmaxima is None else argmaxima[rows],
            "samples": min(at_once, samples - start),
            "class_tiles": 0 if partials is None else partials.shape[1],
            "KIND": kind,
        }
        _launch_partial(plan, own | {"partial_ptr": partial}, gram)
        combine(partial, basis.constants, output[rows], plan.splits)
    return output


def _launch_partial(plan: DualPlan, own: dict[str, Any], gram: Tensor | None) -> None:
    arguments = plan.arguments | own
    tiles = cdiv(own["samples"], arguments["BLOCK_N"])
    if gram is None:
        launch(dual_kernel, (tiles, plan.splits), wide=plan.wide, **arguments)
        return
    arguments |= {"gram_ptr": gram, "GRAM_UNIT": math.gcd(arguments["anchors"], 16)}
    blocks = cdiv(arguments["anchors"], arguments["BLOCK_A"])
    component_tiles = cdiv(arguments["components"], arguments["BLOCK_K"])
    for kernel, grid in ((gram_kernel, (tiles, blocks)), (product_kernel, (tiles, component_tiles, plan.splits))):
        taken = {*kernel.arg_names, "num_warps", "num_stages"}
        launch(kernel, grid, wide=plan.wide, **{name: value for name, value in arguments.items() if name in taken})


def _unit(matrix: Tensor) -> int:
    """Largest power of two up to 16 that divides a matrix's width and row offsets."""
    return math.gcd(matrix.stride(0), matrix.shape[1], 16) if matrix.stride(1) == 1 else 1


def _default_tile(anchors: int, components: int, itemsize: int, precision: str, is_aligned: bool) -> dict[str, Any]:
    """Default tile, with enough blocks of anchors to fill a GPU at small batches: N = 256, n = 4096 give 128 programs, one wave.

    Tensor cores need 64 samples for wgmma; CUDA cores ("ieee") do not. An fp32 basis takes twice the registers and shared memory
    in flight, "tf32x3" twice the registers again, as do rows loaded element by element (21841 classes), leaving less for the tile.
    """
    block = 128 if anchors >= 4096 and itemsize == 2 and is_aligned else 64 if anchors >= 512 else 32
    tile: dict[str, Any] = {"VARIANT": "fused", "BLOCK_N": 64, "BLOCK_A": block, "BLOCK_R": 32, "num_warps": 8}
    tile |= {"BLOCK_K": 128, "num_stages": 4} if itemsize == 2 else {"BLOCK_K": 64, "num_stages": 3}
    if not is_aligned:
        tile |= {"BLOCK_R": 16, "BLOCK_K": 64}
    if precision == "ieee":
        tile |= {
            "BLOCK_N": 16,
            "BLOCK_A": min(block, 64),
            "BLOCK_R": 16,
            "BLOCK_K": 32,
            "num_warps": 4,
            "num_stages": 2,
        }
    elif precision == "tf32":
        # Rounding takes both operands through registers.
        tile |= {"BLOCK_R": 16}
    elif precision == "tf32x3":
        tile |= {"BLOCK_A": 32, "BLOCK_R": 16, "BLOCK_K": 32, "num_stages": 3}
    tile["BLOCK_K"] = min(tile["BLOCK_K"], max(16, next_power_of_2(components)))
    return tile
