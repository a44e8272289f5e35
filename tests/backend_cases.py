"""All node cases of ONNX's backend tests, in float64, each with a verdict: tested, or why not.

``python -m tests.backend_cases`` prints the verdicts.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.bodies import has_body
from onnx_lrp.opsets import opset_of
from onnx_lrp.own_bodies import OWN_BODIES
from onnx_lrp.reference import to_double
from tests.adjoint_reference import run_onnxruntime
from tests.adjoint_tools import attributes

NEWEST, NEWEST_IR = 26, 13  # the newest that ONNX Runtime loads
TESTED = "tested"
# Verdicts on what has no derivative to test, whatever is built here.
NO_PATH = "no float output depends on a float input through operators that have a derivative"
FOREIGN = "not of ai.onnx"
NEWER = f"newer than opset {NEWEST}"
UNTYPED = "sequences or optionals"
# Verdicts on what has a derivative and is not tested.
REFUSED = "refused by design"
ELSEWHERE = "tested elsewhere"
MISSING = "no adjoint"
OPEN = "not covered"

# Control flow, recurrent layers, quantised operators and their like have tests of their own.
OTHERS = {"If", "Loop", "Scan", "SequenceMap", "LSTM", "GRU", "RNN"}
OTHERS |= {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}
CONVERTED = {"Scatter", "Upsample"}  # old operators for which reading the model puts new ones
CONSTANT = {"Col2Im", "DFT"}  # want the shape of a block, and the axis, as constants
# Why an operator (with an attribute) is refused.
# Cases that are not covered, and why.
INFINITE = "an output holds -inf, which no cotangent goes with"
COARSE = "its softmax runs in float32 whatever the rest does, too coarse for small steps: in test_attention"
NOT_COVERED = {
    "test_attention_24_qk_matmul_output_mode3_softmax_precision": COARSE,
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal": INFINITE,
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal": INFINITE,
}
TRAINING = "training mode draws or updates numbers: an explanation wants the model in evaluation mode"
LARGEST = "mode=max keeps the largest of products with weights, not of pixels"
# Inputs that an operator holds constant, by design.
HELD = {"BatchNormalization": (1, 2, 3, 4), "RoiAlign": (1,), "Dropout": (1,), "OneHot": (0, 1)}


@dataclass(frozen=True)
class Trial:
    """One case, in float64.

    Attributes:
        name: its name.
        model: the model.
        feeds: its inputs; None for what is no tensor.
        outputs: what the case expects.
        runs: ONNX Runtime runs it as it came.
        verdict: tested, or one of the verdicts above.
        why: more on that.
    """

    name: str
    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    runs: bool = False
    verdict: str = TESTED
    why: str = ""

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        return self.model.graph.node

    @property
    def op(self) -> str:
        """Its operator; of a case of several nodes that of the function whose body they are."""
        return self.nodes[0].op_type if len(self.nodes) == 1 else "several"

    @property
    def wanted(self) -> list[str]:
        """Inputs to differentiate by."""
        held = {n.input[i] for n in self.nodes for i in HELD.get(n.op_type, ()) if i < len(n.input)}
        read = {name for n in self.nodes for name in n.input} - held
        return [n for n, x in self.feeds.items() if x is not None and x.dtype == np.float64 and n in read]

    def frozen(self) -> Trial:
        """The same with integer and boolean inputs as constants of the model."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        fixed = {name: x for name, x in self.feeds.items() if x.dtype != np.float64}
        free = [i for i in model.graph.input if i.name not in fixed]
        del model.graph.input[:]
        model.graph.input.extend(free)
        model.graph.initializer.extend(numpy_helper.from_array(x, name) for name, x in fixed.items())
        feeds = {name: x for name, x in self.feeds.items() if name not in fixed}
        return replace(self, name=f"{self.name}-constant", model=model, feeds=feeds)


@functools.cache
def trials() -> dict[str, Trial]:
    """All node cases, by name."""
    return {case.name: _trial(case) for case in load_model_tests(kind="node")}


def differentiable() -> list[Trial]:
    """Cases in which a float depends on a float, and which ONNX Runtime runs."""
    verdicts = (TESTED, REFUSED, ELSEWHERE, MISSING, OPEN)
    return [t for t in trials().values() if t.runs and t.verdict in verdicts]


def _trial(case: Any) -> Trial:
    (inputs, results), *_ = case.data_sets
    given, fed = _held_inside(case.model, inputs)
    if any(n.op_type in CONVERTED for n in given.graph.node):
        given = onnx.version_converter.convert_version(given, 18)
    model = to_double(given)
    for domain in model.opset_import:
        domain.version = min(domain.version, NEWEST) if domain.domain in ("", "ai.onnx") else domain.version
    feeds = {i.name: _array(x) for i, x in zip(model.graph.input, fed, strict=True)}
    if any(n.op_type == "Unique" for n in given.graph.node):  # equal numbers, drawn apart, are no longer one
        feeds = {name: x + 0.01 * np.arange(x.size).reshape(x.shape) for name, x in feeds.items()}
    outputs = {o.name: _array(x) for o, x in zip(model.graph.output, results, strict=True)}
    trial = Trial(case.name, model, feeds, outputs)
    if (len(trial.nodes) > 1 or trial.op in CONSTANT) and all(x is not None for x in feeds.values()):
        trial = replace(trial.frozen(), name=case.name)  # else not even the rank of what a body reduces is known
    verdict, why = _verdict(trial)
    runs = verdict not in (NO_PATH, FOREIGN, NEWER, UNTYPED) and _runs(case.model, inputs)
    return replace(trial, verdict=verdict, why=why, runs=runs)


