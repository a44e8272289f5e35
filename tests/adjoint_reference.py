"""Running models: ONNX's reference implementation, mended where it is mistaken, and ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnx_lrp import reference

Array = np.ndarray
Feeds = Mapping[str, Array]
_SLIDES = ("strides", "dilations", "output_padding")


class Erf(OpRun):
    """Erf in the type of its input: onnx's own computes in float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype),)


class Pad(OpRun):
    """Pad that takes negative pads: numpy's, which onnx's own calls, does not."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        pads: Array,
        value: Array | None = None,
        axes: Array | None = None,
        mode: str | None = None,
    ) -> tuple[Array]:
        widths = np.zeros((x.ndim, 2), np.int64)
        widths[np.arange(x.ndim) if axes is None else axes] = np.asarray(pads).reshape(2, -1).T
        mode = mode or "constant"
        options = {"constant_values": 0 if value is None else value} if mode == "constant" else {}
        grown = np.pad(x, np.maximum(widths, 0), mode, **options)
        cut = tuple(slice(max(-b, 0), n - max(-e, 0)) for (b, e), n in zip(widths, grown.shape, strict=True))
        return (grown[cut].astype(x.dtype),)


class Mean(OpRun):
    """Mean of tensors of several shapes: onnx's own adds in place to the first."""

    op_domain = ""

    def _run(self, *xs: Array) -> tuple[Array]:
        return (sum(xs[1:], xs[0]) / len(xs),)


class ConvTranspose(OpRun):
    """ConvTranspose by the sum that it is: y[stride * i + dilation * k] += w[k] x[i]; onnx's own knows fewer forms."""

    op_domain = ""

    def _run(self, x: Array, w: Array, b: Array | None = None, **options: Any) -> tuple[Array]:
        n, group, mode = x.ndim - 2, options["group"], options["auto_pad"]
        strides, dilations, extra = (
            options.get(k) or d for k, d in zip(_SLIDES, ([1] * n, [1] * n, [0] * n), strict=True)
        )
        kernel = w.shape[2:]
        full = [
            s * (i - 1) + d * (k - 1) + 1 for s, i, d, k in zip(strides, x.shape[2:], dilations, kernel, strict=True)
        ]
        pads = options.get("pads") if mode == "NOTSET" else None
        wanted = options.get("output_shape")
        if wanted is None and mode.startswith("SAME"):
            wanted = [i * s for i, s in zip(x.shape[2:], strides, strict=True)]
        begin = list((pads or [0] * n)[:n])
        if wanted is not None:
            total = [max(f + p - o, 0) for f, p, o in zip(full, extra, wanted, strict=True)]
            begin = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total]
        else:
            wanted = [f + p - b - c for f, p, b, c in zip(full, extra, begin, (pads or [0] * n)[-n:], strict=True)]
        parts = np.split(x, group, 1), np.split(w, group)
        room = [max(f, b + o) for f, b, o in zip(full, begin, wanted, strict=True)]
        y = np.zeros((x.shape[0], w.shape[1] * group, *room), x.dtype)
        for place in np.ndindex(*kernel):
            at = [
                slice(d * k, d * k + s * i, s)
                for d, k, s, i in zip(dilations, place, strides, x.shape[2:], strict=True)
            ]
            products = [np.einsum("nc...,cm->nm...", p, q[(..., *place)]) for p, q in zip(*parts, strict=True)]
            y[(slice(None), slice(None), *at)] += np.concatenate(products, 1)
        cut = [slice(b, b + o) for b, o in zip(begin, wanted, strict=True)]
        bias = 0 if b is None else b.reshape(-1, *[1] * n)
        return (y[(slice(None), slice(None), *cut)] + bias,)


class LRN(OpRun):
    """LRN over all channels: onnx's own counts as many as there are pictures."""

    op_domain = ""

    def _run(self, x: Array, alpha: float, beta: float, bias: float, size: int) -> tuple[Array]:
        before = (size - 1) // 2
        windows = [slice(max(0, c - before), c - before + size) for c in range(x.shape[1])]
        squares = np.stack([(x[:, w] ** 2).sum(1) for w in windows], 1)
        return (x / (bias + alpha / size * squares) ** beta,)


