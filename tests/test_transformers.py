"""Transformers by both of torch's exporters: attnlrp and cp_lrp against the gradient form of the rules, and LXT."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest

import onnx_lrp
from onnx_lrp.reference import run_double, to_double
from tests.support import worst

pytest.importorskip("torch")
lxt_peer = pytest.importorskip("tests.peers.lxt_peer")
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


def test_integrated_gradients():
    """The mean gradient on the way from black, of the class that the picture itself has."""
    import torch

    feeds, model = nets.inputs_of("vit"), copy.deepcopy(nets.net("vit")).double()
    x = torch.as_tensor(feeds["x"]).double()
    chosen = model(x).argmax(-1, keepdim=True)
    places, weights = np.polynomial.legendre.leggauss(8)
    expected = 0.0
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        step = (x * place).requires_grad_()
        expected = expected + weight * torch.autograd.grad(model(step).gather(1, chosen).sum(), step)[0]
    method = onnx_lrp.IntegratedGradients(steps=8)
    found = run_double(onnx_lrp.rewrite(to_double(nets.exported("vit", "script-18")), method).model, feeds)
    assert worst(found["relevance/x"], (x * expected).numpy()) < 1e-6


LXT = [("attnlrp", name) for name in nets.NETS] + [("cp_lrp", name) for name in nets.NETS]


@pytest.mark.parametrize(("book", "name"), LXT)
def test_as_lxt_has_it_in_its_efficient_form(book, name):
    feeds = nets.inputs_of(name)
    expected = nets.relevance_by(lxt_peer.Efficient(cp=book == "cp_lrp"), name, feeds)
    found = run_double(onnx_lrp.rewrite(to_double(nets.exported(name, "script-18")), book).model, feeds)
    assert worst(found["relevance/x"], expected) < 1e-6


@pytest.mark.parametrize("name", ["bert", "gpt", "llama"])
def test_as_lxt_has_it_in_its_explicit_form(name):
    """Its stabilizers, some of which are fixed, allow for no more digits."""
    feeds = nets.inputs_of(name)
    expected = nets.relevance_by(lxt_peer.Explicit(), name, feeds, times_input=False)
    found = run_double(onnx_lrp.rewrite(to_double(nets.exported(name, "script-18")), "attnlrp").model, feeds)
    assert worst(found["relevance/x"], expected) < 1e-4


@pytest.mark.parametrize("how", ["script-18", "script-20"])
@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("name", nets.NETS)
def test_in_float16(name, how, book):
    """A model in float16 is explained in float32, and as the float32 model is up to what its own rounding changes."""
    feeds = nets.inputs_of(name)
    expected = nets.relevance_by(BOOKS[book](), name, feeds)
    halves = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in feeds.items()}
    found = run_single(onnx_lrp.rewrite(nets.exported(name, how, half=True), book).model, halves)["relevance/x"]
    assert worst(found.astype(np.float64), expected) < 0.05


def test_a_padded_token_has_no_relevance():
    feeds = nets.inputs_of("bert")
    for book in BOOKS:
        found = run_single(onnx_lrp.rewrite(nets.exported("bert", "script-18"), book).model, feeds)["relevance/x"]
        assert not found[1, 4:].any()
        assert found[1, :4].all()


def test_what_is_recognised_is_in_the_table():
    for name, how in CASES:
        table = onnx_lrp.rewrite(nets.exported(name, how), "attnlrp").table
        notes = [row.why.rsplit("; ", 1)[-1] for row in table]
        assert notes.count("attention: scores") == notes.count("attention: values") == 1, (name, how)
        assert notes.count("gated product") == (name == "llama"), (name, how)
