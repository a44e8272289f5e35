"""onnx_lrp: white-box explanations for any ONNX model, as an ONNX model."""

from onnx_lrp.errors import InputError, ModelError, OnnxLrpError, RuleError, UnsupportedOps
from onnx_lrp.explainer import Explainer
from onnx_lrp.explanation import Explanation
from onnx_lrp.methods import (
    LRP,
    Deconvnet,
    DeepLift,
    GradCAM,
    Gradient,
    GuidedBackprop,
    GuidedGradCAM,
    Hadamard,
    InputXGradient,
    IntegratedGradients,
    SmoothGrad,
)
from onnx_lrp.reweigh import Reweighted, reweigh
from onnx_lrp.rewrite import VERSION, Explained, rewrite
from onnx_lrp.tokenizer import Tokenizer
from onnx_lrp.tokens import TokenRelevance
from onnx_lrp.weights import weights_as_inputs

__version__ = VERSION
__all__ = [
    "LRP",
    "Deconvnet",
    "DeepLift",
    "Explained",
    "Explainer",
    "Explanation",
    "GradCAM",
    "Gradient",
    "GuidedBackprop",
    "GuidedGradCAM",
    "Hadamard",
    "InputError",
    "InputXGradient",
    "IntegratedGradients",
    "ModelError",
    "OnnxLrpError",
    "Reweighted",
    "RuleError",
    "SmoothGrad",
    "TokenRelevance",
    "Tokenizer",
    "UnsupportedOps",
    "reweigh",
    "rewrite",
    "weights_as_inputs",
]