class Gelu(OpRun):
    """Gelu in the type of its input: its function body takes onnx's own Erf."""

    op_domain = ""

    def _run(self, x: Array, approximate: str) -> tuple[Array]:
        if approximate == "tanh":
            return (x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))),)


class _Pool(OpRun):
    """What pools have in common; onnx's own loops over windows are slow, and mistaken about some pads."""

    op_domain = ""

    def _prepare(self, lengths: Sequence[int], options: Mapping[str, Any]) -> None:
        """Work out kernel, strides, dilations, pads, and what the last windows of ceil_mode overhang."""
        n = len(lengths)
        self._kernel, mode = options["kernel_shape"], options.get("auto_pad") or "NOTSET"
        self._strides, self._dilations = (options.get(k) or [1] * n for k in ("strides", "dilations"))
        reach = [d * (k - 1) + 1 for d, k in zip(self._dilations, self._kernel, strict=True)]
        pads = options.get("pads") if mode == "NOTSET" else None
        self._pads, self._over = list(zip(*np.reshape(pads or [0] * 2 * n, (2, n)).tolist(), strict=True)), []
        for i, (length, s, r) in enumerate(zip(lengths, self._strides, reach, strict=True)):
            if mode.startswith("SAME"):
                total = max((math.ceil(length / s) - 1) * s + r - length, 0)
                self._pads[i] = (total // 2, total - total // 2)[:: -1 if mode == "SAME_LOWER" else 1]
            over, (begin, end) = 0, self._pads[i]
            if options.get("ceil_mode"):
                count = math.ceil((length + begin + end - r) / s) + 1
                count -= (count - 1) * s >= length + begin  # no window begins in the padding at the end
                over = max((count - 1) * s + r - length - begin - end, 0)
            self._over.append((0, over))

    def _windows(self, x: Array, padding: float, overhang: float) -> Array:
        """All windows, their elements along the last axis."""
        rest = [(0, 0), (0, 0)]
        x = np.pad(np.pad(x, rest + self._pads, constant_values=padding), rest + self._over, constant_values=overhang)
        n = len(self._kernel)
        reach = [d * (k - 1) + 1 for d, k in zip(self._dilations, self._kernel, strict=True)]
        views = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(range(2, 2 + n)))
        views = views[(..., *(slice(None, None, d) for d in self._dilations))]
        views = views[(slice(None), slice(None), *(slice(None, None, s) for s in self._strides))]
        return views.reshape(*views.shape[: 2 + n], -1)


class MaxPool(_Pool):
    """MaxPool, the first of the largest elements giving the index."""

    def _run(self, x: Array, **options: Any) -> tuple[Array, ...]:
        self._prepare(x.shape[2:], options)
        windows = self._windows(x, -np.inf, -np.inf)
        places = self._windows(np.arange(x.size).reshape(x.shape), -1, -1)
        winner = windows.argmax(-1)[..., None]
        return windows.max(-1), np.take_along_axis(places, winner, -1)[..., 0]


class AveragePool(_Pool):
    """AveragePool: padding counts if it is told to, the overhang of ceil_mode never."""

    def _run(self, x: Array, **options: Any) -> tuple[Array]:
        self._prepare(x.shape[2:], options)
        count = self._windows(np.ones_like(x), options.get("count_include_pad") or 0, 0).sum(-1)
        return (self._windows(x, 0, 0).sum(-1) / count,)


class LpPool(_Pool):
    """LpPool as it is defined: padding counts as zero."""

    def _run(self, x: Array, **options: Any) -> tuple[Array]:
        self._prepare(x.shape[2:], options)
        p = options["p"]
        return ((self._windows(np.abs(x) ** p, 0, 0).sum(-1)) ** (1 / p),)


