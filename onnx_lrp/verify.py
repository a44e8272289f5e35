"""Is an explained model right: outputs unchanged, relevance as in float64, conservation layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnx_lrp import model as models
from onnx_lrp.adjoints.quantization import QUANTIZED
from onnx_lrp.errors import InputError
from onnx_lrp.ledger import Accounts
from onnx_lrp.methods import Method, find_method
from onnx_lrp.model import ModelLike
from onnx_lrp.placement import Placement, placement
from onnx_lrp.reference import run_double
from onnx_lrp.rewrite import Explained, rewrite_with_accounts
from onnx_lrp.roles import noise
from onnx_lrp.runtime import CPU, Array, Device, Session

OUTPUT_TOLERANCE = 1e-5  # the runtime may optimise the two graphs differently
CONSERVATION_TOLERANCE = 1e-3
_TIE = 1e-5  # values of a window that are closer than this, relative to the largest in the tensor, are equal in float32
RELEVANCE_TOLERANCE = 1e-3
# A 16-bit forward pass is itself that far from float64, and moves when the runtime places its casts differently.
# There a rounding can move a pool's winner, so relevance is compared in the mean (L2), not by its worst pixel.
_NARROW_OUTPUT_TOLERANCE, _NARROW_RELEVANCE_TOLERANCE = 1e-2, 1e-1


@dataclass(frozen=True)
class Layer:
    """What one node did with its relevance, summed over all samples that ran (one, unless the batch is fixed).

    Attributes:
        node: its name.
        op: its operator.
        rule: its rule.
        arrived: relevance of its outputs.
        passed: relevance it gave to its inputs.
        bias: what its biases took.
        stabilizer: what its stabilizer took.
        other: what is left: arrived - passed - bias - stabilizer.
    """

    node: str
    op: str
    rule: str
    arrived: float
    passed: float
    bias: float
    stabilizer: float

    @property
    def other(self) -> float:
        """What no account explains; zero up to rounding for a rule that conserves."""
        return self.arrived - self.passed - self.bias - self.stabilizer


@dataclass
class Verification:
    """The result of :func:`verify`.

    Attributes:
        outputs: per output of the model, the largest difference to the source, relative to its largest value.
        reference: per relevance output, the largest difference to float64, relative to its largest value (16-bit
            models: in the L2 norm).
        layers: the conservation ledger; empty for methods that do not conserve.
        score: the explained score.
        total: sum of the relevance of all reported inputs.
        absorbed: what biases and stabilizers took.
        narrow: True for a 16-bit model, which is held to wider tolerances.
        providers: execution providers in use.
        placement: where the nodes run, where that is not the CPU alone.
        notes: what could not be checked, and why.
    """

    outputs: dict[str, float]
    reference: dict[str, float]
    layers: list[Layer]
    score: float
    total: float
    absorbed: float
    narrow: bool
    providers: list[str]
    placement: Placement | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def other(self) -> float:
        """Relevance that no account explains, relative to the score."""
        if not self.layers:
            return 0.0
        return abs(self.score - self.total - self.absorbed) / max(abs(self.score), 1e-12)

    @property
    def allowed(self) -> tuple[float, float]:
        """Tolerances of outputs and of relevance."""
        return (
            (_NARROW_OUTPUT_TOLERANCE, _NARROW_RELEVANCE_TOLERANCE)
            if self.narrow
            else (OUTPUT_TOLERANCE, RELEVANCE_TOLERANCE)
        )

    @property
    def ok(self) -> bool:
        """True if everything that was checked is within its tolerance."""
        outputs, relevance = self.allowed
        return (
            all(d <= outputs for d in self.outputs.values())
            and all(d <= relevance for d in self.reference.values())
            and self.other <= CONSERVATION_TOLERANCE
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        rows = [{**layer.__dict__, "other": layer.other} for layer in self.layers]
        return {
            "ok": self.ok,
            "outputs": self.outputs,
            "reference": self.reference,
            "score": self.score,
            "relevance": self.total,
            "absorbed": self.absorbed,
            "other": self.other,
            "providers": self.providers,
            "placement": None if self.placement is None else self.placement.to_json(),
            "layers": rows,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        allowed, providers = self.allowed, ", ".join(self.providers)
        lines = [f"outputs unchanged   {_worst(self.outputs):.1e}  (allowed {allowed[0]:.0e}, relative; {providers})"]
        if self.placement is not None:
            lines.append(f"nodes               {self.placement}")
        if self.reference:
            lines.append(f"relevance, float64  {_worst(self.reference):.1e}  (allowed {allowed[1]:.0e}, relative)")
        if self.layers:
            lines.append(
                f"conservation        {self.other:.1e}  (allowed {CONSERVATION_TOLERANCE:.0e}: "
                "|score - relevance - absorbed| / |score|)"
            )
            lines.append(f"  score {self.score:.6g} = relevance {self.total:.6g} + absorbed {self.absorbed:.6g}")
            header = ("node", "op", "rule", "arrived", "passed", "bias", "stabilizer", "other")
            rows = [
                header,
                *(
                    (r.node, r.op, r.rule, *(f"{n:.4g}" for n in (r.arrived, r.passed, r.bias, r.stabilizer, r.other)))
                    for r in self.layers
                ),
            ]
            widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
            lines += [
                "",
                *(
                    "  ".join(
                        c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
                    )
                    for row in rows
                ),
            ]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("verified" if self.ok else "NOT verified")
        return "\n".join(lines)


def _worst(differences: Mapping[str, float]) -> float:
    return max(differences.values(), default=0.0)


def verify(
    model: ModelLike,
    inputs: Array | Mapping[str, Array] | None = None,
    method: str | os.PathLike[str] | Method = "epsilon_plus_flat",
    *,
    reported: Sequence[str] | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    **options: Any,
) -> Verification:
    """Check an explained model on one sample.

    Args:
        model: as for :func:`onnx_lrp.rewrite`.
        inputs: an array or {"input": array}; only the first sample is used; default: seeded noise in [0, 1).
        method: the method to verify.
        reported: tensors whose relevance is reported, which :func:`onnx_lrp.rewrite` calls ``inputs``; default: all.
        device: where the model runs.
        threads: threads per operator.
        options: as for :func:`onnx_lrp.rewrite`.

    Returns:
        What was found.

    Raises:
        OnnxLrpError: as for :func:`onnx_lrp.rewrite`; InputError where inputs do not fit.
        MemoryError: the float64 run needs more memory than there is.
    """
    source = models.load(model, options.pop("shapes", None))
    chosen = find_method(method)
    conserves = chosen.start != "one"
    accounts: Accounts = "node" if conserves else "none"
    explained = rewrite_with_accounts(source, chosen, inputs=reported, accounts=accounts, **options)
    session = Session(explained.model, device=device, threads=threads, folder=source.folder)
    feeds = _sample(session, inputs)
    found = session.run(feeds)
    plain = Session(source.original, device=device, threads=threads, folder=source.folder).run(
        {k: v for k, v in feeds.items() if k in session.inputs}
    )
    outputs = {name: _difference(found[name], value) for name, value in plain.items()}
    fed, providers = set(session.inputs), session.providers
    del session  # the float64 run needs the memory that it holds
    places = None
    if providers[0] != CPU:
        places = placement(explained.model, feeds, device=device, threads=threads, folder=source.folder)
    notes: list[str] = []
    names = explained.relevance.values()
    narrow = any(t.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16) for t in source.weights.values())
    compare = _mean_difference if narrow else _difference

    def run(extra: Sequence[str]) -> dict[str, Array]:
        if not extra:
            return {}
        wider = _with_outputs(explained.model, extra)
        return Session(wider, device=device, threads=threads, folder=source.folder).run(feeds, extra)

    try:
        integers = run(_quantised(source))
        exact = run_double(explained.model, feeds, integers)
        allowed = _NARROW_RELEVANCE_TOLERANCE if narrow else RELEVANCE_TOLERANCE
        if any(compare(found[n], exact[n]) > allowed for n in names):
            winners, count = _ties(explained.model, feeds, integers, run)
            if count:
                exact = run_double(explained.model, feeds, integers | winners)
                notes.append(
                    f"in {count} windows of pools the largest values are equal up to rounding, and float64 picks "
                    "another: relevance is compared for the same winners"
                )
    except MemoryError:  # that says nothing about the model, so it must not pass as verified
        raise
    except Exception as error:  # the reference implementation lacks operators and forms here and there
        exact = found
        notes.append(
            f"no float64 reference: ONNX's reference implementation fails ({' '.join(str(error).split())[:120]}); "
            "the ledger is of the float32 run"
        )
    total = sum(
        float(found[name].astype(np.float64).sum()) for tensor, name in explained.relevance.items() if tensor in fed
    )
    reference = {} if exact is found else {n: compare(found[n], exact[n]) for n in names}
    return Verification(
        outputs,
        reference,
        _layers(explained, exact) if conserves else [],
        float(found["score"].sum()),
        total,
        float(found["absorbed"].sum()) if conserves else 0.0,
        narrow,
        providers,
        places,
        notes,
    )


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A model with further tensors among its outputs."""
    wider = onnx.ModelProto()
    wider.CopyFrom(model)
    own = {o.name for o in model.graph.output}
    wider.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in own)
    return wider


