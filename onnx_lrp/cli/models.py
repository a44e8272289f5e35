"""Commands about a model: rewrite, check, verify."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from onnx_lrp.cli.console import say
from onnx_lrp.cli.options import (
    Commands,
    add_masks,
    add_pixels,
    add_rewriting,
    add_running,
    command,
    feeds_of,
    has_pictures,
    masking,
    preprocessing,
    rewriting,
    wanted_inputs,
)
from onnx_lrp.errors import InputError, UnsupportedOps
from onnx_lrp.inputs import find_inputs
from onnx_lrp.model import bytes_on_disk, load
from onnx_lrp.rewrite import Explained, rewrite
from onnx_lrp.runtime import Device


def register(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the commands."""
    parser = command(commands, "rewrite", run_rewrite, "write a model that predicts and explains in one run")
    add_rewriting(parser)
    parser.add_argument("out", metavar="OUT", nargs="?", help="default: MODEL with suffix .lrp.onnx")
    parser.add_argument(
        "--target",
        default="input",
        help="input (a graph input; default), argmax, or a class: 3, or 3,7 for several axes",
    )
    about = "add an input 'against': a class whose score is subtracted; default: the highest of the others"
    parser.add_argument("--against", action="store_true", help=about)
    parser.add_argument("--portable", action="store_true", help="emit nothing that WebGPU, OpenVINO or TensorRT lacks")
    parser.add_argument("--switch", action="store_true", help="add an input 'explain'; false skips the explanation")
    add_masks(parser)
    parser.add_argument(
        "--ledger", action="store_true", help="add the output 'absorbed': what biases and stabilizers took"
    )
    check = command(commands, "check", run_check, "print which rule each node takes, and what is not supported")
    add_rewriting(check)
    add_masks(check)
    check.add_argument("--portable", action="store_true", help="as for rewrite")
    check.add_argument("--json", action="store_true", help="print JSON")
    verify = command(commands, "verify", run_verify, "check outputs, relevance and conservation on one sample")
    add_rewriting(verify)
    verify.add_argument("sample", metavar="INPUT", nargs="?", help="an image, .npy, .npz or .json; default: noise")
    verify.add_argument("--portable", action="store_true", help="as for rewrite")
    verify.add_argument("--json", action="store_true", help="print JSON")
    add_running(verify)
    add_pixels(verify)
    return [parser, check, verify]


def run_rewrite(args: argparse.Namespace) -> int:
    """Write the explained model and say what it has."""
    source = Path(args.model)
    out = Path(args.out) if args.out else source.with_suffix(".lrp.onnx")
    if out.is_dir():
        raise InputError(f"{out}: a folder; name a file to write, such as {out / (source.stem + '.lrp.onnx')}")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out}: this is the model itself, which stays as it is; name another file")
    target = args.target if args.target in ("input", "argmax") else _indices(args.target)
    explained = rewrite(
        source,
        args.method,
        target=target,
        against=args.against,
        ledger=args.ledger,
        portable=args.portable,
        switch=args.switch,
        **masking(args),
        **rewriting(args),
    )
    explained.save(out)
    if not args.quiet:
        say(*_summary(explained, source, out))
    return 0


def _indices(text: str) -> int | list[int]:
    try:
        indices = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--target is input, argmax or a class number, not {text!r}") from None
    return indices[0] if len(indices) == 1 else indices


def _summary(explained: Explained, source: Path, out: Path) -> list[str]:
    """What was written, in a few lines."""
    before, after = explained.source.skeleton.graph, explained.model.graph
    weights = {t.name for t in after.initializer}
    old = {i.name for i in before.input}
    inputs = [_signature(i) + (" (optional)" if i.name in weights else "") for i in after.input if i.name not in old]
    outputs = [_signature(o) for o in after.output[len(before.output) :]]
    small, large = bytes_on_disk(source), bytes_on_disk(out)
    return [
        f"written  {out}",
        f"method   {explained.method}, explaining {explained.explained}",
        *_listed("inputs", inputs),
        *_listed("outputs", outputs),
        f"nodes    {len(before.node)} + {len(after.node) - len(before.node)}",
        f"size     {_bytes(small)} -> {_bytes(large)} (x {large / small:.2f})",
    ]


def _listed(title: str, items: Sequence[str]) -> list[str]:
    return [f"{title if i == 0 else '':<8} + {item}" for i, item in enumerate(items)]


def _signature(info: onnx.ValueInfoProto) -> str:
    tensor = info.type.tensor_type
    dims = ", ".join(d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim)
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"{info.name}: {kind} [{dims}]"


def _bytes(number: int) -> str:
    power = min(int(math.log(max(number, 1), 1000)), 3)
    return f"{number / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def run_check(args: argparse.Namespace) -> int:
    """Print the rule table, or all that is not supported; nothing runs."""
    try:
        explained = rewrite(args.model, args.method, portable=args.portable, **masking(args), **rewriting(args))
    except UnsupportedOps as error:
        if not args.json:
            raise
        if not args.quiet:
            say(
                json.dumps(
                    {"ok": False, "model": args.model, "unsupported": [n.__dict__ for n in error.nodes]}, indent=1
                )
            )
        return 1
    if args.quiet:
        return 0
    if args.json:
        about: dict[str, Any] = {"ok": True, "model": args.model, "method": explained.method}
        about |= {"explained": explained.explained, "classes": explained.classes, "relevance": explained.relevance}
        say(json.dumps(about | {"nodes": [row.__dict__ for row in explained.table], "unsupported": []}, indent=1))
        return 0
    kinds = f"{len(explained.table)} nodes between {', '.join(explained.relevance)} and {explained.explained}"
    say(str(explained.table), "", f"{kinds}: all have a rule of {explained.method}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check an explained model on one sample."""
    from onnx_lrp.verify import verify

    inputs = None
    if args.sample is not None:
        path, *more = find_inputs([args.sample])
        if more:
            raise InputError(f"{args.sample}: verify takes one input, this folder holds {len(more) + 1}")
        inputs = _sample(args, path)
    options = {**rewriting(args), "portable": args.portable}
    options["reported"] = options.pop("inputs", None)
    device: Device = "cpu" if args.device == "auto" else args.device
    result = verify(args.model, inputs, args.method, device=device, threads=args.threads, **options)
    if not args.quiet:
        say(json.dumps(result.to_json(), indent=1) if args.json else str(result))
    return 0 if result.ok else 1


def _sample(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """One file as arrays by input name."""
    source = load(args.model)
    pre = preprocessing(args, source)[0] if has_pictures([path]) else None
    return feeds_of(path, pre, wanted_inputs(source))[1]
