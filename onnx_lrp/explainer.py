"""Explainer: rewrite once, run many. Explanation: what a run gives back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.methods import Method
from onnx_lrp.model import ModelLike, write_atomically
from onnx_lrp.rewrite import Explained, rewrite
from onnx_lrp.runtime import Array, Device, Session

Inputs = Any  # an array, or a mapping of input names to arrays
Targets = int | Sequence[Any] | Array | None

# On a CPU larger batches gain no time and cost memory; on a GPU they pay.
_CHUNK_CPU, _CHUNK_GPU = 4, 32


@dataclass
class Explanation:
    """What one call gives back, for N samples.

    Attributes:
        outputs: the model's own outputs by name.
        relevance: relevance by tensor name, in the tensor's shape (integer inputs: per token, (N, T)).
        target: classes explained, int64 (N,); (N, k) where the output has k class axes.
        score: the explained score, (N,).
        absorbed: relevance taken by biases and stabilizers, (N,); None unless the ledger was asked for.
        inputs: what was fed.
        method: name of the method.
    """

    outputs: dict[str, Array]
    relevance: dict[str, Array]
    target: Array
    score: Array
    absorbed: Array | None
    inputs: dict[str, Array] = field(repr=False)
    method: str = ""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.score)

    def total(self) -> Array:
        """Sum of the relevance of all reported model inputs per sample, float64 (N,)."""
        parts = [r.astype(np.float64).reshape(len(self), -1).sum(1) for name, r in self.relevance.items() if name in self.inputs]
        return np.sum(parts, axis=0) if parts else np.zeros(len(self))

    def save(self, path: str | os.PathLike[str], *, pictures: Sequence[Array | None] | None = None, **options: Any) -> Path:
        """Write a heat map (.png) or all arrays (.npz).

        Args:
            path: where to; written under a temporary name and renamed.
            pictures: uint8 (H, W, 3) per sample to draw beside the map; default: the input itself.
            options: for pictures: ``colormap``, ``heading``.

        Raises:
            InputError: unknown suffix, folder missing, disk full.
        """
        target = Path(path)
        if target.suffix == ".npz":
            import io

            buffer = io.BytesIO()
            arrays = {f"relevance/{k}": v for k, v in self.relevance.items()} | {f"output/{k}": v for k, v in self.outputs.items()}
            extra = {} if self.absorbed is None else {"absorbed": self.absorbed}
            np.savez_compressed(buffer, **arrays, target=self.target, score=self.score, **extra)  # type: ignore[arg-type]
            try:
                write_atomically(target, buffer.getvalue())
            except OSError as error:
                raise InputError(f"{target}: cannot be written ({error.strerror or error}); check the folder and the free space") from None
            return target
        if target.suffix == ".png":
            from onnx_lrp.show import explanation_figure, save

            return save(explanation_figure(self, pictures, **options), target)
        raise InputError(f"{target}: an explanation is saved as .png or .npz; choose one of these suffixes")


class Explainer:
    """Explain many inputs of one model: the model is rewritten and the session made once.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph.
        method: registered name, path of a rule book, or a method object.
        device: "auto" (CUDA where it loads, else CPU), "cpu" or "cuda".
        providers: ONNX Runtime's own list, overrides ``device``.
        threads: threads per operator.
        batch_size: samples per run; default: 4 on a CPU, 32 on a GPU.
        options: as for :func:`onnx_lrp.rewrite`.

    Raises:
        OnnxLrpError: as for :func:`onnx_lrp.rewrite`; InputError where the device is not to be had.
    """

    def __init__(
        self,
        model: ModelLike,
        method: str | os.PathLike[str] | Method = "epsilon_plus_flat",
        *,
        device: Device = "auto",
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        batch_size: int | None = None,
        **options: Any,
    ):
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is at least 1, not {batch_size}")
        self.explained: Explained = rewrite(model, method, **options)
        self.session = Session(self.explained.model, device=device, providers=providers, threads=threads, folder=self.explained.source.folder)
        on_gpu = self.session.providers[0] != "CPUExecutionProvider"
        self.batch_size = batch_size or (_CHUNK_GPU if on_gpu else _CHUNK_CPU)
        self._own = [o.name for o in self.explained.source.skeleton.graph.output]

    @property
    def providers(self) -> list[str]:
        """Execution providers really in use."""
        return self.session.providers

    def __call__(self, inputs: Inputs, target: Targets = None) -> Explanation:
        """Explain a batch of any size.

        Args:
            inputs: an array (N, …) for a model with one input, or {"input": array, …}; parameters of the method
                (``low``, ``high``, ``start``) go in by name, too.
            target: class to explain: None for the arg max, one for all, or one per sample; for an output with several
                class axes a tuple of indices (one for all) or a list of tuples.

        Returns:
            The explanation, samples in the order given.

        Raises:
            InputError: wrong name, shape or dtype, NaN, class out of range.
        """
        feeds = self._feeds(inputs)
        batched = self._batched(feeds)
        count = len(feeds[batched[0]]) if batched else 1
        wanted = self._targets(target, count)
        step = self._step(batched)
        pieces = []
        for begin in range(0, max(count, 1), step):
            part = {k: (v[begin : begin + step] if k in batched else v) for k, v in feeds.items()}
            missing = step - (min(count, begin + step) - begin) if self._fixed(batched) else 0
            if missing:  # a fixed batch runs full: the last sample is repeated, its copies are dropped
                part = {k: np.concatenate([v, np.repeat(v[-1:], missing, axis=0)]) if k in batched else v for k, v in part.items()}
            if wanted is not None:
                rows = wanted[begin : begin + step]
                part["target"] = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
            result = self.session.run(part)
            pieces.append({k: v[: step - missing] if missing and v.ndim else v for k, v in result.items()})
        joined = pieces[0] if len(pieces) == 1 else {k: np.concatenate([p[k] for p in pieces]) if pieces[0][k].ndim else pieces[0][k] for k in pieces[0]}
        return Explanation(
            {name: joined[name] for name in self._own},
            {tensor: joined[name] for tensor, name in self.explained.relevance.items()},
            joined["target_used"],
            joined["score"].reshape(-1),
            joined.get("absorbed"),
            {k: v for k, v in feeds.items() if k in self.session.inputs},
            self.explained.method,
        )

    def stream(self, batches: Iterable[Inputs]) -> Iterator[Explanation]:
        """Explain batch after batch: explanations come in order, memory stays constant."""
        for batch in batches:
            yield self(batch)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _feeds(self, inputs: Inputs) -> dict[str, Array]:
        session = self.session
        if not isinstance(inputs, Mapping):
            if len(session.inputs) != 1:
                raise InputError(f"the model has {len(session.inputs)} inputs ({', '.join(session.inputs)}): give a dict of name to array")
            inputs = {next(iter(session.inputs)): inputs}
        known = {**session.inputs, **session.optional}
        for name in inputs:
            if name == "target" or name not in known:
                hint = "give classes as target=" if name == "target" else f"inputs are {', '.join(n for n in known if n != 'target')}"
                raise InputError(f"the model has no input '{name}'; {hint}")
        absent = [n for n in session.inputs if n not in inputs]
        if absent:
            raise InputError(f"input '{absent[0]}' is missing; the model needs {', '.join(session.inputs)}")
        return {name: self._checked(name, array, known[name].shape) for name, array in inputs.items()}

    def _checked(self, name: str, array: Any, shape: Sequence[int | str | None]) -> Array:
        data, dtype = np.asarray(array), np.dtype(self.session.dtype(name))
        if data.dtype.kind not in "fiub":
            raise InputError(f"input '{name}' wants {dtype}, got {data.dtype}: give a numeric array")
        if dtype.kind in "iu" and data.dtype.kind == "f" and not np.array_equal(data, np.floor(data)):
            raise InputError(f"input '{name}' wants {dtype}, got {data.dtype} with fractions: give whole numbers")
        expected = "(" + ", ".join(str(d) if d is not None else "?" for d in shape) + ")"
        if data.ndim != len(shape):
            hint = "; add a batch axis: x[None]" if data.ndim == len(shape) - 1 else ""
            raise InputError(f"input '{name}' wants shape {expected}, got {data.shape}{hint}")
        first = 1 if name in self.session.inputs and isinstance(shape[0] if shape else None, int) else 0  # a fixed batch is fed in turns
        wrong = [i for i, (d, n) in enumerate(zip(shape, data.shape, strict=True)) if i >= first and isinstance(d, int) and d != n]
        if wrong:
            raise InputError(f"input '{name}' wants shape {expected}, got {data.shape}")
        optional = name not in self.session.inputs
        if data.dtype.kind == "f" and not optional and not np.isfinite(data).all():
            kind = "NaN" if np.isnan(data).any() else "infinite values"
            raise InputError(f"input '{name}' holds {kind}; clean the data first")
        return np.ascontiguousarray(data, dtype)

    def _batched(self, feeds: Mapping[str, Array]) -> list[str]:
        """Inputs that are cut into chunks along axis 0: those of the model that have one."""
        names = [n for n in self.session.inputs if feeds[n].ndim]
        lengths = {n: len(feeds[n]) for n in names}
        if len(set(lengths.values())) > 1:
            free = [n for n in names if not isinstance(self.session.inputs[n].shape[0], int) or lengths[n] != self.session.inputs[n].shape[0]]
            if len({lengths[n] for n in free}) > 1:
                raise InputError(f"inputs have different numbers of samples: {', '.join(f'{n}: {c}' for n, c in lengths.items())}")
            return free
        return names

    def _fixed(self, batched: Sequence[str]) -> bool:
        return bool(batched) and isinstance(self.session.inputs[batched[0]].shape[0], int)

    def _step(self, batched: Sequence[str]) -> int:
        return int(self.session.inputs[batched[0]].shape[0]) if self._fixed(batched) else self.batch_size

    def _targets(self, target: Targets, count: int) -> Array | None:
        """Classes as int64 (count,) or (count, k), each checked against its range."""
        if target is None:
            return None
        classes = self.explained.classes
        if "target" not in self.session.optional:
            raise InputError("the model was rewritten for a fixed target; rewrite it with target='input' to choose classes")
        given = np.asarray(target)
        if given.dtype.kind not in "iu":
            raise InputError(f"target is a class index or one per sample, not {given.dtype} values")
        width = len(classes)
        if width == 1:
            rows = np.broadcast_to(given.reshape(-1), (count,)) if given.size in (1, count) else given.reshape(-1)
            table = rows[:, None]
        elif given.ndim == 0:
            table = np.tile([-1] * (width - 1) + [int(given)], (count, 1))
        elif given.ndim == 1 and len(given) == width:
            table = np.tile(given, (count, 1))
        else:
            table = given.reshape(len(given), -1)
        if table.shape != (count, width):
            raise InputError(f"target wants one class for all or one per sample ({count}), got shape {given.shape}")
        for axis, length in enumerate(classes):
            bad = [int(t) for t in table[:, axis] if t < -1 or (length is not None and t >= length)]
            if bad:
                raise InputError(f"class {bad[0]} is out of range: the output has {length} classes, 0 to {(length or 0) - 1} (-1: arg max)")
        result = table.astype(np.int64)
        return result[:, 0].copy() if width == 1 else result
