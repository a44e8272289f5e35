"""The pass that sees operators of ai.onnx.ml as primitives of ai.onnx, as scikit-learn's exporters write them.

The primitives stand beside the source's nodes and are small: linear models, scalers, normalizers, imputers. Where the
text of the standard leaves a choice, they compute what ONNX Runtime computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from onnx_lrp.adjoints.shapes import ints
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.inference import infer, named
from onnx_lrp.view import View

DOMAIN = "ai.onnx.ml"

_CATEGORIES = "categories have no derivative"
_NUMBERS = "explain a tensor before it with output=, or feed the encoded numbers to the model"
_TREE = (
    "a decision tree has no derivative: its output is constant between its thresholds",
    "use a method made for trees (TreeSHAP), or train a linear model or a network",
)
_SVM = (
    "kernel machines are not covered",
    "train a linear one (in scikit-learn LinearSVC, LinearSVR, SGDClassifier), which exports as a linear model",
)
_REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(["TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"], _TREE),
    **dict.fromkeys(["SVMClassifier", "SVMRegressor"], _SVM),
    **dict.fromkeys(
        ["OneHotEncoder", "LabelEncoder", "CategoryMapper", "DictVectorizer", "CastMap"], (_CATEGORIES, _NUMBERS)
    ),
    "Binarizer": ("a threshold has no derivative: its output is constant on both sides", _NUMBERS),
    "ZipMap": ("it turns numbers into dictionaries", "export with options={id(model): {'zipmap': False}}"),
}


class _Body:
    """The primitives of one node.

    Attributes:
        e: the emitter.
        call: the node.
        calls: its primitives, in order; one that other nodes share is in the view once.
    """

    def __init__(self, e: Emitter, call: Call, present: set[int]):
        self.e, self.call, self.calls, self._present = e, call, [], present

    calls: list[Call]

    def op(self, kind: str, *inputs: Any, **attrs: Any) -> Value:
        """Emit a primitive, as part of the view."""
        value = self.e.op(kind, *inputs, **attrs)
        maker = self.e.producers.get(value.name)
        if maker is not None and id(maker) not in self._present:
            maker.note = f"part of {self.call.op}"
            self._present.add(id(maker))
            self.calls.append(maker)
        return value

    def floats(self, index: int = 0) -> Value:
        """An input as float32, which all of these operators compute in."""
        x = self.call.given(index)
        return x if x.dtype == np.float32 else self.op("Cast", x, to=onnx.TensorProto.FLOAT)

    def numbers(self, name: str) -> Any:
        """A list of numbers among the attributes, as float32."""
        return np.array(self.call.attrs.get(name) or [], np.float32)


def see_primitives(v: View) -> None:
    """See the operators of ai.onnx.ml that have a derivative as primitives; say of the others why they have none."""
    if not any(call.domain == DOMAIN for call in v.calls):
        return
    _without_nan(v)
    replaced: dict[Value, Value] = {}
    calls: list[Call] = []
    present = {id(call) for call in v.calls}
    for call in v.calls:
        call.inputs = tuple(replaced.get(x, x) if x is not None else None for x in call.inputs)
        see = _SEEN.get(call.op) if call.domain == DOMAIN else None
        body = _Body(v.e, call, present)
        if see is not None:
            with v.e.scope(call.site, doc=f"{call.op} {call.site} in primitives"):
                place, result = see(body)
            if result is not None:
                calls += body.calls
                replaced[place] = result
                continue
        elif call.domain == DOMAIN:
            call.refused = _REFUSED.get(call.op)
        _infer_again(v.e, call)
        calls.append(call)
    v.calls = calls
    v.rewire(replaced)


def _infer_again(e: Emitter, call: Call) -> None:
    """Learn the ranks of outputs that could not be known when the source was read, for those of inputs were not."""
    if call.domain or all(o is None or o.facts.shape is not None for o in call.outputs):
        return
    names = [f"_{k}" if o is None else o.name for k, o in enumerate(call.outputs)]
    known = {v.name: e.array(v) for v in call.inputs if v is not None and v.facts.const and v.dtype.kind == "i"}
    integers = {name: array for name, array in known.items() if array is not None}
    try:
        inferred = infer(call.op, call.inputs, names, call.attrs, e.opset, integers)
    except Exception:  # inference rejects what it does not know in words of its own; then nothing is learnt
        return
    for output, facts in zip(call.outputs, inferred, strict=True):
        if output is not None:
            output.facts = replace(facts, shape=named(facts.shape, output.name), const=output.facts.const)


def see_logits_of_two_classes(v: View) -> None:
    """See Concat(1 - sigmoid(z), sigmoid(z)) as sigmoid(Concat(-z, z)): two classes with a logit each."""
    makers = v.producers()
    calls: list[Call] = []
    for call in v.calls:
        calls.append(call)
        logits = [_logit(v, makers, x) for x in call.inputs] if call.op == "Concat" and not call.domain else [None]
        made = [part for part in logits if part is not None]
        if len(made) < len(logits) or not any(negated for _, negated in made):
            continue
        with v.e.scope(call.site, doc="1 - sigmoid(z) as sigmoid(-z)"):
            inputs = [v.e.op("Neg", z) if negated else z for z, negated in made]
            joined = v.e.op("Concat", *inputs, shape=call.output.facts.shape, **call.attrs)
        calls[-1:] = [
            *(Call("Neg", (z,), (x,), {}, call.site) for x, (z, negated) in zip(inputs, made, strict=True) if negated),
            Call("Concat", tuple(inputs), (joined,), call.attrs, call.site),
            Call("Sigmoid", (joined,), call.outputs, {}, call.site, note="1 - sigmoid(z) seen as sigmoid(-z)"),
        ]
    v.calls = calls


def _logit(v: View, makers: dict[Value, Call], x: Value | None) -> tuple[Value, bool] | None:
    """z, and whether it is negated, if a tensor is sigmoid(z) or 1 - sigmoid(z)."""
    call = makers.get(x) if x is not None else None
    if call is None or call.domain:
        return None
    if call.op == "Sigmoid":
        return call.given(0), False
    one = v.e.array(call.input(0)) if call.op == "Sub" else None
    if one is None or not np.all(one == 1):
        return None
    inner = _logit(v, makers, call.given(1))
    return None if inner is None or inner[1] else (inner[0], True)


def _without_nan(v: View) -> None:
    """Where missing values (NaN) are imputed, see 0 in their place: they get no relevance, and not NaN."""
    missing = [c for c in v.calls if c.domain == DOMAIN and c.op == "Imputer" and _imputes_nan(c)]
    if not missing:
        return
    for x in {*(x for x in v.inputs.values() if x.dtype.kind == "f"), *(c.given(0) for c in missing)}:
        with v.e.scope(x.name, doc=f"{x.name} with 0 for missing values"):
            clean = v.e.op("Where", v.e.op("IsNaN", x), v.e.const(0, x.dtype), x, shape=x.facts.shape)
        v.inputs = {name: clean if other is x else other for name, other in v.inputs.items()}
        for call in v.calls:
            call.outputs = tuple(clean if o is x else o for o in call.outputs)
            if call in missing and call.inputs[0] is x:
                call.attrs = call.attrs | {"with_nan": x}
        v.rewire({x: clean})


def _imputes_nan(call: Call) -> bool:
    return bool(np.isnan(call.attrs.get("replaced_value_float", 0.0)))


# ---- one function per operator: (the tensor of the source, what stands for it) -------------------------------------

_Seen = tuple[Value, Value | None]


def _scaler(b: _Body) -> _Seen:
    """(x - offset) * scale."""
    return b.call.output, b.op("Mul", b.op("Sub", b.floats(), b.numbers("offset")), b.numbers("scale"))


def _normalizer(b: _Body) -> _Seen:
    """Each row over its largest number (with its sign, as ONNX Runtime has it), or over its L1 or L2 norm."""
    x, norm = b.floats(), b.call.attrs.get("norm", "MAX")
    if norm == "MAX":
        return b.call.output, b.op("Div", x, b.op("ReduceMax", x, ints(b.e, [-1]), keepdims=1))
    return b.call.output, b.op("LpNormalization", x, axis=-1, p=1 if norm == "L1" else 2)


def _imputer(b: _Body) -> _Seen:
    """One number, or one per feature, in place of a missing one."""
    x, numbers = b.call.given(0), b.numbers("imputed_value_floats")
    if x.dtype.kind != "f" or not numbers.size:  # integers carry no relevance
        return b.call.output, None
    if _imputes_nan(b.call):
        absent = b.e.op("IsNaN", b.call.attrs["with_nan"])
    else:
        absent = b.e.op("Equal", x, b.call.attrs.get("replaced_value_float", 0.0))
    return b.call.output, b.op("Where", absent, b.e.const(numbers, x.dtype), x)


def _rows(b: _Body) -> Value:
    """The input as rows of features."""
    x = b.floats()
    return x if x.rank == 2 else b.op("Reshape", x, ints(b.e, [1, -1]))


def _linear(b: _Body, weights: Any, intercepts: Any) -> Value:
    """X W' + b for weights (outputs, features)."""
    return b.op("Gemm", _rows(b), np.ascontiguousarray(weights.T), intercepts if intercepts.size else None)


