"""Explanation methods: each says which walks it needs, which step a call takes, and what is reported."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from onnx_lrp.composite import book_names
from onnx_lrp.errors import InputError
from onnx_lrp.methods.contract import Found, Method, Plan, StepFor, Walk
from onnx_lrp.methods.deeplift import DeepLift
from onnx_lrp.methods.gradcam import GradCAM, GuidedGradCAM
from onnx_lrp.methods.gradients import Deconvnet, Gradient, GuidedBackprop, InputXGradient
from onnx_lrp.methods.hadamard import Hadamard
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
    "Hadamard",
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

_GRADIENT_FAMILY: dict[str, type[Any]] = {
    "gradient": Gradient,
    "input_x_gradient": InputXGradient,
    "guided_backprop": GuidedBackprop,
    "deconvnet": Deconvnet,
    "grad_cam": GradCAM,
    "guided_grad_cam": GuidedGradCAM,
    "integrated_gradients": IntegratedGradients,
    "deeplift": DeepLift,
    "smoothgrad": SmoothGrad,
    "hadamard": Hadamard,
}


def method_names() -> list[str]:
    """All registered names."""
    return [*book_names(), *_GRADIENT_FAMILY]


def find_method(method: str | os.PathLike[str] | Method) -> Method:
    """A method by registered name, by the path of a rule book, or the object itself.

    Parameters of the gradient family may follow the name: "integrated_gradients:steps=100,baseline=input".

    Raises:
        InputError: no such method, or no such parameter.
        RuleError: the rule book is malformed.
    """
    if not isinstance(method, str | os.PathLike):
        if all(hasattr(method, part) for part in ("name", "start", "tensors", "plan")):
            return method
        raise InputError(
            f"a method is a name, the path of a rule book, or an object such as LRP(...), not {type(method).__name__}"
        )
    text = os.fspath(method)
    name, _, given = text.partition(":")
    if name in _GRADIENT_FAMILY:
        return _with_parameters(name, given)
    if text in book_names() or text.endswith(".toml"):
        return LRP(text)
    raise InputError(
        f"there is no method '{text}'; there are {', '.join(method_names())}, or the path of a rule book (.toml)"
    )


def parameters(method: type[Any] | Method) -> dict[str, str]:
    """What may follow a method's name, and what is taken where it does not."""
    if not dataclasses.is_dataclass(method) or isinstance(method, LRP):
        return {}
    return {f.name: str(f.default) for f in dataclasses.fields(method) if f.init}


def _with_parameters(name: str, given: str) -> Method:
    """A method of the gradient family from text such as steps=100,baseline=input."""
    kind, chosen = _GRADIENT_FAMILY[name], {}
    known = parameters(kind)
    for part in given.split(",") if given else []:
        key, equals, text = part.partition("=")
        if key not in known or not equals:
            takes = f"it takes {', '.join(f'{k}={v}' for k, v in known.items())}" if known else "it takes none"
            raise InputError(f"method '{name}' has no parameter '{part}'; {takes}")
        chosen[key] = _value(text)
    method: Method = kind(**chosen)
    return method


def _value(text: str) -> int | float | str | bool:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
