"""What supports a prediction counts more, what opposes it less: the forward pass of LRP-inference fine-tuning.

The logits of a model are a linear layer of a sum, say of what a caption's model saw, c, and of what it had said, h. In
the graph, at every position: the word predicted is the arg max, its logit is propagated through layer and sum, and each
summand is weighed by what came to it,

    omega_c = 1 + R(c) / max abs R(c),    p^ = layer(omega_c * c + omega_h * h),

omega from 0 to 2 (Sun et al. 2022, Explain and improve: LRP-inference fine-tuning for image captioning models,
Information Fusion 77, sec. 4). Training with a loss on p^, too, takes support away from words that are wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from onnx_lrp import model as models
from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.shapes import along_axis, arange_like, cast_like, expand_like, ints
from onnx_lrp.backward import Relevance, reverse
from onnx_lrp.canonical import view
from onnx_lrp.composite import Composite
from onnx_lrp.emit import Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.ledger import Ledger
from onnx_lrp.methods import LRP
from onnx_lrp.model import ModelLike, Shapes, Source
from onnx_lrp.replay import leading, replay
from onnx_lrp.rewrite import VERSION
from onnx_lrp.steps import Steps, Table
from onnx_lrp.target import find_explained
from onnx_lrp.view import View, mark_active

_SUMS = ("Add", "Sub", "Sum")


@dataclass
class Reweighted:
    """A model that predicts twice: as it is, and with its last summands weighed by their relevance.

    Attributes:
        model: the ModelProto; its own outputs first, then these.
        logits: name of the output with the re-weighted logits, ``reweighted/<logits>``, in the shape of the logits.
        omegas: weighed tensor -> name of the output with its weights, ``omega/<tensor>``, in its shape, from 0 to 2.
        explained: name of the logits that are explained.
        table: which rule every node between the weighed tensors and the logits takes.
    """

    model: onnx.ModelProto
    logits: str
    omegas: dict[str, str]
    explained: str
    table: Table
    source: Source = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model under a temporary name and rename it; above 2 GiB the weights lie beside it.

        Raises:
            InputError: the folder is missing or not writable, or the disk is full.
        """
        models.save(self.model, path, self.source.folder)


def reweigh(
    model: ModelLike,
    tensors: Sequence[str] | None = None,
    *,
    output: str | None = None,
    masked: Sequence[int] = (),
    rules: str | os.PathLike[str] | Composite = "captioning",
    shapes: Shapes | None = None,
    portable: bool = False,
) -> Reweighted:
    """Append re-weighted logits to a model: omega from relevance one layer deep, and what the layer makes of it.

    The last axis of the logits is that of the classes; each position along the others has a prediction, and weights, of
    its own. Where all relevance is zero, omega is 1.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph; it is not modified.
        tensors: what is weighed; default: the summands of the sum that the last linear layer reads. Relevance reaches
            them by every way from the logits that leads through none of the others.
        output: the logits; default: the first output, or what feeds its final Softmax, LogSoftmax, Sigmoid.
        masked: predictions that weigh nothing (omega 1): numbers of stop words and special tokens.
        rules: rule book for the layer and the sum; default: epsilon rule with 0.01 for both, as in the paper.
        shapes: lengths of inputs to take as fixed, as for :func:`onnx_lrp.rewrite`.
        portable: emit nothing that WebGPU, OpenVINO or TensorRT lacks.

    Returns:
        The model with its further outputs.

    Raises:
        ModelError: the model cannot be read or is invalid.
        UnsupportedOps: a node between the tensors and the logits has no rule.
        InputError: the logits are no layer of a sum, or an option does not fit the model.
    """
    book = LRP(rules)
    source = models.load(model, shapes)
    kept = [*(tensors or ()), *([output] if output else ())]
    v = view(source, fold_batchnorm=book.fold_batchnorm, portable=portable, kept=kept)
    e = v.e
    z, _ = find_explained(v, output)
    weighed = _summands(v, z) if tensors is None else [v.value(name) for name in dict.fromkeys(tensors)]
    # What makes a summand may read another one, as attention reads the state; that way is one layer too deep.
    chain = leading(v.calls, weighed, [z])
    made = {o for call in chain for o in call.outputs}
    read = [x for call in chain for x in call.inputs if x is not None and x not in made and _is_live(x)]
    mark_active(replace(v, calls=chain), {*weighed, *read}, z)
    _check(v, weighed, z)
    steps = Steps(source, book.name, book.step_for, False, Ledger(e, z, "none"), lambda view: None, True)
    step_for, table = steps.assign(e, chain)
    with e.scope("prediction", doc="the predicted class at every position"):
        seed = Relevance(_predicted(e, z, masked), z)
    found = reverse(e, chain, {z: seed}, step_for, weighed)
    omegas = {}
    for x in weighed:
        with e.scope(v.name_of(x), "omega", f"weights of {v.name_of(x)}"):
            omegas[x] = _omega(e, x, found[x], axis=min(x.rank, z.rank) - 1)
    with e.scope("reweighted", doc="summands times their weights"):
        changes = {x: e.op("Mul", x, omega, label="weighed") for x, omega in omegas.items()}
    logits = replay(e, chain, changes)[z]
    names = {v.name_of(x): f"omega/{v.name_of(x)}" for x in weighed}
    outputs = [e.rename(logits, f"reweighted/{v.name_of(z)}")]
    outputs += [e.rename(omegas[x], names[v.name_of(x)]) for x in weighed]
    info = {
        "version": VERSION,
        "method": "reweigh",
        "parameters": repr(book),
        "masked": [int(word) for word in masked],
        "explained": v.name_of(z),
        "source_sha256": source.sha256,
    }
    proto = models.assemble(source, e.export(outputs), {"onnx_lrp": json.dumps(info, sort_keys=True)})
    return Reweighted(proto, outputs[0].name, names, v.name_of(z), table, source)


