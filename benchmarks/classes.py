"""Several classes of one picture in one run, which share a forward pass, against a row for each.

    python -m benchmarks.classes                    # ResNet-50, epsilon_plus

Times are medians; the ways take turns in one process. Rows of their own run one by one, which is fastest on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

import onnx_lrp
from exporters.torch_nets import export, resnet50, vgg16
from onnx_lrp.runtime import Session

NETWORKS = {"resnet50": resnet50, "vgg16": vgg16}


def table(network: str, method: str, counts: Sequence[int], size: int, threads: int, rounds: int) -> list[str]:
    """Lines of a table in Markdown."""
    torch.manual_seed(0)
    source = export(NETWORKS[network](), None, (1, 3, size, size), folded=True)
    (name,) = (i.name for i in source.graph.input)
    x = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    forward = Session(source, device="cpu", threads=threads)
    plain, many = (
        Session(onnx_lrp.rewrite(source, method, multi_target=several).model, device="cpu", threads=threads)
        for several in (False, True)
    )

    def row_by_row(count: int) -> None:
        for number in range(count):
            plain.run({name: x, "target": np.array([number])})

    ways: dict[tuple[str, int], Callable[[], object]] = {("forward", 1): lambda: forward.run({name: x})}
    for count in counts:
        ways["rows", count] = lambda count=count: row_by_row(count)  # type: ignore[misc]
        ways["shared", count] = lambda count=count: many.run({name: x, "target": np.arange(count)})  # type: ignore[misc]
    times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first one warms up
                times[way].append(time.perf_counter() - begin)
    ms = {way: 1e3 * statistics.median(found) for way, found in times.items()}
    once = ms["forward", 1]
    lines = [
        "| classes | one row each: × forward | shared: × forward | shared per class | times faster |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in counts:
        rows, shared = ms["rows", count] / once, ms["shared", count] / once
        lines.append(f"| {count} | {rows:.1f} | {shared:.1f} | {shared / count:.2f} | {rows / shared:.2f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet50")
    parser.add_argument("--method", default="epsilon_plus")
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--size", type=int, default=224, help="height and width of the picture")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    print("\n".join(table(args.network, args.method, args.classes, args.size, args.threads, args.rounds)))


if __name__ == "__main__":
    main()
