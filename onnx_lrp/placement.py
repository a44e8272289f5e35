"""Where the nodes of a model run: which provider each was given to, as ONNX Runtime's profile tells."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnx_lrp.runtime import CPU, Array, Device, Session

_KERNEL = "_kernel_time"
_COPIES = ("MemcpyToHost", "MemcpyFromHost")


@dataclass(frozen=True)
class Placed:
    """One node of the optimised graph.

    Attributes:
        name: its name; of fused nodes, one that ONNX Runtime gave.
        op: its operator.
        provider: the provider that ran it.
        shape: whether it computes nothing but shapes, which every provider leaves to the CPU.
    """

    name: str
    op: str
    provider: str
    shape: bool = False


@dataclass(frozen=True)
class Placement:
    """Which provider runs which nodes; copies between a device and the host are counted apart.

    Attributes:
        provider: the first one in use, which should run all but what computes shapes.
        nodes: in the order in which they first ran.
        copies: how many nodes only copy tensors from the host to a device or back.
    """

    provider: str
    nodes: tuple[Placed, ...]
    copies: int = 0

    def counts(self) -> dict[str, int]:
        """Number of nodes by provider, the most first."""
        return dict(Counter(node.provider for node in self.nodes).most_common())

    def left_behind(self) -> list[str]:
        """Nodes on the CPU though a device is in use, save those that compute shapes: "name (operator)"."""
        if self.provider == CPU:
            return []
        return [f"{n.name} ({n.op})" for n in self.nodes if n.provider == CPU and not n.shape]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"nodes": self.counts(), "copies": self.copies, "left_behind": self.left_behind()}

    def __str__(self) -> str:
        text = ", ".join(f"{count} on {provider}" for provider, count in self.counts().items())
        if self.provider == CPU:
            return text
        shapes, behind = sum(n.shape and n.provider == CPU for n in self.nodes), self.left_behind()
        text += f" ({shapes} for shapes), copies between host and device: {self.copies}"
        return text + (f"; on the CPU, and not for shapes: {', '.join(behind)}" if behind else "")


def placement(
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    *,
    device: Device = "auto",
    providers: Sequence[Any] | None = None,
    threads: int | None = None,
    folder: Path | None = None,
) -> Placement:
    """Run a model once, in a session of its own, and see where its nodes run.

    Args:
        model: the model.
        feeds: its inputs.
        device: as for :class:`onnx_lrp.runtime.Session`, like all that follows.
        providers: ONNX Runtime's own list.
        threads: threads per operator.
        folder: where external data of the model lies.

    Raises:
        OnnxLrpError: as for :class:`onnx_lrp.runtime.Session`.
    """
    with tempfile.TemporaryDirectory(prefix="onnx_lrp_") as inside:
        prefix = Path(inside) / "profile"
        session = Session(model, device=device, providers=providers, threads=threads, folder=folder, profile=prefix)
        session.run(feeds)
        events = json.loads(Path(session.raw.end_profiling()).read_text(encoding="utf-8"))
    return placed(events, session.providers[0], shape_nodes(model.graph))


def placed(events: Iterable[Mapping[str, Any]], provider: str, shapes: AbstractSet[str] = frozenset()) -> Placement:
    """Read ONNX Runtime's profile.

    Args:
        events: the profile, a list of events.
        provider: the first one in use.
        shapes: names of nodes that compute nothing but shapes.
    """
    nodes: dict[tuple[str, str, str], Placed] = {}  # nodes of loops run many times
    for event in events:
        args = event.get("args") or {}
        label = str(event.get("name", ""))
        if event.get("cat") != "Node" or not label.endswith(_KERNEL) or "provider" not in args:
            continue
        name, op = label.removesuffix(_KERNEL), str(args.get("op_name", ""))
        # What descends from shapes may still be as large as a tensor, such as zeros expanded to its shape.
        small = all(len(shape) <= 1 for out in args.get("output_type_shape", ()) for shape in out.values())
        node = Placed(name, op, str(args["provider"]), small and name in shapes)
        nodes.setdefault((name, op, str(args.get("node_index", ""))), node)
    copies = [node for node in nodes.values() if node.op in _COPIES]
    return Placement(provider, tuple(node for node in nodes.values() if node.op not in _COPIES), len(copies))


def shape_nodes(graph: onnx.GraphProto, known: AbstractSet[str] = frozenset()) -> set[str]:
    """Names of the nodes that compute from shapes and constants alone, also in bodies.

    Args:
        graph: its nodes in order.
        known: names from around it that are shapes or constants.
    """
    about = known | {i.name for i in graph.initializer} - {i.name for i in graph.input}
    found: set[str] = set()
    for node in graph.node:
        bodies = [g for a in node.attribute for g in (a.g, *a.graphs) if g.node]
        for body in bodies:
            found |= shape_nodes(body, about)
        read = {name for name in node.input if name}
        if not bodies and (node.op_type in ("Shape", "Size", "Constant") or (read and read <= about)):
            found.add(node.name)
            about |= set(node.output)
    return found
