"""The command ``benchmark``: what explanations of a model cost, beside its forward pass."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from onnx_lrp.cli.console import say
from onnx_lrp.cli.options import Commands, add_rewriting, add_running, command, count, rewriting
from onnx_lrp.cli.output import check_writing
from onnx_lrp.explanation import save_text


def register(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the command."""
    about = "measure forward pass and explanation in turns: time, memory, bytes, and which provider runs which nodes"
    parser = command(commands, "benchmark", run, about)
    add_rewriting(parser, several_methods=True)
    group = add_running(parser)
    about = "samples per call; may be repeated; default 1, or the model's fixed batch"
    group.add_argument("--batch-size", type=count, action="append", metavar="N", help=about)
    group.add_argument("--rounds", type=count, default=5, metavar="N", help="turns of each, of which the median counts")
    group.add_argument("--no-memory", action="store_true", help="start no processes to measure memory in")
    parser.add_argument("--json", metavar="FILE", help="write all figures there, too")
    return [parser]


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table."""
    from onnx_lrp.measure import benchmark

    path = None if args.json is None else Path(args.json)
    if path is not None:
        check_writing(path, [path], [Path(args.model)])
    found = benchmark(
        args.model,
        args.method or ["epsilon_plus_flat"],
        batch_sizes=args.batch_size,
        device=args.device,
        threads=args.threads,
        rounds=args.rounds,
        memory=not args.no_memory,
        **rewriting(args),
    )
    if path is not None:
        save_text(path, json.dumps(found.to_json(), indent=1) + "\n")
    if not args.quiet:
        say(str(found))
    return 0
