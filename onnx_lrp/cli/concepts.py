"""The command ``concepts``: which inputs a channel of a layer is most relevant in, and where in them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.cli.batches import Column, bounds, results, wanted_target
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
    feeds_of,
    has_pictures,
    keep_parallel,
    preprocessing,
    rewriting,
    wanted_inputs,
)
from onnx_lrp.cli.output import check_writing
from onnx_lrp.cli.sources import file_entries
from onnx_lrp.concepts import Concepts, Hit
from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer
from onnx_lrp.explanation import save_arrays
from onnx_lrp.inputs import find_inputs
from onnx_lrp.model import write_atomically
from onnx_lrp.preprocess import Preprocess, require_pillow
from onnx_lrp.show import COLORMAPS, ConceptCell, ConceptRow, concept_sheet, picture_of, save

_FIRST = 6  # channels to show where none are named


@dataclass(frozen=True)
class Sample:
    """Where a sample of the data set comes from: a file, and its place there."""

    path: Path
    index: int
    several: bool

    def __str__(self) -> str:
        return f"{self.path}[{self.index}]" if self.several else str(self.path)


@dataclass(frozen=True, eq=False)
class Found:
    """The conditional relevance of one sample's input, and what to show of it."""

    picture: NDArray[np.uint8] | None
    relevance: NDArray[Any]