def _quantised(source: models.Source) -> list[str]:
    """What the quantised operators of a model make: a float64 run must not round to other integers."""
    return [
        name
        for node in source.skeleton.graph.node
        if node.op_type in QUANTIZED and node.op_type != "DequantizeLinear" and node.domain in ("", "ai.onnx")
        for name in node.output
        if name
    ]


def _ties(
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    integers: Mapping[str, Array],
    run: Callable[[Sequence[str]], dict[str, Array]],
) -> tuple[dict[str, Array], int]:
    """The winners that pools have in the runtime, where float64 has others of the same value; and how many these are.

    A winner that is smaller in float64 by more than rounding is no tie: it is left out, and the difference stands.
    """
    pools = [n for n in model.graph.node if n.op_type == "MaxPool" and len(n.output) > 1]
    here = run([n.output[1] for n in pools])
    wider = _with_outputs(model, [name for n in pools for name in (n.input[0], *n.output)])
    there = run_double(wider, feeds, integers)
    winners, count = {}, 0
    for node in pools:
        x, y, places = there[node.input[0]], there[node.output[0]], here[node.output[1]]
        lost = np.abs(y - x.reshape(-1)[places]).max(initial=0.0)
        others = int((places != there[node.output[1]]).sum())
        if others and lost <= _TIE * np.abs(x).max(initial=0.0):
            winners[node.output[1]], count = places, count + others
    return winners, count


