"""Pipelines of scikit-learn, freshly trained and exported; what they compute by scikit-learn itself.

They need packages that nothing else here needs, so they have a command of their own:

    pip install scikit-learn skl2onnx
    python -m pytest -m heavy tests/test_sklearn.py
"""

from __future__ import annotations

import numpy as np
import pytest

import onnx_lrp
from onnx_lrp.errors import InputError, UnsupportedOps
from onnx_lrp.verify import verify

pytestmark = pytest.mark.heavy
pytest.importorskip("skl2onnx")
nets = pytest.importorskip("exporters.sklearn_nets")
EXPLAINED = sorted(set(nets.RECIPES) - {"tree"})
SCORED = ("logistic_regression", "logistic_regression_of_two", "imputed", "columns", "normalized")


@pytest.mark.parametrize("name", EXPLAINED)
def test_a_pipeline_is_explained(name: str) -> None:
    """Its outputs are those of scikit-learn; relevance and what biases take make up the score, which is a logit."""
    net = nets.build(name)
    explainer = onnx_lrp.Explainer(net.model, "epsilon", device="cpu", ledger=True)
    found = explainer(net.samples)
    outputs = list(found.outputs.values())
    if hasattr(net.pipeline, "predict_proba"):
        np.testing.assert_array_equal(outputs[0], net.pipeline.predict(net.samples))
        np.testing.assert_allclose(outputs[1], net.pipeline.predict_proba(net.samples), atol=2e-4)
        np.testing.assert_array_equal(found.target, outputs[0])
        assert (found.score > 1).any(), "a logit, no probability"
    else:
        np.testing.assert_allclose(outputs[0][:, 0], net.pipeline.predict(net.samples), rtol=1e-3)
    whole = found.relevance["X"].sum(1) + found.absorbed
    np.testing.assert_allclose(whole, found.score, rtol=1e-4, atol=1e-4)
    for method in ("epsilon", "gradient"):
        verification = verify(net.model, net.samples[:1], method)
        assert verification.ok, str(verification)
        assert not verification.notes


@pytest.mark.parametrize("name", SCORED)
def test_gradients_are_differences_of_the_decision(name: str) -> None:
    """Of what scikit-learn calls the decision function, by central differences."""
    net = nets.build(name)
    x = net.samples[:4].astype(np.float64)
    explainer = onnx_lrp.Explainer(net.model, "gradient", device="cpu", target=1)
    found = explainer(net.samples[:4]).relevance["X"]
    decide = net.pipeline.decision_function
    for column in range(x.shape[1]):
        step = np.zeros_like(x)
        step[:, column] = 1e-4 * np.abs(net.samples[:, column]).max()
        slope = (decide(x + step) - decide(x - step)) / (
            2 * step[:, column][:, None] if decide(x).ndim > 1 else 2 * step[:, column]
        )
        slope = slope[:, 1] if slope.ndim > 1 else slope
        np.testing.assert_allclose(found[:, column], slope, rtol=2e-2, atol=2e-3 * np.abs(found).max())


def test_missing_values() -> None:
    net = nets.build("imputed")
    x = net.samples.copy()
    x[::3, 1] = np.nan
    found = onnx_lrp.Explainer(net.model, "epsilon", device="cpu")(x)
    assert np.isfinite(found.relevance["X"]).all()
    assert (found.relevance["X"][::3, 1] == 0).all()


def test_what_cannot_be_explained_says_so() -> None:
    with pytest.raises(UnsupportedOps, match="a decision tree has no derivative"):
        onnx_lrp.rewrite(nets.build("tree").model)
    with pytest.raises(InputError, match="'zipmap': False"):
        onnx_lrp.rewrite(nets.build("logistic_regression", zipmap=True).model)
