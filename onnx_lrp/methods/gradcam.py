"""Grad-CAM: which places of a convolution's maps speak for the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.shapes import concat_ints, dim_of, expand_like, ints, zeros_like
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.methods.contract import Found, Plan, Walk
from onnx_lrp.methods.gradients import Gradient, GuidedBackprop
from onnx_lrp.target import Start
from onnx_lrp.view import CONVOLUTIONS, View, mark_active

Axes = Mapping[Value, tuple[int, ...]]  # which axes of a picture are its batch, channels, height and width

_CHANNELS_FIRST = (0, 1, 2, 3)
# What belongs to the block of a convolution, besides activations: sums, gates, normalizations as the view has them.
_ARITHMETIC = ("Add", "BatchNormalization", "Div", "Max", "Mean", "Min", "Mul", "Sub", "Sum")


@dataclass(frozen=True)
class GradCAM:
    """Maps of the last convolution, weighted by their mean gradient (Selvaraju et al. 2017).

    relu(sum_c w_c A_c) with w_c the mean of dy/dA_c over all places (eqs. 1 and 2 there): shape (N, 1, h, w) for the
    layer, and for every input (N, 1, H, W), enlarged to its size by bilinear interpolation (sec. 3 there) whose pixels
    are areas: torch's ``align_corners=False``. A picture with its channels last gets (N, H, W, 1). In captum the relu
    is an option, and the map stays at the layer's size until ``LayerAttribution.interpolate``.

    Attributes:
        layer: name of the tensor A, of rank 4; default: what the last block of a convolution gives, after its sums,
            normalizations and activations and before any pooling.
    """

    layer: str | None = None
    name: ClassVar[str] = "grad_cam"
    start: ClassVar[Start] = "one"

    @property
    def tensors(self) -> Sequence[str]:
        """The layer, where it is named."""
        return () if self.layer is None else (self.layer,)

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        """A walk to the layer; its map is reported, too."""
        layer, axes = self._find(v, explained, reported)
        return Plan([Walk(Gradient().step_for, [layer])], partial(self._report, layer, axes), {v.name_of(layer): layer})

    def _find(self, v: View, explained: Value, reported: Mapping[Value, str]) -> tuple[Value, Axes]:
        """The layer, by name or by data flow, and where the reported pictures have their height and width.

        Raises:
            InputError: there is none such, or it or what is reported is no picture.
        """
        for x in reported:
            if not _is_picture(x):
                raise InputError(
                    f"{self.name} lays its map over pictures (N, C, H, W), '{v.name_of(x)}' has shape {x.facts.shape}; "
                    "name pictures with inputs="
                )
        calls = mark_active(v, list(reported), explained)
        axes = {x: axes_of(x, calls) for x in reported}
        if self.layer is None:
            found = last_convolution(calls, explained)
            if found is None:
                raise InputError(
                    f"{self.name} finds no convolution with a map of more than one place before '{explained.name}'; "
                    f"name a tensor of rank 4 as {type(self).__name__}(layer=...), or choose another method"
                )
            return found, axes
        layer = v.value(self.layer)
        if not _is_picture(layer):
            raise InputError(
                f"{self.name} needs a layer of shape (N, C, h, w), '{self.layer}' is {layer.dtype} of shape "
                f"{layer.facts.shape}; name what a convolution gives"
            )
        if not layer.facts.active:
            names = ", ".join(v.name_of(x) for x in reported)
            raise InputError(f"layer '{self.layer}' does not lie between {names} and '{explained.name}'; name another")
        return layer, axes

    def _map(self, e: Emitter, layer: Value, found: Mapping[Value, Relevance]) -> Value:
        """relu(sum_c w_c A_c)."""
        gradient = found[layer].whole(e) if layer in found else zeros_like(e, layer)
        weights = e.op("ReduceMean", gradient, ints(e, [2, 3]), keepdims=1, label="weights")
        weighted = e.op("ReduceSum", weights * layer, ints(e, [1]), keepdims=1, label="weighted_maps")
        return e.op("Relu", weighted, label="map")

    def _report(self, layer: Value, axes: Axes, e: Emitter, x: Value, found: Found) -> Value:
        """The map, enlarged to the size of what is reported."""
        return enlarged(e, self._map(e, layer, found[0]), x, axes.get(x, _CHANNELS_FIRST))


@dataclass(frozen=True)
class GuidedGradCAM(GradCAM):
    """Guided backpropagation times the enlarged map of Grad-CAM (Selvaraju et al. 2017, sec. 3.2).

    The weights of the map are those of the plain gradient, as in captum; interpolation is bilinear, as in the paper.

    Attributes:
        layer: as in :class:`GradCAM`.
    """

    name: ClassVar[str] = "guided_grad_cam"

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        """A guided walk to the inputs, and a plain one to the layer."""
        layer, axes = self._find(v, explained, reported)
        walks = [Walk(GuidedBackprop().step_for, list(reported)), Walk(Gradient().step_for, [layer])]
        return Plan(walks, partial(self._report, layer, axes))

    def _report(self, layer: Value, axes: Axes, e: Emitter, x: Value, found: Found) -> Value:
        """The product."""
        guided, weights = found
        if x not in guided:
            return zeros_like(e, x)
        return expand_like(e, guided[x].whole(e), x) * enlarged(e, self._map(e, layer, weights), x, axes[x])


def last_convolution(calls: Sequence[Call], explained: Value) -> Value | None:
    """The last tensor that the block of a convolution gives; None where there is none of more than one place.

    A block is a convolution with the sums, products, normalizations, activations and joins of channels that follow it.

    Args:
        calls: those between the inputs and the explained tensor, in order.
        explained: the explained tensor, which is not taken itself.
    """
    block: set[Value] = set()
    last = None
    for call in calls:
        y = call.outputs[0]
        if y is None or y is explained or call.domain or not _is_picture(y) or y.shape[2:] == (1, 1):
            continue
        if call.op in CONVOLUTIONS or (_continues(call) and any(call.given(i) in block for i in call.active)):
            block.add(y)
            last = y
    return last


def _continues(call: Call) -> bool:
    """Whether an operator leaves every place where it is."""
    if call.op == "Concat":
        return call.attrs.get("axis") in (1, -3)
    operator = OPERATORS.get(call.op)
    return call.op in _ARITHMETIC or (operator is not None and operator.verb == "pointwise")


def _is_picture(value: Value) -> bool:
    return value.dtype.kind == "f" and value.facts.shape is not None and len(value.facts.shape) == 4


def axes_of(x: Value, calls: Sequence[Call]) -> tuple[int, ...]:
    """Which axes of a picture are its batch, channels, height and width, as the next convolution reads it.

    Channels come first if no convolution follows.
    """
    seen: dict[Value, tuple[int, ...]] = {x: _CHANNELS_FIRST}
    for call in calls:
        before = next((seen[call.given(i)] for i in call.active if call.given(i) in seen), None)
        y = call.outputs[0]
        if before is None or y is None or call.domain or not _is_picture(y):
            continue
        if call.op in CONVOLUTIONS:
            return before
        if call.op == "Transpose":
            seen[y] = tuple(before[i] for i in call.attrs.get("perm", (3, 2, 1, 0)))
        elif _continues(call) or call.op in ("AveragePool", "Cast", "MaxPool", "Pad"):
            seen[y] = before
    return _CHANNELS_FIRST


def enlarged(e: Emitter, small: Value, like: Value, axes: Sequence[int]) -> Value:
    """Maps (N, 1, h, w) at the height and width of another tensor, by bilinear interpolation.

    Args:
        e: the emitter.
        small: the maps.
        like: the other tensor.
        axes: which of its axes are batch, channels, height and width; the result has them in the same order.
    """
    height, width = like.shape[axes[2]], like.shape[axes[3]]
    large = (
        small
        if small.shape[2:] == (height, width) and all(isinstance(d, int) for d in (height, width))
        else _resized(e, small, like, axes)
    )
    order = [list(axes).index(i) for i in range(4)]
    return large if order == [0, 1, 2, 3] else e.op("Transpose", large, perm=order)


def _resized(e: Emitter, small: Value, like: Value, axes: Sequence[int]) -> Value:
    size = concat_ints(e, [dim_of(e, small, 0), [1], dim_of(e, like, axes[2]), dim_of(e, like, axes[3])])
    shape = (small.shape[0], 1, like.shape[axes[2]], like.shape[axes[3]])
    options = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    return e.op("Resize", small, None, None, size, shape=shape, **options)
