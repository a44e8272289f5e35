"""Quantised models: relevance and gradients of the floats that the integers stand for, against numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnx_lrp
from onnx_lrp.errors import UnsupportedOps
from onnx_lrp.verify import verify
from tests import dense_oracle
from tests.adjoint_reference import run_onnxruntime
from tests.layers import Net
from tests.quantized_nets import FORMS, OUT_SCALE, X_SCALE, Y_SCALE, Quantized, build, integers, pictures
from tests.support import run_double, worst
from tests.test_canonical import replayed

torch = pytest.importorskip("torch")
Array = np.ndarray


def middle(net: Quantized, ints: dict[str, Array]) -> tuple[Array, Array]:
    """The floats that the inputs of the two layers stand for, by hand."""
    names = list(ints)
    if net.dynamic:
        grids = [ints[n] for n in names]
        (q0, s0, z0), (q1, s1, z1) = grids[:3], grids[3:]
        return (q0.astype(np.float64) - z0) * np.float64(s0), (q1.astype(np.float64) - z1) * np.float64(s1)
    q0, q1 = ints[names[0]], ints[names[1]]
    zero = {"uint8": 100 if net.model.graph.node[5].op_type == "Relu" else 0, "int8": -128}[q1.dtype.name]
    return (q0.astype(np.float64) - 128) * X_SCALE, (q1.astype(np.float64) - zero) * Y_SCALE


def convolved(a: Array, net: Quantized) -> Array:
    parts = (torch.from_numpy(np.asarray(p, np.float64)) for p in (a, net.w, net.b * np.ones(4)))
    return torch.nn.functional.conv2d(*parts, padding=1).numpy()


def explained_by(net: Quantized, method: str, target: int) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Relevance of x in float64 and in float32, the score, and the integers."""
    feeds = {"x": pictures()}
    explained = onnx_lrp.rewrite(net.model, method, target=target)
    ints = integers(net.model, feeds)
    exact = run_double(explained.model, feeds, ints)
    found = run_onnxruntime(explained.model, feeds)
    for name, y in run_onnxruntime(net.model, feeds).items():
        np.testing.assert_array_equal(found[name], y)
    return exact["relevance/x"], found["relevance/x"], exact["score"], ints


