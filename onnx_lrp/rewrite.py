"""The story on one page: load, see, seed, walk, name the outputs, finish."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import operator
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnx_lrp import model as models
from onnx_lrp.backward import Relevance, reverse
from onnx_lrp.canonical import see, view
from onnx_lrp.classes import OneClass, over_classes, sample_axis
from onnx_lrp.emit import Value
from onnx_lrp.errors import InputError, ModelError
from onnx_lrp.ledger import Accounts, Entry, Ledger
from onnx_lrp.masks import Masks, conditions, mask_axes, mask_inputs
from onnx_lrp.methods import Method, find_method
from onnx_lrp.methods.contract import Plan, Walk
from onnx_lrp.model import ModelLike, Shapes, Source
from onnx_lrp.steps import Steps, Table
from onnx_lrp.switch import EXPLAIN, behind_switch
from onnx_lrp.target import STARTS, Start, Target, find_explained, is_single, no_class, seed
from onnx_lrp.view import View, mark_active

VERSION = "0.1.0"


@dataclass
class Explained:
    """An explained model.

    Attributes:
        bare: the explained model without its weights, which are those of ``source``.
        table: which rule every node takes.
        method: name of the method.
        relevance: reported tensor -> name of the graph output that holds its relevance.
        target_rank: number of class axes of the explained tensor (1 for a classifier).
        classes: length of each class axis, None where it is dynamic.
        explained: name of the explained tensor.
        head: Softmax, LogSoftmax or Sigmoid if that was stepped over.
        ledger: per-node accounts (for verification only).
        masks: masked tensor -> its axis of channels; the graph input is ``mask/<tensor>``.
        across: input whose samples are the classes -> the class axis that is: the images, of a similarity (N, B) of N
            captions and B images.
        values: inner tensor -> name of the graph output that holds its value.
        rows: with ``multi_target``: output that has a row for every class of every sample -> the axis of these.
        sharing: whether several classes of a sample can share a forward pass: the model can have ``multi_target``.
    """

    bare: onnx.ModelProto = field(repr=False)
    table: Table
    method: str
    relevance: dict[str, str]
    classes: tuple[int | None, ...]
    explained: str
    head: str
    source: Source = field(repr=False)
    ledger: list[Entry] = field(default_factory=list, repr=False)
    masks: dict[str, int] = field(default_factory=dict)
    across: dict[str, int] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    sharing: bool = False

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The ModelProto: predicts and explains in one run. It is put together, and kept, when first asked for."""
        return models.with_weights(self.bare, self.source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model under a temporary name and rename it; above 2 GiB the weights lie beside it.

        Raises:
            InputError: the folder is missing or not writable, or the disk is full.
        """
        models.save(self.model, path, self.source.folder)

    def to_graphsurgeon(self) -> Any:
        """The model as an onnx_graphsurgeon Graph."""
        return models.to_graphsurgeon(self.model)


def rewrite(
    model: ModelLike,
    method: str | os.PathLike[str] | Method = "epsilon_plus_flat",
    *,
    inputs: Sequence[str] | None = None,
    shapes: Shapes | None = None,
    layers: Sequence[str] = (),
    values: Sequence[str] = (),
    output: str | None = None,
    target: Target = "input",
    start: Start | None = None,
    against: bool = False,
    ledger: bool = False,
    fold_batchnorm: bool | None = None,
    portable: bool = False,
    allow_gradient: bool = False,
    switch: bool = False,
    masks: Masks = (),
    exclude_parallel: bool = True,
    multi_target: bool = False,
) -> Explained:
    """Append the explanation to a model.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph; it is not modified.
        method: registered name, path of a rule book, or a method object.
        inputs: tensors to report relevance for; default: every float graph input, and for every integer one the
            embedding rows that its Gather picks, summed over the embedding axis.
        shapes: lengths of inputs to take as fixed, such as {"input": (None, 576)}; None leaves an axis as it is. For
            models whose inner ranks depend on them.
        layers: further tensors whose relevance is an output.
        values: inner tensors whose value is an output, such as attention maps to show beside the explanation.
        output: the explained tensor; default: the first output, or what feeds its final Softmax, LogSoftmax, Sigmoid.
        target: "input" (graph input ``target``, default -1: arg max), "argmax", an int, or one int per class axis.
        start: "logit", "one", "softmax", "contrast" or "input"; default: the method's.
        against: subtract another class: the score is target minus that, at the same place. Adds the graph input
            ``against`` (default -1: the highest of the others) and the output ``against_used``.
        ledger: add the output ``absorbed`` (N,): what biases and stabilizers took.
        fold_batchnorm: see BatchNormalization as part of a linear neighbour; default: true, unless a rule book says
            otherwise.
        portable: emit nothing that WebGPU, OpenVINO or TensorRT lacks.
        allow_gradient: let nodes without a rule take the plain gradient; the table says which did.
        switch: put the explanation behind a graph input ``explain`` (bool, default true), so that a client that
            feeds false pays for the prediction only.
        masks: tensors at which relevance can be made conditional on channels: each gets a graph input
            ``mask/<tensor>`` (n, C), n = 1 or the batch, that multiplies its relevance; default ones. Channels lie on
            axis 1; a mapping of names to axes says otherwise.
        exclude_parallel: with masks, only what passes through the masked tensors counts, as in zennit-crp: nothing
            that goes around one, through a shortcut; of several in a row it passes all, of several side by side any.
        multi_target: explain K classes of each of N samples in one run: ``target`` (and ``against``, ``start``, masks)
            may have N·K rows, those of the first sample first, and relevance, ``target_used``, ``score`` and
            ``absorbed`` have as many. The forward pass, and all that depends on the inputs alone, is computed once
            for N samples, the walk back class by class in a Scan. Of an output (N, C) the class -k is the k-th highest.

    Returns:
        The explained model.

    Raises:
        ModelError: the model cannot be read or is invalid.
        UnsupportedOps: some nodes have no rule; all of them are listed.
        RuleError: the rule book is malformed.
        InputError: an option does not fit the model.
    """
    return rewrite_with_accounts(
        model,
        method,
        inputs=inputs,
        shapes=shapes,
        layers=layers,
        values=values,
        output=output,
        target=target,
        start=start,
        against=against,
        accounts="total" if ledger else "none",
        fold_batchnorm=fold_batchnorm,
        portable=portable,
        allow_gradient=allow_gradient,
        switch=switch,
        masks=masks,
        exclude_parallel=exclude_parallel,
        multi_target=multi_target,
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python's collector of cycles from running.

    What a rewriting makes lives to its end. The collector would go through all of it again and again: a fifth of the
    time at 10,000 nodes, and the one part of it that grows faster than the model.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def rewrite_with_accounts(
    model: ModelLike | Source,
    method: str | os.PathLike[str] | Method,
    *,
    inputs: Sequence[str] | None = None,
    shapes: Shapes | None = None,
    layers: Sequence[str] = (),
    values: Sequence[str] = (),
    output: str | None = None,
    target: Target = "input",
    start: Start | None = None,
    against: bool = False,
    accounts: Accounts = "none",
    fold_batchnorm: bool | None = None,
    portable: bool = False,
    allow_gradient: bool = False,
    switch: bool = False,
    masks: Masks = (),
    exclude_parallel: bool = True,
    multi_target: bool = False,
) -> Explained:
    """Like :func:`rewrite`; ``accounts="node"`` adds every node's own accounts as outputs, for verification."""
    chosen = find_method(method)
    begin = start or chosen.start
    fold = getattr(chosen, "fold_batchnorm", True) if fold_batchnorm is None else fold_batchnorm
    if begin not in STARTS:
        raise InputError(f"start is one of {', '.join(STARTS)}, not '{begin}'")
    if multi_target and portable:
        raise InputError("multi_target=True needs a Scan, which WebGPU lacks; leave portable= or multi_target= away")
    source = model if isinstance(model, Source) else models.load(model, shapes)
    v = view(
        source,
        fold_batchnorm=fold,
        portable=portable,
        kept=[*layers, *(inputs or ()), *([output] if output else []), *chosen.tensors, *mask_axes(masks)],
    )
    e = v.e
    if switch and EXPLAIN in e.values:
        raise ModelError(f"the model already has a tensor named '{EXPLAIN}', which the switch needs; rename it")
    explained, head = find_explained(v, output)
    reported = {**_reported_inputs(v, inputs), **{name: ([v.value(name)], False) for name in layers}}
    wanted = {x: name for name, (tensors, _) in reported.items() for x in tensors}
    plan = chosen.plan(v, explained, wanted)
    passes = functools.partial(see, fold_batchnorm=fold)

    def steps_of(walk: Walk, keeper: Ledger | None) -> Steps:
        return Steps(source, chosen.name, walk.step_for, allow_gradient, keeper, passes, chosen.start != "one")

    if explained.facts.shape is None:  # because of an operator that nobody sees through, which is the better error
        for walk in plan.walks:
            steps_of(walk, None).assign(e, mark_active(v, walk.wanted, explained))
    if plan.score is not None and (output or start or against or target != "input"):
        raise InputError(f"{chosen.name} explains no class: leave output=, start=, against= and target= away")
    if plan.score is not None and multi_target:
        raise InputError(f"{chosen.name} explains no class: leave multi_target= away")
    single = plan.score is None and is_single(v, explained, head)
    reported |= {name: ([x], False) for name, x in plan.layers.items()}
    names = {name: f"relevance/{name}" for name in reported}
    along = {name: sample_axis(v, xs[0], explained, single=single) for name, (xs, _) in reported.items()}
    classwise = over_classes(e, explained, along, single=single, target=target) if multi_target else OneClass()
    found: list[Mapping[Value, Relevance]] = []
    table, unmet = Table(), set(mask_axes(masks))
    rows: dict[str, Value] = {}  # the outputs with a row for every class of a sample
    with classwise.turn():
        if plan.score is None:
            first = seed(
                e,
                explained,
                target,
                begin,
                single=single,
                against=against,
                fed=classwise.fed,
                many=multi_target,
            )
        else:
            first = no_class(e, explained, plan.score)
        masked = mask_inputs(v, masks, classwise.fed)
        keeper = Ledger(e, first.score, accounts, () if first.single else (explained, *wanted))
        for walk in plan.walks:
            seeds = {explained: first.relevance} if walk.seeds is None else walk.seeds
            calls = mark_active(v, walk.wanted, *seeds)
            if not any(x.facts.active for x in seeds):
                begun = " or ".join(f"'{v.name_of(x)}'" for x in seeds)
                raise InputError(f"{begun} does not depend on {', '.join(reported)}: there is nothing to explain")
            step_for, lines = steps_of(walk, keeper).assign(e, calls)
            unmet -= {name for name in unmet if v.value(name).facts.active}
            known = set(table)
            table.extend(line for line in lines if line not in known)
            run = walk.run
            if masked and run is not reverse:
                raise InputError(
                    f"masks= is for methods that walk through the model once, which {chosen.name} does not"
                )
            if masked:
                run = functools.partial(reverse, conditions=conditions(masked, v.calls, calls, exclude_parallel))
            found.append(run(e, calls, seeds, step_for, walk.wanted))
        if unmet:
            raise InputError(
                f"masks= names {', '.join(sorted(unmet))}, which does not lie between {', '.join(reported)} "
                f"and '{explained.name}'; name another tensor"
            )
        for name, (tensors, is_token) in reported.items():
            with e.scope(name, chosen.name, f"relevance of {name}"):
                parts = [plan.report(e, x, found) for x in tensors]
                if is_token:
                    parts = [plan.per_token(e, part) for part in parts]
                rows[names[name]] = functools.reduce(operator.add, parts)
        rows |= {"target_used": first.used, "score": first.score}
        if first.against is not None:
            rows["against_used"] = first.against
        rows |= keeper.outputs() | dict(plan.extras(e, found, first))
    at = dict.fromkeys(rows, 0) | {names[name]: axis or 0 for name, axis in along.items()}
    outputs = [e.rename(value, name) for name, value in classwise.stacked(rows, at).items()]
    shown = {name: f"value/{name}" for name in values}
    outputs.extend(e.rename(v.value(name), given) for name, given in shown.items())
    added = e.export(outputs)
    info: dict[str, Any] = {
        "version": VERSION,
        "method": chosen.name,
        "parameters": repr(chosen),
        "target": target if isinstance(target, str) else np.asarray(target).tolist(),
        "start": begin,
        **({"against": True} if against else {}),
        **({"multi_target": True} if multi_target else {}),
        "explained": explained.name,
        "source_sha256": source.sha256,
    }
    if masked:
        info |= {"masks": mask_axes(masks), "exclude_parallel": exclude_parallel}
    nodes, own = len(source.skeleton.graph.node), [o.name for o in source.skeleton.graph.output]
    lengths = {name: tuple(tensor.dims) for name, tensor in source.weights.items()}
    arrange = (lambda proto: behind_switch(proto, nodes, own, lengths)) if switch else (lambda proto: None)
    bare = models.assemble_bare(source, added, {"onnx_lrp": json.dumps(info, sort_keys=True)}, arrange)
    axes = explained.shape if first.single else explained.shape[1:]
    classes = tuple(d if isinstance(d, int) else None for d in axes if d != 1) or (1,)
    return Explained(
        bare,
        table,
        chosen.name,
        names,
        classes,
        explained.name,
        head,
        source,
        keeper.entries,
        mask_axes(masks),
        {} if first.single else _across(v, explained),
        shown,
        at if multi_target else {},
        _sharing(plan, target, along.values()) and not portable,
    )


def _sharing(plan: Plan, target: Target, axes: Collection[int | None]) -> bool:
    """Whether several classes of a sample can be explained in one run: what ``multi_target`` asks for."""
    return isinstance(target, str) and target == "input" and plan.score is None and None not in axes


def _across(v: View, explained: Value) -> dict[str, int]:
    """Inputs whose samples are the classes of what is explained, told by what open lengths are called."""
    if not explained.rank:
        return {}
    batch, *others = explained.shape
    classes = [d for d in others if d != 1]
    along = {name: x.shape for name, x in v.inputs.items() if x.facts.shape and isinstance(x.shape[0], str)}
    found = {name: shape for name, shape in along.items() if shape[0] in classes}
    return {name: classes.index(s[0]) for name, s in found.items() if batch in classes or batch not in s}


def _reported_inputs(v: View, inputs: Sequence[str] | None) -> dict[str, tuple[list[Value], bool]]:
    """Tensors to report: name -> (its value, or the rows it picks from embeddings; whether these are to be summed)."""
    found: dict[str, tuple[list[Value], bool]] = {}
    for name in v.inputs if inputs is None else inputs:
        value = v.value(name)
        if value.dtype.kind == "f":
            found[name] = ([value], False)
            continue
        if rows := _embedded(v, value):
            found[name] = (rows, True)
        elif inputs is not None:
            raise InputError(
                f"input '{name}' is {value.dtype} and feeds no embedding Gather; name a float tensor instead"
            )
    if not found:
        raise InputError(
            "the model has no float input and no token embedding to report relevance for; name a tensor with inputs="
        )
    return found


def _embedded(v: View, ids: Value) -> list[Value]:
    """The rows that an integer tensor picks from constant tables, as it is or cast to another integer."""
    same, rows = {ids}, []
    for call in v.calls:
        if call.op == "Cast" and call.input(0) in same and call.output.dtype.kind in "iu":
            same.add(call.output)
        elif call.op == "Gather" and call.input(1) in same and call.attrs.get("axis", 0) == 0:
            table = call.given(0)
            if table.facts.const and table.dtype.kind == "f" and table.rank == 2:
                rows.append(call.output)
    return rows
