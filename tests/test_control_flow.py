"""If, Scan and Loop: against the same model written out step by step, and against what its outputs do."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests

import onnx_lrp
from onnx_lrp.composite import Assignment, Composite
from onnx_lrp.errors import ModelError, UnsupportedOps
from onnx_lrp.methods import LRP, IntegratedGradients, SmoothGrad
from onnx_lrp.reference import run_double, to_double
from onnx_lrp.verify import verify
from tests.adjoint_reference import run_onnxruntime
from tests.adjoint_tools import EXACT, SLOPE, close, network, slope
from tests.control_cases import CASES, Case
from tests.unrolling import unrolled

METHODS = ("gradient", "input_x_gradient", "guided_backprop", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon")


def explain(proto: onnx.ModelProto, case: Case, method: object, **options: object) -> onnx_lrp.Explained:
    return onnx_lrp.rewrite(proto, method, inputs=case.wanted, start="input", ledger=True, **options)


def start_of(case: Case) -> dict[str, np.ndarray]:
    (name,) = (o.name for o in case.model.graph.output)
    y = run_double(case.model, case.feeds)[name]
    return {"start": np.random.default_rng(6).standard_normal(y.shape)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_oracle_computes_the_same(case):
    (expected,), (found,) = (run_double(m, case.feeds).values() for m in (case.model, unrolled(case.model, case.feeds)))
    assert close(found, expected, EXACT)
    assert not case.in_runtime or close(
        run_onnxruntime(case.model, case.feeds)[case.model.graph.output[0].name], expected, EXACT
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_relevance_is_that_of_the_model_written_out(case, method):
    feeds = case.feeds | start_of(case)
    expected = run_double(explain(unrolled(case.model, case.feeds), case, method).model, feeds)
    model = explain(case.model, case, method).model
    for run in (run_double, run_onnxruntime)[: 1 + case.in_runtime]:
        found = run(model, feeds)
        for name in [*(f"relevance/{x}" for x in case.wanted), "absorbed", "score"]:
            assert close(found[name], expected[name], EXACT), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_the_slope(case):
    feeds, start = case.feeds, start_of(case)
    found = run_double(explain(case.model, case, "gradient").model, feeds | start)
    (y,) = (o.name for o in case.model.graph.output)
    for x in case.wanted:
        gradient = found[f"relevance/{x}"]
        v = np.random.default_rng(7).standard_normal(gradient.shape)

        def score(t: float, x: str = x, v: np.ndarray = v) -> float:
            return float((run_double(case.model, feeds | {x: feeds[x] + t * v})[y] * start["start"]).sum())

        expected, smooth = slope(score)
        assert smooth
        assert abs((gradient * v).sum() - expected) <= SLOPE * max(abs(expected), np.abs(gradient * v).sum(), 1e-3)


# ---- many versions of the inputs -----------------------------------------------------------------------------------

# Those whose inputs and outputs have the samples on their first axis.
ROWS = [c for c in CASES if all(x.shape[0] == 2 for x in c.feeds.values() if x.dtype == np.float64)]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_integrated_gradients_are_the_mean_gradient(case):
    feeds, start, steps = case.feeds, start_of(case), 3
    gradient = explain(case.model, case, "gradient").model
    expected = dict.fromkeys(case.wanted, 0)
    for place, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        at = {x: feeds[x] * (place + 1) / 2 for x in case.wanted}
        found = run_double(gradient, feeds | at | start)
        expected = {x: expected[x] + weight / 2 * feeds[x] * found[f"relevance/{x}"] for x in case.wanted}
    model = explain(case.model, case, IntegratedGradients(steps=steps)).model
    for run in (run_double, run_onnxruntime):
        found = run(model, feeds | start)
        for x in case.wanted:
            assert close(found[f"relevance/{x}"], expected[x], EXACT), x


@pytest.mark.parametrize("case", [c for c in CASES if c.in_runtime], ids=str)
def test_smoothgrad_is_that_of_the_model_written_out(case):
    """The noise is the runtime's, and the same for both."""
    method, feeds = SmoothGrad(samples=3, noise=0.1), case.feeds | start_of(case)
    found = run_onnxruntime(explain(case.model, case, method).model, feeds)
    expected = run_onnxruntime(explain(unrolled(case.model, case.feeds), case, method).model, feeds)
    for x in case.wanted:
        assert close(found[f"relevance/{x}"], expected[f"relevance/{x}"], EXACT), x