def _runs(model: onnx.ModelProto, inputs: Sequence[Any]) -> bool:
    """Whether ONNX Runtime runs a case as it came, but for its version."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = min(copy.ir_version, NEWEST_IR)
    for domain in copy.opset_import:
        domain.version = min(domain.version, NEWEST) if not domain.domain else domain.version
    arrays = [numpy_helper.to_array(x) if isinstance(x, TensorProto) else x for x in inputs]
    try:
        run_onnxruntime(copy, dict(zip((i.name for i in model.graph.input), arrays, strict=True)))
    except Exception:  # untyped errors of several kinds, all of them "no"
        return False
    return True


def _array(x: Any) -> np.ndarray | None:
    x = numpy_helper.to_array(x) if isinstance(x, TensorProto) else x
    if not isinstance(x, np.ndarray | np.generic):
        return None
    if x.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        return np.asarray(x)
    return np.nan_to_num(np.asarray(x, np.float64), nan=0.5, posinf=2, neginf=-2)


def _verdict(trial: Trial) -> tuple[str, str]:
    domains = {n.domain for n in trial.nodes} - {"", "ai.onnx"}
    operators = {n.op_type for n in trial.nodes}
    if domains:
        return (ELSEWHERE if "ai.onnx.ml" in domains else FOREIGN), ", ".join(sorted(domains))
    if operators & OTHERS:
        return ELSEWHERE, ", ".join(sorted(operators & OTHERS))
    for node in trial.nodes:
        try:
            known = onnx.defs.get_schema(node.op_type, opset_of(trial.model)).attributes
        except onnx.defs.SchemaError:
            return NEWER, node.op_type
        if any(a.name not in known for a in node.attribute):
            return NEWER, f"an attribute of {node.op_type}"
    if any(x is None for x in (*trial.feeds.values(), *trial.outputs.values())):
        return UNTYPED, ""
    if not _depends(trial):
        return NO_PATH, ""
    if trial.name.removesuffix("_expanded") in NOT_COVERED:
        return OPEN, NOT_COVERED[trial.name.removesuffix("_expanded")]
    for node in trial.nodes:
        given = attributes(node, opset_of(trial.model))
        flag = trial.feeds.get(node.input[2]) if node.op_type == "Dropout" and len(node.input) > 2 else None
        if given.get("training_mode", 0) or (flag is not None and flag.any()):
            return REFUSED, TRAINING
        if node.op_type == "RoiAlign" and given["mode"] == "max":
            return REFUSED, LARGEST
        if not _known(node.op_type, opset_of(trial.model)):
            return MISSING, node.op_type
    return TESTED, ""


def _known(op: str, opset: int) -> bool:
    return op in OPERATORS or op in OWN_BODIES or has_body(op, opset)


def _depends(trial: Trial) -> bool:
    """Whether some float output depends on a wanted input, not through a barrier."""
    reached = set(trial.wanted)
    for node in trial.nodes:
        operator = OPERATORS.get(node.op_type)
        if (operator is None or operator.verb != "barrier") and reached.intersection(node.input):
            reached.update(node.output)
    outputs = trial.model.graph.output
    return any(o.name in reached and o.type.tensor_type.elem_type == TensorProto.DOUBLE for o in outputs)


def _held_inside(model: onnx.ModelProto, inputs: Sequence[Any]) -> tuple[onnx.ModelProto, list[Any]]:
    """The model with held float inputs (in Resize: the region and the scales, which stay float32) as its constants."""
    held = {
        n.input[i]
        for n in model.graph.node
        if n.op_type in ("Resize", "Upsample")
        for i in range(1, min(3, len(n.input)))
    }
    copy, rest = onnx.ModelProto(), []
    copy.CopyFrom(model)
    del copy.graph.input[:]
    for info, x in zip(model.graph.input, inputs, strict=True):
        if info.name in held and info.type.tensor_type.elem_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(x) if isinstance(x, TensorProto) else x
            copy.graph.initializer.append(numpy_helper.from_array(array, info.name))
        else:
            copy.graph.input.append(info)
            rest.append(x)
    return copy, rest


def report() -> str:
    """The verdicts: how many cases, and which of the differentiable ones are not tested."""
    counts = Counter(t.verdict for t in trials().values())
    lines = [f"{len(trials())} node cases of onnx {onnx.__version__}"]
    lines += [f"{count:5}  {verdict}" for verdict, count in counts.most_common()]
    rest = [t for t in differentiable() if t.verdict != TESTED]
    there = [t for t in differentiable() if t.verdict != ELSEWHERE]
    tested = sum(t.verdict == TESTED for t in there)
    lines.append(f"of {len(there)} differentiable cases that ONNX Runtime runs, {tested} are tested; not these:")
    lines += [f"       {t.name}: {t.verdict} ({t.why})" for t in rest]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
