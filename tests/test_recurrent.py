"""LSTM, GRU and RNN: their steps compute what the fused operator does, and explain as the steps that they are."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import onnx_lrp
from onnx_lrp import model as models
from onnx_lrp.canonical import view
from onnx_lrp.cells import GATES
from onnx_lrp.errors import UnsupportedOps
from onnx_lrp.reference import to_double
from onnx_lrp.replay import replay
from tests import recurrent_oracle
from tests.adjoint_reference import run_onnxruntime
from tests.adjoint_tools import cotangents_for, gradient_model, off_slope, run_reference
from tests.support import run_double, worst

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 3, 5
FUNCTIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}


@dataclass(frozen=True)
class Cell:
    """A recurrent operator in one of its forms."""

    op: str
    attrs: dict[str, Any] = field(default_factory=dict)
    ways: int = 1
    lengths: tuple[int, ...] | None = None
    bias: bool = True
    initial: bool = True
    peephole: bool = False
    outputs: str = "yhc"
    steps: int = STEPS
    scale: float = 0.6

    def __str__(self) -> str:
        given = "_".join(f"{k}={v}" for k, v in self.attrs.items())
        plain = Cell(self.op)
        rest = (k for k in ("lengths", "bias", "initial", "peephole", "outputs", "steps"))
        changed = "_".join(f"{k}={getattr(self, k)}" for k in rest if getattr(self, k) != getattr(plain, k))
        return "-".join(filter(None, (self.op, given, changed))).replace(" ", "").replace("'", "")

    @property
    def batch_first(self) -> bool:
        return bool(self.attrs.get("layout"))

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs that can be differentiated by: data, weights, states."""
        rng = np.random.default_rng(5)
        width = len(GATES[self.op]) * HIDDEN
        state = (BATCH, self.ways, HIDDEN) if self.batch_first else (self.ways, BATCH, HIDDEN)
        shapes: dict[str, tuple[int, ...]] = {
            "x": (BATCH, self.steps, INPUTS) if self.batch_first else (self.steps, BATCH, INPUTS),
            "W": (self.ways, width, INPUTS),
            "R": (self.ways, width, HIDDEN),
        }
        if self.bias:
            shapes["B"] = (self.ways, 2 * width)
        if self.initial:
            shapes["h0"] = state
            if self.op == "LSTM":
                shapes["c0"] = state
        if self.peephole:
            shapes["P"] = (self.ways, 3 * HIDDEN)
        return {name: self.scale * rng.standard_normal(shape) for name, shape in shapes.items()}

    def model(self, dtype: Any = np.float64, weights: bool = False, free: bool = False) -> onnx.ModelProto:
        """A model of the operator alone; ``weights``: all but the data are initializers; ``free``: lengths are open."""
        arrays = {name: a.astype(dtype) for name, a in self.arrays().items()}
        names = ["x", "W", "R", "B", "lens", "h0", *(["c0", "P"] if self.op == "LSTM" else [])]
        constants = dict(arrays) if weights else {}
        constants.pop("x", None)
        if self.lengths is not None:
            constants["lens"] = np.array(self.lengths, np.int32)
        names = [n if n in arrays or n in constants else "" for n in names]
        outputs = [o if o in self.outputs else "" for o in ("yhc" if self.op == "LSTM" else "yh")]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        axes: dict[str, Sequence[str | int]] = {"x": ("N", "T", INPUTS) if self.batch_first else ("T", "N", INPUTS)}
        axes |= dict.fromkeys(("h0", "c0"), ("N", self.ways, HIDDEN) if self.batch_first else (self.ways, "N", HIDDEN))
        graph = helper.make_graph(
            [helper.make_node(self.op, names, outputs, name="cell", hidden_size=HIDDEN, **self.attrs)],
            "recurrent",
            [
                helper.make_tensor_value_info(n, kind, axes.get(n, a.shape) if free else a.shape)
                for n, a in arrays.items()
                if n not in constants
            ],
            [helper.make_tensor_value_info(o, kind, [None] * (4 if o == "y" else 3)) for o in outputs if o],
            [numpy_helper.from_array(a, n) for n, a in constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    def fused(self) -> dict[str, np.ndarray]:
        """Outputs of the operator in ONNX Runtime, in float32; it wants the steps first."""
        arrays = {name: a.astype(np.float32) for name, a in self.arrays().items()}
        if not self.batch_first:
            return run_onnxruntime(self.model(np.float32), arrays)
        attrs = {k: v for k, v in self.attrs.items() if k != "layout"}
        turned = Cell(self.op, attrs, self.ways, self.lengths, self.bias, self.initial, self.peephole, self.outputs)
        arrays |= {n: arrays[n].swapaxes(0, 1) for n in ("x", "h0", "c0") if n in arrays}
        found = run_onnxruntime(turned.model(np.float32), arrays)
        return {n: v.transpose(2, 0, 1, 3) if n == "y" else v.swapaxes(0, 1) for n, v in found.items()}


def functions(op: str, *names: str, **numbers: list[float]) -> dict[str, Any]:
    """Attributes that name as many activations as the operator takes."""
    return {"activations": list(names)[: FUNCTIONS[op]], **{f"activation_{k}": v for k, v in numbers.items()}}


def forms(op: str) -> list[Cell]:
    """An operator in all its forms."""
    both: dict[str, Any] = {"direction": "bidirectional"}
    cells = [
        Cell(op),
        Cell(op, steps=1),
        Cell(op, steps=1, initial=False, bias=False),
        Cell(op, {"direction": "reverse"}),
        Cell(op, both, 2),
        Cell(op, {"layout": 1}),
        Cell(op, both | {"layout": 1}, 2, lengths=(2, 4, 1)),
        Cell(op, lengths=(2, 4, 1)),
        Cell(op, lengths=(4, 4, 4)),
        Cell(op, lengths=(0, 3, 4)),
        Cell(op, lengths=(3, 0, 2), initial=False),
        Cell(op, {"direction": "reverse"}, lengths=(2, 4, 1)),
        Cell(op, both, 2, lengths=(2, 4, 0)),
        Cell(op, both, 2, initial=False, bias=False),
        Cell(op, bias=False),
        Cell(op, initial=False),
        Cell(op, {"clip": 0.5}),
        Cell(op, both, 2, outputs="y"),
        Cell(op, both, 2, outputs="h"),
        Cell(op, functions(op, "HardSigmoid", "Softsign", "Relu", alpha=[0.3], beta=[0.4])),
        Cell(op, functions(op, "HardSigmoid", "Softplus", "Softsign")),
        Cell(op, functions(op, "ScaledTanh", "Elu", "LeakyRelu", alpha=[0.8, 0.6, 0.2], beta=[0.7])),
        Cell(op, functions(op, "Affine", "ThresholdedRelu", "Elu", alpha=[0.3, 0.1], beta=[0.2])),
        Cell(op, functions(op, "Sigmoid", "LeakyRelu", "Tanh")),
    ]
    mixed = functions(op, "HardSigmoid", "ScaledTanh", "Tanh", alpha=[0.3, 0.8, 0.2, 0.9], beta=[0.4, 0.7, 0.5, 0.8])
    mixed["activations"] *= 2
    cells.append(Cell(op, both | mixed, 2))
    if op == "LSTM":
        cells += [Cell(op, outputs=o) for o in ("c", "yc", "hc")]
        cells += [
            Cell(op, peephole=True),
            Cell(op, both | {"clip": 0.4}, 2, peephole=True),
            Cell(op, peephole=True, initial=False),
            Cell(op, {"input_forget": 1}),
            Cell(op, {"input_forget": 1}, peephole=True, lengths=(2, 4, 1)),
        ]
    if op == "GRU":
        late = {"linear_before_reset": 1}
        cells += [
            Cell(op, late),
            Cell(op, late, initial=False),
            Cell(op, late, bias=False),
            Cell(op, late | both, 2, lengths=(2, 4, 1)),
            Cell(op, late | {"clip": 0.4, "layout": 1}),
        ]
    return cells


CELLS = [cell for op in GATES for cell in forms(op)]


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("weights", [False, True], ids=["fed", "constant"])
@pytest.mark.parametrize("form", ["free", "fixed", "portable"])
def test_the_steps_compute_what_the_fused_operator_does(cell: Cell, weights: bool, form: str) -> None:
    """What the walk sees, emitted on a copy of the data: as loops, and written out."""
    source = models.load(cell.model(np.float32, weights, free=form == "free"))
    v = view(source, portable=form == "portable")
    assert not {call.op for call in v.calls} & set(GATES)
    assert ("Scan" in {call.op for call in v.calls}) == (form == "free" or (form == "fixed" and cell.steps > 1))
    x = v.value("x")
    again = replay(v.e, v.calls, {x: v.e.op("Identity", x)})
    outputs = [v.e.rename(again[v.value(name)], f"steps/{name}") for name in v.outputs]
    proto = models.assemble(source, v.e.export(outputs), {})
    arrays = {name: a.astype(np.float32) for name, a in cell.arrays().items()}
    # ONNX Runtime does not run the fused operator with batches first: run the steps alone.
    del proto.graph.node[: len(source.skeleton.graph.node)]
    del proto.graph.output[: len(v.outputs)]
    assert not {node.op_type for node in proto.graph.node} & set(GATES)
    found = run_onnxruntime(proto, arrays)
    for name, expected in cell.fused().items():
        assert worst(found[f"steps/{name}"], expected) <= 1e-5


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradient_is_the_slope_of_the_fused_operator(cell: Cell) -> None:
    """Against differences of the fused operator in numpy, by everything that it reads; and in ONNX Runtime."""
    proto, feeds = cell.model(), cell.arrays()
    cotangents = cotangents_for(run_reference(proto, feeds))
    found = run_reference(gradient_model(proto, list(feeds)), {**feeds, **cotangents})
    for name in feeds:
        error = off_slope(False, proto, feeds, name, cotangents, found[f"gradient/{name}"])
        assert error is not None, "there is a kink here"
        assert error <= 1, f"{name}: the slope differs by {error:.1e} tolerances"


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_reference_is_onnx_runtime(cell: Cell) -> None:
    """What verification holds an explained model against computes what ONNX Runtime does."""
    found = run_double(cell.model(np.float32), cell.arrays())
    for name, expected in cell.fused().items():
        assert worst(found[name], expected) <= 1e-5


# ---- against torch ---------------------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "lstm": lambda: torch.nn.LSTM(3, 4, batch_first=True),
    "lstm_deep_both": lambda: torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    "lstm_no_bias": lambda: torch.nn.LSTM(3, 4, bias=False, batch_first=True),
    "gru": lambda: torch.nn.GRU(3, 4, batch_first=True),
    "gru_deep_both": lambda: torch.nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    "rnn": lambda: torch.nn.RNN(3, 4, batch_first=True),
    "rnn_relu_both": lambda: torch.nn.RNN(3, 4, nonlinearity="relu", bidirectional=True, batch_first=True),
}


class Classifier(torch.nn.Module):
    """A recurrent layer, and a linear one on the mean of its outputs."""

    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(2)
        self.layer = NETWORKS[name]()
        self.head = torch.nn.Linear(4 * (1 + self.layer.bidirectional), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0].mean(1))


