"""The command ``evaluate``: methods measured alike on the same inputs, as a table and a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp import evaluate, show
from onnx_lrp.cli.batches import wanted_target
from onnx_lrp.cli.console import say
from onnx_lrp.cli.options import (
    Commands,
    add_pixels,
    add_range,
    add_rewriting,
    add_running,
    add_text,
    class_names,
    command,
    count,
    feeds_of,
    numbers,
    preprocessing,
    rewriting,
    tokenizer_of,
    wanted_inputs,
)
from onnx_lrp.cli.output import check_writing
from onnx_lrp.cli.sources import Entry, find_entries, is_picture
from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer
from onnx_lrp.explanation import save_text
from onnx_lrp.positions import Position
from onnx_lrp.preprocess import Preprocess
from onnx_lrp.roles import kinds, text_inputs
from onnx_lrp.tokenizer import Tokenizer

Feeds = dict[str, NDArray[Any]]


def register(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the command."""
    about = "measure methods: delete what they call relevant and watch the score, randomise the weights"
    parser = command(commands, "evaluate", run, about)
    add_rewriting(parser, several_methods=True)
    inputs = "images, folders of images, .npy, .npz, .json, all of one shape; with a tokenizer texts"
    parser.add_argument("sources", metavar="INPUT", nargs="+", help=inputs)
    wanted = "number or name of the class, default the predicted one; A,B,...: one per input"
    parser.add_argument("-t", "--target", metavar="CLASS", help=wanted)
    about = "a .png (the curves) or .json (all numbers); may be repeated; default: the table alone"
    parser.add_argument("-o", "--out", action="append", default=[], metavar="OUT", help=about)
    parser.add_argument("--labels", metavar="FILE", help="class names: one per line, or JSON; default: the model's")
    about = "of pictures, squares of this side are deleted; default: about a fourteenth of the side"
    parser.add_argument("--patch", type=count, metavar="PIXELS", help=about)
    about = "what takes the place of what is deleted; default: a picture's mean colour, else 0"
    parser.add_argument("--fill", type=float, metavar="VALUE", help=about)
    parser.add_argument("--steps", type=count, default=10, metavar="N", help="of the curves; default 10")
    parser.add_argument("--no-randomise", action="store_true", help="do not explain the model with random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and the random order")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_range(parser)
    add_running(parser, batches=True)
    add_text(parser)
    add_pixels(parser)
    return [parser]


def run(args: argparse.Namespace) -> int:
    """Measure all methods on all inputs."""
    outs = [Path(out) for out in args.out]
    tokenizer = tokenizer_of(args)
    entries = find_entries(args.sources, texts=tokenizer is not None)
    for out in outs:
        if out.suffix not in (".png", ".json"):
            raise InputError(f"{out}: an evaluation is written as .png or .json; choose one of these suffixes")
        check_writing(out, [out], [*(e.path for e in entries if e.path is not None), Path(args.model)])
    methods = args.method or ["epsilon_plus_flat", "epsilon", "input_x_gradient"]
    first = Explainer(args.model, methods[0], tokenizer=tokenizer, device=args.device, **rewriting(args))
    source, classes = first.explained.source, first.explained.classes
    pre, _ = preprocessing(args, source) if any(map(is_picture, entries)) else (None, "")
    feeds = _feeds(entries, pre, first, tokenizer)
    width = len(next(iter(feeds.values())))
    names = class_names(args.labels, source, classes[-1]) if classes else None
    target = None if args.target is None else wanted_target(args.target, names, width, 1)
    verdicts = evaluate.compare(
        args.model,
        methods,
        feeds,
        _features(args, first, feeds, pre, tokenizer),
        target=None if target is None else np.broadcast_to(target, (width,)),
        parameters=_range(args, pre),
        steps=args.steps,
        randomise=not args.no_randomise,
        seed=args.seed,
        device=args.device,
        threads=args.threads,
        batch_size=args.batch_size,
        position=args.position or ("auto" if len(classes) == 2 and tokenizer is not None else None),
        **rewriting(args),
    )
    found = {"model": args.model, "inputs": width, "methods": [_numbers(v) for v in verdicts]}
    if not args.quiet:
        say(*([json.dumps(found, indent=1)] if args.json else _table(verdicts, width)))
    for out in outs:
        if out.suffix == ".json":
            save_text(out, json.dumps(found, indent=1) + "\n")
        else:
            show.save(_plot(verdicts, width), out)
        if not args.quiet and not args.json:
            say(f"written  {out}")
    return 0


# ---- what is measured ------------------------------------------------------------------------------------------------


