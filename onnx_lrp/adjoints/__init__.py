"""Adjoints of ONNX operators: the registry, and one file per family that fills it."""

from onnx_lrp.adjoints import arithmetic, contraction, movement, normalization, pointwise, pooling, reduction
from onnx_lrp.adjoints.registry import OPERATORS, Operator, adjoint

__all__ = [
    "OPERATORS",
    "Operator",
    "adjoint",
    "arithmetic",
    "contraction",
    "movement",
    "normalization",
    "pointwise",
    "pooling",
    "reduction",
]
