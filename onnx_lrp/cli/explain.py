"""The command ``explain``: files in, heat maps out, and what can be said about each in a few lines."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.cli.console import Progress, say
from onnx_lrp.cli.options import (
    Commands,
    add_pixels,
    add_rewriting,
    add_running,
    class_names,
    class_number,
    command,
    count,
    feeds_of,
    has_pictures,
    numbers,
    preprocessing,
    rewriting,
    wanted_inputs,
)
from onnx_lrp.cli.output import Result, plan
from onnx_lrp.cli.report import Report
from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer, Explanation
from onnx_lrp.inputs import find_inputs
from onnx_lrp.methods import find_method
from onnx_lrp.preprocess import Preprocess

_LOG = logging.getLogger("onnx_lrp")

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


def register(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the command."""
    parser = command(commands, "explain", run, "explain predictions: heat maps as PNG, or arrays as NPZ")
    add_rewriting(parser, several_methods=True)
    parser.add_argument("sources", metavar="INPUT", nargs="+", help="images, folders of images, .npy, .npz, .json")
    wanted = "number or name of the class, default the predicted one; A,B,...: one per input; repeat it to compare"
    parser.add_argument("-t", "--target", action="append", metavar="CLASS", help=wanted)
    parser.add_argument("-o", "--out", metavar="OUT", help="a .png (one figure), a folder/ (a .png each), or a .npz")
    parser.add_argument("--labels", metavar="FILE", help="class names: one per line, or JSON; default: the model's")
    parser.add_argument("--top", type=count, default=3, metavar="N", help="classes of the prediction; default 3")
    parser.add_argument("--colormap", default="diverging", help="such as diverging, purplegreen, bwr, hot")
    parser.add_argument("--low", help="least value of the inputs, for the z-box rule; pictures know theirs")
    parser.add_argument("--high", help="greatest value likewise")
    parser.add_argument("--no-ledger", action="store_true", help="do not account for what biases and stabilizers take")
    add_running(parser)
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="samples per run; default 4 on a CPU, 32 on a GPU"
    )
    add_pixels(parser)
    return [parser]


def run(args: argparse.Namespace) -> int:
    """Explain all inputs."""
    paths = find_inputs(args.sources)
    methods = args.method or ["epsilon_plus_flat"]
    out = plan(args.out, Path(args.model), paths, methods, args.colormap)
    explainers = [_explainer(args, method) for method in methods]
    explained, source = explainers[0][0].explained, explainers[0][0].explained.source
    names = class_names(args.labels, source, explained.classes[-1])
    pre, origin = preprocessing(args, source) if has_pictures(paths) else (None, "")
    columns = _columns(args.target, explainers, names, len(paths))
    # "tabby, tabby cat": the first of several names is enough to read.
    out.labels = None if names is None else [name.split(",")[0] for name in names]
    out.titles = [column.title for column in columns]
    report, conserves = Report(explained, out.labels, args.top), [column.conserves for column in columns]
    if not args.quiet:
        pixels = "arrays as they are" if pre is None else f"pictures as {pre} ({origin})"
        say(f"{args.model} on {', '.join(explainers[0][0].providers)}; {pixels}")
    progress, done = Progress(len(paths), quiet=args.quiet), 0
    try:
        for result in _results(args, paths, pre, columns):
            _say_if_even(result)
            written = out.add(result)
            done += 1
            progress.clear()
            if not args.quiet:
                say("", str(result.path), *report.lines(result.explanations, conserves), *_written(written))
            progress.show(done, result.path.name)
        progress.clear()
        written = out.finish()
        if not args.quiet:
            say(*([""] if written and len(paths) > 1 else []), *_written(written))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(out.interrupted(done, len(paths))) from None
    finally:
        progress.clear()
        out.tidy()
    return 0


def _written(path: Path | None) -> list[str]:
    return [] if path is None else [f"  written     {path}"]


def _say_if_even(result: Result) -> None:
    """Say when a map says nothing: a flat rule on a dense layer gives every feature the same share."""
    for explanation in result.explanations:
        for name, relevance in explanation.relevance.items():
            spread, size = np.ptp(relevance[0]), np.abs(relevance[0]).max()
            if name in explanation.inputs and relevance[0].size > 1 and size > 0 and spread <= 1e-6 * size:
                _LOG.warning("%s gives all of '%s' the same relevance; try -m epsilon", explanation.method, name)


# ---- what is asked for -------------------------------------------------------------------------------------------


def _explainer(args: argparse.Namespace, name: str) -> tuple[Explainer, bool]:
    """The explainer of a method, and whether its relevance should add up to the score."""
    method = find_method(name)
    conserves = (args.start or method.start) != "one"
    options = {**rewriting(args), "ledger": conserves and not args.no_ledger}
    running = {"device": args.device, "threads": args.threads, "batch_size": args.batch_size}
    return Explainer(args.model, method, **running, **options), conserves


def _columns(
    asked: Sequence[str] | None,
    explainers: Sequence[tuple[Explainer, bool]],
    names: Sequence[str] | None,
    files: int,
) -> list[Column]:
    """Every method with every class asked for."""
    width = len(explainers[0][0].explained.classes)
    targets = {text: _target(text, names, files, width) for text in asked} if asked else {"": None}
    columns = []
    for explainer, conserves in explainers:
        for text, target in targets.items():
            method = explainer.explained.method if len(explainers) > 1 or len(targets) == 1 else ""
            title = ", ".join(filter(None, [method, text if len(targets) > 1 else ""]))
            columns.append(Column(title, explainer, target, conserves))
    return columns


def _target(text: str, names: Sequence[str] | None, files: int, width: int) -> Target:
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


def _bounds(args: argparse.Namespace, pre: Preprocess | None, explainer: Explainer) -> dict[str, NDArray[Any]]:
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


# ---- running -----------------------------------------------------------------------------------------------------


def _results(
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
        bounds = _bounds(args, None if first.picture is None else pre, column.explainer)
        target = column.target
        if isinstance(target, list) and files > 1 and len(column.explainer.explained.classes) == 1:
            target = [target[sample.number] for sample in batch]
        try:
            explanations.append(column.explainer({**bounds, **feeds}, target))
        except InputError as error:
            raise InputError(f"{first.path}: {error}") from None
    for i, sample in enumerate(batch):
        yield Result(sample.path, sample.picture, [e[i] if len(batch) > 1 else e for e in explanations])