def _linear_regressor(b: _Body) -> _Seen:
    """X W' + b, one column per target."""
    targets, after = int(b.call.attrs.get("targets", 1)), b.call.attrs.get("post_transform", "NONE")
    scores = _linear(b, b.numbers("coefficients").reshape(targets, -1), b.numbers("intercepts"))
    # Of a single target ONNX Runtime computes neither the logistic function nor a softmax.
    return b.call.output, scores if targets == 1 and after != "PROBIT" else _transformed(b, scores, after)


def _linear_classifier(b: _Body) -> _Seen:
    """Scores X W' + b and what follows them; two classes may share one row w, whose score is that of the second."""
    intercepts, attrs = b.numbers("intercepts"), b.call.attrs
    labels = len(attrs.get("classlabels_ints") or attrs.get("classlabels_strings") or [])
    weights, after = b.numbers("coefficients").reshape(max(intercepts.size, 1), -1), attrs.get("post_transform", "NONE")
    scores_name = b.call.outputs[1] if len(b.call.outputs) > 1 else None
    if scores_name is None:
        return b.call.output, None
    if len(weights) == 1 and labels == 2:
        logistic = after == "LOGISTIC"
        if after == "PROBIT":
            _transformed(b, scores_name, after)
            return scores_name, None
        # The first class has the score 1 - z, or the probability 1 - sigmoid(z) = sigmoid(-z).
        weights = np.concatenate([-weights, weights])
        intercepts = np.concatenate([(0.0 if logistic else 1.0) - intercepts, intercepts]).astype(np.float32)
        after = "LOGISTIC" if logistic else "NONE"
    result = _transformed(b, _linear(b, weights, intercepts), after)
    return scores_name, result


