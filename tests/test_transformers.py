"""Transformers of torch by both exporters: attnlrp and cp_lrp against the gradient form of the rules, and LXT itself."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

import onnx_lrp
from onnx_lrp.reference import run_double, to_double
from tests.support import worst

nets = pytest.importorskip("tests.transformer_nets")

BOOKS = {"attnlrp": nets.AttnLRP, "cp_lrp": nets.CPLRP}
CASES = [(name, how) for name in nets.NETS for how in nets.EXPORTS]


def run_single(model, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize(("name", "how"), CASES)
def test_as_the_gradient_form_has_it(name, how, book):
    """In float64 and, by ONNX Runtime, in float32; of another batch and length than it was exported with."""
    model = nets.exported(name, how)
    feeds = nets.inputs_of(name, batch=3, length=7)
    expected = nets.relevance_by(BOOKS[book](), name, feeds)
    exact = run_double(onnx_lrp.rewrite(to_double(model), book, ledger=True).model, feeds)
    assert worst(exact["relevance/x"], expected) < 1e-6
    whole = exact["relevance/x"].reshape(3, -1).sum(1) + exact["absorbed"]
    np.testing.assert_allclose(whole, exact["score"], rtol=1e-6)
    rounded = run_single(onnx_lrp.rewrite(model, book).model, feeds)
    assert worst(rounded["relevance/x"], expected) < 1e-4


@pytest.mark.parametrize(("name", "how"), CASES)
def test_gradient(name, how):
    feeds = nets.inputs_of(name)
    expected = nets.relevance_by(nets.Plain(), name, feeds, times_input=True)
    found = run_double(onnx_lrp.rewrite(to_double(nets.exported(name, how)), "input_x_gradient").model, feeds)
    assert worst(found["relevance/x"], expected) < 1e-6
