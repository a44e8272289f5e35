"""Explanation methods: each says which walks it needs, which step a call takes, and what is reported."""

from __future__ import annotations

import os
from collections.abc import Callable

from onnx_lrp.composite import book_names
from onnx_lrp.errors import InputError
from onnx_lrp.methods.contract import Found, Method, Plan, StepFor, Walk
from onnx_lrp.methods.deeplift import DeepLift
from onnx_lrp.methods.gradcam import GradCAM, GuidedGradCAM
from onnx_lrp.methods.gradients import Deconvnet, Gradient, GuidedBackprop, InputXGradient
from onnx_lrp.methods.integrated import IntegratedGradients
from onnx_lrp.methods.lrp import LRP
from onnx_lrp.methods.smoothgrad import SmoothGrad

__all__ = [
    "LRP",
    "Deconvnet",
    "DeepLift",
    "Found",
    "GradCAM",
    "Gradient",
    "GuidedBackprop",
    "GuidedGradCAM",
    "InputXGradient",
    "IntegratedGradients",
    "Method",
    "Plan",
    "SmoothGrad",
    "StepFor",
    "Walk",
    "find_method",
    "method_names",
]

_GRADIENT_FAMILY: dict[str, Callable[[], Method]] = {
    "gradient": Gradient,
    "input_x_gradient": InputXGradient,
    "guided_backprop": GuidedBackprop,
    "deconvnet": Deconvnet,
    "grad_cam": GradCAM,
    "guided_grad_cam": GuidedGradCAM,
    "integrated_gradients": IntegratedGradients,
    "deeplift": DeepLift,
    "smoothgrad": SmoothGrad,
}


def method_names() -> list[str]:
    """All registered names."""
    return [*book_names(), *_GRADIENT_FAMILY]


def find_method(method: str | os.PathLike[str] | Method) -> Method:
    """A method by registered name, by the path of a rule book, or the object itself.

    Raises:
        InputError: no such method.
        RuleError: the rule book is malformed.
    """
    if not isinstance(method, str | os.PathLike):
        if all(hasattr(method, part) for part in ("name", "start", "tensors", "plan")):
            return method
        raise InputError(
            f"a method is a name, the path of a rule book, or an object such as LRP(...), not {type(method).__name__}"
        )
    text = os.fspath(method)
    if text in _GRADIENT_FAMILY:
        return _GRADIENT_FAMILY[text]()
    if text in book_names() or text.endswith(".toml"):
        return LRP(text)
    raise InputError(
        f"there is no method '{text}'; there are {', '.join(method_names())}, or the path of a rule book (.toml)"
    )
