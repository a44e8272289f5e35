"""Inner tensors of any rank as what is explained, and walks that begin with relevance computed in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrp import Explainer, Gradient, rewrite
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Value
from onnx_lrp.errors import InputError
from onnx_lrp.methods import Plan, Walk
from onnx_lrp.runtime import Session
from onnx_lrp.view import View
from tests.layers import Net, quarters
from tests.support import run_double

RNG = np.random.default_rng(5)
X = RNG.standard_normal((3, 4)).astype(np.float32)

SHAPES: dict[str, tuple[Any, ...]] = {"matrix": ("N", 4), "tokens": ("N", "T", 4), "fixed": (3, 4), "none": (4,)}


def branching(shape: tuple[Any, ...]) -> onnx.ModelProto:
    """Inner tensors of the input's rank (c, d), of one axis less (n), and without axes (s)."""
    net = Net(seed=2)
    a = net("Tanh", net("MatMul", net.input("x", *shape), net.weight(4, 6)))
    c = net("Tanh", net("MatMul", a, net.weight(6, 5), out="c"), out="d")
    inner = [net("ReduceSum", c, net.const([-1], np.int64), keepdims=0, out="n"), net("ReduceMean", c, keepdims=0)]
    return net.model(net("MatMul", c, net.weight(5, 3), out="y"), inner[0], net("Exp", inner[1], out="s"))


@pytest.mark.parametrize("name", ["c", "d", "n", "s"])
@pytest.mark.parametrize("axes", SHAPES)
def test_any_inner_tensor_is_explained_from_any_start(axes: str, name: str) -> None:
    """The gradient of what start="input" weighs, by torch."""
    torch = pytest.importorskip("torch")
    model = branching(SHAPES[axes])
    shape = [{"N": 3, "T": 2}.get(d, d) for d in SHAPES[axes]]
    x = quarters(RNG, tuple(shape))
    first, second = (
        torch.tensor(onnx.numpy_helper.to_array(w), dtype=torch.float64) for w in model.graph.initializer[:2]
    )
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    c = torch.tanh(leaf @ first) @ second
    d = torch.tanh(c)
    value = {"c": c, "d": d, "n": d.sum(-1), "s": torch.exp(d.mean())}[name]
    start = np.asarray(RNG.standard_normal(tuple(value.shape)))
    value.backward(torch.tensor(start))
    found = run_double(rewrite(model, "gradient", output=name, start="input").model, {"x": x, "start": start})
    np.testing.assert_allclose(found["relevance/x"], leaf.grad.numpy(), rtol=1e-9, atol=1e-12)
    total = (value * 0 + torch.tensor(start)).detach().numpy()
    # A vector of a model without an axis of samples is one sample's.
    rows = total.reshape(1, -1).sum(1) if axes == "none" or not total.ndim else total.reshape(len(total), -1).sum(1)
    np.testing.assert_allclose(found["score"], rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["lrp_0", "gradient"])
def test_a_tensor_without_axes_is_explained_in_one_run(method: str) -> None:
    """It belongs to all samples, so a batch is not cut into pieces."""
    x = quarters(RNG, (7, 4))
    model = branching(("N", 4))
    explained = Explainer(model, method, output="s", device="cpu", threads=1, batch_size=2)(x)
    expected = run_double(rewrite(model, method, output="s").model, {"x": x})
    assert explained.score.shape == (1,)
    np.testing.assert_allclose(explained.score, expected["score"], rtol=1e-5)
    np.testing.assert_allclose(explained.relevance["x"], expected["relevance/x"], rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Energy(Gradient):
    """Half the squared length of two tensors, of which one lies on the way from the other."""

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        c, n = v.value("c"), v.value("n")
        with v.e.scope("energy"):
            score = v.e.op("ReduceSumSquare", c, np.array([1]), keepdims=0) * 0.5 + n * n * 0.5
        return Plan(
            [Walk(self.step_for, list(reported), seeds={c: Relevance(c), n: Relevance(n)})], self.report, score=score
        )


def test_a_method_begins_where_it_says_with_what_it_computes() -> None:
    torch = pytest.importorskip("torch")
    model = branching(("N", 4))
    x = quarters(RNG, (3, 4))
    first, second = (
        torch.tensor(onnx.numpy_helper.to_array(w), dtype=torch.float64) for w in model.graph.initializer[:2]
    )
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    c = torch.tanh(leaf @ first) @ second
    energy = c.square().sum(1) / 2 + torch.tanh(c).sum(1).square() / 2
    energy.sum().backward()
    found = run_double(rewrite(model, Energy()).model, {"x": x})
    np.testing.assert_allclose(found["relevance/x"], leaf.grad.numpy(), rtol=1e-9)
    np.testing.assert_allclose(found["score"], energy.detach().numpy(), rtol=1e-9)
    np.testing.assert_array_equal(found["target_used"], [-1] * 3)


@pytest.mark.parametrize("options", [{"target": 1}, {"start": "one"}, {"output": "y"}])
def test_a_method_of_its_own_score_takes_no_class(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="explains no class: leave output=, start=, against= and target= away"):
        rewrite(branching(("N", 4)), Energy(), **options)
    with pytest.raises(InputError, match="no class"):
        Explainer(branching(("N", 4)), Energy(), device="cpu")(X, target=1)
    with pytest.raises(InputError, match="'c' or 'n' does not depend on y"):
        rewrite(branching(("N", 4)), Energy(), inputs=["y"])


# ---- values ----------------------------------------------------------------------------------------------------------


def test_values_of_inner_tensors_are_outputs() -> None:
    """As the model itself makes them, batch by batch, and cut with the explanation."""
    model = branching(SHAPES["matrix"])
    wider = onnx.ModelProto()
    wider.CopyFrom(model)
    wider.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("c", "d"))
    expected = Session(wider, device="cpu").run({"x": X}, ["c", "d"])
    explainer = Explainer(model, "epsilon", values=["c", "d", "c"], batch_size=2, device="cpu")
    found = explainer(X)
    assert list(found.values) == ["c", "d"]
    for name, value in expected.items():
        np.testing.assert_array_equal(found.values[name], value)
        np.testing.assert_array_equal(found[1].values[name], value[1:2])
        np.testing.assert_array_equal(found.arrays()[f"value/{name}"], value)
    assert list(found.relevance) == ["x"]
    (output,) = (o for o in explainer.explained.model.graph.output if o.name == "value/c")
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == ["N", 5]


def test_values_behind_a_switch_and_of_inputs() -> None:
    model = branching(SHAPES["matrix"])
    switched = rewrite(model, "epsilon", values=["x", "d"], switch=True).model
    session = Session(switched, device="cpu")
    shown = session.run({"x": X})
    np.testing.assert_array_equal(shown["value/x"], X)
    assert shown["value/d"].shape == (3, 5)
    assert not session.run({"x": X, "explain": np.array(False)})["value/d"].size


def test_values_of_no_tensor() -> None:
    with pytest.raises(InputError, match="no tensor named 'nothing'"):
        rewrite(branching(SHAPES["matrix"]), "epsilon", values=["nothing"])