def exported(network: torch.nn.Module, x: torch.Tensor, exporter: str = "script") -> onnx.ModelProto:
    """Exported with a free number of samples; by torch's older exporter also with a free length."""
    buffer = io.BytesIO()
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["logits"]}
    if exporter == "dynamo":
        return torch.onnx.export(
            network.eval(), (x,), dynamo=True, verbose=False, dynamic_shapes={"x": {0: "N"}}, **names
        ).model_proto
    torch.onnx.export(
        network.eval(),
        (x,),
        buffer,
        dynamic_axes={"x": {0: "N", 1: "T"}, "logits": {0: "N"}},
        opset_version=17,
        dynamo=False,
        **names,
    )
    return onnx.load_from_string(buffer.getvalue())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "exporter"),
    [*((n, "script") for n in NETWORKS), ("lstm_deep_both", "dynamo"), ("gru_deep_both", "dynamo")],
)
def test_gradient_is_that_of_torch(name: str, exporter: str) -> None:
    network = Classifier(name)
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((2, 6, 3)).astype(np.float32))
    model = exported(network, x, exporter)
    assert {n.op_type for n in model.graph.node} & set(GATES)
    explained = onnx_lrp.rewrite(model, "gradient", target=1).model
    network.double()
    for shape in ((2, 6, 3), (8, 6, 3), (1, 6, 3), *([(1, 1, 3), (3, 17, 3)] if exporter == "script" else [])):
        feeds = rng.standard_normal(shape).astype(np.float32)
        wide = torch.from_numpy(feeds).double().requires_grad_()
        network(wide)[:, 1].sum().backward()
        expected = wide.grad.numpy()
        assert worst(run_double(explained, {"x": feeds})["relevance/x"], expected) <= 1e-9
        assert worst(run_onnxruntime(explained, {"x": feeds})["relevance/x"], expected) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lstm_deep_both", "gru_deep_both"])