def _transformed(b: _Body, scores: Value, after: str) -> Value | None:
    """What a linear model makes of its scores; None, and refused, for what only probit models have."""
    if after == "NONE":
        return scores
    if after == "LOGISTIC":
        return b.op("Sigmoid", scores)
    if after == "SOFTMAX":
        return b.op("Softmax", scores, axis=-1)
    b.call.refused = (f"post_transform {after} is not covered", "explain a model with NONE, LOGISTIC or SOFTMAX")
    return None


def _feature_vectorizer(b: _Body) -> _Seen:
    """Columns side by side."""
    parts = [b.floats(i) for i in range(len(b.call.inputs))]
    rows = [x if x.rank == 2 else b.op("Reshape", x, ints(b.e, [1, -1])) for x in parts]
    return b.call.output, b.op("Concat", *rows, axis=1)


def _array_feature_extractor(b: _Body) -> _Seen:
    """Columns by index."""
    x = b.call.given(0)
    if x.dtype.kind != "f":
        return b.call.output, None
    rows = x if x.facts.shape is None or x.rank > 1 else b.op("Reshape", x, ints(b.e, [1, -1]))
    return b.call.output, b.op("Gather", rows, b.e.op("Reshape", b.call.given(1), ints(b.e, [-1])), axis=-1)


_SEEN: dict[str, Callable[[_Body], _Seen]] = {
    "Scaler": _scaler,
    "Normalizer": _normalizer,
    "Imputer": _imputer,
    "LinearRegressor": _linear_regressor,
    "LinearClassifier": _linear_classifier,
    "FeatureVectorizer": _feature_vectorizer,
    "ArrayFeatureExtractor": _array_feature_extractor,
}
