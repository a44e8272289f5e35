"""The command ``explain``: files in, heat maps out, and what can be said about each in a few lines."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnx_lrp.cli.batches import Column, results, wanted_target
from onnx_lrp.cli.console import Progress, say
from onnx_lrp.cli.options import (
    Commands,
    add_maps,
    add_pixels,
    add_rewriting,
    add_running,
    class_names,
    command,
    count,
    has_pictures,
    preprocessing,
    rewriting,
)
from onnx_lrp.cli.output import Result, plan
from onnx_lrp.cli.report import Report
from onnx_lrp.explainer import Explainer
from onnx_lrp.inputs import find_inputs
from onnx_lrp.methods import find_method

_LOG = logging.getLogger("onnx_lrp")


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
    add_maps(parser)
    parser.add_argument("--no-ledger", action="store_true", help="do not account for what biases and stabilizers take")
    add_running(parser, batches=True)
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
        for result in results(args, paths, pre, columns):
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
    targets = {text: wanted_target(text, names, files, width) for text in asked} if asked else {"": None}
    columns = []
    for explainer, conserves in explainers:
        for text, target in targets.items():
            method = explainer.explained.method if len(explainers) > 1 or len(targets) == 1 else ""
            title = ", ".join(filter(None, [method, text if len(targets) > 1 else ""]))
            columns.append(Column(title, explainer, target, conserves))
    return columns