def _sample(session: Session, inputs: Array | Mapping[str, Array] | None) -> dict[str, Array]:
    """The first sample of what was given, or seeded noise in the shapes that the model declares."""
    if inputs is None:
        return noise(session.specs())
    given = inputs if isinstance(inputs, Mapping) else {next(iter(session.inputs)): inputs}
    feeds = {}
    for name, array in given.items():
        if name not in session.inputs and name not in session.optional:
            raise InputError(f"the model has no input '{name}'; inputs are {', '.join(session.inputs)}")
        info = session.inputs.get(name) or session.optional[name]
        rows = next(iter(info.shape), 0)
        data = session.checked(name, array, rows if isinstance(rows, int) else None)
        # One sample, or as many as a fixed first axis wants: the last one is repeated.
        wanted = np.arange(rows if isinstance(rows, int) else 1)
        feeds[name] = np.take(data, np.minimum(wanted, len(data) - 1), 0) if data.ndim else data
    missing = [n for n in session.inputs if n not in feeds]
    if missing:
        raise InputError(f"input '{missing[0]}' is missing; the model needs {', '.join(session.inputs)}")
    return feeds


def _difference(found: Array, expected: Array) -> float:
    if not found.size:
        return 0.0
    scale = float(np.abs(expected.astype(np.float64)).max()) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max()) / scale


def _mean_difference(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / (float(np.linalg.norm(expected)) or 1.0)


def _layers(explained: Explained, results: Mapping[str, Array]) -> list[Layer]:
    """The ledger by node, in the order of the walk."""
    rules = {row.node: row for row in explained.table}
    accounts: dict[str, dict[str, float]] = {}
    for entry in explained.ledger:
        account = accounts.setdefault(entry.node, {"out": 0.0, "in": 0.0, "bias": 0.0, "stabilizer": 0.0})
        account[entry.account] += float(results[entry.output].sum())
    return [
        Layer(node, rules[node].op, rules[node].rule, a["out"], a["in"], a["bias"], a["stabilizer"])
        for node, a in accounts.items()
        if node in rules
    ]
