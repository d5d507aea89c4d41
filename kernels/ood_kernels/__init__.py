"""Fused scoring functions on tensors: feature maps, heads and bases; no knowledge of models.

CPU or CUDA tensors in fp32, fp16, bf16 or fp64; accumulation in fp32 or better; outputs never alias inputs and carry no
autograd history. Each function wraps a torch operator of the same name in `torch.ops.ood_kernels`; `reference` holds the
plain-torch implementations that define correct results.
"""

from . import reference
from .backend import BACKENDS
from .bases import DualTensors, ExplicitTensors, FactoredTensors
from .checks import PRECISIONS
from .functional import masked_energy, pool_nap, pool_statistics, project_gradients, score
from .masks import pack_mask, unpack_mask
from .types import BasisTensors, Head, PoolStatistics, ScoreOutputs

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "BasisTensors",
    "DualTensors",
    "ExplicitTensors",
    "FactoredTensors",
    "Head",
    "PoolStatistics",
    "ScoreOutputs",
    "masked_energy",
    "pack_mask",
    "pool_nap",
    "pool_statistics",
    "project_gradients",
    "reference",
    "score",
    "unpack_mask",
]