def test_methods_of_many_versions_with_a_free_length(name: str) -> None:
    """Integrated gradients are the mean gradient on the line, computed by torch."""
    network, count = Classifier(name), 3
    rng = np.random.default_rng(2)
    model = exported(network, torch.zeros(2, 6, 3))
    method = onnx_lrp.IntegratedGradients(steps=count)
    explained, exact = (onnx_lrp.rewrite(m, method, target=2).model for m in (model, to_double(model)))
    smooth = onnx_lrp.rewrite(model, onnx_lrp.SmoothGrad(samples=2, noise=0.0), target=2).model
    network.double()
    for shape in ((2, 5, 3), (1, 1, 3)):
        feeds = rng.standard_normal(shape).astype(np.float32)
        expected = np.zeros(shape)
        for place, weight in zip(*np.polynomial.legendre.leggauss(count), strict=True):
            at = torch.from_numpy(feeds).double() * (place + 1) / 2
            network(at.requires_grad_())[:, 2].sum().backward()
            expected += weight / 2 * feeds * at.grad.numpy()
        assert worst(run_double(exact, {"x": feeds.astype(np.float64)})["relevance/x"], expected) <= 1e-9
        assert worst(run_onnxruntime(explained, {"x": feeds})["relevance/x"], expected) <= 1e-5
        wide = torch.from_numpy(feeds).double().requires_grad_()
        network(wide)[:, 2].sum().backward()
        assert worst(run_onnxruntime(smooth, {"x": feeds})["relevance/x"], wide.grad.numpy()) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_deeplift_goes_through_the_steps() -> None:
    model = exported(Classifier("lstm"), torch.zeros(2, 6, 3))
    explained = onnx_lrp.rewrite(model, "deeplift", target=2, shapes={"x": (None, 4, None)}).model
    feeds = {"x": np.random.default_rng(2).standard_normal((2, 4, 3)).astype(np.float32)}
    found, at_zero = run_double(explained, feeds), run_double(model, {"x": np.zeros((2, 4, 3), np.float32)})["logits"]
    assert np.abs(found["delta"]).max() <= 1e-9
    np.testing.assert_allclose(found["relevance/x"].sum((1, 2)), (found["logits"] - at_zero)[:, 2], atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "layers"), [("gradient", 4), ("epsilon", 1)])
