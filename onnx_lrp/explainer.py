"""Explainer: rewrite once, run many."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.explanation import Explanation
from onnx_lrp.masks import mask_array
from onnx_lrp.methods import Method
from onnx_lrp.model import ModelLike
from onnx_lrp.positions import Position, find_positions
from onnx_lrp.rewrite import Explained, rewrite
from onnx_lrp.roles import filled, kinds, role_of, text_inputs
from onnx_lrp.runtime import CPU, Array, Device, Session
from onnx_lrp.stream import ahead, gathered
from onnx_lrp.tokenizer import Text, Tokenizer, TokenizerLike, as_tokenizer
from onnx_lrp.tokens import token_rows

Inputs = Any  # an array, or a mapping of input names to arrays
Targets = int | Sequence[Any] | Array | None

_LOG = logging.getLogger("onnx_lrp")

# On a CPU larger batches gain no time and cost memory; on a GPU they pay.
_CHUNK_CPU, _CHUNK_GPU = 4, 32


class _Checked(dict[str, Array]):
    """Feeds that were checked: on which axis of each its samples lie, and how many there are."""

    def __init__(self, feeds: Mapping[str, Array], axes: dict[str, int], count: int):
        super().__init__(feeds)
        self.axes, self.count = axes, count


def _joins(one: _Checked, other: _Checked) -> bool:
    """Whether two batches can run as one: equal but for their samples, and for how many these are."""

    def apart(item: _Checked) -> dict[str, tuple[Any, ...]]:
        return {k: (*v.shape[: item.axes[k]], *v.shape[item.axes[k] + 1 :]) for k, v in item.items() if k in item.axes}

    whole = [k for k in one if k not in one.axes]
    same = one.keys() == other.keys() and apart(one) == apart(other)
    return same and bool(one.axes) and all(np.array_equal(one[k], other[k]) for k in whole)


class Explainer:
    """Explain many inputs of one model: the model is rewritten and the session made once.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph.
        method: registered name, path of a rule book, or a method object.
        device: "auto" (CUDA where it loads, else CPU), "cpu" or "cuda".
        providers: ONNX Runtime's own list, overrides ``device``.
        threads: threads per operator.
        batch_size: samples per run; default: 4 on a CPU, 32 on a GPU, or where samples have an input in common.
        cuda_graph: with CUDA, record the kernels of a run once and replay them, which saves the time to launch each.
            All lengths must be fixed (``shapes={"input": (8, 3, 224, 224)}``), and the model without control flow.
        tokenizer: path of a tokenizer.json, or a tokenizer: then texts can be given for token ids, and explanations
            know the words.
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
        cuda_graph: bool = False,
        tokenizer: TokenizerLike = None,
        **options: Any,
    ):
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is at least 1, not {batch_size}")
        self.tokenizer = as_tokenizer(tokenizer)
        self.explained: Explained = rewrite(model, method, **options)
        self.session = Session(
            self.explained.bare,
            device=device,
            providers=providers,
            threads=threads,
            folder=self.explained.source.folder,
            source=self.explained.source,
            cuda_graph=cuda_graph,
        )
        _LOG.info("%s: %s on %s", self.explained.source.name, self.explained.method, ", ".join(self.providers))
        on_gpu = self.session.providers[0] != CPU
        self._own = [o.name for o in self.explained.source.skeleton.graph.output]
        # Of a similarity (N, B) of captions and images, each caption is compared with all images. Where relevance of
        # the images is asked for, too, each caption has an image of its own, and they run pair by pair.
        across = self.explained.across
        self._pairs = any(name in self.explained.relevance for name in across)
        self._shared = () if self._pairs else tuple(across)
        self._apart = {self.session.inputs[name].shape[0] for name in self._shared}  # what their axes are called
        # What all samples share is computed once per run.
        self.batch_size = batch_size or (_CHUNK_GPU if on_gpu or self._shared else _CHUNK_CPU)
        # The input whose first axis is the batch: the first one explained, else the first that has axes.
        known = [n for n in (*self.explained.relevance, *self.session.inputs) if n in self.session.inputs]
        shaped = [n for n in known if n not in self._shared]
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
        if self._pairs:
            return 1
        return 0 if not self._lead or self.session.shapes["score"] == [1] else self.batch_size

    def __call__(
        self,
        inputs: Inputs,
        target: Targets = None,
        *,
        position: Position | None = None,
        against: Targets = None,
        masks: Mapping[str, Any] | None = None,
    ) -> Explanation:
        """Explain a batch of any size.

        Args:
            inputs: an array (N, …) for a model with one input, or {"input": array, …}; parameters of the method
                (``low``, ``high``, ``start``) go in by name, too. With a tokenizer also texts: a string, a pair of
                strings, or a list of such; in a dict for an input of token ids. What is not given beside token ids (a
                mask, segments, positions, a past) is filled in: every token counts, and there is no past.
            target: class to explain: None for the arg max, one for all, or one per sample; for an output with several
                class axes a tuple of indices (one for all) or a list of tuples. With a tokenizer and a position also a
                token as text. "all", for outputs (N, C): every class of every sample, in N·C rows, those of the first
                sample first. Where the classes are samples of another input (a similarity of N captions and B images),
                that input is common to all rows; if its relevance is asked for, too, inputs are pairs instead, as many
                of the one as of the other, and there is no target.
            position: for outputs (N, T, classes), such as a language model's: which of the T positions to explain:
                "last" (the next token), "mask" (the hidden word), a number (below 0 from the end of the text), a list
                of one per sample; one sample is explained at several positions, a list or "all", in one run.
            against: of a model that was rewritten with ``against=True``: the class whose score is subtracted, one for
                all or one per sample; None: the highest of the others. With a tokenizer also a token as text.
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
        if self._pairs and target is not None:
            both = ", ".join(self.explained.relevance)
            raise InputError(
                f"relevance of {both} is asked for, so sample i of the one is explained with sample i of the other: "
                "leave target= away and repeat samples, or leave one out of inputs="
            )
        if isinstance(target, str) and target == "all" and len(self.explained.classes) == 1:
            feeds, target, count = self._every(feeds, axes, count)
        target = self._numbers(target)
        if position is not None:
            rows, places = self._positions(position, feeds)
            feeds, count = {k: np.take(v, rows, axes[k]) if k in axes else v for k, v in feeds.items()}, len(rows)
            target = self._at(places, target)
        if masks:
            feeds, axes, count = self._conditions(masks, feeds, axes, count)
        wanted = self._targets(target, count, self._lengths(feeds))
        if against is not None:
            feeds["against"], axes["against"] = self._others(self._numbers(against), count), 0
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
        _warn_of_nan(joined["score"], self.explained.explained)
        return Explanation(
            {name: joined[name] for name in self._own},
            {tensor: joined[name] for tensor, name in self.explained.relevance.items()},
            joined["target_used"],
            joined["score"].reshape(-1),
            joined.get("absorbed"),
            {k: v for k, v in feeds.items() if k in self.session.inputs},
            self.explained.method,
            joined.get("delta"),
            self.tokenizer,
            joined.get("against_used"),
            tuple(n for n in self.session.inputs if n not in axes) + tuple(n for n in self._own if self._is_apart(n)),
            {tensor: joined[name] for tensor, name in self.explained.values.items()},
        )

    def stream(self, batches: Iterable[Inputs], *, prefetch: int = 1, gather: bool = False) -> Iterator[Explanation]:
        """Explain batch after batch: one explanation for each, in order; memory does not grow with their number.

        Args:
            batches: inputs as for a call, of any size each.
            prefetch: runs for which inputs are taken and checked in advance, by a thread, while the present one goes
                on; 0: a batch is taken when its explanation is asked for, and by the caller's own thread.
            gather: run small neighbours of equal shapes together, up to :attr:`chunk` samples. That is faster for
                small models and on a GPU; an explanation then waits for the batches that run with its own.

        Returns:
            An iterator. An error of `batches`, or of a batch that does not fit, is raised where its explanation would
            have come. Closing it (``.close()``, or leaving a loop over it) ends the thread; a batch that the thread is
            waiting for is waited for.

        Raises:
            InputError: a negative `prefetch`; later as for a call.
        """
        if prefetch < 0:
            raise InputError(f"prefetch is at least 0, not {prefetch}")
        groups = gathered(self._checked(batches), lambda item: item.count, self.chunk if gather else 1, _joins)
        return self._explained(ahead(groups, prefetch) if prefetch else groups)

    def _checked(self, batches: Iterable[Inputs]) -> Iterator[_Checked]:
        """Batches ready to run; an error says which batch it is about."""
        for number, batch in enumerate(batches):
            try:
                feeds = self._feeds(batch)
                checked = _Checked(feeds, *self._axes(feeds))
            except InputError as error:
                error.add_note(f"in batch {number} of the stream, counted from 0")
                raise
            yield checked

    def _explained(self, groups: Generator[list[_Checked], None, None]) -> Iterator[Explanation]:
        """The explanation of each batch, those of a group from one run."""
        with contextlib.closing(groups):
            for group in groups:
                if len(group) == 1:
                    yield self(group.pop())
                else:
                    yield from self._together(group)

    def _together(self, group: Sequence[_Checked]) -> Iterator[Explanation]:
        """The explanations of batches that run as one."""
        feeds, axes = dict(group[0]), group[0].axes
        feeds |= {k: np.concatenate([item[k] for item in group], axis) for k, axis in axes.items()}
        whole, begin = self(_Checked(feeds, axes, sum(item.count for item in group))), 0
        for item in group:
            yield self._part(whole, begin, item)
            begin += item.count

    def _part(self, whole: Explanation, begin: int, item: _Checked) -> Explanation:
        """What one batch has of an explanation of several, in arrays of its own."""

        def cut(arrays: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
            axes = {k: self._output_axis(names[k], v, len(whole)) for k, v in arrays.items()}
            rows = range(begin, begin + item.count)
            return {k: v if axes[k] is None else np.take(v, rows, axes[k]) for k, v in arrays.items()}

        part = whole[begin : begin + item.count]
        part.outputs = cut(whole.outputs, {name: name for name in whole.outputs})
        part.relevance = cut(whole.relevance, self.explained.relevance)
        part.values = cut(whole.values, self.explained.values)
        part.inputs = {k: v for k, v in item.items() if k in self.session.inputs}
        return part

    def _every(
        self, feeds: dict[str, Array], axes: Mapping[str, int], count: int
    ) -> tuple[dict[str, Array], Array, int]:
        """Samples repeated for each of their classes, and the classes."""
        (classes,) = self._lengths(feeds)
        if classes is None:
            raise InputError("target='all': the number of classes is open in this model; list them")
        found = {k: np.repeat(v, classes, axes[k]) if k in axes else v for k, v in feeds.items()}
        return found, np.tile(np.arange(classes), count), count * classes

    def _lengths(self, feeds: Mapping[str, Array]) -> tuple[int | None, ...]:
        """How many classes each class axis has, None where that is not known."""
        given = {self.explained.across[name]: len(feeds[name]) for name in self._shared}
        return tuple(given.get(axis, length) for axis, length in enumerate(self.explained.classes))

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _feeds(self, inputs: Inputs) -> dict[str, Array]:
        if isinstance(inputs, _Checked):
            return dict(inputs)
        session = self.session
        inputs = self._encoded(inputs)
        if not isinstance(inputs, Mapping):
            if len(session.inputs) != 1:
                raise InputError(
                    f"the model has {len(session.inputs)} inputs: give a dict with {', '.join(session.inputs)}"
                )
            inputs = {next(iter(session.inputs)): inputs}
        known = {**session.inputs, **session.optional}
        for name in inputs:
            masked = name in (f"mask/{tensor}" for tensor in self.explained.masks)
            chosen = name in ("target", "against") and name not in session.inputs
            if chosen or masked or name not in known:
                hint = (
                    f"give classes as {name}="
                    if chosen
                    else "give masks as masks="
                    if masked
                    else f"inputs are {', '.join(n for n in known if n not in ('target', 'against'))}"
                )
                raise InputError(f"the model has no input '{name}'; {hint}")
        absent = [n for n in session.inputs if n not in inputs]
        if absent:
            raise InputError(f"input '{absent[0]}' is missing; the model needs {', '.join(session.inputs)}")
        batch = self._batch if isinstance(self._batch, int) else None
        return {name: session.checked(name, array, batch) for name, array in inputs.items()}

    def _encoded(self, inputs: Inputs) -> Inputs:
        """Texts as token ids; other inputs as they are."""
        session = self.session
        specs = session.specs()
        groups = {g.ids: g for g in text_inputs(kinds(specs))}
        if (texts := _texts(inputs)) is not None:
            return self._reader().feeds(texts, specs)
        if not isinstance(inputs, Mapping):
            only_text = all(role_of(name, *kind) for name, kind in kinds(specs).items())
            if len(specs) == 1 or len(groups) != 1 or not only_text:
                return inputs
            inputs = {next(iter(groups)): inputs}
        found: dict[str, Any] = {}
        for name, value in inputs.items():
            if (texts := _texts(value)) is None:
                found[name] = value
            elif name in groups:
                found |= self._reader().feeds(texts, {n: specs[n] for n in groups[name].names()})
            else:
                raise InputError(f"input '{name}' takes no text; texts go to {', '.join(groups) or 'no input'}")
        return filled(found, specs, None if self.tokenizer is None else self.tokenizer.pad) | found

    def _reader(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("text needs a tokenizer: Explainer(..., tokenizer='tokenizer.json'); or give token ids")
        return self.tokenizer

    def _numbers(self, target: Any) -> Any:
        """Tokens that are named by their text as numbers."""
        if isinstance(target, str):
            return self._reader().number(target)
        if not isinstance(target, list | tuple) or not any(isinstance(t, str) for t in target):
            return target
        return [self._reader().number(t) if isinstance(t, str) else t for t in target]

    def _positions(self, position: Position, feeds: Mapping[str, Array]) -> tuple[Array, Array]:
        """Which sample and which position each explanation is of."""
        classes = self.explained.classes
        if len(classes) != 2:
            what = f"classes on {len(classes)} axes" if len(classes) > 1 else "one axis of classes"
            raise InputError(f"position= is for outputs (N, positions, classes); this model's output has {what}")
        rows = token_rows(feeds, self.tokenizer)
        if rows is None:
            raise InputError("position= is for models of token ids; give target=(position, class)")
        return find_positions(position, rows)

    def _at(self, places: Array, target: Targets) -> Array:
        """Targets (P, 2): a position and a class each, -1 for the highest."""
        classes = np.asarray(-1 if target is None else target)
        if classes.dtype.kind not in "iu" or classes.ndim > 1 or classes.size not in (1, len(places)):
            raise InputError(f"with position=, target is one class, or one per position ({len(places)})")
        return np.stack([places, np.broadcast_to(classes.reshape(-1), places.shape)], axis=1)

    def _others(self, against: Targets, count: int) -> Array:
        """Classes to subtract, int64 (count,)."""
        if "against" not in self.session.optional:
            raise InputError("the model subtracts no class; rewrite it with against=True")
        given, last = np.asarray(against), self.explained.classes[-1]
        if given.dtype.kind not in "iu" or given.ndim > 1 or given.size not in (1, count):
            raise InputError(f"against wants one class for all or one per sample ({count}), got {against!r}")
        bad = [int(c) for c in given.reshape(-1) if c < -1 or (last is not None and c >= last)]
        if bad:
            raise InputError(f"against: class {bad[0]} is out of range (-1: the highest of the others)")
        return np.broadcast_to(given.reshape(-1), (count,)).astype(np.int64)

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
            if name == self._lead or not shape or name in self._shared:
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
        # What a method takes besides (a baseline, bounds) is one for all, or has a row per sample; weights are whole.
        free = [n for n, i in self.session.optional.items() if i.shape and not isinstance(i.shape[0], int)]
        axes |= {n: 0 for n in free if n in feeds and len(feeds[n]) == count > 1}
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
        if self._is_apart(name):
            return None
        shape = self.session.shapes[name]
        if isinstance(self._batch, str) and self._batch in shape:
            return shape.index(self._batch)
        return next((axis for axis, length in enumerate(array.shape) if length == samples), None)

    def _is_apart(self, name: str) -> bool:
        """Whether the rows of an output are those of an input that all samples share."""
        shape = self.session.shapes[name]
        return bool(shape) and shape[0] in self._apart and self._batch not in shape

    def _targets(self, target: Targets, count: int, classes: tuple[int | None, ...]) -> Array | None:
        """Classes as int64 (count,) or (count, k), each checked against its range."""
        if target is None:
            return None
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


def _texts(inputs: Any) -> list[Text] | None:
    """Texts where these are some: a string, a pair of strings, or a list of such; None for anything else."""
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(t, str) for t in inputs):
        return [inputs]
    if isinstance(inputs, list) and inputs and all(isinstance(t, str | tuple) for t in inputs):
        first = [t if isinstance(t, str) else t[0] if t else None for t in inputs]
        return inputs if all(isinstance(t, str) for t in first) else None
    return None


def _warn_of_nan(score: Array, name: str) -> None:
    """Say when it is the model itself that gives no number, for then neither does the explanation."""
    bad = np.flatnonzero(np.isnan(score))
    if len(bad):
        _LOG.warning(
            "the model's own '%s' is NaN for %d of %d samples (the first is sample %d): perhaps 0 / 0, since torch's "
            "newer exporter takes sums with tiny constants such as + 1e-8 away unless optimize=False",
            name,
            len(bad),
            len(score),
            bad[0],
        )
