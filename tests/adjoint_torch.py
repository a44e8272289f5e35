"""The operators in torch: an oracle for adjoints, by autograd."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it

Array = np.ndarray
Attrs = Mapping[str, Any]
Tensor = torch.Tensor
# (attributes, inputs: None where absent, shape of the output) -> the output
Forward = Callable[[Attrs, Sequence[Tensor | None], tuple[int, ...]], Tensor]


def autograd(
    op: str, attrs: Attrs, inputs: Sequence[Array | None], cotangent: Array, wanted: Sequence[int]
) -> list[Array]:
    """Gradients of <output, cotangent> with respect to the wanted inputs."""
    tensors = [None if x is None else torch.tensor(x.astype(np.int64) if x.dtype.kind == "u" else x) for x in inputs]
    leaves = [tensors[i].requires_grad_() for i in wanted]
    y = TORCH[op](attrs, tensors, cotangent.shape)
    assert tuple(y.shape) == cotangent.shape, f"{op}: torch gives {tuple(y.shape)}, ONNX {cotangent.shape}"
    found = torch.autograd.grad(y, leaves, torch.tensor(cotangent), allow_unused=True)
    return [np.zeros(x.shape) if g is None else g.numpy() for x, g in zip(leaves, found, strict=True)]


def _unary(f: Callable[[Tensor], Tensor]) -> Forward:
    return lambda a, xs, shape: f(xs[0])


def _scaled(f: Callable[..., Tensor], *names: str) -> Forward:
    return lambda a, xs, shape: f(xs[0], *(a[name] for name in names))


def _elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


def _selu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.exp(x) - alpha)


def _shrink(x: Tensor, lambd: float, bias: float) -> Tensor:
    return torch.where(x.abs() > lambd, x - bias * x.sign(), torch.zeros_like(x))


def _hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """As torch's own, whose slope is 0 on both bounds."""
    y = alpha * x + beta
    return torch.where((y > 0) & (y < 1), y, y.detach().clamp(0, 1))