def test_only_what_waits_is_in_the_loop(method: str, layers: int) -> None:
    """Backwards one layer for each gate that relevance reaches; gates and what the inputs bring are made outside."""
    model = onnx_lrp.rewrite(exported(Classifier("lstm"), torch.zeros(2, 6, 3)), method, target=2).model
    loops = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    kinds = [[n.op_type for n in loop.node] for loop in loops]
    assert [ops.count("MatMul") for ops in kinds] == [0, layers]  # what the cell is; backwards
    assert not {"Sigmoid", "Tanh", "Div"} & {op for ops in kinds for op in ops}
    assert sum(n.op_type == "LSTM" for n in model.graph.node) == 1


# ---- relevance -------------------------------------------------------------------------------------------------------

# Epsilon everywhere, without its stabilizer: what input times gradient gives where gates and slopes are held constant.
EXACT_BOOK = """
title = "signal takes all, no stabilizer"
[[assign]]
where = { role = "gate" }
rule = "gate"
epsilon = 0.0
[[assign]]
where = { kind = "movement" }
rule = "route"
[[assign]]
where = { kind = ["linear", "bilinear"] }
rule = "lrp_0"
[[assign]]
where = { kind = "pointwise" }
rule = "pass"
"""


def held(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """f(x) as x times a constant: relevance passes."""
    return x * (function(x) / x).detach()


def lstm_surrogate(layer: torch.nn.LSTM, x: torch.Tensor) -> torch.Tensor:
    """Outputs of an LSTM whose gates are constants (Arras et al. 2017, sec. 3.1)."""
    h = c = torch.zeros(len(x), layer.hidden_size, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        z = x[:, t] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
        i, forget, g, o = z.chunk(4, 1)
        c = torch.sigmoid(forget).detach() * c + torch.sigmoid(i).detach() * held(torch.tanh, g)
        h = torch.sigmoid(o).detach() * held(torch.tanh, c)
        outputs.append(h)
    return torch.stack(outputs, 1)


def gru_surrogate(layer: torch.nn.GRU, x: torch.Tensor) -> torch.Tensor:
    """Outputs of a GRU whose gates are constants."""
    h = torch.zeros(len(x), layer.hidden_size, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        xr, xz, xn = (x[:, t] @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(3, 1)
        hr, hz, hn = (h @ layer.weight_hh_l0.T + layer.bias_hh_l0).chunk(3, 1)
        reset, update = torch.sigmoid(xr + hr).detach(), torch.sigmoid(xz + hz).detach()
        h = (1 - update) * held(torch.tanh, xn + reset * hn) + update * h
        outputs.append(h)
    return torch.stack(outputs, 1)


SURROGATES: dict[str, Callable[..., torch.Tensor]] = {"lstm": lstm_surrogate, "gru": gru_surrogate}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SURROGATES)
def test_gates_are_constants_and_the_signal_takes_all(name: str, tmp_path: Path) -> None:
    book = tmp_path / "exact.toml"
    book.write_text(EXACT_BOOK)
    network = Classifier(name)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 6, 3)).astype(np.float32))
    explained = onnx_lrp.rewrite(exported(network, x), book, target=1, ledger=True).model
    network.double()
    wide = x.double().requires_grad_()
    outputs = SURROGATES[name](network.layer, wide)
    torch.testing.assert_close(outputs, network.layer(wide)[0], rtol=1e-12, atol=1e-12)
    network.head(outputs.mean(1))[:, 1].sum().backward()
    found = run_double(explained, {"x": x.numpy()})
    assert worst(found["relevance/x"], (wide.grad * wide).detach().numpy()) <= 1e-9
    total = found["relevance/x"].sum((1, 2)) + found["absorbed"]
    np.testing.assert_allclose(total, found["score"], rtol=1e-9)


