"""Several classes of one input in one run, which share a forward pass, against a row of its own for each.

    python -m benchmarks.classes                    # ResNet-50, epsilon_plus

Rows of their own run one by one, which is fastest on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import onnx_lrp
from benchmarks.measure import Call, command, described, medians, publish
from benchmarks.networks import NETWORKS, Sizes, network
from onnx_lrp.runtime import Session

PACKAGES = ("onnxruntime", "onnx", "torch", "numpy")


def table(name: str, method: str, counts: Sequence[int], sizes: Sizes, threads: int, rounds: int) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    net = network(name, 1, sizes)
    source, feeds = net.write(), {key: x.numpy() for key, x in net.feeds.items()}
    plain, many = (onnx_lrp.rewrite(source, method, multi_target=several).model for several in (False, True))
    forward, alone, together = (Session(model, device="cpu", threads=threads) for model in (source, plain, many))

    def row_by_row(count: int) -> None:
        for number in range(count):
            alone.run(feeds | {"target": np.array([number])})

    calls: dict[str, Call] = {"forward": lambda: forward.run(feeds)}
    for count in counts:
        calls[f"rows {count}"] = lambda count=count: row_by_row(count)
        calls[f"shared {count}"] = lambda count=count: together.run(feeds | {"target": np.arange(count)})
    ms = medians(calls, rounds)
    yield "| classes | one row each: × forward | shared: × forward | shared, per class | times faster |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for count in counts:
        rows, shared = (ms[f"{way} {count}"] / ms["forward"] for way in ("rows", "shared"))
        yield f"| {count} | {rows:.1f} | {shared:.1f} | {shared / count:.2f} | {rows / shared:.2f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet50")
    parser.add_argument("--method", default="epsilon_plus")
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--picture", type=int, default=224, help="height and width of pictures")
    parser.add_argument("--shrink", type=int, default=1, help="by what channels and classes are divided")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="the page that the table stands in")
    args = parser.parse_args(given)

    def lines() -> Iterator[str]:
        yield described(PACKAGES, args.threads)
        yield f"{args.network} under {args.method}, one input. Medians of {args.rounds}. {command('classes', given)}"
        yield ""
        sizes = Sizes(picture=args.picture, shrink=args.shrink)
        yield from table(args.network, args.method, args.classes, sizes, args.threads, args.rounds)

    publish(lines(), args.write, "classes")


if __name__ == "__main__":
    main()