def _feeds(entries: Sequence[Entry], pre: Preprocess | None, first: Explainer, tokenizer: Tokenizer | None) -> Feeds:
    """All inputs as one batch."""
    inputs = wanted_inputs(first.explained.source)
    texts = [entry.text for entry in entries if entry.text is not None]
    if texts and tokenizer is not None:
        if len(texts) < len(entries):
            raise InputError("texts and files are measured apart; give one kind")
        return tokenizer.feeds(texts, inputs)
    parts = [feeds_of(entry.file, pre, inputs)[1] for entry in entries]
    for entry, part in zip(entries, parts, strict=True):
        for name, array in part.items():
            if name not in parts[0] or array.shape[1:] != parts[0][name].shape[1:]:
                what = f"'{name}' has another shape than that of the first input"
                raise InputError(f"{entry.name}: {what}; give inputs of one shape, or --size for pictures")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _features(
    args: argparse.Namespace, first: Explainer, feeds: Feeds, pre: Preprocess | None, tokenizer: Tokenizer | None
) -> evaluate.Features:
    """What is deleted: squares of a picture, tokens of a text, or single numbers."""
    groups = text_inputs(kinds(wanted_inputs(first.explained.source)))
    if groups and groups[0].ids in first.explained.relevance:
        return _tokens(first, feeds, groups[0].ids, groups[0].mask, tokenizer)
    name = next((n for n in first.explained.relevance if n in feeds), "")
    if not name:
        raise InputError("no relevance of an input is reported; leave --input out, or name an input of the model")
    x = feeds[name]
    if pre is not None or x.ndim == 4:
        last = pre.layout == "NHWC" if pre is not None else x.shape[1] > x.shape[3]
        return evaluate.squares(name, x, args.patch, args.fill, channels=3 if last else 1)
    return evaluate.singles(name, 0.0 if args.fill is None else args.fill)


def _tokens(
    first: Explainer, feeds: Feeds, ids: str, mask: str | None, tokenizer: Tokenizer | None
) -> evaluate.Features:
    """The tokens of the text itself: hidden by the mask where there is one, else replaced by the unknown token."""
    position: Position | None = "last" if len(first.explained.classes) == 2 else None
    tokens = first(feeds, position=position).tokens(tokenizer)
    allowed = np.stack([t.content for t in tokens])
    if mask is not None:
        return evaluate.Features(ids, np.asarray, evaluate.hidden_tokens(mask), allowed)
    blank = None if tokenizer is None else tokenizer.mask if tokenizer.unknown is None else tokenizer.unknown
    if blank is None:
        what = (
            "the model has no attention mask, so deleted tokens become the tokenizer's unknown token, and there is none"
        )
        raise InputError(f"{what}; give --tokenizer FILE, or use onnx_lrp.evaluate.compare")
    return evaluate.Features(ids, np.asarray, evaluate.replaced_tokens(ids, blank), allowed)


def _range(args: argparse.Namespace, pre: Preprocess | None) -> Feeds:
    """The box of the z-box rule, as given, else what black and white pixels become."""
    found: Feeds = {}
    for name, pixel in zip(("low", "high"), pre.bounds() if pre else (None, None), strict=True):
        text = getattr(args, name)
        if text is not None:
            found[name] = numbers(name, text, (1,) if pixel is None else pixel.shape)
        elif pixel is not None:
            found[name] = pixel
    return found


# ---- saying and writing ----------------------------------------------------------------------------------------------


def _numbers(verdict: evaluate.Verdict) -> dict[str, Any]:
    """All numbers of a method, for JSON."""
    found: dict[str, Any] = {"method": verdict.method, "share": verdict.deletion.share.tolist()}
    for name in ("deletion", "insertion"):
        line: evaluate.Curve = getattr(verdict, name)
        found[name] = {"area": line.area().tolist(), "scores": line.scores.mean(0).tolist()}
    arrays: Mapping[str, Any] = {
        "faithfulness": verdict.faithfulness,
        "completeness": verdict.completeness,
        "similarity": verdict.similarity,
    }
    return found | {name: None if a is None else a.tolist() for name, a in arrays.items()}


def _table(verdicts: Sequence[evaluate.Verdict], count: int) -> list[str]:
    """A line per method, and what the columns mean."""
    wide = max(len(v.method) for v in verdicts)
    titles = ("deletion", "insertion", "faithfulness", "missing", "random weights")
    lines = [f"{'method':<{wide}}  " + "  ".join(f"{t:>14}" for t in titles)]
    for v in verdicts:
        error = v.faithfulness.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
        faith = f"{v.faithfulness.mean():.3g}" + (f" ± {error:.2g}" if count > 1 else "")
        cells = [f"{v.deletion.area().mean():.4g}", f"{v.insertion.area().mean():.4g}", faith]
        cells.append("" if v.completeness is None else f"{np.median(v.completeness):.1%}")
        cells.append("" if v.similarity is None else f"{v.similarity.mean():+.2f}")
        lines.append(f"{v.method:<{wide}}  " + "  ".join(f"{c:>14}" for c in cells).rstrip())
    return [
        *lines,
        "",
        f"means over {count} input(s) of the explained score. deletion: the most relevant first, low is good;",
        "insertion: they come back first, high is good; faithfulness: the area between deleting the least and the most",
        "relevant first; missing: of the score, by biases and stabilizers or steps (median); random weights: rank",
        "correlation with the map of the same model with random weights, near 0 is good",
    ]


def _plot(verdicts: Sequence[evaluate.Verdict], count: int) -> Any:
    """Both curves, one above the other."""
    figures = []
    for name, title, axis in (
        ("deletion", "Deleting the most relevant first: low is good", "share deleted"),
        ("insertion", "Bringing the most relevant back first: high is good", "share brought back"),
    ):
        lines: dict[str, evaluate.Curve] = {v.method: getattr(v, name) for v in verdicts}
        means = {method: line.scores.mean(0) for method, line in lines.items()}
        notes = {method: f"area {line.area().mean():.4g}" for method, line in lines.items()}
        places = verdicts[0].deletion.share
        heading = f"{title} (score, mean of {count})" if count > 1 else f"{title} (score)"
        figures.append(show.curves(means, places, heading, axis, dashed=evaluate.CHANCE, notes=notes, height=320))
    return show.stack(figures)