class Unique(OpRun):
    """Unique of tensors in any order: onnx's own, told not to sort, picks along the first axis, whatever the axis."""

    op_domain = ""

    def _run(self, x: Array, axis: int | None, sorted: int) -> tuple[Array, ...]:
        y, first, inverse, counts = np.unique(x, True, True, True, axis=axis)
        order = np.arange(len(first)) if sorted else np.argsort(first)
        back = np.argsort(order)[inverse.reshape(-1)]
        found = (np.take(y, order, axis or 0), first[order], back, counts[order])
        return found[: len(self.onnx_node.output)]


class DeformConv(OpRun):
    """DeformConv with places in the type of the offset: onnx's own have float32, and it samples them one by one."""

    op_domain = ""

    def _run(
        self, x: Array, w: Array, offset: Array, b: Array | None = None, mask: Array | None = None, **options: Any
    ) -> tuple[Array]:
        kernel, (high, wide), group, sets = w.shape[2:], offset.shape[2:], options["group"], options["offset_group"]
        strides, dilations, pads = (
            options.get(k) or d for k, d in (("strides", [1] * 2), ("dilations", [1] * 2), ("pads", [0] * 4))
        )
        moved = offset.reshape(len(x), sets, -1, 2, high, wide)
        weights = (
            np.ones((len(x), sets, len(moved[0, 0]), high, wide))
            if mask is None
            else mask.reshape(len(x), sets, -1, high, wide)
        )
        y = np.zeros((len(x), len(w), high, wide), x.dtype)
        inside, outside = x.shape[1] // sets, len(w) // group
        for k, tap in enumerate(np.ndindex(*kernel)):
            grown = np.indices((high, wide)) * np.reshape(strides, (2, 1, 1))
            begin = np.reshape(np.array(tap) * dilations - pads[:2], (2, 1, 1))
            for s in range(sets):
                places = (grown + begin + moved[:, s, k]).reshape(len(x), 2, -1).transpose(0, 2, 1)
                part = x[:, s * inside : (s + 1) * inside]
                seen = reference.sample(part, places, "linear", "zeros").reshape(*part.shape[:2], high, wide)
                for c in range(inside):
                    channel = s * inside + c
                    g, own = divmod(channel, w.shape[1])
                    rows = slice(g * outside, (g + 1) * outside)
                    y[:, rows] += (
                        w[rows, own][(slice(None), *tap)][None, :, None, None]
                        * (seen[:, c] * weights[:, s, k])[:, None]
                    )
        return (y + (0 if b is None else b.reshape(-1, 1, 1)),)


class AffineGrid(OpRun):
    """AffineGrid in the type of its input: onnx's own computes in float32."""

    op_domain = ""

    def _run(self, theta: Array, size: Array, align_corners: int) -> tuple[Array]:
        lengths = [int(n) for n in size[2:]]
        along = [np.linspace(-1, 1, n) if align_corners else (2 * np.arange(n) + 1) / n - 1 for n in lengths]
        places = np.stack([*reversed(np.meshgrid(*along, indexing="ij")), np.ones(lengths)], -1)
        return (np.einsum("...k,njk->n...j", places, theta),)


_THEIRS = [c for c in vars(reference).values() if isinstance(c, type) and issubclass(c, OpRun) and c is not OpRun]
MENDED = {
    c.__name__: c
    for c in (*_THEIRS, Erf, Pad, Mean, ConvTranspose, LRN, Gelu, MaxPool, AveragePool, Unique, DeformConv, AffineGrid)
}
MENDED["LpPool"] = LpPool


def run_reference(proto: onnx.ModelProto, feeds: Feeds) -> dict[str, Array]:
    """Outputs by ONNX's reference implementation, in the types that the model declares."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    session = ReferenceEvaluator(reference.named(copy), new_ops=list(MENDED.values()))
    return dict(zip(session.output_names, session.run(None, dict(feeds)), strict=True))


def run_onnxruntime(proto: onnx.ModelProto, feeds: Feeds) -> dict[str, Array]:
    """Outputs by ONNX Runtime on the CPU, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {k: x for k, x in feeds.items() if k in wanted}), strict=True))
