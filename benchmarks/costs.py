"""What explanations cost, counted and not timed: nodes, multiplications, bytes and memory, the same on every machine.

    python -m benchmarks.costs                      # the table
    python -m benchmarks.costs --write tests/costs.json

Multiplications are those of products of tensors (Conv, ConvTranspose, MatMul, Gemm) on one sample, as a ratio to the
forward pass; bytes are those of the file, as a ratio to the source's; live are the most bytes of activations that are
alive at once, as a ratio to the forward pass (see `benchmarks.memory`). A test holds the numbers to `tests/costs.json`,
so a change of them is seen where it is made.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

import onnx_lrp
from benchmarks.memory import live
from benchmarks.networks import network
from benchmarks.sizes import Sizes
from exporters.torch_nets import export, mobilenet, resnet18, resnet50, vgg16
from exporters.transformers import Bert, ViT
from exporters.transformers import export as export_transformer
from onnx_lrp.order import bodies

Counts = dict[str, float]


_SHAPES = "/shapes"  # ends the names of outputs that tell shapes of the steps of a Scan
BERT = ("ids", "mask", "types")  # the inputs that are integers


@cache
def networks() -> Mapping[str, tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]]:
    """Small networks of every kind, with the shapes that their inputs are counted at."""

    def picture(build: Callable[..., torch.nn.Module], **options: int) -> onnx.ModelProto:
        return export(build(width=16, classes=10, **options), None, (1, 3, 64, 64), folded=True)

    torch.manual_seed(0)
    bert, vit = (
        Bert(vocabulary=50, dim=32, heads=4, hidden=64, layers=2),
        ViT(size=64, dim=32, heads=4, hidden=64, layers=2),
    )
    ids = {name: torch.ones(2, 16, dtype=torch.long) for name in BERT}
    open_batch = {name: {0: "batch"} for name in ("image", "logits", *ids)}
    image, sequences = {"input": (1, 3, 64, 64)}, Sizes(length=3, shrink=16)
    return {
        "vgg16": (picture(vgg16, size=64, hidden=64), image),
        "resnet18": (picture(resnet18), image),
        "resnet50": (picture(resnet50), image),
        "mobilenet": (picture(mobilenet), image),
        "vit": (
            export_transformer(vit, None, {"image": torch.zeros(2, 3, 64, 64)}, "logits", open_batch),
            {"image": (1, 3, 64, 64)},
        ),
        "bert": (
            export_transformer(bert, None, ids, "logits", open_batch),
            dict.fromkeys(ids, (1, 16)),
        ),
        "lstm": (network("lstm", 2, sequences).write(), {"x": (1, 12, 32)}),
        "gru": (network("gru", 2, sequences).write(), {"x": (1, 12, 32)}),
    }


METHODS = ("epsilon", "epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box", "gradient")
ATTENTION = ("attnlrp", "cp_lrp", "gradient")


def methods(name: str) -> Sequence[str]:
    """The methods that are counted on a network."""
    return ATTENTION if name in ("vit", "bert") else METHODS


def counted(name: str, method: str) -> Counts:
    """Nodes added, multiplications and bytes per forward, of one network under one method."""
    source, shapes = networks()[name]
    target = (0, 0) if name == "bert" else 0  # of every token there are logits
    explained = onnx_lrp.rewrite(source, method, shapes=shapes, target=target)
    forward = explained.source.skeleton
    feeds = {k: np.ones(shape, np.int64 if k in BERT else np.float32) for k, shape in shapes.items()}
    before, after = (products(model, feeds) for model in (source, explained.model))
    return {
        "nodes": sum(1 for _ in nodes(explained.model.graph)) - sum(1 for _ in nodes(forward.graph)),
        "multiplications": round(after / before, 3),
        "bytes": round(explained.model.ByteSize() / source.ByteSize(), 3),
        "live": round(live(explained.model, feeds) / live(source, feeds), 3),
    }


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of bodies too."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from nodes(body)


def products(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> int:
    """Multiplications of a model on one sample; a Scan counts once per step, an If as its dearer branch.

    Lengths are those of a run, in a Scan those of its first step: ONNX's inference of shapes does not know all.
    """
    whole = onnx.ModelProto.FromString(model.SerializeToString())
    for node in whole.graph.node:
        if node.op_type == "Scan":
            _tell_shapes(node)
    made = [name for node in whole.graph.node for name in node.output if name]
    given = {value.name for value in whole.graph.output}
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in given)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    found = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    shapes = {name: np.shape(array) for name, array in zip(names, found, strict=True)}
    shapes |= {name: array.shape for name, array in feeds.items()}
    steps = {name: array for name, array in zip(names, found, strict=True) if name.endswith(_SHAPES)}
    shapes |= {name.removesuffix(_SHAPES): tuple(map(int, array[0])) for name, array in steps.items() if len(array)}
    return _of_graph(model.graph, shapes)


def _tell_shapes(scan: onnx.NodeProto) -> None:
    """Let a Scan give the shapes of all that its steps compute."""
    attributes = {a.name: a for a in scan.attribute}
    body = attributes["body"].g
    for name in [name for node in body.node for name in node.output if name]:
        told = f"{name}{_SHAPES}"
        body.node.append(onnx.helper.make_node("Shape", [name], [told]))
        body.output.append(onnx.ValueInfoProto(name=told))
        scan.output.append(told)
        for key in ("scan_output_axes", "scan_output_directions"):
            if key in attributes:
                attributes[key].ints.append(0)


def _of_graph(graph: onnx.GraphProto, outer: Mapping[str, tuple[int, ...]]) -> int:
    shapes = dict(outer) | {t.name: tuple(t.dims) for t in graph.initializer}
    return sum(_products_of(node, shapes) for node in graph.node)


def _products_of(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    attributes = {a.name: a for a in node.attribute}
    if node.op_type in ("Conv", "ConvTranspose"):
        # Every weight meets every place of the smaller of the two pictures, the one that is not strided over.
        across = shapes[node.output[0] if node.op_type == "Conv" else node.input[0]]
        return math.prod(shapes[node.input[1]]) * across[0] * math.prod(across[2:])
    if node.op_type in ("MatMul", "Gemm"):
        if not {*node.input[:2], node.output[0]} <= shapes.keys():  # in a step's body, where one row meets all weights
            return max(math.prod(shapes[name]) for name in node.input[:2] if name in shapes)
        inner = shapes[node.input[0]]
        turned = node.op_type == "Gemm" and "transA" in attributes and attributes["transA"].i
        return math.prod(shapes[node.output[0]]) * inner[-2 if turned else -1]
    if node.op_type == "Scan":
        steps = shapes[node.input[-1]][0]
        return steps * _of_graph(attributes["body"].g, shapes)
    if node.op_type == "If":
        return max(_of_graph(attributes[name].g, shapes) for name in ("then_branch", "else_branch"))
    return _recurrent(node, shapes) if node.op_type in ("LSTM", "GRU", "RNN") else 0


def _recurrent(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    steps, batch = shapes[node.input[0]][:2]
    return steps * batch * sum(math.prod(shapes[name]) for name in node.input[1:3])


def every() -> dict[str, dict[str, Counts]]:
    """All counts, by network and method."""
    return {name: {method: counted(name, method) for method in methods(name)} for name in networks()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="the file that the test reads")
    args = parser.parse_args(arguments)
    found = every()
    print(f"{'network':12}{'method':24}{'nodes added':>12}{'multiplications':>17}{'bytes':>8}{'live':>8}")
    for name, row in found.items():
        for method, count in row.items():
            print(
                f"{name:12}{method:24}{count['nodes']:12.0f}{count['multiplications']:17.3f}"
                f"{count['bytes']:8.3f}{count['live']:8.3f}"
            )
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
