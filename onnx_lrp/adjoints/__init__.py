"""Adjoints of ONNX operators: the registry, and one file per family that fills it."""

from onnx_lrp.adjoints import (
    algebra,
    arithmetic,
    contraction,
    einsum,
    indexing,
    movement,
    normalization,
    pointwise,
    pooling,
    quantization,
    reduction,
    resize,
    sampling,
)
from onnx_lrp.adjoints.registry import OPERATORS, Operator, adjoint, adjoints

__all__ = [
    "OPERATORS",
    "Operator",
    "adjoint",
    "adjoints",
    "algebra",
    "arithmetic",
    "contraction",
    "einsum",
    "indexing",
    "movement",
    "normalization",
    "pointwise",
    "pooling",
    "quantization",
    "reduction",
    "resize",
    "sampling",
]