def _clip(a: Attrs, xs: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    bounds = [x for x in xs[1:3] if x is not None]
    return torch.clamp(xs[0], *xs[1:3]) if bounds else xs[0].clone()


def _axes(a: Attrs, xs: Sequence[Tensor | None]) -> tuple[int, ...] | None:
    """Axes of a reduction; None for no reduction at all."""
    axes = [] if len(xs) < 2 or xs[1] is None else xs[1].tolist()
    if not axes:
        return None if a["noop_with_empty_axes"] else tuple(range(xs[0].ndim))
    return tuple(axes)


def _reduce(f: Callable[..., Tensor]) -> Forward:
    def forward(a: Attrs, xs: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
        axes = _axes(a, xs)
        return xs[0].clone() if axes is None else f(xs[0], axes, keepdim=bool(a["keepdims"]))

    return forward


def window_pads(a: Attrs, lengths: Sequence[int], windows: Sequence[int]) -> list[tuple[int, int]]:
    """Padding of each axis under which exactly the given number of windows fits."""
    n = len(lengths)
    kernel, mode = a["kernel_shape"], a["auto_pad"]
    strides, dilations = a.get("strides") or [1] * n, a.get("dilations") or [1] * n
    pads = a.get("pads") or [0] * 2 * n
    result = []
    for i, (length, count) in enumerate(zip(lengths, windows, strict=True)):
        need = (count - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 - length
        begin = pads[i] if mode == "NOTSET" else 0
        if mode.startswith("SAME"):
            begin = max(need, 0) // 2 if mode == "SAME_UPPER" else max(need, 0) - max(need, 0) // 2
        result.append((begin, need - begin))
    return result


def _max_pool(a: Attrs, xs: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    x = xs[0]
    n = x.ndim - 2
    widths = [w for pair in reversed(window_pads(a, x.shape[2:], shape[2:])) for w in pair]
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
    padded = F.pad(x, widths, value=-math.inf)
    return pool(padded, a["kernel_shape"], a.get("strides") or [1] * n, 0, a.get("dilations") or [1] * n)


def _extreme(f: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    return lambda a, xs, shape: functools.reduce(f, xs).clone()


def _lrn(a: Attrs, xs: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    x, size = xs[0], int(a["size"])
    before = (size - 1) // 2
    squares = torch.stack([(x[:, max(0, c - before) : c - before + size] ** 2).sum(1) for c in range(x.shape[1])], 1)
    return x / (a["bias"] + a["alpha"] / size * squares) ** a["beta"]


def _conv(a: Attrs, xs: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    x, w = xs[:2]
    n = x.ndim - 2
    given = {**a, "kernel_shape": w.shape[2:]}
    widths = [k for pair in reversed(window_pads(given, x.shape[2:], shape[2:])) for k in pair]
    f = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    strides, dilations = a.get("strides") or [1] * n, a.get("dilations") or [1] * n
    bias = xs[2] if len(xs) > 2 else None
    return f(F.pad(x, widths), w, bias, strides, 0, dilations, a["group"])


def _grid_sample(a: Attrs, xs: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(a["mode"], a["mode"])
    return F.grid_sample(xs[0], xs[1], mode, a["padding_mode"], bool(a["align_corners"]))


def _scatter_elements(a: Attrs, xs: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    x, axis, reduction = xs[0], a["axis"], a["reduction"]
    indices = torch.where(xs[1] < 0, xs[1] + x.shape[axis], xs[1])
    if reduction == "none":
        return x.scatter(axis, indices, xs[2])
    return x.scatter_reduce(axis, indices, xs[2], names[reduction])


def _cum_prod(x: Tensor, axis: int, exclusive: int, reverse: int) -> Tensor:
    x = x.flip(axis) if reverse else x
    if exclusive:
        x = torch.cat([torch.ones_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    y = x.cumprod(axis)
    return y.flip(axis) if reverse else y


def _unique(a: Attrs, xs: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    """The elements that numpy keeps: the first of equal ones."""
    axis = a.get("axis")
    first = np.unique(xs[0].detach().numpy(), return_index=True, axis=axis)[1]
    kept = torch.tensor(first if a["sorted"] else np.sort(first))
    return xs[0].flatten()[kept] if axis is None else xs[0].index_select(axis, kept)


TORCH: dict[str, Forward] = {
    "Relu": _unary(torch.relu),
    "LeakyRelu": lambda a, xs, shape: F.leaky_relu(xs[0], a["alpha"]),
    "ThresholdedRelu": lambda a, xs, shape: xs[0] * (xs[0] > a["alpha"]),
    "PRelu": lambda a, xs, shape: torch.where(xs[0] > 0, xs[0], xs[0] * xs[1]),
    "Shrink": _scaled(_shrink, "lambd", "bias"),
    "Clip": _clip,
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Erf": _unary(torch.erf),
    "Gelu": lambda a, xs, shape: F.gelu(xs[0], approximate=a["approximate"]),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Abs": _unary(torch.abs),
    "HardSwish": _unary(F.hardswish),
    "HardSigmoid": _scaled(_hard_sigmoid, "alpha", "beta"),
    "Elu": _scaled(_elu, "alpha"),
    "Selu": _scaled(_selu, "alpha", "gamma"),
    "Celu": lambda a, xs, shape: F.celu(xs[0], a["alpha"]),
    "Softplus": lambda a, xs, shape: F.softplus(xs[0], threshold=1e9),
    "Softsign": _unary(F.softsign),
    "Mish": _unary(F.mish),
    "Swish": lambda a, xs, shape: xs[0] * torch.sigmoid(a["alpha"] * xs[0]),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Tan": _unary(torch.tan),
    "Asin": _unary(torch.asin),
    "Acos": _unary(torch.acos),
    "Atan": _unary(torch.atan),
    "Sinh": _unary(torch.sinh),
    "Cosh": _unary(torch.cosh),
    "Asinh": _unary(torch.asinh),
    "Acosh": _unary(torch.acosh),
    "Atanh": _unary(torch.atanh),
    "Neg": _unary(torch.neg),
    "Add": lambda a, xs, shape: xs[0] + xs[1],
    "Sub": lambda a, xs, shape: xs[0] - xs[1],
    "Mul": lambda a, xs, shape: xs[0] * xs[1],
    "Mod": lambda a, xs, shape: (torch.fmod if a["fmod"] else torch.remainder)(xs[0], xs[1]),
    "Div": lambda a, xs, shape: xs[0] / xs[1],
    "Pow": lambda a, xs, shape: torch.pow(xs[0], xs[1]),
    "Max": _extreme(torch.maximum),
    "Min": _extreme(torch.minimum),
    "Where": lambda a, xs, shape: torch.where(*xs),
    "MatMul": lambda a, xs, shape: xs[0] @ xs[1],
    "Conv": _conv,
    "MaxPool": _max_pool,
    "LRN": _lrn,
    "GridSample": _grid_sample,
    "ScatterElements": _scatter_elements,
    "Unique": _unique,
    "CumProd": lambda a, xs, shape: _cum_prod(xs[0], int(xs[1]), a["exclusive"], a["reverse"]),
    "Softmax": lambda a, xs, shape: torch.softmax(xs[0], a["axis"]),
    "LogSoftmax": lambda a, xs, shape: torch.log_softmax(xs[0], a["axis"]),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "ReduceL1": _reduce(lambda x, axes, keepdim: x.abs().sum(axes, keepdim=keepdim)),
    "ReduceL2": _reduce(lambda x, axes, keepdim: torch.linalg.vector_norm(x, 2, axes, keepdim=keepdim)),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "GlobalAveragePool": lambda a, xs, shape: xs[0].mean(tuple(range(2, xs[0].ndim)), keepdim=True),
    "GlobalMaxPool": lambda a, xs, shape: xs[0].flatten(2).max(2).values.reshape(shape),
}
