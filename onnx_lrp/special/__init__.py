"""Steps that are not tables: moving, passing, pooling, products of two live tensors, normalizations, softmax."""

from onnx_lrp.special.moving import route, stop, uniform, winner_takes_all
from onnx_lrp.special.normalizing import Normalization, Softmax, batchnorm_absolute
from onnx_lrp.special.passing import Pass
from onnx_lrp.special.pooling import ProportionalPool
from onnx_lrp.special.products import Constant, Gate, Proportional, Share
from onnx_lrp.special.sums import Sum

__all__ = [
    "Constant",
    "Gate",
    "Normalization",
    "Pass",
    "Proportional",
    "ProportionalPool",
    "Share",
    "Softmax",
    "Sum",
    "batchnorm_absolute",
    "route",
    "stop",
    "uniform",
    "winner_takes_all",
]
