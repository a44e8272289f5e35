"""The command ``explain``: files or texts in, pictures out, and what can be said about each in a few lines."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_lrp.cli.baselines import add_baselines, baseline_feeds, with_baselines
from onnx_lrp.cli.batches import Column, Target, results, together, wanted_target
from onnx_lrp.cli.console import Progress, say
from onnx_lrp.cli.options import (
    Commands,
    Names,
    add_maps,
    add_pixels,
    add_rewriting,
    add_running,
    add_text,
    class_names,
    class_number,
    command,
    count,
    preprocessing,
    rewriting,
    tokenizer_of,
)
from onnx_lrp.cli.output import Result, plans
from onnx_lrp.cli.report import Report
from onnx_lrp.cli.sources import find_entries, is_picture, with_text
from onnx_lrp.composite import book_names
from onnx_lrp.errors import InputError
from onnx_lrp.evaluate import gaussian, randomised
from onnx_lrp.explainer import Explainer
from onnx_lrp.methods import Method, find_method
from onnx_lrp.rewrite import Explained
from onnx_lrp.show.terminal import depth_of
from onnx_lrp.tokenizer import Tokenizer

_LOG = logging.getLogger("onnx_lrp")


def register(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the command."""
    parser = command(commands, "explain", run, "explain predictions: heat maps, coloured texts, or arrays")
    add_rewriting(parser, several_methods=True)
    inputs = "images, folders of images, .npy, .npz, .json; with a tokenizer texts, and .txt with one per line"
    parser.add_argument("sources", metavar="INPUT", nargs="+", help=inputs)
    wanted = "number or name of the class, default the predicted one; A,B,...: one per input; repeat it to compare; "
    wanted += "top:N: the N highest; all"
    parser.add_argument("-t", "--target", action="append", metavar="CLASS", help=wanted)
    about = "subtract this class's score (next: the highest of the others): why the one rather than the other"
    parser.add_argument("--against", metavar="CLASS", help=about)
    written = "a .png (one figure), a .html (texts on one page), a folder/ (a file each), or a .npz; may be repeated"
    parser.add_argument("-o", "--out", action="append", metavar="OUT", help=written)
    parser.add_argument("--labels", metavar="FILE", help="class names: one per line, or JSON; default: the model's")
    parser.add_argument("--top", type=count, default=3, metavar="N", help="classes of the prediction; default 3")
    add_maps(parser)
    about = "of one picture, show relevance as a mask over it instead of an overlay"
    parser.add_argument("--masked", action="store_true", help=about)
    add_baselines(parser)
    about = "explain a copy of the model with random weights, as a control: a map that stays shows the picture alone"
    parser.add_argument("--randomise", "--randomize", type=int, nargs="?", const=0, metavar="SEED", help=about)
    parser.add_argument("--no-ledger", action="store_true", help="do not account for what biases and stabilizers take")
    add_running(parser, batches=True)
    add_text(parser)
    add_pixels(parser)
    return [parser]


def run(args: argparse.Namespace) -> int:
    """Explain all inputs."""
    tokenizer = tokenizer_of(args)
    entries = find_entries(args.sources, texts=tokenizer is not None)
    if args.text is not None:
        entries = with_text(entries, args.text, tokenizer)
    names_of_methods = args.method or ["epsilon_plus_flat"]
    outs = plans(args.out, Path(args.model), entries, names_of_methods, args.colormap, texts=tokenizer is not None)
    methods = with_baselines([find_method(name) for name in names_of_methods], args.baseline)
    explainers = [_explainer(args, method, tokenizer) for method in methods]
    explained, source = explainers[0][0].explained, explainers[0][0].explained.source
    names: Names = class_names(args.labels, source, explained.classes[-1])
    if names is None and tokenizer is not None and tokenizer.names(explained.classes[-1]):
        names = tokenizer
    pre, origin = preprocessing(args, source) if any(map(is_picture, entries)) else (None, "")
    columns = _columns(args, explainers, names, len(entries), tokenizer)
    # Maps of channels are in the colours of the picture, whatever the order of the model's channels.
    blue_first = args.colormap == "rgb" and pre is not None and pre.color == "BGR"
    colormap = "bgr" if blue_first else args.colormap
    # "tabby, tabby cat": the first of several names is enough to read.
    labels = names.labels if isinstance(names, Tokenizer) else names and [name.split(",")[0] for name in names]
    for out in outs:
        out.labels, out.titles, out.mask = labels, [column.title for column in columns], args.masked
        out.colormap = colormap
    conserves = [column.conserves for column in columns]
    report, depth = Report(explained, labels, args.top, words=args.words), depth_of(sys.stdout)
    if not args.quiet:
        read = "arrays as they are" if pre is None else f"pictures as {pre} ({origin})"
        read = f"texts by {tokenizer.name}" if tokenizer is not None and pre is None else read
        what = args.model if args.randomise is None else f"{args.model} with random weights (seed {args.randomise})"
        say(f"{what} on {', '.join(explainers[0][0].providers)}; {read}")
        _say_if_made_for_others([explainer.explained for explainer, _ in explainers])
    progress, done = Progress(len(entries), quiet=args.quiet), 0
    try:
        for result in results(args, entries, pre, columns):
            _say_if_even(result)
            name, said = result.entry.name, result.explanations
            is_text = tokenizer is not None or any(out.kind == "page" for out in outs)
            rows = report.rows(name, said) if is_text else []
            written = [out.add(result, rows) for out in outs]
            done += 1
            progress.clear()
            if not args.quiet:
                say("", name, *report.lines(said, conserves, rows, depth), *_written(written))
            progress.show(done, name)
        progress.clear()
        written = [out.finish() for out in outs]
        if not args.quiet:
            say(*([""] if any(written) and len(entries) > 1 else []), *_written(written))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(outs[0].interrupted(done, len(entries))) from None
    finally:
        progress.clear()
        for out in outs:
            out.tidy()
    return 0