def test_equal_nodes_count_once():
    """Nodes that compute the same become one when they are repeated on other inputs."""
    twice = "a = MatMul(x, w)  b = MatMul(x, w)  c = Tanh(a)  d = Sigmoid(b)  y = Mul(c, d)"
    signature, once = "double[N,3] x, double[3,4] w => double[N,4] y", twice.replace("Sigmoid(b)", "Sigmoid(a)")
    feeds = {"x": np.random.default_rng(8).standard_normal((2, 3)), "start": np.ones((2, 4))}
    found, expected = (
        run_double(onnx_lrp.rewrite(network(signature, body), IntegratedGradients(steps=3), start="input").model, feeds)
        for body in (twice, once)
    )
    assert close(found["relevance/x"], expected["relevance/x"], EXACT)


def test_deeplift_does_not_go_inside():
    case = next(c for c in CASES if c.name == "if: True")
    with pytest.raises(ModelError, match=r"If_0/then_branch/\w+.*choose integrated_gradients"):
        onnx_lrp.rewrite(case.model, "deeplift", inputs=["x"])


# ---- the books -----------------------------------------------------------------------------------------------------


def retyped(proto: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The model in another type of float."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)

    def tensor(t: onnx.TensorProto) -> None:
        if t.data_type == TensorProto.DOUBLE:
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(dtype), t.name))

    def graph(g: onnx.GraphProto) -> None:
        for info in (*g.input, *g.output, *g.value_info):
            if info.type.tensor_type.elem_type == TensorProto.DOUBLE:
                info.type.tensor_type.elem_type = kind
        for t in g.initializer:
            tensor(t)
        for attribute in (a for node in g.node for a in node.attribute):
            if attribute.name == "to" and attribute.i == TensorProto.DOUBLE:
                attribute.i = kind
            tensor(attribute.t)
            if attribute.HasField("g"):
                graph(attribute.g)

    graph(copy.graph)
    return copy