def _summands(v: View, z: Value) -> list[Value]:
    """The live summands of the sum that a linear layer makes the logits of; of several, one per step of a text."""
    makers = v.producers()
    found: dict[Value, None] = {}
    waiting = [(z, False)]
    while waiting:
        x, layered = waiting.pop()
        call = makers.get(x)
        live = [] if call is None else [i for i in call.inputs if i is not None and _is_live(i)]
        verb = OPERATORS[call.op].verb if call is not None and call.op in OPERATORS and not call.domain else ""
        if call is None or not live or verb not in ("linear", "bilinear"):
            raise _no_sum(v, z)
        if call.op == "Concat" and not layered:
            waiting += [(i, False) for i in reversed(live)]
        elif len(live) == 1:
            waiting.append((live[0], layered or verb == "bilinear"))
        elif layered and call.op in _SUMS:
            found |= dict.fromkeys(live)
        else:
            raise _no_sum(v, z)
    return list(found)


def _is_live(x: Value) -> bool:
    return x.dtype.kind == "f" and not x.facts.const


def _no_sum(v: View, z: Value) -> InputError:
    return InputError(
        f"'{v.name_of(z)}' is no linear layer of a sum of tensors that depend on inputs; name with tensors= what is to "
        "be weighed, or the logits with output="
    )


def _check(v: View, weighed: Sequence[Value], z: Value) -> None:
    """See that everything weighed leads to the logits, at every position on its own.

    Raises:
        InputError: something does not.
    """
    if not weighed:
        raise InputError("tensors= names nothing to be weighed; leave it out, or name tensors before the last layer")
    for x in weighed:
        if x is z or not x.facts.active:
            raise InputError(f"'{v.name_of(x)}' does not lead to '{v.name_of(z)}'; name another tensor")
        pairs = list(zip(x.shape, z.shape, strict=False))[: min(x.rank, z.rank) - 1]
        if x.rank == 0 or any(a == 1 and b != 1 for a, b in pairs):
            raise InputError(
                f"'{v.name_of(x)}' {x.shape} is shared by several positions of '{v.name_of(z)}' {z.shape}, and each "
                "wants weights of its own; name a tensor behind with tensors="
            )


def _predicted(e: Emitter, z: Value, masked: Sequence[int]) -> Value:
    """One at the arg max along the last axis; zero everywhere where that is masked."""
    axis = z.rank - 1
    if axis < 0:
        raise InputError(f"'{z.name}' has no axis of classes; name the logits with output=")
    length = z.shape[axis]
    wrong = [w for w in masked if not int(w) >= 0 or (isinstance(length, int) and int(w) >= length)]
    if wrong:
        raise InputError(f"masked: there is no class {wrong[0]}; the logits have {length}, from 0 on")
    best = e.op("ArgMax", z, axis=axis, keepdims=1)
    hot = cast_like(e, e.op("Equal", best, along_axis(e, arange_like(e, z, axis), axis, z.rank)), z)
    if not len(masked):
        return hot
    same = cast_like(e, e.op("Equal", best, e.const(np.array(list(masked), np.int64), name="masked")), z)
    return hot * (1.0 - e.op("ReduceMax", same, ints(e, [axis]), keepdims=1))


def _omega(e: Emitter, x: Value, relevance: Relevance, axis: int) -> Value:
    """1 + R / max abs R, the maximum at each position: over all axes from the given one on."""
    whole = expand_like(e, relevance.whole(e), x)
    highest = e.op("ReduceMax", e.op("Abs", whole), ints(e, range(axis, x.rank)), keepdims=1)
    some = e.op("Where", e.op("Greater", highest, e.const(0, x.dtype)), highest, e.const(1, x.dtype))
    return 1.0 + whole / some
