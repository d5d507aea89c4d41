"""The instructions, by family."""

from . import asynchronous, conversion, floating, integer, memory, tensor, warp
from .table import TABLE, bind

__all__ = ["TABLE", "asynchronous", "bind", "conversion", "floating", "integer", "memory", "tensor", "warp"]
