"""What is known of a tensor without running the model: type, shape, constness, sign, activity.

Sign facts halve the work of sign-splitting rules: where x >= 0 is known, the negative part of x needs no pass.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Dim = int | str | None
Shape = tuple[Dim, ...]


class Sign(enum.Flag):
    """Which signs the elements of a tensor can have (zero is always possible)."""

    ZERO = 0
    NEGATIVE = enum.auto()
    POSITIVE = enum.auto()
    ANY = NEGATIVE | POSITIVE

    @property
    def flipped(self) -> Sign:
        """The sign of the negated tensor."""
        sign = Sign.ZERO
        if Sign.NEGATIVE in self:
            sign |= Sign.POSITIVE
        if Sign.POSITIVE in self:
            sign |= Sign.NEGATIVE
        return sign

    def times(self, other: Sign) -> Sign:
        """The sign of the product of two tensors."""
        sign = Sign.ZERO
        if Sign.POSITIVE in self:
            sign |= other
        if Sign.NEGATIVE in self:
            sign |= other.flipped
        return sign


@dataclass(frozen=True)
class Facts:
    """What is known of a tensor.

    Attributes:
        dtype: numpy element type.
        shape: ints, symbols or None per axis; None where even the rank is unknown.
        const: True if the tensor depends on no graph input, but perhaps on weights that can be fed.
        sign: which signs its elements can have.
        active: True if it carries influence from the explained inputs to the explained tensor.
        masked: True if an attention mask may have left infinities or NaN in it, with which nothing goes.
    """

    dtype: np.dtype[Any]
    shape: Shape | None
    const: bool = False
    sign: Sign = Sign.ANY
    active: bool = False
    masked: bool = False


def sign_of_array(array: np.ndarray[Any, Any]) -> Sign:
    """Sign of a constant; arrays of more than 65,536 elements are not read (weights are rarely of one sign)."""
    if array.dtype.kind not in "fiu" or not 0 < array.size <= 65536:
        return Sign.ANY
    sign = Sign.ZERO
    if np.any(array < 0):
        sign |= Sign.NEGATIVE
    if np.any(array > 0):
        sign |= Sign.POSITIVE
    return Sign.ANY if np.isnan(array).any() else sign


SignRule = Callable[[Sequence[Sign], Mapping[str, Any]], Sign]


def _union(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    total = Sign.ZERO
    for sign in signs:
        total |= sign
    return total


def _product(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[0].times(signs[1])


def _contraction(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[0].times(signs[1]) | (signs[2] if len(signs) > 2 else Sign.ZERO)


def _gemm(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    alpha, beta = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
    product = signs[0].times(signs[1])
    bias = signs[2] if len(signs) > 2 else Sign.ZERO
    return (product if alpha >= 0 else product.flipped) | (bias if beta >= 0 else bias.flipped)


def _subtract(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[0] | signs[1].flipped


def _maximum(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    total = _union(signs, attrs)
    return total if all(Sign.NEGATIVE in sign for sign in signs) else total & Sign.POSITIVE


def _minimum(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    total = _union(signs, attrs)
    return total if all(Sign.POSITIVE in sign for sign in signs) else total & Sign.NEGATIVE


def _clip(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    sign = signs[0]
    low = signs[1] if len(signs) > 1 else Sign.ANY
    high = signs[2] if len(signs) > 2 else Sign.ANY
    if Sign.NEGATIVE not in low:
        sign &= Sign.POSITIVE
        sign |= low
    if Sign.POSITIVE not in high:
        sign &= Sign.NEGATIVE
        sign |= high
    return sign


def _first(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[0]


def _pad(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[0] | (signs[2] if len(signs) > 2 else Sign.ZERO)


def _where(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[1] | signs[2]


def _scatter(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return Sign.ANY if attrs.get("reduction", "none") == "mul" else signs[0] | signs[2]


def _prelu(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[0] & Sign.POSITIVE | (signs[0] & Sign.NEGATIVE).times(signs[1])


def _resize(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    """A cubic overshoots, and a crop beyond the ends is filled with a number."""
    crops = attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    return Sign.ANY if crops or attrs.get("mode", "nearest") == "cubic" else signs[0]


def _positive(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return Sign.POSITIVE


def _relu(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[0] & Sign.POSITIVE


def _flip(signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    return signs[0].flipped


# Optional inputs that are absent count as ZERO, so a rule may index them where the operator allows.
SIGN_RULES: dict[str, SignRule] = {
    **dict.fromkeys(
        [
            "Identity",
            "Reshape",
            "Flatten",
            "Squeeze",
            "Unsqueeze",
            "Transpose",
            "Slice",
            "Gather",
            "GatherElements",
            "GatherND",
            "Expand",
            "Tile",
            "Split",
            "DepthToSpace",
            "SpaceToDepth",
            "MaxPool",
            "AveragePool",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "Cast",
            "Dropout",
            "LeakyRelu",
            "Tanh",
            "Erf",
            "Elu",
            "Selu",
            "Celu",
            "Softsign",
            "Sign",
            "CumSum",
            "Trilu",
            "Compress",
            "ReverseSequence",
            "LpNormalization",
            "MaxUnpool",
            "LRN",
            "Floor",
            "Ceil",
            "Round",
            "Asinh",
            "Sinh",
            "Atan",
            "Cbrt",
        ],
        _first,
    ),
    **dict.fromkeys(["Relu", "ThresholdedRelu", "HardSwish"], _relu),
    **dict.fromkeys(
        [
            "Sigmoid",
            "HardSigmoid",
            "Softmax",
            "Exp",
            "Abs",
            "Sqrt",
            "Softplus",
            "ReduceL1",
            "ReduceL2",
            "ReduceSumSquare",
            "LpPool",
            "GlobalLpPool",
            "Shape",
            "Size",
            "OneHot",
            "Cosh",
            "NonZero",
            "ArgMax",
            "ArgMin",
        ],
        _positive,
    ),
    **dict.fromkeys(["Add", "Sum", "Concat", "Mean"], _union),
    **dict.fromkeys(["Mul", "Div"], _product),
    **dict.fromkeys(["Conv", "ConvTranspose", "MatMul"], _contraction),
    "HardSwish": lambda signs, attrs: signs[0],
    "Reciprocal": _first,
    "Gemm": _gemm,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
    "PRelu": _prelu,
    "Resize": _resize,
    "RMSNormalization": _product,
    "Sub": _subtract,
    "Neg": _flip,
    "LogSoftmax": lambda signs, attrs: Sign.NEGATIVE,
    "Max": _maximum,
    "Min": _minimum,
    "Clip": _clip,
    "Pad": _pad,
    "Where": _where,
    "Pow": lambda signs, attrs: Sign.POSITIVE if Sign.NEGATIVE not in signs[0] else Sign.ANY,
}


def sign_of(op: str, signs: Sequence[Sign], attrs: Mapping[str, Any]) -> Sign:
    """Sign of an operator's output from the signs of its inputs; ANY where nothing is known."""
    rule = SIGN_RULES.get(op)
    return rule(signs, attrs) if rule and signs else Sign.ANY
