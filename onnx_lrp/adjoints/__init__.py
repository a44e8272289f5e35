"""Adjoints of ONNX operators: the registry, and one file per family that fills it."""

from onnx_lrp.adjoints import (
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
)
from onnx_lrp.adjoints.registry import OPERATORS, Operator, adjoint

__all__ = [
    "OPERATORS",
    "Operator",
    "adjoint",
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
]
