"""Inputs read and explained in batches, in order and in constant memory: what commands over many files share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.cli.options import class_number, feeds_of, numbers, wanted_inputs
from onnx_lrp.cli.output import Result
from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer
from onnx_lrp.explanation import Explanation
from onnx_lrp.preprocess import Preprocess

Target = int | list[int] | None


@dataclass(frozen=True)
class Column:
    """One way to explain an input: by a method, a class; and whether its relevance should add up to the score."""

    title: str
    explainer: Explainer
    target: Target
    conserves: bool


@dataclass(frozen=True)
class Sample:
    """One input file as read: its place among the inputs, its arrays, and what to show of it."""

    number: int
    path: Path
    feeds: dict[str, NDArray[Any]]
    picture: NDArray[np.uint8] | None

    def runs_with(self, other: Sample) -> bool:
        """Whether the two can be run as one batch: single pictures of the same shape."""
        pictures = self.picture is not None and other.picture is not None
        return pictures and all(v.shape == other.feeds[k].shape for k, v in self.feeds.items())


def wanted_target(text: str, names: Sequence[str] | None, files: int, width: int) -> Target:
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
    args: argparse.Namespace, paths: Sequence[Path], pre: Preprocess | None, columns: Sequence[Column]
) -> Iterator[Result]:
    """Results in the order of the inputs; pictures run in batches, files of arrays one by one."""
    inputs = wanted_inputs(columns[0].explainer.explained.source)
    limit = max(1, min(column.explainer.chunk for column in columns))
    batch: list[Sample] = []
    for number, path in enumerate(paths):
        item, feeds = feeds_of(path, pre, inputs)
        sample = Sample(number, path, feeds, item.picture)
        if batch and (len(batch) == limit or not sample.runs_with(batch[0])):
            yield from _run(args, batch, len(paths), pre, columns)
            batch = []
        batch.append(sample)
    yield from _run(args, batch, len(paths), pre, columns)


def _run(
    args: argparse.Namespace, batch: Sequence[Sample], files: int, pre: Preprocess | None, columns: Sequence[Column]
) -> Iterator[Result]:
    """Explain files together, and take the explanation apart again."""
    first = batch[0]
    feeds = {k: np.concatenate([s.feeds[k] for s in batch]) if len(batch) > 1 else v for k, v in first.feeds.items()}
    explanations: list[Explanation] = []
    for column in columns:
        box = bounds(args, None if first.picture is None else pre, column.explainer)
        target = column.target
        if isinstance(target, list) and files > 1 and len(column.explainer.explained.classes) == 1:
            target = [target[sample.number] for sample in batch]
        try:
            explanations.append(column.explainer({**box, **feeds}, target))
        except InputError as error:
            raise InputError(f"{first.path}: {error}") from None
    for i, sample in enumerate(batch):
        yield Result(sample.path, sample.picture, [e[i] if len(batch) > 1 else e for e in explanations])