@pytest.mark.parametrize("book", ["epsilon_plus_flat", "epsilon_alpha2_beta1", "zplus"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conserved(case, book):
    """All that is lost inside is booked, from its own formula."""
    model = onnx_lrp.rewrite(case.model, book, inputs=case.wanted, ledger=True, target=1).model
    found = run_double(model, case.feeds)
    parts = [found[f"relevance/{x}"].sum() for x in case.wanted] + [found["absorbed"].sum()]
    assert abs(found["score"].sum() - sum(parts)) <= EXACT * max(np.abs(parts).max(), 1.0)


@pytest.mark.parametrize("case", [c for c in CASES if "[N," in c.signature], ids=str)
def test_verified(case):
    one = case.of_one_sample
    feeds = {n: x.astype(np.float32) if x.dtype == np.float64 else x for n, x in one.feeds.items()}
    result = verify(retyped(one.model, TensorProto.FLOAT), feeds, "epsilon_alpha2_beta1")
    assert result.ok, str(result)
    assert not result.notes
    for row in result.layers:
        assert abs(row.other) <= EXACT * max(abs(row.arrived), abs(row.passed), abs(row.bias), 1.0), row
    assert {"If", "Loop", "Scan"} & {row.op for row in result.layers} or "known" in case.name


# ---- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.in_runtime], ids=str)
def test_behind_a_switch(case):
    feeds = case.feeds | start_of(case)
    plain = run_onnxruntime(explain(case.model, case, "epsilon").model, feeds)
    model = explain(case.model, case, "epsilon", switch=True).model
    found = run_onnxruntime(model, feeds)
    (y,) = (o.name for o in case.model.graph.output)
    for name in (y, *(f"relevance/{x}" for x in case.wanted)):
        assert np.array_equal(found[name], plain[name])
    assert np.array_equal(run_onnxruntime(model, feeds | {"explain": np.array(False)})[y], plain[y])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_portable(case):
    feeds = case.feeds | start_of(case)
    found, expected = (run_double(explain(case.model, case, "epsilon", portable=p).model, feeds) for p in (True, False))
    for x in case.wanted:
        assert close(found[f"relevance/{x}"], expected[f"relevance/{x}"], EXACT)


def test_16_bit_models_are_explained_in_float32():
    case = next(c for c in CASES if c.name == "scan: 4 steps")
    half = retyped(case.model, TensorProto.FLOAT16)
    feeds = {n: x.astype(np.float16) for n, x in case.feeds.items()}
    found = run_onnxruntime(onnx_lrp.rewrite(half, "epsilon", inputs=case.wanted, target=3).model, feeds)
    expected = run_double(onnx_lrp.rewrite(to_double(half), "epsilon", inputs=case.wanted, target=3).model, feeds)
    for x in case.wanted:
        assert found[f"relevance/{x}"].dtype == np.float32
        assert close(found[f"relevance/{x}"], expected[f"relevance/{x}"], 1e-2), x


# ---- rules inside ----------------------------------------------------------------------------------------------------


def test_rule_table_lists_what_is_inside():
    case = next(c for c in CASES if c.name == "if: nested, True, True")
    rows = {row.node: row.rule for row in explain(case.model, case, "epsilon_plus_flat").table}
    assert rows["MatMul_0"].startswith("flat")
    assert rows["If_0"] == "inside"
    assert rows["If_0/then_branch/If_1"] == "inside"
    assert rows["If_0/then_branch/MatMul_1"].startswith("epsilon")  # it is the first in its body, not in the net
    assert "If_0/then_branch/If_1/then_branch/Mul_0" in rows


def test_first_layer_inside_a_body():
    case = next(c for c in CASES if c.name == "scan: no state")
    rows = {row.node: row.rule for row in explain(case.model, case, "epsilon_plus_flat").table}
    assert rows["Scan_0/body/MatMul_0"].startswith("flat")


def test_layer_that_reads_a_state_is_not_the_first():
    """In the second step it reads what a layer has made."""
    body = (
        "trips = Constant <value = int64 {3}> ()"
        + """
        h = Loop (trips, , x) <body = step (int64 i, bool c, double[N,3] s) => (bool c1, double[N,3] s1) {
            c1 = Identity(c)
            s1 = MatMul(s, w)
        }>
    """
    )
    rows = onnx_lrp.rewrite(network("double[N,3] x, double[3,3] w => double[N,3] h", body), "epsilon_plus_flat").table
    assert {row.node: row.rule.split("(")[0] for row in rows} == {"Loop_0": "inside", "Loop_0/body/MatMul_0": "epsilon"}


def test_what_has_no_rule_inside_is_listed():
    case = next(c for c in CASES if c.name == "if: nested, True, True")
    dense = LRP(Composite("dense", "dense", (Assignment({"op": ["MatMul", "Mul"]}, "epsilon", {}),)))
    with pytest.raises(UnsupportedOps) as caught:
        explain(case.model, case, dense)
    assert {node.name for node in caught.value.nodes} == {
        "Relu_0",
        "Concat_0",
        "If_0/then_branch/If_1/then_branch/Sigmoid_0",
        "If_0/then_branch/If_1/else_branch/Add_0",
        "If_0/else_branch/Sub_0",
        "If_0/else_branch/Tanh_0",
    }


SHARED = """
    r = RotaryEmbedding(x, cos, sin)
    trips = Constant <value = int64 {3}> ()
    h = Loop (trips, , xh) <
        body = step (int64 i, bool c, float[N,2,3,4] s) => (bool c1, float[N,2,3,4] s1) {
            c1 = Identity(c)
            r1 = RotaryEmbedding(x, cos, sin)
            r2 = RotaryEmbedding(x, cos, sin)
            t = Mul(r1, r2)
            s1 = Mul(s, t)
        }
    >
    y = Mul(h, r)
"""


def test_bodies_of_operators_inside_bodies():
    """Equal expressions outside, inside, and twice inside: each is walked through where it stands."""
    signature = """
        float[N,2,3,4] x, float[N,2,3,4] xh, float[N,3,2] xcos, float[N,3,2] xsin => float[N,2,3,4] y
    """
    proto = network(signature, SHARED.replace("cos", "xcos").replace("sin", "xsin"), opset=23)
    rng = np.random.default_rng(2)
    shapes = {"x": (2, 2, 3, 4), "xh": (2, 2, 3, 4), "xcos": (2, 3, 2), "xsin": (2, 3, 2), "start": (2, 2, 3, 4)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    flat = unrolled(proto, {name: x for name, x in feeds.items() if name != "start"})
    found, expected = (run_double(onnx_lrp.rewrite(m, "gradient", start="input").model, feeds) for m in (proto, flat))
    for name in ("x", "xh", "xcos", "xsin"):
        assert close(found[f"relevance/{name}"], expected[f"relevance/{name}"], EXACT), name


# ---- what is refused -------------------------------------------------------------------------------------------------

GROWING = """
    trips = Constant <value = int64 {3}> ()
    y = Loop (trips, , x) <body = step (int64 i, bool c, double[1,3] s) => (bool c1, double[M,3] s1) {
        c1 = Identity(c)
        t = Tanh(x)
        s1 = Concat <axis = 0> (s, t)
    }>
"""
SPREADING = """
    trips = Constant <value = int64 {3}> ()
    begin = Constant <value = double[1,3] {1, 2, 3}> ()
    y = Loop (trips, , begin) <body = step (int64 i, bool c, double[M,3] s) => (bool c1, double[M,3] s1) {
        c1 = Identity(c)
        s1 = Add(s, x)
    }>
"""
NOISE = """
    y = If (xc) <
        then_branch = then () => (double[N,3] a) { r = RandomNormalLike(x)  a = Add(x, r) },
        else_branch = otherwise () => (double[N,3] a) { a = Relu(x) }
    >
"""
FOREIGN = NOISE.replace("RandomNormalLike(x)", "com.microsoft.Gelu(x)")
LISTS = """
    trips = Constant <value = int64 {3}> ()
    empty = SequenceEmpty <dtype = 11> ()
    all = Loop (trips, , empty) <body = step (int64 i, bool c, seq(double[N,3]) s) => (bool c1, seq(double[N,3]) s1) {
        c1 = Identity(c)
        t = Tanh(x)
        s1 = SequenceInsert(s, t)
    }>
    y = ConcatFromSequence <axis = 1> (all)
"""


@pytest.mark.parametrize(
    ("signature", "body", "message"),
    [
        (
            "double[1,3] x => double[M,3] y",
            GROWING,
            r"'Loop_0' \(Loop\): its state 's1' begins with .* give it its full",
        ),
        ("double[N,3] x => double[M,3] y", SPREADING, r"'Loop_0' \(Loop\): its state 's1' begins with shape \(1, 3\)"),
        (
            "double[N,3] x, bool xc => double[N,3] y",
            NOISE,
            r"'If_0/then_branch/RandomNormalLike_0' \(RandomNormalLike\)",
        ),
        ("double[N,3] x, bool xc => double[N,3] y", FOREIGN, r"'If_0/then_branch/Gelu_0' \(com.microsoft.Gelu\)"),
        ("double[N,3] x => double[N,M] y", LISTS, r"Loop_0.*sequence"),
    ],
    ids=["a growing state", "a state that spreads", "noise", "a foreign operator", "sequences"],
)
def test_refused(signature, body, message):
    proto = network(signature, body)
    if "microsoft" in body:
        proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    with pytest.raises((ModelError, UnsupportedOps), match=message):
        onnx_lrp.rewrite(proto, "gradient", output="y")


SQUEEZED = """
    h = MatMul(x, w)
    one = Constant <value = int64 {1}> ()
    axis = Constant <value = int64[1] {1}> ()
    s = Shape(h)
    n = Gather(s, one)
    c = Equal(n, one)
    y = If (c) <
        then_branch = then () => (double[N,4] a) { a = Squeeze(h, axis) },
        else_branch = otherwise () => (double[N,K,4] a) { a = Identity(h) }
    >
    z = MatMul(y, v)
"""


def test_ranks_that_depend_on_open_lengths():
    """As torch's exporter leaves a squeeze: explained where the length is fixed, else with a hint to fix it."""
    signature = "double[N,K,3] x, double[3,4] w, double[4,2] v => double[N,2] z"
    with pytest.raises(
        ModelError, match=r"rank of tensor 'y' is unknown \(perhaps the branches of an If differ.*shapes="
    ):
        onnx_lrp.rewrite(network(signature, SQUEEZED), "epsilon")
    fixed = network(signature.replace("K", "1"), SQUEEZED.replace("K", "1"))
    explained = onnx_lrp.rewrite(fixed, "gradient", target=1)
    assert not [row for row in explained.table if row.op == "If"]
    x = np.random.default_rng(3).standard_normal((2, 1, 3))
    weights = {t.name: numpy_helper.to_array(t) for t in fixed.graph.initializer}
    expected = np.broadcast_to((weights["w"] @ weights["v"])[:, 1], x.shape)
    for run in (run_double, run_onnxruntime):
        assert close(run(explained.model, {"x": x})["relevance/x"], expected, EXACT)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bytes_twice(case):
    first, second = (explain(case.model, case, "zplus").model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


# ---- exporters and ONNX's own cases ----------------------------------------------------------------------------------


def test_loops_and_branches_of_torch():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = torch.nn.Linear(7, 4), torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.zeros(x.size(1), 4, dtype=x.dtype)
            for i in range(x.size(0)):
                h = torch.tanh(self.cell(torch.cat([x[i], h], 1)))
            if bool(h.sum() > 0):  # noqa: SIM108 - to be an If
                y = self.out(torch.relu(h))
            else:
                y = self.out(h * h)
            return y.squeeze(1)

    Net.forward.__annotations__ = {"x": torch.Tensor, "return": torch.Tensor}
    torch.manual_seed(0)
    net = torch.jit.script(Net().double().eval())
    file = io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "T", 1: "N"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(5, 2, 3).double(),), file, dynamo=False, opset_version=18, **names)
    proto = onnx.load_from_string(file.getvalue())
    assert {"Loop", "If"} <= {node.op_type for node in proto.graph.node}
    model = onnx_lrp.rewrite(proto, "gradient", start="input").model
    taken = set()
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal((3 + seed, 2, 3)) + (-1) ** seed * 2
        leaf = torch.tensor(x, requires_grad=True)
        y = net(leaf)
        start = np.random.default_rng(9).standard_normal(tuple(y.shape))
        y.backward(torch.tensor(start))
        for run in (run_double, run_onnxruntime):
            found = run(model, {"x": x, "start": start})
            assert close(found["relevance/x"], leaf.grad.numpy(), EXACT)
        state = torch.zeros(2, 4).double()
        for row in leaf:
            state = torch.tanh(net.cell(torch.cat([row, state], 1)))
        taken.add(bool(state.sum() > 0))
    assert taken == {True, False}


@pytest.mark.parametrize("name", ["test_loop11", "test_scan9_sum", "test_scan9_multi_state", "test_scan9_scalar"])
def test_cases_of_onnx(name):
    case = next(c for c in load_model_tests(kind="node") if c.name == name)
    ((inputs, _),) = case.data_sets
    model = to_double(case.model)
    arrays = [numpy_helper.to_array(x) if isinstance(x, TensorProto) else np.asarray(x) for x in inputs]
    feeds = {
        i.name: a.astype(np.float64) if a.dtype == np.float32 else a
        for i, a in zip(model.graph.input, arrays, strict=True)
    }
    wanted = [name for name, a in feeds.items() if a.dtype == np.float64]
    for output in (o.name for o in model.graph.output):
        y = run_double(model, feeds)[output]
        start = np.random.default_rng(6).standard_normal(y.shape)
        found = run_double(
            onnx_lrp.rewrite(model, "gradient", inputs=wanted, output=output, start="input").model,
            feeds | {"start": start},
        )
        for x in wanted:
            v = np.random.default_rng(7).standard_normal(feeds[x].shape)

            def score(t: float, x: str = x, v: np.ndarray = v, output: str = output, u: np.ndarray = start) -> float:
                return float((run_double(model, feeds | {x: feeds[x] + t * v})[output] * u).sum())

            expected, smooth = slope(score)
            assert smooth
            assert abs((found[f"relevance/{x}"] * v).sum() - expected) <= SLOPE * max(abs(expected), 1e-3)
