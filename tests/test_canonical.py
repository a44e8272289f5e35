"""Canonical passes change how a model is seen, never what it computes.

Every view is replayed: its calls are emitted again on copies of the inputs, and give the model's own outputs.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lrp import model as models
from onnx_lrp.adjoints.shapes import cast_like
from onnx_lrp.canonical import view
from onnx_lrp.errors import ModelError
from onnx_lrp.reference import to_double
from onnx_lrp.view import View
from tests.adjoint_reference import run_onnxruntime, run_reference
from tests.adjoint_tools import EXACT, SINGLE, close, cotangents_for, feeds_for, gradient_model, network

NORM = "float[{0}] scale, float[{0}] shift, float[{0}] mean, float[{0}] var"


def replayed(proto: onnx.ModelProto, **options: object) -> tuple[View, onnx.ModelProto]:
    """A model's view, and the model with outputs ``replayed/<y>``: all calls emitted again on copies of the inputs."""
    source = models.load(proto)
    v = view(source, **options)
    e = v.e
    copies = {x: x * 1.0 for x in v.inputs.values() if x.dtype.kind == "f"}
    for call in v.calls:
        changes = {i: copies[x] for i, x in enumerate(call.inputs) if x in copies}
        if changes:
            again = e.again(call, changes)
            copies.update((o, a) for o, a in zip(call.outputs, again.outputs, strict=True) if o is not None)
    outputs = [e.rename(cast_like(e, copies[v.value(y)], v.value(y)), f"replayed/{y}") for y in v.outputs]
    return v, models.assemble(source, e.export(outputs), {})


def check(proto: onnx.ModelProto, ops: str, **options: object) -> View:
    """Check which operators are seen, and that replaying them gives the outputs of the original model."""
    v, again = replayed(proto, **options)
    assert " ".join(c.op for c in v.calls) == ops
    double = to_double(proto)
    _, exact = replayed(double, **options)
    for lengths in (5, 6):
        feeds = feeds_for(proto, lengths)
        single = run_onnxruntime(again, feeds)
        for y, expected in run_onnxruntime(proto, feeds).items():
            assert close(single[f"replayed/{y}"], expected, SINGLE if expected.dtype == np.float32 else 1e-2)
        wide = {name: x.astype(np.float64) for name, x in feeds.items()}
        found = run_reference(exact, wide)
        for y, expected in run_reference(double, wide).items():
            assert close(found[y], expected, 0.0)
            assert close(found[f"replayed/{y}"], expected, EXACT)
    return v


CONV, GEMM = "float[N,3,H,W] x, float[4,3,3,2] w", "float[N,3] x, float[3,4] w"
BATCHNORM = "BatchNormalization <epsilon: float = 0.01> (c, scale, shift, mean, var)"
OUT4, OUT3, OUT2 = "float[a,b,c,d] y", "float[a,b,c] y", "float[a,b] y"

