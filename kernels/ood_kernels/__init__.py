"""Fused scoring functions on tensors: they know feature maps, heads and bases, not models.

CPU or CUDA tensors in fp32, fp16, bf16 or fp64; accumulation in fp32 or better; outputs never alias inputs and carry no
autograd history. Beneath each function lies a torch operator of the same name in `torch.ops.ood_kernels`; `reference`
holds the plain-torch twins that define what is right.
"""

from . import reference
from .functional import masked_energy, pool_nap, pool_statistics, project_gradients, score
from .types import BasisTensors, DualTensors, ExplicitTensors, Head, PoolStatistics, ScoreOutputs

__all__ = [
    "BasisTensors",
    "DualTensors",
    "ExplicitTensors",
    "Head",
    "PoolStatistics",
    "ScoreOutputs",
    "masked_energy",
    "pool_nap",
    "pool_statistics",
    "project_gradients",
    "reference",
    "score",
]