SHARES = ("gate", "share", "proportional")


def assert_relevance_of_the_surrogate(cell: Cell, output: str, rule: str, book: Path, **form: bool) -> None:
    """Relevance of data and states, and the account, against torch; in ONNX Runtime too where it has the operator."""
    book.write_text(recurrent_oracle.BOOK.replace("RULE", rule))
    arrays = cell.arrays()
    live = [n for n in ("x", "h0", "c0") if n in arrays]
    tensors = {n: torch.tensor(a, requires_grad=n in live) for n, a in arrays.items()}
    outputs = recurrent_oracle.surrogate(cell.op, cell.attrs, tensors, cell.lengths, rule)
    y = run_double(cell.model(), arrays)[output]
    np.testing.assert_allclose(outputs[output].detach(), y, rtol=1e-12, atol=1e-12)
    start = np.random.default_rng(3).standard_normal(y.shape) * (y != 0)
    expected = recurrent_oracle.relevance(outputs, output, torch.tensor(start), tensors)
    size = max(np.abs(r).max() for r in expected.values())
    assert size > 0
    perm = list(range(y.ndim)) if cell.batch_first else {4: [2, 0, 1, 3], 3: [1, 0, 2]}[y.ndim]
    for dtype, bound in ((np.float64, 1e-9), (np.float32, 1e-4)):
        if dtype == np.float32 and cell.batch_first:
            continue  # ONNX Runtime does not run the fused operator
        model = cell.model(dtype, free=not form)
        model.graph.node.append(helper.make_node("Transpose", [output], ["samples"], perm=perm))
        kind = model.graph.output[0].type.tensor_type.elem_type
        model.graph.output.append(helper.make_tensor_value_info("samples", kind, [None] * y.ndim))
        options = {"inputs": live, "output": "samples", "start": "input", "ledger": True} | form
        explained = onnx_lrp.rewrite(model, book, **options).model
        feeds = {n: a.astype(dtype) for n, a in (arrays | {"start": start.transpose(perm)}).items()}
        found = (run_double if dtype == np.float64 else run_onnxruntime)(explained, feeds)
        for n in live:
            assert np.abs(found[f"relevance/{n}"] - expected[n]).max() <= bound * size, n
        kept = sum(found[f"relevance/{n}"].sum() for n in live) + found["absorbed"].sum()
        assert abs(kept - start.sum()) <= bound * max(np.abs(start).sum(), size)