FOLDED = {
    # BatchNormalization to the left
    "conv_batchnorm": (f"{CONV}, {NORM.format(4)} => {OUT4}", f"c = Conv(x, w) y = {BATCHNORM}", "Conv"),
    "conv_bias_batchnorm": (
        f"{CONV}, float[4] b, {NORM.format(4)} => {OUT4}",
        f"c = Conv <pads = [1, 0, 1, 1]> (x, w, b) y = {BATCHNORM}",
        "Conv",
    ),
    "conv_groups_batchnorm": (
        f"float[N,4,H,W] x, float[6,2,3,3] w, {NORM.format(6)} => {OUT4}",
        f"c = Conv <group = 2> (x, w) y = {BATCHNORM}",
        "Conv",
    ),
    "conv_add_batchnorm": (
        f"{CONV}, float[4,1,1] b, {NORM.format(4)} => {OUT4}",
        f"z = Conv(x, w) c = Add(b, z) y = {BATCHNORM}",
        "Conv",
    ),
    "transposed_batchnorm": (
        f"float[N,3,H,W] x, float[3,2,3,3] w, {NORM.format(2)} => {OUT4}",
        f"c = ConvTranspose <strides = [2, 1]> (x, w) y = {BATCHNORM}",
        "ConvTranspose",
    ),
    "transposed_groups_batchnorm": (
        f"float[N,4,H,W] x, float[4,3,3,3] w, float[6] b, {NORM.format(6)} => {OUT4}",
        f"c = ConvTranspose <group = 2> (x, w, b) y = {BATCHNORM}",
        "ConvTranspose",
    ),
    "gemm_batchnorm": (f"{GEMM}, float[4] b, {NORM.format(4)} => {OUT2}", f"c = Gemm(x, w, b) y = {BATCHNORM}", "Gemm"),
    "gemm_transposed_batchnorm": (
        f"float[N,3] x, float[4,3] w, {NORM.format(4)} => {OUT2}",
        f"c = Gemm <transB = 1> (x, w) y = {BATCHNORM}",
        "Gemm",
    ),
    "gemm_alpha_beta_batchnorm": (
        f"float[N,3] x, float[4,3] w, float[4] b, {NORM.format(4)} => {OUT2}",
        f"c = Gemm <alpha: float = 0.5, beta: float = 2.0, transB = 1> (x, w, b) y = {BATCHNORM}",
        "Gemm",
    ),
    "gemm_transposed_input": (
        f"float[3,N] x, float[3,4] w, float[4] b, {NORM.format(4)} => {OUT2}",
        f"c = Gemm <transA = 1> (x, w, b) y = {BATCHNORM}",
        "Gemm",
    ),
    "matmul_batchnorm": (f"{GEMM}, {NORM.format(4)} => {OUT2}", f"c = MatMul(x, w) y = {BATCHNORM}", "MatMul"),
    "matmul_add_batchnorm": (
        f"{GEMM}, float[4] b, {NORM.format(4)} => {OUT2}",
        f"z = MatMul(x, w) c = Add(z, b) y = {BATCHNORM}",
        "MatMul",
    ),
    "matmul_of_rows_batchnorm": (
        f"float[N,3,4] x, float[4,5] w, {NORM.format(3)} => {OUT3}",
        f"c = MatMul(x, w) y = {BATCHNORM}",
        "MatMul BatchNormalization",
    ),
    "batchnorm_alone": (
        f"float[N,4,H] x, {NORM.format(4)} => {OUT3}",
        f"c = Relu(x) y = {BATCHNORM}",
        "Relu BatchNormalization",
    ),
    "batchnorm_of_a_shared_conv": (
        f"{CONV}, {NORM.format(4)} => {OUT4}",
        f"c = Conv(x, w) n = {BATCHNORM} y = Add(n, c)",
        "Conv BatchNormalization Add",
    ),
    # BatchNormalization to the right
    "batchnorm_conv": (
        f"float[N,4,H,W] x, float[3,4,2,2] w, float[3] b, {NORM.format(4)} => {OUT4}",
        f"c = Relu(x) n = {BATCHNORM} y = Conv <strides = [2, 2]> (n, w, b)",
        "Relu Conv",
    ),
    "batchnorm_padded_conv": (
        f"float[N,4,H,W] x, float[3,4,2,2] w, {NORM.format(4)} => {OUT4}",
        f"c = Relu(x) n = {BATCHNORM} y = Conv <pads = [1, 0, 0, 0]> (n, w)",
        "Relu BatchNormalization Conv",
    ),
    "batchnorm_same_conv": (
        f"float[N,4,H,W] x, float[3,4,2,2] w, {NORM.format(4)} => {OUT4}",
        f'c = Relu(x) n = {BATCHNORM} y = Conv <strides = [2, 2], auto_pad = "SAME_UPPER"> (n, w)',
        "Relu BatchNormalization Pad Conv",
    ),
    "batchnorm_grouped_conv": (
        f"float[N,4,H,W] x, float[2,2,2,2] w, {NORM.format(4)} => {OUT4}",
        f"c = Relu(x) n = {BATCHNORM} y = Conv <group = 2> (n, w)",
        "Relu BatchNormalization Conv",
    ),
    "batchnorm_gemm": (
        f"float[N,3] x, float[3,4] w, float[4] b, {NORM.format(3)} => {OUT2}",
        f"c = Relu(x) n = {BATCHNORM} y = Gemm <alpha: float = 0.5> (n, w, b)",
        "Relu Gemm",
    ),
    "batchnorm_gemm_transposed": (
        f"float[N,3] x, float[4,3] w, {NORM.format(3)} => {OUT2}",
        f"c = Relu(x) n = {BATCHNORM} y = Gemm <transB = 1> (n, w)",
        "Relu Gemm",
    ),
    # constants added
    "matmul_add": (f"{GEMM}, float[4] b => {OUT2}", "c = MatMul(x, w) y = Add(c, b)", "MatMul"),
    "add_matmul": (f"float[N,2,3] x, float[3,4] w, float[2,1] b => {OUT3}", "c = MatMul(x, w) y = Add(b, c)", "MatMul"),
    "matmul_add_scalar": (f"{GEMM}, float b => {OUT2}", "c = MatMul(x, w) y = Sum(c, b)", "MatMul"),
    "matmul_sub": (f"{GEMM}, float[1,4] b => {OUT2}", "c = MatMul(x, w) y = Sub(c, b)", "MatMul"),
    "sub_matmul": (f"{GEMM}, float[1,4] b => {OUT2}", "c = MatMul(x, w) y = Sub(b, c)", "MatMul Sub"),
    "matmul_add_more_axes": (f"{GEMM}, float[2,1,4] b => {OUT3}", "c = MatMul(x, w) y = Add(c, b)", "MatMul Add"),
    "matmul_vector_add": (
        "float[N,3] x, float[3] w, float b => float[a] y",
        "c = MatMul(x, w) y = Add(c, b)",
        "MatMul",
    ),
    "gemm_add": (f"{GEMM}, float[4] b, float[1,4] k => {OUT2}", "c = Gemm(x, w, b) y = Add(c, k)", "Gemm"),
    "gemm_add_longer": (
        f"float[1,3] x, float[3,4] w, float[5,4] k => {OUT2}",
        "c = Gemm(x, w) y = Add(c, k)",
        "Gemm Add",
    ),
    "conv_add": (f"{CONV}, float[1,4,1,1] k => {OUT4}", "c = Conv(x, w) y = Add(c, k)", "Conv"),
    "conv_add_scalar": (f"{CONV}, float k => {OUT4}", "c = Conv(x, w) y = Add(c, k)", "Conv"),
    "conv_bias_add": (f"{CONV}, float[4] b, float[1] k => {OUT4}", "c = Conv(x, w, b) y = Add(k, c)", "Conv"),
    "conv_add_row": (
        f"float[N,3,5,5] x, float[4,3,3,2] w, float[4] k => {OUT4}",
        "c = Conv(x, w) y = Add(c, k)",
        "Conv Add",
    ),
    "conv_add_longer": (
        f"float[N,3,H,W] x, float[1,3,2,2] w, float[4,1,1] k => {OUT4}",
        "c = Conv(x, w) y = Add(c, k)",
        "Conv Add",
    ),
    "transposed_add": (
        f"float[N,3,H,W] x, float[3,2,3,3] w, float[2,1,1] k => {OUT4}",
        "c = ConvTranspose(x, w) y = Add(c, k)",
        "ConvTranspose",
    ),
    # constant factors
    "conv_mul": (f"{CONV}, float[4] b, float[4,1,1] k => {OUT4}", "c = Conv(x, w, b) y = Mul(k, c)", "Conv"),
    "conv_mul_scalar_add": (
        f"{CONV}, float k, float[4,1,1] b => {OUT4}",
        "c = Conv(x, w) d = Mul(c, k) y = Add(d, b)",
        "Conv",
    ),
    "conv_div": (f"{CONV}, float[4,1,1] k => {OUT4}", "c = Conv(x, w) y = Div(c, k)", "Conv"),
    "div": (f"float[N,4] x, float[4] k => {OUT2}", "y = Div(x, k)", "Mul"),
    "div_of_constant": (f"float[N,4] x, float[4] k => {OUT2}", "y = Div(k, x)", "Div"),
    "transposed_mul": (
        f"float[N,4,H] x, float[4,3,3] w, float[6,1] k => {OUT3}",
        "c = ConvTranspose <group = 2> (x, w) y = Mul(c, k)",
        "ConvTranspose",
    ),
    "matmul_mul": (f"{GEMM}, float[4] k => {OUT2}", "c = MatMul(x, w) y = Mul(c, k)", "MatMul"),
    "matmul_mul_rows": (
        f"float[2,3] x, float[3,4] w, float[2,1] k => {OUT2}",
        "c = MatMul(x, w) y = Mul(c, k)",
        "MatMul Mul",
    ),
    "gemm": (
        f"{GEMM}, float[4] b => {OUT2}",
        "y = Gemm <alpha: float = 0.3, beta: float = -2.0> (x, w, b)",
        "Gemm",
    ),
    "gemm_of_two_inputs": (
        f"float[N,3] x, float[3,4] x1, float[4] b => {OUT2}",
        "y = Gemm <alpha: float = 0.3, beta: float = -2.0> (x, x1, b)",
        "Gemm",
    ),
    # explicit pads
    **{
        f"{op}_{mode}_{size}".lower(): (
            f"float[N,3,{lengths}] x{weights} => {OUT4}",
            f'y = {op} <strides = [2, 3], auto_pad = "{mode}"{kernel}> (x{", w" if weights else ""})',
            seen if size == "dynamic" and mode != "VALID" else op,
        )
        for op, weights, kernel, seen in (
            ("Conv", ", float[4,3,3,4] w", "", "Pad Conv"),
            ("MaxPool", "", ", kernel_shape = [3, 4]", "Pad MaxPool"),
            ("AveragePool", "", ", kernel_shape = [3, 4]", "Pad AveragePool Mul"),
            ("ConvTranspose", ", float[3,4,3,4] w", "", "ConvTranspose"),
        )
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for size, lengths in (("static", "5,7"), ("dynamic", "H,W"))
    },
    "average_with_padding": (
        f"float[N,3,H,W] x => {OUT4}",
        'y = AveragePool <strides = [2, 2], auto_pad = "SAME_UPPER", kernel_shape = [3, 3], count_include_pad = 1> (x)',
        "Pad AveragePool",
    ),
    "same_with_stride_one": (f"{CONV} => {OUT4}", 'y = Conv <auto_pad = "SAME_UPPER"> (x, w)', "Conv"),
    # constants behind operators
    "identity_of_weights": (
        f"{CONV}, float[4,1,1] b => {OUT4}",
        "v = Identity(w) c = Conv(x, v) y = Add(c, b)",
        "Conv",
    ),
    "transposed_weights": (
        f"float[N,3] x, float[4,3] w, float[4] b => {OUT2}",
        "v = Transpose(w) c = MatMul(x, v) y = Add(c, b)",
        "Transpose MatMul",
    ),
    "cast_weights": (
        f"float[N,3] x, double[3,4] w, double[4] b => {OUT2}",
        "v = Cast <to = 1> (w) d = Cast <to = 1> (b) c = MatMul(x, v) y = Add(c, d)",
        "Cast Cast MatMul",
    ),
    "reshaped_bias": (
        f"{CONV}, float[4] b => {OUT4}",
        "s = Constant <value_ints = [4, 1, 1]> () d = Reshape(b, s) c = Conv(x, w) y = Add(c, d)",
        "Reshape Conv",
    ),
    # seen through
    "identity": (f"{GEMM} => {OUT2}", "h = Identity(x) c = MatMul(h, w) d = Identity(c) y = Identity(d)", "MatMul"),
    "dropout": (f"{GEMM} => {OUT2}", "h = Dropout(x) c, mask = Dropout(h) y = MatMul(c, w)", "MatMul"),
    "cast_to_the_same": (f"{GEMM} => {OUT2}", "h = Cast <to = 1> (x) y = MatMul(h, w)", "MatMul"),
    "dropout_between": (f"{GEMM}, float[4] b => {OUT2}", "c = MatMul(x, w) d = Dropout(c) y = Add(d, b)", "MatMul"),
}