@pytest.mark.parametrize("rule", ["epsilon", "zplus"])
@pytest.mark.parametrize("form", FORMS)
def test_relevance_is_that_of_the_float_network(form: str, rule: str) -> None:
    """The float network has the dequantised weights and the activations that were really computed."""
    net, target = build(form), 2
    exact, single, score, ints = explained_by(net, rule, target)
    oracle = dense_oracle.ORACLES[rule]
    inputs, hidden = middle(net, ints)
    pooled_is_quantised = hidden.shape[-1] != 4
    for n in range(2):
        a = inputs[n]
        matrix, bias = dense_oracle.matrix_of(lambda parts: convolved(parts[0], net), [a.shape])
        z = (matrix @ a.reshape(-1) + bias).reshape(4, 4, 4)
        h = np.maximum(z, 0) if pooled_is_quantised else hidden[n]
        windows = h.reshape(4, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(4, 2, 2, 4)
        winner = windows.argmax(-1)
        pooled = hidden[n].reshape(16) if pooled_is_quantised else windows.max(-1).reshape(16)
        r = np.zeros(5)
        r[target] = score[n]
        shares = oracle(net.v.T, net.d, pooled, r).inputs.reshape(4, 2, 2)
        spread = np.zeros((4, 2, 2, 4))
        np.put_along_axis(spread, winner[..., None], shares[..., None], -1)
        back = spread.reshape(4, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1)
        expected = oracle(matrix, bias, a.reshape(-1), back).inputs.reshape(a.shape)
        assert worst(exact[n], expected) < 1e-9
        assert worst(single[n], expected) < 1e-5


def on_grid(x: Any, low: float, high: float, value: Array) -> Any:
    """Straight through the rounding, nothing beyond the ends: `value` forward, that of a clamp backward."""
    clamped = x.clamp(low, high)
    return clamped + (torch.from_numpy(value) - clamped).detach()


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_straight_through(form: str) -> None:
    net, target = build(form), 1
    exact, single, _, ints = explained_by(net, "gradient", target)
    inputs, hidden = middle(net, ints)
    free = 1e9
    x = torch.from_numpy(pictures().astype(np.float64)).requires_grad_()
    low, high = (-free, free) if net.dynamic else ((0 - 128 - 0.5) * X_SCALE, (255 - 128 + 0.5) * X_SCALE)
    a = on_grid(x, low, high, inputs)
    parts = (torch.from_numpy(np.asarray(p, np.float64)) for p in (net.w, net.b * np.ones(4)))
    z = torch.nn.functional.conv2d(a, *parts, padding=1)
    if net.dynamic:
        pooled = on_grid(torch.nn.functional.max_pool2d(torch.relu(z), 2), -free, free, hidden.reshape(2, 4, 2, 2))
    else:
        zero = 100 if form == "qdq_relu" else 0
        z = torch.relu(z) if form == "qdq_relu" else z
        ends = (-zero - 0.5) * float(Y_SCALE), (255 - zero + 0.5) * float(Y_SCALE)
        pooled = torch.nn.functional.max_pool2d(on_grid(z, *ends, hidden), 2)
    (pooled.reshape(2, 16) @ torch.from_numpy(net.v))[:, target].sum().backward()
    assert worst(exact, x.grad.numpy()) < 1e-9
    assert worst(single, x.grad.numpy()) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_replayed_and_verified(form: str) -> None:
    """The view computes what the model computes, and verification compares with float64."""
    net = build(form)
    feeds = {"x": pictures()}
    found = run_onnxruntime(replayed(net.model)[1], feeds)
    (name,) = run_onnxruntime(net.model, feeds)
    step = 1e-5 if net.dynamic else float(OUT_SCALE) * 1.01  # an integer may fall on the other side of a tie
    assert np.abs(found[f"replayed/{name}"] - found[name]).max() <= step
    for method in ("epsilon", "gradient"):
        verification = verify(net.model, feeds["x"], method)
        assert verification.ok, str(verification)
        assert not verification.notes
        assert max(verification.reference.values()) < 1e-5


def test_layers_keep_their_names_and_biases() -> None:
    """Rule books see Conv and MatMul, with constant weights and the bias folded in."""
    for form in FORMS:
        table = {row.node: row for row in onnx_lrp.rewrite(build(form).model, "epsilon_plus_flat").table}
        assert table["conv"].op == "Conv"
        assert table["conv"].rule.startswith("flat")
        assert table["dense"].op == "MatMul"
        assert table["dense"].rule.startswith("epsilon")
        assert ("folded" in table["dense"].why) == (form == "dynamic")


@pytest.mark.parametrize("form", FORMS)
def test_methods_that_compute_the_model_again(form: str) -> None:
    """DeepLIFT gives what the outputs differ from those of the baseline, on whatever grids these are computed."""
    net, target = build(form), 2
    x, nothing = pictures()[:1], np.zeros_like(pictures()[:1])
    found = run_onnxruntime(onnx_lrp.rewrite(net.model, "deeplift", target=target).model, {"x": x})
    (y,), (y0,) = (run_onnxruntime(net.model, {"x": v}).values() for v in (x, nothing))
    assert y[0, target] != y0[0, target]
    assert found["relevance/x"].sum() == pytest.approx(float(y[0, target] - y0[0, target]), rel=1e-4)


# ---- the grid ------------------------------------------------------------------------------------------------------


def grid_model(dtype: Any, scale: Array, zero: Array | None, opset: int = 21, **attrs: int) -> onnx.ModelProto:
    """x (2, 4) onto a grid and back, then weighed and summed."""
    net = Net(opset=opset)
    grid = [net.const(scale)] + ([] if zero is None else [net.const(zero, dtype)])
    q = net("QuantizeLinear", net.input("x", 2, 4), *grid, **attrs)
    return net.model(net("MatMul", net("DequantizeLinear", q, *grid, **attrs), net.const([[1], [2], [3], [4]])))


X = np.array([[-9.0, -1.3, 0.1, 99.0], [-0.6, 0.7, 1.2, 40.0]], np.float32)
ONE, PER_ROW, PER_COLUMN = np.array(0.125), np.array([0.125, 0.5]), np.array([0.125, 0.25, 0.5, 0.25])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    ("scale", "attrs"),
    [(ONE, {}), (ONE.reshape(1), {}), (PER_ROW, {"axis": 0}), (PER_COLUMN, {}), (PER_COLUMN, {"axis": -1})],
    ids=["one", "one_of_rank_1", "rows", "columns", "last"],
)
def test_ends_of_a_grid(dtype: Any, scale: Array, attrs: dict[str, int]) -> None:
    """The gradient stops where a number lies beyond what the integers can say, half a step included."""
    info = np.iinfo(dtype)
    zero = np.full(scale.shape, 3)
    x = X * (1 if info.bits == 8 else 200)
    steps = scale if scale.size == 1 else scale[:, None] if attrs.get("axis") == 0 else scale
    inside = (x >= (info.min - 3.5) * steps) & (x <= (info.max - 2.5) * steps)
    assert 0 < inside.sum() < inside.size
    model = grid_model(dtype, scale, zero, **attrs)
    explained = onnx_lrp.rewrite(model, "gradient", target=0)
    found = run_onnxruntime(explained.model, {"x": x})
    np.testing.assert_array_equal(found["relevance/x"], inside * np.array([1.0, 2, 3, 4]))
    relevance = onnx_lrp.rewrite(model, "lrp_0", target=0)
    floats = (np.clip(np.rint(x / steps) + 3, info.min, info.max) - 3) * steps
    found = run_onnxruntime(relevance.model, {"x": x})
    assert worst(found["relevance/x"], floats * np.array([1.0, 2, 3, 4])) < 1e-6, "no relevance is lost at the ends"


