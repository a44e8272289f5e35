"""In which order nodes stand in a graph, and so, in which order ONNX Runtime runs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx


def by_depth(nodes: Sequence[onnx.NodeProto], after: Iterable[onnx.NodeProto] = ()) -> list[onnx.NodeProto]:
    """Nodes sorted by how long the longest way from the inputs to them is; those inside their bodies too, in place.

    ONNX Runtime goes from the last nodes of a graph to what they read, of several inputs first to the one whose node
    stands last. So where relevance meets a quotient of forward tensors, the relevance is computed first, which runs
    the whole model, and the quotient only then, right before it is used. In the order of emission a quotient stands
    behind the relevance it is for, and all quotients are kept beside the tensors that they were computed from.

    Args:
        nodes: the nodes, in an order in which they can run.
        after: nodes that run before; they are not sorted.

    Returns:
        The same nodes; equally deep ones as they stood.
    """
    depths: dict[str, int] = {}

    def depth(node: onnx.NodeProto) -> int:
        found = 1 + max((depths.get(name, 0) for name in reads(node)), default=0)
        depths.update(dict.fromkeys(node.output, found))
        return found

    for node in after:
        depth(node)
    for node in nodes:
        for body in bodies(node):
            ordered = by_depth(list(body.node))
            del body.node[:]
            body.node.extend(ordered)
    return [node for _, node in sorted(((depth(node), node) for node in nodes), key=lambda pair: pair[0])]


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names of what a node reads, and of what nodes in its bodies read."""
    yield from node.input
    for body in bodies(node):
        for inner in body.node:
            yield from reads(inner)
