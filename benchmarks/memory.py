"""Where memory goes: bytes of tensors that are alive at once, counted; and the peak of a process, measured.

    python -m benchmarks.memory                                     # ResNet-50, batch 1 and 8
    python -m benchmarks.memory --onnx MODEL --method attnlrp       # a file whose only input is a float tensor

Counted is the same on every machine: the order of nodes and the size of each tensor are those of a run of ONNX Runtime
without its optimizations, weights and what is derived from them left out. Measured is the peak resident memory of a new
process beyond what importing took, loading included.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import onnx_lrp
from benchmarks.measure import MB, Call, command, described, peak, publish
from onnx_lrp.order import bodies, reads
from onnx_lrp.runtime import session_options

# numpy has no name for the element types that ONNX Runtime's profile calls by its own
_TYPES = {"float": "float32", "double": "float64"}


def live(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> int:
    """Return the most bytes of activations that are alive at once in a run; steps of loops share theirs.

    A tensor lives from the node that makes it to the last one that reads it, an output to the end. Not counted are
    inputs, weights, and what the runtime folds when it loads the model.
    """
    order, sizes = _profiled(model, feeds)
    return _peak_of(model.graph, order, sizes, ())


def _profiled(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """When each node runs first, and the bytes of its outputs, at their largest; by the node's name."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        session.run(None, {name: array for name, array in feeds.items() if name in wanted})
        events = json.loads(Path(session.end_profiling()).read_text())
    order: dict[str, int] = {}
    sizes: dict[str, list[int]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") != "Node" or name == event["name"]:
            continue
        order.setdefault(name, len(order))
        found = [_bytes(*next(iter(output.items()))) for output in event["args"]["output_type_shape"]]
        sizes[name] = [max(pair) for pair in zip(found, sizes.get(name, found), strict=True)]
    return order, sizes


def _bytes(kind: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * np.dtype(_TYPES.get(kind, kind)).itemsize


def _peak_of(
    graph: onnx.GraphProto, order: Mapping[str, int], sizes: Mapping[str, Sequence[int]], outer: Collection[str]
) -> int:
    constant = {*outer, *(t.name for t in graph.initializer if t.name not in {i.name for i in graph.input})}
    for node in graph.node:
        if constant.issuperset(filter(None, reads(node))) and not any(bodies(node)):
            constant.update(node.output)
    nodes = sorted((n for n in graph.node if n.name in order), key=lambda n: order[n.name])
    last = {name: k for k, node in enumerate(nodes) for name in reads(node)}
    last |= {output.name: len(nodes) for output in graph.output}
    alive: dict[str, int] = {}
    most = 0
    for k, node in enumerate(nodes):
        made = dict(zip(filter(None, node.output), sizes[node.name], strict=True))
        alive |= {name: size for name, size in made.items() if name not in constant}
        inside = max((_peak_of(body, order, sizes, constant) for body in bodies(node)), default=0)
        most = max(most, sum(alive.values()) + inside)
        alive = {name: size for name, size in alive.items() if last.get(name, -1) > k}
    return most


# ---- measured -------------------------------------------------------------------------------------------------------


def _picture(session: ort.InferenceSession, batch: int) -> dict[str, np.ndarray]:
    given = session.get_inputs()[0]
    shape = (batch, *given.shape[1:])
    return {given.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def bare_call(path: Path, batch: int, threads: int, options: bool = False) -> Call:
    """Return a run of a file in ONNX Runtime, by its own options or by those of the explainer."""
    chosen = session_options() if options else ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = 3
    session = ort.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])
    return functools.partial(session.run, None, _picture(session, batch))


def explainer_call(path: Path, batch: int, threads: int, method: str, chunk: int | None = None) -> Call:
    """Return a call of the explainer; ``chunk`` samples a run, or by default."""
    explainer = onnx_lrp.Explainer(path, method, device="cpu", threads=threads, batch_size=chunk)
    feeds = _picture(explainer.session.raw, batch)
    return lambda: explainer(feeds)


def report(path: Path, method: str, batches: Sequence[int], threads: int) -> Iterator[str]:
    """Measure, and yield the lines of the table."""
    yield described(("onnxruntime", "onnx", "numpy"), threads)
    yield f"{path.stem}, weights of {path.stat().st_size / MB:.0f} MB, {method}. Peaks of three runs, in MB.\n"
    with tempfile.TemporaryDirectory() as folder:
        explained = Path(folder) / "explained.onnx"
        onnx_lrp.rewrite(path, method).save(explained)
        rows: dict[str, Callable[[int], Callable[[], Call]]] = {
            "ONNX Runtime, forward only": lambda batch: functools.partial(bare_call, path, batch, threads),
            "the explained file in ONNX Runtime": lambda batch: functools.partial(
                bare_call, explained, batch, threads, True
            ),
            "`Explainer`, the batch at once": lambda batch: functools.partial(
                explainer_call, path, batch, threads, method, batch
            ),
            "`Explainer`": lambda batch: functools.partial(explainer_call, path, batch, threads, method),
        }
        yield "| | " + " | ".join(f"batch {batch}: peak MB | per forward" for batch in batches) + " |"
        yield "| --- |" + " ---: |" * 2 * len(batches)
        forward: dict[int, float] = {}
        for title, make in rows.items():
            cells = []
            for batch in batches:
                found = peak(make(batch), ("onnxruntime", "onnx_lrp")) or math.nan
                cells.append(f"{found:.0f} | {found / forward.setdefault(batch, found):.2f}")
            yield f"| {title} | " + " | ".join(cells) + " |"
        yield ""
        for title, file in (("forward", path), ("explained", explained)):
            session = ort.InferenceSession(file, session_options(), providers=["CPUExecutionProvider"])
            counted = live(onnx.load(file), _picture(session, 1)) / MB
            yield f"Activations alive at once, {title}: {counted:.1f} MB per sample."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--onnx", type=Path, help="a model's file; default: ResNet-50 with random weights")
    parser.add_argument("--method", default="epsilon_plus")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of memory there")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        path = args.onnx
        if path is None:
            from exporters.torch_nets import export, resnet50

            path = Path(folder) / "resnet50.onnx"
            export(resnet50(), path, (1, 3, 224, 224), folded=True)
        lines = report(path, args.method, [int(b) for b in args.batches.split(",")], args.threads)
        publish([*lines, command("memory", given)], args.write, "memory")


if __name__ == "__main__":
    main()
