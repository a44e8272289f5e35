"""Inputs read and explained in batches, in order and in constant memory: what commands over many files share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.cli.options import Names, class_number, feeds_of, numbers, picture_input, wanted_inputs
from onnx_lrp.cli.output import Result
from onnx_lrp.cli.sources import Entry, is_picture
from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer
from onnx_lrp.explanation import Explanation
from onnx_lrp.positions import Position
from onnx_lrp.preprocess import Preprocess
from onnx_lrp.roles import Spec, kinds, text_inputs
from onnx_lrp.tokenizer import Tokenizer

Target = int | list[int] | NDArray[np.int64] | None


@dataclass(frozen=True)
class Column:
    """One way to explain an input: by a method, a class, at a position, against another class.

    `conserves`: its relevance should add up to the score. `fed`: what goes into the explained model besides. `number`:
    which of the classes (n, K) in `target` it shows, where columns share a run; n is 1 or one for each input.
    """

    title: str
    explainer: Explainer
    target: Target
    conserves: bool
    position: Position | None = None
    against: int | None = None
    fed: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    number: int | None = None


@dataclass(frozen=True)
class Sample:
    """One input as read: its place among the inputs, its arrays, and what to show of it."""

    number: int
    entry: Entry
    feeds: dict[str, NDArray[Any]]
    picture: NDArray[np.uint8] | None

    def runs_with(self, other: Sample, *, padded: bool) -> bool:
        """Whether the two can be run as one batch: single pictures or texts of the same shape, or padded to it."""
        texts = self.entry.text is not None and other.entry.text is not None
        if texts and padded and self.picture is None:
            return True
        pictures = self.picture is not None and other.picture is not None
        same = self.feeds.keys() == other.feeds.keys()
        return (texts or pictures) and same and all(v.shape == other.feeds[k].shape for k, v in self.feeds.items())


def wanted_target(text: str, names: Names, files: int, width: int) -> Target:
    """One class, one per input file, or one index per class axis; None for the arg max."""
    try:
        number = class_number(text, names)
    except InputError:
        if "," not in text:
            raise
    else:
        return None if number == -1 else number
    classes = [class_number(part, names) for part in text.split(",")]
    if width == 1 and files > 1 and len(classes) != files:
        raise InputError(f"--target names {len(classes)} classes for {files} inputs; give one, or one each")
    return classes


def together(targets: Sequence[Target], files: int) -> NDArray[np.int64] | None:
    """Several classes of one axis as (1, K), or (files, K) where some are of one input each; else None."""
    rows = [np.reshape(-1 if t is None else t, -1) for t in targets]
    if len(rows) < 2 or any(len(r) not in (1, files) for r in rows):
        return None
    return np.stack(np.broadcast_arrays(*rows), axis=1).astype(np.int64)


def bounds(args: argparse.Namespace, pre: Preprocess | None, explainer: Explainer) -> dict[str, NDArray[Any]]:
    """The box of the z-box rule, for a model that asks for it: as given, else what black and white pixels become."""
    found: dict[str, NDArray[Any]] = {}
    for name, pixel in zip(("low", "high"), pre.bounds() if pre else (None, None), strict=True):
        text = getattr(args, name)
        if name not in explainer.session.optional:
            if text is not None:
                method = explainer.explained.method
                raise InputError(f"--{name} is for rule books with the z-box rule, which {method} has not")
            continue
        rank = len(explainer.session.optional[name].shape)
        if text is not None:
            found[name] = numbers(name, text, (1,) * rank if pixel is None else pixel.shape)
        elif pixel is not None:
            found[name] = pixel
    return found


def results(
    args: argparse.Namespace, entries: Sequence[Entry], pre: Preprocess | None, columns: Sequence[Column]
) -> Iterator[Result]:
    """Results in the order of the inputs; pictures and texts run in batches, files of arrays one by one."""
    explainer = columns[0].explainer
    inputs = wanted_inputs(explainer.explained.source)
    limit = max(1, min(column.explainer.chunk for column in columns))
    if any(isinstance(c.position, list) or c.position == "all" for c in columns):
        limit = 1  # several explanations of an input are a batch by themselves
    # Padding changes nothing where a mask says that it is none of the text.
    padded = all(group.mask is not None for group in text_inputs(kinds(inputs)))
    batch: list[Sample] = []
    for number, entry in enumerate(entries):
        sample = _read(number, entry, pre, inputs, explainer.tokenizer)
        if batch and (len(batch) == limit or not sample.runs_with(batch[0], padded=padded)):
            yield from _run(args, batch, len(entries), pre, columns, inputs)
            batch = []
        batch.append(sample)
    yield from _run(args, batch, len(entries), pre, columns, inputs)


def _read(
    number: int, entry: Entry, pre: Preprocess | None, inputs: Mapping[str, Spec], tokenizer: Tokenizer | None
) -> Sample:
    if entry.text is not None and tokenizer is not None:
        try:
            feeds = tokenizer.feeds([entry.text], inputs)
        except InputError as error:
            raise InputError(f"{entry.name}: {error}") from None
        if not is_picture(entry):
            return Sample(number, entry, feeds, None)
        item, seen = feeds_of(entry.file, pre, {name: inputs[name] for name in [picture_input(inputs)]})
        return Sample(number, entry, feeds | seen, item.picture)
    item, feeds = feeds_of(entry.file, pre, inputs)
    return Sample(number, entry, feeds, item.picture)


def _run(
    args: argparse.Namespace,
    batch: Sequence[Sample],
    files: int,
    pre: Preprocess | None,
    columns: Sequence[Column],
    inputs: Mapping[str, Spec],
) -> Iterator[Result]:
    """Explain files together, and take the explanation apart again."""
    first, several = batch[0], len(batch) > 1
    texts = [sample.entry.text for sample in batch if sample.entry.text is not None]
    tokenizer = columns[0].explainer.tokenizer
    if texts and several and tokenizer is not None and first.picture is None:
        feeds = tokenizer.feeds(texts, inputs)
    else:
        feeds = {k: np.concatenate([s.feeds[k] for s in batch]) if several else v for k, v in first.feeds.items()}
    explanations: list[Explanation] = []
    shared: dict[tuple[int, int], Explanation] = {}
    for column in columns:
        key = id(column.explainer), id(column.target)
        if column.number is not None and key in shared:
            explanations.append(shared[key][column.number :: shared[key].per_sample])
            continue
        box = bounds(args, None if first.picture is None else pre, column.explainer)
        target = column.target
        one_axis = len(column.explainer.explained.classes) == 1 or column.position is not None
        if isinstance(target, list) and files > 1 and one_axis:
            target = [target[sample.number] for sample in batch]
        if isinstance(target, np.ndarray) and len(target) > 1:
            target = target[[sample.number for sample in batch]]
        try:
            fed = {**box, **column.fed, **feeds}
            explained = column.explainer(fed, target, position=column.position, against=column.against)
        except InputError as error:
            raise InputError(f"{first.entry.name}: {error}") from None
        if column.number is not None:
            shared[key], explained = explained, explained[column.number :: explained.per_sample]
        explanations.append(explained)
    for i, sample in enumerate(batch):
        yield Result(sample.entry, sample.picture, [e[i] if several else e for e in explanations])