@pytest.mark.parametrize(("signature", "body", "ops"), FOLDED.values(), ids=FOLDED)
def test_view_computes_what_the_model_does(signature, body, ops):
    check(network(signature, body), ops)


def test_batchnorm_stays_if_asked():
    proto = network(f"{CONV}, {NORM.format(4)} => {OUT4}", f"c = Conv(x, w) y = {BATCHNORM}")
    check(proto, "Conv BatchNormalization", fold_batchnorm=False)
    proto = network(f"{GEMM}, float[4] b => {OUT2}", "c = MatMul(x, w) y = Add(c, b)")
    check(proto, "MatMul", fold_batchnorm=False)


@pytest.mark.parametrize("kept", ["c", "n"])
def test_kept_tensor_stays_visible(kept):
    proto = network(f"{CONV}, {NORM.format(4)} => {OUT4}", f"c = Conv(x, w) n = {BATCHNORM} y = Relu(n)")
    v = check(proto, "Conv BatchNormalization Relu" if kept == "c" else "Conv Relu", kept=[kept])
    assert v.value(kept) in v.producers()


def test_graph_output_stays_visible():
    proto = network(f"{CONV}, {NORM.format(4)} => {OUT4}, float[a,b,c,d] c", f"c = Conv(x, w) y = {BATCHNORM}")
    check(proto, "Conv BatchNormalization")


