"""Attention rollout, a baseline: what the attention alone says about which tokens matter.

The probabilities are found by data flow: what a Softmax gives and a product with live values reads, whatever the
exporter wrote between the two. They are the same tensors whether the file holds MatMuls or ONNX's own Attention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx

from onnx_lrp import model as models
from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.canonical import view
from onnx_lrp.emit import Call, Value
from onnx_lrp.errors import InputError
from onnx_lrp.evaluate.perturbation import Feeds
from onnx_lrp.model import ModelLike
from onnx_lrp.runtime import Array, Device, Session


def rollout(attentions: Sequence[Array]) -> Array:
    """Attention rollout (Abnar and Zuidema 2020, sec. 3).

    Every layer mixes as (A + 1) / 2, A being the mean over its heads and 1 the residual; the product over the layers,
    last to first, says how much of each token is in each place at the end.

    Args:
        attentions: probabilities of each layer, first to last, (N, heads, T, T).

    Returns:
        Shares (N, T, T): of token j in place i. Rows sum to 1 where those of the attentions do.
    """
    mixed: Array | None = None
    for probabilities in attentions:
        mean = probabilities.mean(1, dtype=np.float64)
        layer = (mean + np.eye(mean.shape[-1])) / 2
        mixed = layer if mixed is None else layer @ mixed
    if mixed is None:
        raise InputError("rollout wants the attention of one layer at least, got none")
    return mixed


def attention_model(model: ModelLike) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of the model with all attention probabilities as further outputs.

    Returns:
        The model, and the names of these outputs, first layer to last.

    Raises:
        InputError: there is no attention in it, or some lies beside another and not behind it, as in two branches.
    """
    source = models.load(model)
    v = view(source)
    readers: dict[Value, list[tuple[Call, int]]] = defaultdict(list)
    for call in v.calls:
        for index, x in enumerate(call.inputs):
            if x is not None:
                readers[x].append((call, index))
    found: list[Value] = []
    behind: set[Value] = set()  # what depends on the layer before
    for call in v.calls:
        later = any(x in behind for x in call.inputs)
        if call.op == "Softmax" and _mixes(call.output, readers):
            if found and not later:
                raise InputError(
                    f"the attention of '{call.site}' does not come after the one before it; give a model of one branch"
                )
            found.append(call.output)
            behind, later = set(), True
        if later:
            behind |= {x for x in call.outputs if x is not None}
    if not found:
        raise InputError(f"{source.name} holds no attention: no Softmax whose output weighs values in a product")
    outputs = [v.e.rename(x, f"attention/{v.name_of(x)}") for x in found]
    proto = models.assemble(source, v.e.export(outputs), {})
    return proto, [x.name for x in outputs]


def _mixes(probabilities: Value, readers: dict[Value, list[tuple[Call, int]]]) -> bool:
    """True if a product with a live factor reads the value, or what merely moves or masks it."""
    for call, index in readers[probabilities]:
        known = OPERATORS.get(call.op)
        if call.op in ("MatMul", "Einsum"):
            if any(not x.facts.const for i, x in enumerate(call.inputs) if x is not None and i != index):
                return True
        elif ((known is not None and known.moves) or call.op == "Where") and _mixes(call.output, readers):
            return True
    return False


class AttentionRollout:
    """Attention rollout of a model: `AttentionRollout("model.onnx")(inputs)` gives shares (N, T, T).

    Row i says what place i is made of: row 0 explains a class token, the last row the next token, and the mean of the
    rows a mean over tokens.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph.
        device: where it runs.
        threads: threads per operator; default: ONNX Runtime's choice.
    """

    def __init__(self, model: ModelLike, *, device: Device = "auto", threads: int | None = None) -> None:
        proto, self.names = attention_model(model)
        self.session = Session(proto, device=device, threads=threads, folder=models.load(model).folder)

    def __call__(self, feeds: Feeds) -> Array:
        """Run the model on N samples, and roll its attention out."""
        count = len(next(iter(feeds.values())))
        found = self.session.run(feeds, self.names).values()
        # Exporters often lay batch and heads on one axis, batch first.
        return rollout([a.reshape(count, -1, *a.shape[-2:]) for a in found])