@pytest.mark.parametrize("number", range(len(CELLS)), ids=lambda k: str(CELLS[k]))
def test_relevance_is_that_of_the_surrogate(number: int, tmp_path: Path) -> None:
    """Every form, with rules and outputs by turns."""
    cell = CELLS[number]
    output = cell.outputs[number % len(cell.outputs)] if cell.op == "LSTM" else (cell.outputs * 2)[number % 2]
    output = output if output != "c" or cell.op == "LSTM" else "h"
    assert_relevance_of_the_surrogate(cell, output, SHARES[number % 3], tmp_path / "book.toml")


@pytest.mark.parametrize("rule", SHARES)
@pytest.mark.parametrize("op", GATES)
def test_rules_for_gates_in_a_loop_and_written_out(op: str, rule: str, tmp_path: Path) -> None:
    both: dict[str, Any] = {"direction": "bidirectional"}
    for cell, form in (
        (Cell(op, both, 2, lengths=(2, 4, 1)), {}),
        (Cell(op, both, 2, lengths=(2, 4, 1)), {"portable": True}),
        (Cell(op, steps=1), {"portable": False}),
    ):
        assert_relevance_of_the_surrogate(cell, "y", rule, tmp_path / "book.toml", **form)


def test_a_gate_is_known_through_its_complement(tmp_path: Path) -> None:
    """In (1 - sigmoid(a)) * tanh(b), as exporters write a GRU out, tanh(b) is the signal."""
    nodes = [
        helper.make_node("Sigmoid", ["a"], ["gate"]),
        helper.make_node("Sub", ["one", "gate"], ["rest"]),
        helper.make_node("Tanh", ["b"], ["signal"]),
        helper.make_node("Mul", ["rest", "signal"], ["y"], name="gated"),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("a", "b", "y")]
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    graph = helper.make_graph(nodes, "gated", infos[:2], infos[2:], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    explainer = onnx_lrp.Explainer(model, "epsilon", inputs=["a", "b"], start="softmax", device="cpu")
    assert next(row.rule for row in explainer.explained.table if row.node == "gated").startswith("gate")
    a, b = np.float32([[1, -2, 0.5]]), np.float32([[0.3, 2, -1]])
    found = explainer({"a": a, "b": b})
    np.testing.assert_array_equal(found.relevance["a"], 0)
    assert (found.relevance["b"] > 0.1).all()


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_sequence_without_steps_is_named() -> None:
    model = Cell("GRU").model(np.float32, weights=True)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [0, BATCH, INPUTS]))
    with pytest.raises(UnsupportedOps, match=r"cell \(GRU, opset 18\): its sequence has no steps"):
        onnx_lrp.rewrite(model, inputs=["x"])


def test_an_unknown_activation_is_named() -> None:
    model = Cell("RNN", {"activations": ["Wavy"]}).model(np.float32, weights=True)
    with pytest.raises(UnsupportedOps, match=r"cell \(RNN, opset 18\): its activation Wavy is unknown"):
        onnx_lrp.rewrite(model, inputs=["x"])
