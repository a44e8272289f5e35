"""Explainer: rewrite once, run many. Explanation: what a run gives back."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.masks import mask_array
from onnx_lrp.methods import Method
from onnx_lrp.model import ModelLike, write_atomically
from onnx_lrp.rewrite import Explained, rewrite
from onnx_lrp.runtime import Array, Device, Session

Inputs = Any  # an array, or a mapping of input names to arrays
Targets = int | Sequence[Any] | Array | None

_LOG = logging.getLogger("onnx_lrp")

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
        delta: relevance summed minus the rise of the score above the baseline, (N,), zero for complete contributions;
            None for methods without a baseline.
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
    delta: Array | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.score)

    def __getitem__(self, index: int | slice) -> Explanation:
        """One sample, or several, as an explanation of its own."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            index = slice(index, index + 1 or None)

        def cut(arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {k: v[index] if v.ndim and len(v) == len(self) else v for k, v in arrays.items()}

        absorbed, delta = (None if a is None else a[index] for a in (self.absorbed, self.delta))
        outputs, relevance, inputs = cut(self.outputs), cut(self.relevance), cut(self.inputs)
        target, score = self.target[index], self.score[index]
        return Explanation(outputs, relevance, target, score, absorbed, inputs, self.method, delta)

    def total(self) -> Array:
        """Sum of the relevance of all reported model inputs per sample, float64 (N,)."""
        inputs = [r for name, r in self.relevance.items() if name in self.inputs]
        total = np.zeros(len(self))
        for relevance in inputs:
            total = total + relevance.reshape(len(self), -1).sum(1, dtype=np.float64)
        return total

    def channels(self, tensor: str, *, axis: int = 1, by: Literal["sum", "max"] = "sum", share: bool = False) -> Array:
        """Relevance of every channel of a reported tensor, over all its places: (N, C), float64.

        Args:
            tensor: its name; one of ``layers``.
            axis: where its channels lie.
            by: the sum over places, or the largest value.
            share: divided by the sum of all channels' magnitudes, so that samples can be compared.

        Raises:
            InputError: the tensor is not reported, or has no such axis.
        """
        if tensor not in self.relevance:
            raise InputError(f"'{tensor}' is not reported; there is {', '.join(self.relevance)}, more with layers=")
        relevance = self.relevance[tensor].astype(np.float64)
        if not 0 < axis < relevance.ndim:
            raise InputError(f"relevance of '{tensor}' has shape {relevance.shape}, and no channels on axis {axis}")
        rows = np.moveaxis(relevance, axis, 1).reshape(*np.array(relevance.shape)[[0, axis]], -1)
        found = rows.sum(2) if by == "sum" else rows.max(2)
        # The small number is zennit-crp's; it keeps a sample without relevance at zero.
        return np.asarray(found / (np.abs(found).sum(1, keepdims=True) + 1e-10) if share else found)

    def save(
        self, path: str | os.PathLike[str], *, pictures: Sequence[Array | None] | None = None, **options: Any
    ) -> Path:
        """Write a heat map (.png) or all arrays (.npz).

        Args:
            path: where to; written under a temporary name and renamed.
            pictures: uint8 (H, W, 3) per sample to draw beside the map; default: the input itself.
            options: for pictures: ``colormap``, ``heading``, ``labels``, ``percentile``; see
                :func:`onnx_lrp.show.explanation_figure`.

        Returns:
            The path.

        Raises:
            InputError: unknown suffix, folder missing, disk full.
        """
        target = Path(path)
        if target.suffix == ".npz":
            return save_arrays(target, self.arrays())
        if target.suffix == ".png":
            from onnx_lrp.show import explanation_figure, save

            return save(explanation_figure(self, pictures, **options), target)
        raise InputError(f"{target}: an explanation is saved as .png or .npz; choose one of these suffixes")

    def arrays(self) -> dict[str, Array]:
        """Everything but the inputs, under the names that a .npz file of it has."""
        found = {f"relevance/{k}": v for k, v in self.relevance.items()}
        found |= {f"output/{k}": v for k, v in self.outputs.items()}
        found |= {"target": self.target, "score": self.score}
        sums = {"absorbed": self.absorbed, "delta": self.delta}
        return found | {name: array for name, array in sums.items() if array is not None}


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> Path:
    """Write named arrays as .npz under a temporary name and rename it.

    Raises:
        InputError: folder missing or not writable, disk full.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder and the free space"
        ) from None
    return path


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
        folder = self.explained.source.folder
        self.session = Session(self.explained.model, device=device, providers=providers, threads=threads, folder=folder)
        _LOG.info("%s: %s on %s", self.explained.source.name, self.explained.method, ", ".join(self.providers))
        on_gpu = self.session.providers[0] != "CPUExecutionProvider"
        self.batch_size = batch_size or (_CHUNK_GPU if on_gpu else _CHUNK_CPU)
        self._own = [o.name for o in self.explained.source.skeleton.graph.output]
        # The input whose first axis is the batch: the first one explained, else the first that has axes.
        shaped = [n for n in (*self.explained.relevance, *self.session.inputs) if n in self.session.inputs]
        self._lead = next((n for n in shaped if self.session.inputs[n].shape), "")
        self._batch: int | str | None = self.session.inputs[self._lead].shape[0] if self._lead else None

    @property
    def providers(self) -> list[str]:
        """Execution providers really in use."""
        return self.session.providers

    @property
    def fixed(self) -> bool:
        """Whether the model's batch has one length only; other numbers of samples are run in turns."""
        return isinstance(self._batch, int)

    @property
    def chunk(self) -> int:
        """Samples per run; 0 where they cannot be told apart: no batch axis in the inputs or in what is explained."""
        if isinstance(self._batch, int):
            return self._batch
        return 0 if not self._lead or self.session.shapes["score"] == [1] else self.batch_size

    def __call__(
        self, inputs: Inputs, target: Targets = None, *, masks: Mapping[str, Any] | None = None
    ) -> Explanation:
        """Explain a batch of any size.

        Args:
            inputs: an array (N, …) for a model with one input, or {"input": array, …}; parameters of the method
                (``low``, ``high``, ``start``) go in by name, too.
            target: class to explain: None for the arg max, one for all, or one per sample; for an output with several
                class axes a tuple of indices (one for all) or a list of tuples.
            masks: of a model that was rewritten with ``masks``: tensor -> the channels that count there. A channel; a
                list, one entry per sample, each a channel or a list of channels; or an array (N, C) of floats, the
                masks themselves. One sample with several conditions is explained under each of them; what is not
                named counts in full.

        Returns:
            The explanation, samples (or conditions of the one sample) in the order given.

        Raises:
            InputError: wrong name, shape or dtype, NaN, class or channel out of range.
        """
        feeds = self._feeds(inputs)
        axes, count = self._axes(feeds)
        if masks:
            feeds, axes, count = self._conditions(masks, feeds, axes, count)
        wanted = self._targets(target, count)
        step = self.chunk or count
        pieces = []
        for begin in range(0, count, step):
            end = min(count, begin + step)
            # A fixed batch runs full: the last sample is repeated, and its copies are dropped.
            rows = np.minimum(np.arange(begin, begin + step if self.fixed else end), count - 1)
            whole = len(rows) == count and end == count
            part = {k: np.take(v, rows, axes[k]) if k in axes and not whole else v for k, v in feeds.items()}
            if wanted is not None:
                part["target"] = wanted[rows]
            pieces.append((end - begin, len(rows), self.session.run(part)))
        joined = self._join(pieces)
        return Explanation(
            {name: joined[name] for name in self._own},
            {tensor: joined[name] for tensor, name in self.explained.relevance.items()},
            joined["target_used"],
            joined["score"].reshape(-1),
            joined.get("absorbed"),
            {k: v for k, v in feeds.items() if k in self.session.inputs},
            self.explained.method,
            joined.get("delta"),
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
                raise InputError(
                    f"the model has {len(session.inputs)} inputs: give a dict with {', '.join(session.inputs)}"
                )
            inputs = {next(iter(session.inputs)): inputs}
        known = {**session.inputs, **session.optional}
        for name in inputs:
            masked = name in (f"mask/{tensor}" for tensor in self.explained.masks)
            if name == "target" or masked or name not in known:
                hint = (
                    "give classes as target="
                    if name == "target"
                    else "give masks as masks="
                    if masked
                    else f"inputs are {', '.join(n for n in known if n != 'target')}"
                )
                raise InputError(f"the model has no input '{name}'; {hint}")
        absent = [n for n in session.inputs if n not in inputs]
        if absent:
            raise InputError(f"input '{absent[0]}' is missing; the model needs {', '.join(session.inputs)}")
        batch = self._batch if isinstance(self._batch, int) else None
        return {name: session.checked(name, array, batch) for name, array in inputs.items()}

    def _axes(self, feeds: Mapping[str, Array]) -> tuple[dict[str, int], int]:
        """On which axis of each input its samples lie, and how many there are; what is not named is fed whole.

        Raises:
            InputError: inputs that disagree about the number of samples.
        """
        if not self._lead:
            return {}, 1
        count = len(feeds[self._lead])
        axes = {self._lead: 0}
        for name, info in self.session.inputs.items():
            shape, data = list(info.shape), feeds[name]
            if name == self._lead or not shape:
                continue
            if self.fixed:
                if shape[0] == self._batch and len(data) == count:
                    axes[name] = 0
                elif len(data) != shape[0]:
                    self._disagree(feeds, count)
                continue
            axis = shape.index(self._batch) if isinstance(self._batch, str) and self._batch in shape else 0
            if isinstance(shape[axis], int):
                continue
            if data.shape[axis] != count:
                self._disagree(feeds, count)
            axes[name] = axis
        # What a method takes besides (a baseline, bounds) is one for all, or has a row per sample.
        axes |= {n: 0 for n, a in feeds.items() if n not in self.session.inputs and a.ndim and len(a) == count > 1}
        return axes, count

    def _disagree(self, feeds: Mapping[str, Array], count: int) -> None:
        given = ", ".join(f"{name} {feeds[name].shape}" for name in self.session.inputs)
        raise InputError(f"inputs have different numbers of samples: {given}; each wants {count}, as {self._lead} has")

    def _conditions(
        self, masks: Mapping[str, Any], feeds: dict[str, Array], axes: dict[str, int], count: int
    ) -> tuple[dict[str, Array], dict[str, int], int]:
        """Feeds with masks, one row per sample; a single sample is repeated for each of several conditions."""
        unknown = [name for name in masks if name not in self.explained.masks]
        if unknown:
            known = ", ".join(self.explained.masks) or "none; rewrite it with masks=[tensor]"
            raise InputError(f"the model has no masks at '{unknown[0]}'; it has {known}")
        rows = {}
        for name, given in masks.items():
            channels = self.session.optional[f"mask/{name}"].shape[1]
            rows[name] = mask_array(name, given, channels if isinstance(channels, int) else None)
        most = max(len(r) for r in rows.values())
        if count == 1 and most > 1 and axes:
            count, feeds = most, {k: np.repeat(v, most, axes[k]) if k in axes else v for k, v in feeds.items()}
        for name, array in rows.items():
            if len(array) not in (1, count):
                raise InputError(
                    f"masks of '{name}': {len(array)} conditions for {count} samples; give one, or one each"
                )
            mask = np.broadcast_to(array, (count, array.shape[1]))
            feeds[f"mask/{name}"] = self.session.checked(f"mask/{name}", mask)
            axes[f"mask/{name}"] = 0
        return feeds, axes, count

    def _join(self, pieces: Sequence[tuple[int, int, dict[str, Array]]]) -> dict[str, Array]:
        """The outputs of all runs, each (samples wanted, samples run, outputs), one after the other."""
        if len(pieces) == 1 and pieces[0][0] == pieces[0][1]:
            return pieces[0][2]
        joined = {}
        for name, array in pieces[0][2].items():
            axis = self._output_axis(name, array, pieces[0][1])
            kept = [
                np.take(result[name], range(wanted), axis) if axis is not None and wanted < ran else result[name]
                for wanted, ran, result in pieces
            ]
            joined[name] = kept[0] if axis is None else np.concatenate(kept, axis)
        return joined

    def _output_axis(self, name: str, array: Array, samples: int) -> int | None:
        """The axis of an output on which samples lie; None where there is none."""
        shape = self.session.shapes[name]
        if isinstance(self._batch, str) and self._batch in shape:
            return shape.index(self._batch)
        return next((axis for axis, length in enumerate(array.shape) if length == samples), None)

    def _targets(self, target: Targets, count: int) -> Array | None:
        """Classes as int64 (count,) or (count, k), each checked against its range."""
        if target is None:
            return None
        classes = self.explained.classes
        if "target" not in self.session.optional:
            raise InputError(
                "the model was rewritten for a fixed target, or by a method that explains no class; "
                "rewrite it with target='input' to choose classes"
            )
        try:
            given = np.asarray(target)
        except ValueError:
            raise InputError("target is a class index or one per sample; the list given is ragged") from None
        if given.dtype.kind not in "iu" or not given.size:
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
                known = "" if length is None else f": the output has {length} classes, 0 to {length - 1} (-1: arg max)"
                raise InputError(f"class {bad[0]} is out of range{known}")
        result = table.astype(np.int64)
        return result[:, 0].copy() if width == 1 else result
