"""Every differentiable node case of ONNX's own backend test data, in float64.

The tests start from all node cases: tests/backend_cases.py gives each a verdict, and prints the list. What cannot be
tested is named here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

import onnx_lrp
from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.quantization import ROUND_TRIP
from onnx_lrp.errors import ModelError, UnsupportedOps
from onnx_lrp.opsets import opset_of
from onnx_lrp.own_bodies import OWN_BODIES
from tests.adjoint_reference import MENDED, run_reference
from tests.adjoint_tools import EXACT, attributes, close, cotangents_for, gradient_model, is_linear, off_slope
from tests.backend_cases import (
    ELSEWHERE,
    MISSING,
    NOT_COVERED,
    OPEN,
    REFUSED,
    TESTED,
    TRAINING,
    Trial,
    differentiable,
    trials,
)

autograd = pytest.importorskip("tests.adjoint_torch").autograd
TORCH = pytest.importorskip("tests.adjoint_torch").TORCH
ENROLLED = [t for t in trials().values() if t.verdict == TESTED]
FROZEN = [t.frozen() for t in ENROLLED if len(t.nodes) == 1 and any(x.dtype != np.float64 for x in t.feeds.values())]
# Differentiable cases that ONNX Runtime runs and that are not tested, each for a reason that has a name.
# Where the mended oracle differs from what the case expects: ONNX Runtime reads the places of a MaxUnpool otherwise;
# the numbers of a Unique are drawn apart.
OTHERWISE = {t.name for t in ENROLLED if t.op == "Unique"} | {"test_maxunpool_export_with_output_shape"}
EXCEPTIONS = {
    "test_batchnorm_example_training_mode": REFUSED,
    "test_batchnorm_epsilon_training_mode": REFUSED,
    "test_optional_get_element_optional_tensor": MISSING,
    "test_optional_get_element_tensor": MISSING,
}


def _off_slope(trial: Trial, model: onnx.ModelProto, x: str) -> float | None:
    cotangents = cotangents_for(run_reference(trial.model, trial.feeds))
    found = run_reference(model, {**trial.feeds, **cotangents})[f"gradient/{x}"]
    assert found.shape == trial.feeds[x].shape
    linear = False
    if len(trial.nodes) == 1:
        (node,) = trial.nodes
        linear = is_linear(node.op_type, list(node.input).index(x), attributes(node, opset_of(trial.model)))
    return off_slope(linear, trial.model, trial.feeds, x, cotangents, found) if found.size else 0.0


@pytest.mark.parametrize("trial", ENROLLED + FROZEN, ids=lambda trial: trial.name)
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
        for t in ENROLLED
        if t.op in TORCH
        and OPERATORS[t.op].verb in ("pointwise", "nonlinear")
        and all(x.size for x in t.feeds.values())
    ],
    ids=lambda trial: trial.name,
)
def test_adjoint_is_that_of_torch(trial):
    """At the very points of the data, kinks and ties among them."""
    cotangents = cotangents_for(run_reference(trial.model, trial.feeds))
    found = run_reference(gradient_model(trial.model, trial.wanted), {**trial.feeds, **cotangents})
    (node,) = trial.nodes
    names = list(node.input)
    inputs = [trial.feeds.get(name) for name in names]
    (cotangent,) = cotangents.values()
    given = attributes(node, opset_of(trial.model))
    expected = autograd(trial.op, given, inputs, cotangent, [names.index(x) for x in trial.wanted])
    for x, gradient in zip(trial.wanted, expected, strict=True):
        assert close(found[f"gradient/{x}"], gradient, EXACT), x


@pytest.mark.parametrize(
    "trial", [t for t in ENROLLED if t.op in MENDED and t.name not in OTHERWISE], ids=lambda trial: trial.name
)
def test_the_oracle_computes_what_onnx_expects(trial):
    """Where onnx's own implementation was mended, it gives the outputs that come with the case."""
    (name, expected), *_ = trial.outputs.items()
    assert close(run_reference(trial.model, trial.feeds)[name], expected, 1e-3)


@pytest.mark.parametrize("trial", [t for t in trials().values() if t.verdict == REFUSED], ids=lambda t: t.name)
def test_what_is_refused_is_refused_in_plain_words(trial):
    with pytest.raises(ModelError, match="evaluation mode" if trial.why == TRAINING else "cannot be explained"):
        gradient_model(trial.model, trial.wanted)


@pytest.mark.parametrize("name", [name for name, verdict in EXCEPTIONS.items() if verdict == MISSING])
def test_what_is_missing_is_listed(name):
    with pytest.raises(UnsupportedOps, match="no adjoint is registered for this operator"):
        onnx_lrp.rewrite(trials()[name].model, "gradient")


def test_nearly_all_differentiable_cases_are_tested():
    """Of those that ONNX Runtime runs; the rest is known by name."""
    here = [t for t in differentiable() if t.verdict != ELSEWHERE]
    tested = [t for t in here if t.verdict == TESTED]
    rest = {t.name: t.verdict for t in here if t.verdict not in (TESTED, OPEN)}
    assert rest == EXCEPTIONS
    assert {t.name.removesuffix("_expanded") for t in trials().values() if t.verdict == OPEN} == set(NOT_COVERED)
    assert len(tested) >= 0.95 * len(here) > 1000


def test_every_operator_is_met():
    met = {n.op_type for t in ENROLLED for n in t.nodes} | {"GlobalLpPool", "Trilu"}  # in test_adjoints_random
    met |= {ROUND_TRIP}  # of the view alone: in test_quantized
    assert met >= {name for name, operator in OPERATORS.items() if operator.adjoint is not None} | set(OWN_BODIES)
