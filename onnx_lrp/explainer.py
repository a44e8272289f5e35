"""Explainer: rewrite once, run many."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.explanation import Explanation
from onnx_lrp.masks import mask_array
from onnx_lrp.methods import Method
from onnx_lrp.model import ModelLike
from onnx_lrp.positions import Position, find_positions
from onnx_lrp.rewrite import Explained, rewrite, rewrite_with_accounts
from onnx_lrp.roles import filled, kinds, role_of, text_inputs
from onnx_lrp.runtime import CPU, Array, Device, Session
from onnx_lrp.stream import ahead, gathered
from onnx_lrp.tokenizer import Text, Tokenizer, TokenizerLike, as_tokenizer
from onnx_lrp.tokens import token_rows

Inputs = Any  # an array, or a mapping of input names to arrays
Targets = int | str | Sequence[Any] | Array | None

_LOG = logging.getLogger("onnx_lrp")

# On a CPU larger batches gain no time and cost memory; on a GPU they pay.
_CHUNK_CPU, _CHUNK_GPU = 4, 32
# Of several classes per sample a run takes more rows: they are walked from one after the other.
_ROWS = 8


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
        batch_size: samples per run; default: 4 on a CPU, 32 on a GPU, or where samples have an input in common. Of
            several classes per sample, a run takes up to eight times as many rows.
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
        self._load = functools.partial(
            Session,
            device=device,
            providers=providers,
            threads=threads,
            folder=self.explained.source.folder,
            source=self.explained.source,
        )
        self.session = self._load(self.explained.bare, cuda_graph=cuda_graph)
        self._again = functools.partial(
            rewrite_with_accounts,
            self.explained.source,
            method,
            accounts="total" if options.get("ledger") else "none",
            **{k: v for k, v in options.items() if k not in ("ledger", "shapes", "multi_target")},
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
                token as text. Several classes of every sample, which share one forward pass: an array (N, K), or (1, K)
                for all samples alike; for outputs (N, C) also "all", and "top:5" for the five highest of each. Then
                there are N·K rows, those of the first sample first. Where the classes are samples of another input (a
                similarity of N captions and B images), that input is common to all rows; if its relevance is asked
                for, too, inputs are pairs instead, as many of the one as of the other, and there is no target.
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
        each, least = 1, -1  # how many classes a sample has, and the least number of one
        lengths = self._lengths(feeds)
        several = None if position is not None else self._several(target, count, lengths)
        if several is not None:
            each, target = several.shape[1], several.reshape(-1, *several.shape[2:])
            least = -(lengths[0] or each) if len(lengths) == 1 and self.explained.sharing else -1
        target = self._numbers(target)
        if position is not None:
            which, places = self._positions(position, feeds)
            if count == 1:
                each = len(which)
            else:
                feeds, count = {k: np.take(v, which, axes[k]) if k in axes else v for k, v in feeds.items()}, len(which)
            target = self._at(places, target)
        # What is fed with a row for every class of every sample, those of the first sample first.
        rows: dict[str, Array] = {}
        if masks:
            rows, each = self._conditions(masks, count, each)
        wanted = self._targets(target, count * each, lengths, least)
        if wanted is not None:
            rows["target"] = wanted
        if against is not None:
            rows["against"] = self._others(self._numbers(against), count * each)
        per_sample = each
        if each > 1 and not self.explained.sharing:
            _LOG.info("every sample is repeated for each of its classes: here they cannot share a forward pass")
            feeds = {k: np.repeat(v, each, axes[k]) if k in axes else v for k, v in feeds.items()}
            count, each = count * each, 1
        ranked = wanted is not None and bool((wanted < -1).any())
        joined = self._run(feeds, axes, rows, count, each, ranked=ranked)
        _warn_of_nan(joined["score"], self.explained.explained)
        return Explanation(
            {name: joined[name] for name in self._own},
            {tensor: joined[name] for tensor, name in self.explained.relevance.items()},
            joined["target_used"],
            joined["score"].reshape(-1),
            joined.get("absorbed"),
            {k: np.repeat(v, each, axes[k]) if k in axes else v for k, v in feeds.items() if k in self.session.inputs},
            self.explained.method,
            joined.get("delta"),
            self.tokenizer,
            joined.get("against_used"),
            tuple(n for n in self.session.inputs if n not in axes) + tuple(n for n in self._own if self._is_apart(n)),
            {tensor: joined[name] for tensor, name in self.explained.values.items()},
            per_sample,
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

    @functools.cached_property
    def _many(self) -> tuple[Explained, Session]:
        """The model that takes several classes of a sample, loaded when these are first asked for."""
        if self.explained.rows:
            return self.explained, self.session
        explained = self._again(multi_target=True)
        return explained, self._load(explained.bare)

    def _run(
        self,
        feeds: Mapping[str, Array],
        axes: Mapping[str, int],
        rows: Mapping[str, Array],
        count: int,
        each: int,
        *,
        ranked: bool,
    ) -> dict[str, Array]:
        """Outputs by name, for so many samples with so many classes each: all have a row for every class.

        Samples run in chunks, and so do their classes where these are many: what a run holds is bounded.
        """
        explained, session = self._many if each > 1 or ranked else (self.explained, self.session)
        step, most = self.chunk or count, each
        if each > 1:
            limit = _ROWS * self.batch_size
            most = min(each, max(1, limit // (step if self.fixed else 1)))
            step = step if self.fixed else max(1, min(step, limit // most))
        pieces = []
        for begin in range(0, count, step):
            end = min(count, begin + step)
            # A fixed batch runs full: the last sample is repeated, and its copies are dropped.
            samples = np.minimum(np.arange(begin, begin + step if self.fixed else end), count - 1)
            whole = len(samples) == count and end == count
            part = {k: np.take(v, samples, axes[k]) if k in axes and not whole else v for k, v in feeds.items()}
            runs = []
            for first in range(0, each, most):
                chosen = (samples[:, None] * each + np.arange(first, min(first + most, each))).reshape(-1)
                runs.append(session.run(part | {k: v[chosen] for k, v in rows.items()}))
            pieces.append((end - begin, len(samples), runs))
        return self._join(pieces, explained.rows, each)

    def _several(self, target: Any, count: int, lengths: tuple[int | None, ...]) -> Array | None:
        """Classes (N, K), or (N, K, k) for k class axes, where several of each sample are asked for; else None."""
        if isinstance(target, str):
            top = re.fullmatch(r"top:(\d+)", target)
            if len(lengths) > 1 or not (top or target == "all"):
                return None  # a token
            numbers = self._highest(int(top[1]), lengths[0]) if top else _every(lengths[0])
            return np.tile(numbers, (count, 1))
        try:
            given = np.asarray(target)
        except ValueError:  # ragged, which is said where all classes are checked
            return None
        if given.dtype.kind not in "iu" or not given.size or given.ndim != (2 if len(lengths) == 1 else 3):
            return None
        if len(given) not in (1, count):
            raise InputError(
                f"target lists classes of {len(given)} samples, and there are {count}; give (1, K), the same K classes "
                f"for all, or ({count}, K)"
            )
        return np.broadcast_to(given, (count, *given.shape[1:]))

    def _highest(self, number: int, classes: int | None) -> Array:
        """The classes that score highest, as the explained model numbers them: from -1 down."""
        if not self.explained.sharing:
            raise InputError(
                f"target='top:{number}': this model takes one class per sample, so cannot rank them; list classes"
            )
        if not 0 < number <= (classes or number):
            raise InputError(f"target='top:{number}': the output has {classes} classes; give 1 to {classes}")
        return -1 - np.arange(number)

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

    def _conditions(self, masks: Mapping[str, Any], count: int, each: int) -> tuple[dict[str, Array], int]:
        """Masks with a row for every row of relevance, and how many rows a sample has.

        A single sample has one for each of several conditions.
        """
        unknown = [name for name in masks if name not in self.explained.masks]
        if unknown:
            known = ", ".join(self.explained.masks) or "none; rewrite it with masks=[tensor]"
            raise InputError(f"the model has no masks at '{unknown[0]}'; it has {known}")
        found, rows = {}, {}
        for name, given in masks.items():
            channels = self.session.optional[f"mask/{name}"].shape[1]
            found[name] = mask_array(name, given, channels if isinstance(channels, int) else None)
        most = max(len(r) for r in found.values())
        if count * each == 1 and most > 1 and self._lead:
            each = most
        for name, array in found.items():
            if len(array) == count < count * each:
                array = np.repeat(array, each, 0)
            if len(array) not in (1, count * each):
                raise InputError(
                    f"masks of '{name}': {len(array)} conditions for {count * each} samples; give one, or one each"
                )
            mask = np.broadcast_to(array, (count * each, array.shape[1]))
            rows[f"mask/{name}"] = self.session.checked(f"mask/{name}", mask)
        return rows, each

    def _join(
        self, pieces: Sequence[tuple[int, int, Sequence[dict[str, Array]]]], rows: Mapping[str, int], each: int
    ) -> dict[str, Array]:
        """The outputs of all runs, one after the other.

        Args:
            pieces: samples wanted, samples run, and the outputs of their runs, each with some of their classes.
            rows: the outputs that have a row for every class, and on which axis; others get one.
            each: classes of a sample.
        """
        kept, samples, (first, *_) = pieces[0]
        if len(pieces) == 1 and kept == samples and each == 1:
            return first
        joined = {}
        for name, array in first.items():
            axis = rows[name] if name in rows else self._output_axis(name, array, samples)
            if axis is None:
                joined[name] = array
                continue
            parts = []
            for wanted, ran, runs in pieces:
                found = [run[name] for run in runs] if name in rows else [runs[0][name]]
                apart = [r.reshape(*r.shape[:axis], ran, r.shape[axis] // ran, *r.shape[axis + 1 :]) for r in found]
                part = apart[0] if len(apart) == 1 else np.concatenate(apart, axis + 1)
                part = np.take(part, range(wanted), axis) if wanted < ran else part
                part = part if name in rows else np.repeat(part, each, axis + 1)
                parts.append(part.reshape(*part.shape[:axis], wanted * each, *part.shape[axis + 2 :]))
            joined[name] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
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

    def _targets(self, target: Targets, count: int, classes: tuple[int | None, ...], least: int) -> Array | None:
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
            bad = [int(t) for t in table[:, axis] if t < least or (length is not None and t >= length)]
            if bad:
                known = "" if length is None else f": the output has {length} classes, 0 to {length - 1} (-1: arg max)"
                raise InputError(f"class {bad[0]} is out of range{known}")
        result = table.astype(np.int64)
        return result[:, 0].copy() if width == 1 else result


def _every(classes: int | None) -> Array:
    """All classes in their order."""
    if classes is None:
        raise InputError("target='all': the number of classes is open in this model; list them")
    return np.arange(classes)


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
