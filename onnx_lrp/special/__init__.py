"""Steps that are not tables: moving, passing, pooling, products of two live tensors, normalizations, softmax."""

from onnx_lrp.special.moving import pass_through, route, stop, uniform, winner_takes_all
from onnx_lrp.special.normalizing import batchnorm_absolute, softmax
from onnx_lrp.special.pooling import ProportionalPool
from onnx_lrp.special.products import Constant, Gate, Proportional, Share

__all__ = [
    "Constant",
    "Gate",
    "Proportional",
    "ProportionalPool",
    "Share",
    "batchnorm_absolute",
    "pass_through",
    "route",
    "softmax",
    "stop",
    "uniform",
    "winner_takes_all",
]