def test_grid_of_blocks() -> None:
    scale = np.array([[0.125, 0.5], [0.25, 1.0]])
    model = grid_model(np.int8, scale, np.zeros((2, 2)), axis=1, block_size=2)
    steps = np.repeat(scale, 2, 1)
    inside = (-128.5 * steps <= X) & (127.5 * steps >= X)
    assert 0 < inside.sum() < inside.size
    found = run_onnxruntime(onnx_lrp.rewrite(model, "gradient", target=0).model, {"x": X})
    np.testing.assert_array_equal(found["relevance/x"], inside * np.array([1.0, 2, 3, 4]))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2])
def test_grid_of_8_bit_floats(kind: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    net = Net(opset=19)
    grid = [net.const(0.01), net.const(0, dtype)]
    q = net("QuantizeLinear", net.input("x", 2, 4), *grid)
    model = net.model(net("MatMul", net("DequantizeLinear", q, *grid), net.const([[1], [2], [3], [4]])))
    largest = {TensorProto.FLOAT8E4M3FN: 448, TensorProto.FLOAT8E5M2: 57344}[kind]
    x = X * largest / 4480
    found = run_onnxruntime(onnx_lrp.rewrite(model, "gradient", target=0).model, {"x": x})
    inside = np.abs(x) <= largest * np.float32(0.01)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(found["relevance/x"], inside * np.array([1.0, 2, 3, 4]))


def test_without_a_zero_point() -> None:
    found = run_onnxruntime(onnx_lrp.rewrite(grid_model(np.uint8, ONE, None), "gradient", target=0).model, {"x": X})
    inside = (X >= -0.5 * ONE) & (X <= 255.5 * ONE)
    np.testing.assert_array_equal(found["relevance/x"], inside * np.array([1.0, 2, 3, 4]))


def test_a_score_beyond_its_grid_has_a_gradient() -> None:
    """Behind the last layer only the end at zero stops it, which may be a Relu."""
    for zero, expected in ((0, [0.0, 3.0]), (7, [3.0, 3.0])):
        net = Net()
        grid = [net.const(0.01), net.const(zero, np.uint8)]
        y = net("MatMul", net.input("x", 2, 1), net.const([[3.0]]))
        model = net.model(net("DequantizeLinear", net("QuantizeLinear", y, *grid), *grid))
        found = run_onnxruntime(
            onnx_lrp.rewrite(model, "gradient", target=0).model, {"x": np.array([[-50], [50]], np.float32)}
        )
        np.testing.assert_array_equal(found["relevance/x"][:, 0], expected)


# ---- integers that are moved -----------------------------------------------------------------------------------------

SHAPE = (1, 2, 4, 4)
MOVES = {
    "Identity": ({}, ()),
    "MaxPool": ({"kernel_shape": [2, 2], "strides": [2, 2]}, ()),
    "Reshape": ({}, (np.array([1, -1], np.int64),)),
    "Flatten": ({}, ()),
    "Transpose": ({"perm": [0, 2, 3, 1]}, ()),
    "Squeeze": ({}, (np.array([0], np.int64),)),
    "Unsqueeze": ({}, (np.array([1], np.int64),)),
    "Slice": ({}, tuple(np.array([v], np.int64) for v in (1, 4, 3, 2))),
    "Gather": ({"axis": 2}, (np.array([3, 0, 3], np.int64),)),
    "Pad": ({}, (np.array([0, 0, 1, 0, 0, 0, 0, 2], np.int64),)),
    "Pad_valued": ({}, (np.array([0, 0, 1, 0, 0, 0, 0, 2], np.int64), np.array(200, np.uint8))),
    "Concat": ({"axis": 1}, (np.full((1, 1, 4, 4), 201, np.uint8),)),
    "Clip": ({}, (np.array(60, np.uint8), np.array(150, np.uint8))),
    "Relu": ({}, ()),
    "Max": ({}, (np.array(101, np.uint8),)),
    "Tile": ({}, (np.array([1, 1, 2, 1], np.int64),)),
    "Expand": ({}, (np.array([3, 2, 4, 4], np.int64),)),
}


@pytest.mark.parametrize("name", MOVES)
def test_integers_between_quantised_operators(name: str) -> None:
    """All integers are different, so those that come out tell where they came from; relevance goes there."""
    attrs, extra = MOVES[name]
    op = name.split("_")[0]
    dtype = np.int8 if op == "Relu" else np.uint8
    zero = 5 if op == "Relu" else 120
    net = Net()
    q = np.random.default_rng(3).permutation(np.arange(32) * 6 + (-100 if op == "Relu" else 4)).reshape(SHAPE)
    grid = [net.const(0.25), net.const(zero, dtype)]
    moved = net(
        op, net("QuantizeLinear", net.input("x", *SHAPE), *grid), *(net.const(e, e.dtype) for e in extra), **attrs
    )
    floats = net("DequantizeLinear", moved, *grid)
    row = net("Reshape", floats, net.const([1, -1], np.int64))
    alone = net.model(moved, dtype=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    feeds = {"x": ((q - zero) * 0.25).astype(np.float32)}
    (integers_out,) = run_onnxruntime(alone, feeds).values()
    weights = np.random.default_rng(4).integers(-8, 9, (integers_out.size, 1)) / 4
    model = net.model(net("MatMul", row, net.const(weights)))
    gradient = np.zeros(32)
    for value, weight in zip(integers_out.reshape(-1), weights[:, 0], strict=True):
        gradient[q.reshape(-1) == value] += weight
    gradient = gradient.reshape(SHAPE)
    found = run_onnxruntime(onnx_lrp.rewrite(model, "gradient", target=0).model, feeds)
    np.testing.assert_allclose(found["relevance/x"], gradient, atol=1e-6)
    found = run_onnxruntime(onnx_lrp.rewrite(model, "lrp_0", target=0, ledger=True).model, feeds)
    if op in ("Clip", "Relu"):  # activations pass what they get
        expected = (integers_out.astype(np.float64) - zero) * 0.25 * weights.reshape(SHAPE)
    else:
        expected = feeds["x"] * gradient
    np.testing.assert_allclose(found["relevance/x"], expected, atol=1e-5)
    total = found["relevance/x"].sum() + found["absorbed"].sum()
    assert total == pytest.approx(found["score"].sum(), rel=1e-5, abs=1e-5)


def test_read_on_another_grid() -> None:
    """The same integers with another scale and zero are another number of the same size."""
    net = Net()
    q = net("QuantizeLinear", net.input("x", 1, 4), net.const(0.125), net.const(3, np.uint8))
    floats = net("DequantizeLinear", q, net.const(0.5), net.const(7, np.uint8))
    model = net.model(net("MatMul", floats, net.const([[1], [2], [3], [4]])))
    x = np.array([[0.1, 1.3, 2.2, 9.0]], np.float32)
    found = run_onnxruntime(onnx_lrp.rewrite(model, "gradient", target=0).model, {"x": x})
    np.testing.assert_allclose(found["relevance/x"], [[4, 8, 12, 16]])
    assert verify(model, x, "epsilon").ok


def test_integer_inputs_have_relevance() -> None:
    """A fully quantised model has integer inputs: relevance is that of the floats they stand for."""
    net = Net()
    grid = [net.const(0.25), net.const(8, np.uint8)]
    w = net.const([[1, -2], [3, 4], [5, 6]], np.int8), net.const(0.5), net.const(0, np.int8)
    y = net("QLinearMatMul", net.input("x", "N", 3, dtype=TensorProto.UINT8), *grid, *w, *grid)
    model = net.model(net("DequantizeLinear", y, *grid))
    x = np.array([[10, 20, 8]], np.uint8)
    explained = onnx_lrp.Explainer(model, "epsilon", device="cpu", target=1)(x)
    expected = (x - 8.0) * 0.25 * np.array([-1, 2, 3])
    assert worst(explained.relevance["x"], expected) < 1e-5


# ---- what is refused -----------------------------------------------------------------------------------------------


def refused(model: onnx.ModelProto) -> str:
    with pytest.raises(UnsupportedOps) as caught:
        onnx_lrp.rewrite(model, "epsilon")
    return str(caught.value)


def quantised(net: Net) -> tuple[str, list[str]]:
    grid = [net.const(0.25), net.const(8, np.uint8)]
    return net("QuantizeLinear", net.input("x", 1, 4), *grid), grid


def test_arithmetic_on_integers_is_refused() -> None:
    net = Net()
    q, grid = quantised(net)
    text = refused(net.model(net("DequantizeLinear", net("Add", q, q, name="sum"), *grid)))
    assert "sum (Add" in text
    assert "quantised integers" in text
    assert "QDQ" in text


def test_sums_that_are_not_scaled_as_floats_are_refused() -> None:
    net = Net()
    q, _ = quantised(net)
    total = net("MatMulInteger", q, net.const(np.ones((4, 2)), np.uint8))
    shifted = net("Add", total, net.const([1, 2], np.int32), name="bias")
    assert "bias (Add" in refused(net.model(net("Cast", shifted, to=TensorProto.FLOAT)))


def test_integers_taken_for_numbers_are_refused() -> None:
    net = Net()
    q, _ = quantised(net)
    text = refused(net.model(net("Cast", net("Flatten", q), to=TensorProto.FLOAT, name="cast")))
    assert "cast (Cast" in text


def test_operators_of_the_runtime_are_refused_with_a_hint() -> None:
    net = Net()
    q, grid = quantised(net)
    both = net("QLinearAdd", q, *grid, q, *grid, *grid, name="sum", domain="com.microsoft")
    y = net("DequantizeLinear", both, *grid)
    graph = helper.make_graph(
        net.nodes, "g", net.inputs, [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 4])], net.weights
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    text = refused(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert "sum (com.microsoft.QLinearAdd" in text
    assert "QDQ" in text