def _written(paths: Sequence[Path | None]) -> list[str]:
    return [f"  written     {path}" for path in paths if path is not None]


_SIDE_BY_SIDE = 16  # classes in one picture
_FOR_ATTENTION = ("attnlrp", "cp_lrp", "captioning")


def _say_if_made_for_others(found: Sequence[Explained]) -> None:
    """Say which rule book to take, when a model has attention and no book is asked for that was made for it."""
    methods = {explained.method for explained in found}
    attention = any("attention: " in row.why for explained in found for row in explained.table)
    if attention and methods & set(book_names()) and methods.isdisjoint(_FOR_ATTENTION):
        say("the model has attention, for which the rule book attnlrp was made: -m attnlrp")


def _say_if_even(result: Result) -> None:
    """Say when a map says nothing: a flat rule on a dense layer gives every feature the same share."""
    for explanation in result.explanations:
        for name, relevance in explanation.relevance.items():
            if name not in explanation.inputs or relevance[0].size < 2:
                continue
            spread, size = np.ptp(relevance[0]), np.abs(relevance[0]).max()
            if size > 0 and spread <= 1e-6 * size:
                _LOG.warning("%s gives all of '%s' the same relevance; try -m epsilon", explanation.method, name)


# ---- what is asked for -------------------------------------------------------------------------------------------


def _explainer(args: argparse.Namespace, method: Method, tokenizer: Tokenizer | None) -> tuple[Explainer, bool]:
    """The explainer of a method, and whether its relevance should add up to the score."""
    conserves = (args.start or method.start) != "one"
    options = {**rewriting(args), "ledger": conserves and not args.no_ledger, "against": args.against is not None}
    running = {"device": args.device, "threads": args.threads, "batch_size": args.batch_size}
    model = args.model if args.randomise is None else randomised(args.model, seed=args.randomise, draw=gaussian)
    return Explainer(model, method, tokenizer=tokenizer, **running, **options), conserves


def _columns(
    args: argparse.Namespace,
    explainers: Sequence[tuple[Explainer, bool]],
    names: Names,
    inputs: int,
    tokenizer: Tokenizer | None,
) -> list[Column]:
    """Every method with every class asked for."""
    asked, position = args.target, args.position
    width = len(explainers[0][0].explained.classes)
    if position is None and width == 2 and isinstance(names, Tokenizer):
        position = "auto"  # of a language model: the hidden word, or the next one
    width = 1 if position is not None else width
    targets: dict[str, Target] = {} if asked else {"": None}
    for text in asked or ():
        several = None if width > 1 or position is not None else _several(text, names, explainers[0][0].explained)
        targets |= several or {text: wanted_target(text, names, inputs, width)}
    against = None if args.against in (None, "next") else class_number(args.against, names)
    columns = []
    for explainer, conserves in explainers:
        fed = baseline_feeds(args.baseline, explainer, tokenizer)
        # Classes of an input share a run.
        shared = width == 1 and position is None and explainer.explained.sharing
        table = together(list(targets.values()), inputs) if shared else None
        for number, (text, target) in enumerate(targets.items()):
            method = explainer.explained.method if len(explainers) > 1 or len(targets) == 1 else ""
            title = ", ".join(filter(None, [method, text if len(targets) > 1 else ""]))
            column = Column(title, explainer, target, conserves, position, against, fed)
            columns.append(column if table is None else replace(column, target=table, number=number))
    return columns


def _several(text: str, names: Names, explained: Explained) -> dict[str, Target] | None:
    """The classes that `all` or `top:N` stands for, by what their columns are called; None for anything else.

    Raises:
        InputError: there are not as many, or more than can be shown side by side.
    """
    top = re.fullmatch(r"top:(\d+)", text)
    if not top and text != "all":
        return None
    (classes,) = explained.classes
    count = int(top[1]) if top else classes or 0
    if not 0 < count <= (classes or count):
        raise InputError(f"-t {text}: the model has {classes or 'an open number of'} classes; name them")
    if count > _SIDE_BY_SIDE:
        raise InputError(f"-t {text}: at most {_SIDE_BY_SIDE} classes fit side by side; give top:{_SIDE_BY_SIDE}")
    if top and count > 1 and not explained.sharing:
        raise InputError(f"-t {text}: this model takes one class per sample, so cannot rank them; name classes")
    if top:
        return {f"top {i + 1}": -1 - i for i in range(count)}
    labels = names if isinstance(names, Sequence) else None
    return {labels[i].split(",")[0] if labels else str(i): i for i in range(count)}