def test_name_behind_identity_stands_for_what_it_copies():
    proto = network(f"{GEMM} => {OUT2}", "c = MatMul(x, w) i = Identity(c) y = Relu(i)")
    v = check(proto, "MatMul Relu", kept=["i"])
    assert v.value("i") is v.value("c")


def test_half_precision_is_seen_in_single():
    signature = "float16[N,3] x, float16[3,4] w, float16[4] b => float16[a,b] y"
    v = check(network(signature, "c = MatMul(x, w) d = Add(c, b) y = Relu(d)"), "MatMul Relu")
    seen = [x for call in v.calls for x in (*call.inputs, *call.outputs) if x is not None]
    assert {x.dtype for x in seen} == {np.dtype(np.float32)}


def test_cast_between_half_and_single_is_seen_through():
    body = "h = Cast <to = 1> (x) c = MatMul(h, w) y = Cast <to = 10> (c)"
    check(network("float16[N,3] x, float[3,4] w => float16[a,b] y", body), "MatMul")


def test_source_is_not_touched():
    proto = network(f"{CONV}, {NORM.format(4)} => {OUT4}", f"c = Conv(x, w) y = {BATCHNORM}")
    source = models.load(proto)
    before = source.skeleton.SerializeToString(deterministic=True)
    view(source)
    assert source.skeleton.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        (f"float[3,4] x, float[4,2] w, float[2] x1 => {OUT2}", "y = Gemm <beta: float = 0.5> (x, w, x1)"),
        (f"{CONV}, float[4] x1, float[4,1,1] k => {OUT4}", "c = Conv(x, w, x1) y = Add(c, k)"),
        (f"{CONV}, float[4] x1, {NORM.format(4)} => {OUT4}", f"c = Conv(x, w, x1) y = {BATCHNORM}"),
        (
            f"float[N,4] x, float[3,4] w, float[3] x1, {NORM.format(4)} => {OUT2}",
            f"c = Relu(x) n = {BATCHNORM} y = Gemm <transB = 1> (n, w, x1)",
        ),
    ],
    ids=["gemm", "conv_add", "conv_batchnorm", "batchnorm_gemm"],
)
def test_bias_that_depends_on_an_input_gets_its_gradient(signature, body):
    proto = to_double(network(signature, body))
    feeds = {name: x.astype(np.float64) for name, x in feeds_for(network(signature, body), 5).items()}
    cotangents = cotangents_for(run_reference(proto, feeds))
    found = run_reference(gradient_model(proto, ["x", "x1"]), {**feeds, **cotangents})["gradient/x1"]
    rows = np.eye(feeds["x1"].size)
    outputs = [run_reference(proto, {**feeds, "x1": feeds["x1"] + row})["y"] for row in rows]
    change = np.array([((y - run_reference(proto, feeds)["y"]) * cotangents["cotangent/y"]).sum() for y in outputs])
    assert close(found, change, EXACT)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_miscounted_windows_are_refused(op):
    body = f"y = {op} <kernel_shape = [2], strides = [2], pads = [1, 1], ceil_mode = 1> (x)"
    with pytest.raises(ModelError, match="opset 22"):
        view(models.load(network(f"float[N,3,3] x => {OUT3}", body)))
    check(network(f"float[N,3,3] x => {OUT3}", body, opset=22), op)