def register(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the command."""
    about = "find the inputs in which the channels of a layer are most relevant, and where"
    parser = command(commands, "concepts", run, about)
    add_rewriting(parser, layers=False)
    parser.add_argument("sources", metavar="INPUT", nargs="+", help="images, folders of images, .npy, .npz, .json")
    parser.add_argument("--layer", required=True, metavar="TENSOR", help="the tensor whose channels are looked at")
    parser.add_argument("--axis", type=int, default=1, help="on which axis its channels lie; default 1")
    shown = f"numbers such as 3,12,40; default: the {_FIRST} that stand out most in their best inputs"
    parser.add_argument("--channels", metavar="LIST", help=shown)
    parser.add_argument("--top", type=count, default=6, metavar="K", help="inputs per channel; default 6")
    parser.add_argument("--by", choices=("sum", "max"), default="sum", help="over the places of a channel; default sum")
    parser.add_argument(
        "-t", "--target", metavar="CLASS", help="number or name of the class; default: the predicted one"
    )
    out = "a .png (sheet of pictures), .json or .npz (all channels); may be repeated; default: the table alone"
    parser.add_argument("-o", "--out", action="append", default=[], metavar="OUT", help=out)
    parser.add_argument("--whole", action="store_true", help="show whole pictures instead of the part that counts")
    parser.add_argument("--labels", metavar="FILE", help="class names: one per line, or JSON; default: the model's")
    add_maps(parser)
    keep_parallel(parser)
    add_running(parser, batches=True)
    add_pixels(parser)
    return [parser]


def run(args: argparse.Namespace) -> int:
    """Rank all inputs for every channel, then look at the best ones again, channel by channel."""
    paths = find_inputs(args.sources)
    outs = _outs(args, paths)
    explainer = _explainer(args)
    source, classes = explainer.explained.source, explainer.explained.classes
    pre, origin = preprocessing(args, source) if has_pictures(paths) else (None, "")
    names = class_names(args.labels, source, classes[-1])
    target = None if args.target is None else wanted_target(args.target, names, 1, len(classes))
    if not args.quiet:
        pixels = "arrays as they are" if pre is None else f"pictures as {pre} ({origin})"
        say(f"{args.model} on {', '.join(explainer.providers)}; {pixels}")
    concepts, samples = Concepts(args.top), []
    for sample, relevance in _relevance(args, paths, pre, Column("", explainer, target, False)):
        samples.append(sample)
        concepts.add(relevance)
    channels = concepts.chosen(_numbers(args.channels), args.layer) or concepts.leading(_FIRST)
    hits = {channel: concepts.hits(channel) for channel in channels}
    if not args.quiet:
        say(*_table(args, concepts, hits, samples))
    found: dict[tuple[int, int], Found] = {}
    if any(out.suffix != ".json" for out in outs):
        found = dict(_conditional(args, explainer, hits, samples, pre, target))
    for out in outs:
        _write(args, out, concepts, hits, samples, found)
        if not args.quiet:
            say(f"written  {out}")
    return 0


def _explainer(args: argparse.Namespace) -> Explainer:
    """One for both passes; a model without its inputs reported would have other rules, so they are, in both."""
    options: dict[str, Any] = {**rewriting(args), "layers": [args.layer], "masks": {args.layer: args.axis}}
    running = {"device": args.device, "threads": args.threads, "batch_size": args.batch_size}
    return Explainer(args.model, args.method, exclude_parallel=not args.keep_parallel, **running, **options)


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"--channels {text!r} is no list of numbers such as 3,12,40") from None


def _outs(args: argparse.Namespace, paths: Sequence[Path]) -> list[Path]:
    """What to write, checked before the work."""
    outs = [Path(out) for out in args.out]
    for out in outs:
        if out.suffix not in (".png", ".json", ".npz"):
            raise InputError(f"{out}: concepts are written as .png, .json or .npz; choose one of these suffixes")
        check_writing(out, [out], [*paths, Path(args.model)])
    if args.colormap not in COLORMAPS:
        raise InputError(f"--colormap {args.colormap} is unknown; give one of {', '.join(COLORMAPS)}")
    if any(out.suffix == ".png" for out in outs):
        require_pillow()
    return outs


# ---- running -----------------------------------------------------------------------------------------------------


def _relevance(
    args: argparse.Namespace, paths: Sequence[Path], pre: Preprocess | None, column: Column
) -> Iterator[tuple[Sample, NDArray[np.float64]]]:
    """Every sample of the data set and the relevance of all channels in it, (1, C), in shares of the sample's."""
    progress = Progress(len(paths), quiet=args.quiet)
    try:
        for done, result in enumerate(results(args, file_entries(paths), pre, [column]), 1):
            (explanation,) = result.explanations
            shares = explanation.channels(args.layer, axis=args.axis, by=args.by, share=True)
            for index, row in enumerate(shares):
                yield Sample(result.entry.file, index, len(shares) > 1), row[None]
            progress.show(done, result.entry.file.name)
    finally:
        progress.clear()


def _conditional(
    args: argparse.Namespace,
    explainer: Explainer,
    hits: Mapping[int, Sequence[Hit]],
    samples: Sequence[Sample],
    pre: Preprocess | None,
    target: Any,
) -> Iterator[tuple[tuple[int, int], Found]]:
    """The relevance of each best sample's input under each channel that it is best for: (channel, sample) -> that."""
    inputs = wanted_inputs(explainer.explained.source)
    wanted: dict[int, list[int]] = {}
    for channel, best in hits.items():
        for hit in best:
            wanted.setdefault(hit.sample, []).append(channel)
    progress = Progress(len(wanted), quiet=args.quiet)
    name = next(iter(explainer.explained.relevance))
    try:
        for done, (number, channels) in enumerate(sorted(wanted.items()), 1):
            sample = samples[number]
            item, feeds = feeds_of(sample.path, pre, inputs)
            if sample.several:
                feeds = {k: v[sample.index : sample.index + 1] if k in inputs else v for k, v in feeds.items()}
            box = bounds(args, None if item.picture is None else pre, explainer)
            explanation = explainer({**box, **feeds}, target, masks={args.layer: channels})
            picture = picture_of(explanation, name) if item.picture is None else item.picture
            for channel, relevance in zip(channels, explanation.relevance[name], strict=True):
                yield (channel, number), Found(picture, relevance)
            progress.show(done, sample.path.name)
    finally:
        progress.clear()


# ---- saying and writing ------------------------------------------------------------------------------------------


def _table(
    args: argparse.Namespace, concepts: Concepts, hits: Mapping[int, Sequence[Hit]], samples: Sequence[Sample]
) -> list[str]:
    """Channels with their mean share and best samples."""
    lines = [
        f"{concepts.count} inputs, {len(concepts.mean)} channels of {args.layer}; shares of the relevance there",
        "",
    ]
    lines.append(f"{'channel':>7}  {'mean':>7}  most relevant in")
    for channel, best in hits.items():
        what = (
            ", ".join(f"{_short(samples[hit.sample])} {hit.relevance:.1%}" for hit in best) or "none: it speaks against"
        )
        lines.append(f"{channel:>7}  {concepts.mean[channel]:>7.1%}  {what}")
    return lines


def _short(sample: Sample) -> str:
    return sample.path.stem + (f"[{sample.index}]" if sample.several else "")


def _write(
    args: argparse.Namespace,
    out: Path,
    concepts: Concepts,
    hits: Mapping[int, Sequence[Hit]],
    samples: Sequence[Sample],
    found: Mapping[tuple[int, int], Found],
) -> None:
    """One file."""
    if out.suffix == ".png":
        _sheet(args, out, concepts, hits, samples, found)
        return
    every = {channel: concepts.hits(channel) for channel in range(len(concepts.mean))}
    if out.suffix == ".json":
        rows = [
            {
                "channel": channel,
                "mean": float(concepts.mean[channel]),
                "inputs": [{"input": str(samples[hit.sample]), "relevance": hit.relevance} for hit in best],
            }
            for channel, best in every.items()
        ]
        about = {
            "model": args.model,
            "method": args.method,
            "layer": args.layer,
            "by": args.by,
            "count": concepts.count,
        }
        write_atomically(out, (json.dumps(about | {"channels": rows}, indent=1) + "\n").encode())
        return
    arrays = {"mean": concepts.mean, "relevance": np.zeros((len(every), args.top))}
    arrays["input"] = np.full(arrays["relevance"].shape, "", f"U{max(len(str(s)) for s in samples)}")
    for channel, best in every.items():
        for rank, hit in enumerate(best):
            arrays["relevance"][channel, rank], arrays["input"][channel, rank] = hit.relevance, str(samples[hit.sample])
    for channel, shown in hits.items():
        arrays |= {f"map/{channel}/{rank}": found[channel, hit.sample].relevance for rank, hit in enumerate(shown)}
    save_arrays(out, arrays)


def _sheet(
    args: argparse.Namespace,
    out: Path,
    concepts: Concepts,
    hits: Mapping[int, Sequence[Hit]],
    samples: Sequence[Sample],
    found: Mapping[tuple[int, int], Found],
) -> None:
    rows = []
    for channel, best in hits.items():
        cells = []
        for hit in best:
            item = found[channel, hit.sample]
            if item.picture is None:
                raise InputError(
                    f"{out}: a sheet shows pictures, and {samples[hit.sample]} is none; write .json or .npz"
                )
            cells.append(
                ConceptCell(item.picture, item.relevance, f"{hit.relevance:.1%} {_short(samples[hit.sample])}")
            )
        if cells:
            rows.append(
                ConceptRow(f"channel {channel}: {concepts.mean[channel]:.1%} of the relevance on average", cells)
            )
    heading = f"{args.layer}: where its channels are most relevant"
    save(concept_sheet(rows, heading, args.colormap, crop=not args.whole), out)
