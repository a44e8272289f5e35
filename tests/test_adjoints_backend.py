"""Every registered adjoint against the single-node cases of ONNX's own backend test data, in float64.

A case is found by its operator: whatever is registered is tested. What cannot be tested is listed with its reason, and
the list is part of the test.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.quantization import ROUND_TRIP
from onnx_lrp.errors import ModelError
from onnx_lrp.opsets import opset_of
from onnx_lrp.reference import to_double
from tests.adjoint_reference import MENDED, run_reference
from tests.adjoint_tools import EXACT, attributes, close, cotangents_for, gradient_model, off_slope

autograd = pytest.importorskip("tests.adjoint_torch").autograd
TORCH = pytest.importorskip("tests.adjoint_torch").TORCH

NEWEST = 26  # the newest opset that ONNX Runtime loads
# Inputs that an operator holds constant, by design.
HELD = {"BatchNormalization": (1, 2, 3, 4)}


@dataclass(frozen=True)
class Trial:
    """One case of the backend tests, in float64."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    reason: str = ""

    @property
    def node(self) -> onnx.NodeProto:
        return self.model.graph.node[0]

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def wanted(self) -> list[str]:
        """Inputs to differentiate by."""
        held = [self.node.input[i] for i in HELD.get(self.op, ())]
        return [n for n in self.node.input if n in self.feeds and self.feeds[n].dtype == np.float64 and n not in held]

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


def _array(x: Any) -> np.ndarray | None:
    x = numpy_helper.to_array(x) if isinstance(x, TensorProto) else x
    if not isinstance(x, np.ndarray | np.generic):
        return None
    if x.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        return np.asarray(x)
    return np.nan_to_num(np.asarray(x, np.float64), nan=0.5, posinf=2, neginf=-2)


def _reason(trial: Trial) -> str:
    """Why a case cannot be tested; empty where it can."""
    node, model = trial.node, trial.model
    known = onnx.defs.get_schema(node.op_type, opset_of(model)).attributes
    if any(a.name not in known for a in node.attribute):
        return "newer"
    if any(x is None for x in trial.feeds.values()):
        return "sequence or optional"
    if not trial.wanted or all(o.type.tensor_type.elem_type != TensorProto.DOUBLE for o in model.graph.output):
        return "no float that depends on a float"
    flag = trial.feeds.get(node.input[2]) if node.op_type == "Dropout" and len(node.input) > 2 else None
    given = attributes(node, opset_of(model))
    if given.get("training_mode", 0) or (flag is not None and flag.any()):
        return "training mode"
    if given.get("reduction", "none") not in ("none", "add"):
        return "refused"
    if given.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "refused"
    return ""


def _held_inside(model: onnx.ModelProto, inputs: Sequence[Any]) -> tuple[onnx.ModelProto, list[Any]]:
    """The model with held float inputs (in Resize: the region and the scales, which stay float32) as its constants."""
    if model.graph.node[0].op_type != "Resize":
        return model, list(inputs)
    held = set(model.graph.node[0].input[1:3])
    copy, rest = onnx.ModelProto(), []
    copy.CopyFrom(model)
    del copy.graph.input[:]
    for info, x in zip(model.graph.input, inputs, strict=True):
        if info.name in held:
            array = numpy_helper.to_array(x) if isinstance(x, TensorProto) else x
            copy.graph.initializer.append(numpy_helper.from_array(array, info.name))
        else:
            copy.graph.input.append(info)
            rest.append(x)
    return copy, rest


@functools.cache
def trials() -> dict[str, Trial]:
    """All single-node cases whose operator has an adjoint."""
    found = {}
    for case in load_model_tests(kind="node"):
        nodes = case.model.graph.node
        operator = OPERATORS.get(nodes[0].op_type)
        if len(nodes) != 1 or nodes[0].domain or operator is None or operator.adjoint is None:
            continue
        (inputs, results), *_ = case.data_sets
        given, inputs = _held_inside(case.model, inputs)
        model = to_double(given)
        model.opset_import[0].version = min(opset_of(model), NEWEST)
        feeds = {i.name: _array(x) for i, x in zip(model.graph.input, inputs, strict=True)}
        outputs = {o.name: _array(x) for o, x in zip(model.graph.output, results, strict=True)}
        trial = Trial(case.name, model, feeds, outputs)
        found[case.name] = replace(trial, reason=_reason(trial))
    return found


def uncovered() -> dict[str, str]:
    """Cases that cannot be tested, and why."""
    return {name: trial.reason for name, trial in trials().items() if trial.reason}


def _enrolled() -> list[Trial]:
    covered = [t for t in trials().values() if not t.reason]
    mixed = [t.frozen() for t in covered if any(x.dtype != np.float64 for x in t.feeds.values())]
    return covered + mixed


def _off_slope(trial: Trial, model: onnx.ModelProto, x: str) -> float | None:
    cotangents = cotangents_for(run_reference(trial.model, trial.feeds))
    found = run_reference(model, {**trial.feeds, **cotangents})[f"gradient/{x}"]
    assert found.shape == trial.feeds[x].shape
    linear = OPERATORS[trial.op].verb in ("linear", "bilinear")
    return off_slope(linear, trial.model, trial.feeds, x, cotangents, found) if found.size else 0.0


@pytest.mark.parametrize("trial", _enrolled(), ids=lambda trial: trial.name)
def test_adjoint(trial):
    model = gradient_model(trial.model, trial.wanted)
    for x in trial.wanted:
        error = _off_slope(trial, model, x)
        if error is None:  # at a kink: a small step aside there is a slope
            rng = np.random.default_rng(2)
            moved = {
                n: a + rng.uniform(0.01, 0.05, a.shape) if n in trial.wanted else a for n, a in trial.feeds.items()
            }
            error = _off_slope(replace(trial, feeds=moved), model, x)
        assert error is not None
        assert error <= 1, x


@pytest.mark.parametrize(
    "trial",
    [
        t
        for t in trials().values()
        if not t.reason
        and t.op in TORCH
        and OPERATORS[t.op].verb in ("pointwise", "nonlinear")
        and all(x.size for x in t.feeds.values())
    ],
    ids=lambda trial: trial.name,
)
def test_adjoint_is_that_of_torch(trial):
    """At the very points of the data, kinks and ties among them."""
    cotangents = cotangents_for(run_reference(trial.model, trial.feeds))
    found = run_reference(gradient_model(trial.model, trial.wanted), {**trial.feeds, **cotangents})
    names = list(trial.node.input)
    inputs = [trial.feeds.get(name) for name in names]
    (cotangent,) = cotangents.values()
    given = attributes(trial.node, opset_of(trial.model))
    expected = autograd(trial.op, given, inputs, cotangent, [names.index(x) for x in trial.wanted])
    for x, gradient in zip(trial.wanted, expected, strict=True):
        assert close(found[f"gradient/{x}"], gradient, EXACT), x


@pytest.mark.parametrize(
    "trial", [t for t in trials().values() if not t.reason and t.op in MENDED], ids=lambda trial: trial.name
)
def test_the_oracle_computes_what_onnx_expects(trial):
    """Where onnx's own implementation was mended, it gives the outputs that come with the case."""
    (name, expected), *_ = trial.outputs.items()
    assert close(run_reference(trial.model, trial.feeds)[name], expected, 1e-3)


@pytest.mark.parametrize("trial", [t for t in trials().values() if t.reason == "training mode"], ids=lambda t: t.name)
def test_training_mode_is_refused(trial):
    with pytest.raises(ModelError, match="evaluation mode"):
        gradient_model(trial.model, trial.wanted)


@pytest.mark.parametrize("trial", [t for t in trials().values() if t.reason == "refused"], ids=lambda t: t.name)
def test_what_cannot_be_explained_is_refused(trial):
    with pytest.raises(ModelError, match="cannot be explained"):
        gradient_model(trial.model, trial.wanted)


def test_what_is_not_covered_is_known():
    reasons = Counter(uncovered().values())
    print(f"\n{len(trials()) - reasons.total()} of {len(trials())} cases are tested; not tested: {dict(reasons)}")
    assert set(reasons) == {
        "no float that depends on a float",
        "sequence or optional",
        "training mode",
        "refused",
        "newer",
    }
    assert reasons["sequence or optional"] + reasons["training mode"] <= 10


def test_every_operator_is_met():
    met = {t.op for t in trials().values() if not t.reason} | {"GlobalLpPool", "Trilu"}  # in test_adjoints_random
    met |= {ROUND_TRIP}  # of the view alone: in test_quantized
    assert {name for name, operator in OPERATORS.items() if operator.adjoint is not None} == met
