"""Several classes of every sample in one run: as one run for each, the forward pass computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.classes import table
from benchmarks.costs import networks, products
from benchmarks.networks import Sizes
from onnx_lrp.errors import InputError, OnnxLrpError
from onnx_lrp.explainer import Explainer
from onnx_lrp.explanation import Explanation
from onnx_lrp.methods import IntegratedGradients, SmoothGrad, method_names
from onnx_lrp.rewrite import Explained, rewrite
from onnx_lrp.runtime import Session
from tests.adjoint_reference import run_reference
from tests.adjoint_tools import EXACT, close
from tests.control_cases import CASES, Case
from tests.layers import BATCH, LAYERS, Net
from tests.small_models import conv, two_inputs, writer
from tests.support import numbers, run_double, to_double
from tests.test_free_shapes import FREE
from tests.test_random_graphs import drawn
from tests.transformer_nets import exported, inputs_of

SINGLE = 1e-5
Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], Feeds]
Trials = Sequence[tuple[Feeds, Feeds]]
# Of many versions few are enough here.
SHORT: dict[str, Any] = {"integrated_gradients": IntegratedGradients(steps=3), "smoothgrad": SmoothGrad(samples=3)}


def pools(batch: int | str = "N") -> onnx.ModelProto:
    """Windows that overlap and windows that do not, a shortcut, a batch norm; five classes."""
    net = Net()
    h = net("Relu", net("Conv", net.input("x", batch, 3, 9, 9), net.weight(4, 3, 3, 3), net.weight(4)))
    h = net("MaxPool", h, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    g = net("Conv", h, net.weight(4, 4, 3, 3), pads=[1, 1, 1, 1])
    g = net("BatchNormalization", g, *(net.const(np.full(4, v)) for v in (1, 0.1, 0.2, 1)))
    h = net("MaxPool", net("Relu", net("Add", g, h)), kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net("Softmax", net("Gemm", net("Flatten", h), net.weight(16, 5), net.weight(5))))


def in_double(model: onnx.ModelProto) -> Run:
    """A model in float64, by ONNX's reference implementation."""
    exact = to_double(model)

    def run(feeds: Feeds) -> Feeds:
        return run_reference(exact, {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in feeds.items()})

    return run


def in_runtime(model: onnx.ModelProto) -> Run:
    """A model by ONNX Runtime."""
    session = Session(model, device="cpu", threads=1)
    return lambda feeds: session.run({name: x.astype(session.dtype(name)) for name, x in feeds.items()})


def in_rows(turns: np.ndarray) -> np.ndarray:
    """(K, N, …) as N·K rows, those of the first sample first."""
    return np.moveaxis(turns, 0, 1).reshape(-1, *turns.shape[2:])


def apart(rows: np.ndarray, axis: int, count: int) -> np.ndarray:
    """N·K rows on an axis as one array for each of K classes."""
    split = rows.reshape(*rows.shape[:axis], -1, count, *rows.shape[axis + 1 :])
    return np.moveaxis(split, axis + 1, 0)


def check(
    model: onnx.ModelProto,
    method: Any,
    trials: Trials,
    runs: Mapping[Callable[[onnx.ModelProto], Run], float],
    **options: Any,
) -> Explained:
    """Compare one run with a run for each class, in all that has a row per class, and in the model's own outputs.

    ``trials``: inputs, and what is fed for the classes: (K, N, …).
    """
    many, plain = (rewrite(model, method, multi_target=several, **options) for several in (True, False))
    assert set(many.rows) >= {*plain.relevance.values(), "target_used", "score"}
    for made, tolerance in runs.items():
        whole, single = made(many.model), made(plain.model)
        for feeds, turns in trials:
            together = whole(feeds | {name: in_rows(x) for name, x in turns.items()})
            count = len(next(iter(turns.values())))
            for k in range(count):
                alone = single(feeds | {name: x[k] for name, x in turns.items()})
                assert alone.keys() == together.keys()
                for name, expected in alone.items():
                    found = together[name]
                    found = apart(found, many.rows[name], count)[k] if name in many.rows else found
                    if name == "delta" and tolerance > EXACT:
                        continue  # in float32 it is what rounding leaves of sums that cancel
                    assert close(found, expected, tolerance), f"{made.__name__}, class {k}: {name}"
    return many


def both(model: onnx.ModelProto, method: Any, trials: Trials, **options: Any) -> None:
    """In float64 and in float32, which methods that refuse a model do as ever."""
    try:
        rewrite(model, method, **options)
    except OnnxLrpError as error:
        with pytest.raises(type(error)):
            rewrite(model, method, multi_target=True, **options)
        return
    if method == "hadamard":
        with pytest.raises(InputError, match="explains no class"):
            rewrite(model, method, multi_target=True)
        return
    many = check(model, SHORT.get(method, method), trials, {in_double: EXACT, in_runtime: SINGLE}, **options)
    assert many.sharing


def classes_of(samples: int, count: int, most: int) -> np.ndarray:
    """Classes (K, N), other ones for each sample."""
    return (np.arange(count)[:, None] + 2 * np.arange(samples)) % most


def fed(shapes: Mapping[str, tuple[int, ...]], samples: int) -> Feeds:
    """Numbers for every input; token ids below ten."""
    full = {name: (samples, *shape) for name, shape in shapes.items()}
    return {n: np.arange(np.prod(s)).reshape(s) % 10 if n == "ids" else numbers(*s) for n, s in full.items()}


# ---- the graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_pictures(method: str, batch: int | str) -> None:
    """A free batch and a fixed one; one sample and several, one class and several."""
    options = {} if SHORT.get(method) or "grad" in method else {"ledger": True}
    trials = [
        ({"x": numbers(samples, 3, 9, 9)}, {"target": classes_of(samples, count, 5)})
        for samples in ((1, 3) if batch == "N" else (batch,))
        for count in (1, 4)
    ]
    both(pools(batch), method, trials, **options)


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("name", [name for name in FREE if name != "conv"])
def test_networks_of_every_kind(name: str, method: str) -> None:
    """Several inputs, tokens, attention, gates, a batch that an LSTM has on its second axis."""
    build, shapes = FREE[name]
    classes = classes_of(3, 2, 2)
    classes = classes if name != "pixels" else np.stack([classes + 7, classes], -1)
    both(build(), method, [(fed(shapes, 3), {"target": classes})])


@pytest.mark.parametrize("method", ["attnlrp", "cp_lrp", "gradient", "integrated_gradients"])
@pytest.mark.parametrize("name", ["bert", "gpt", "llama", "vit"])
def test_transformers(name: str, method: str) -> None:
    """A class of a picture, or a position and a class of a text."""
    model, feeds = exported(name, "dynamo-18"), inputs_of(name, batch=2)
    classes = classes_of(2, 3, 3)
    if len(rewrite(model, method).classes) == 2:
        classes = np.stack([np.array([[0, 5], [1, 4], [-1, 3]]), classes], -1)
    both(model, method, [(feeds, {"target": classes})])


@pytest.mark.parametrize("method", ["gradient", "epsilon_plus_flat", "epsilon"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_control_flow(case: Case, method: str) -> None:
    """Bodies that are walked through in the body of the classes; what begins the relevance is fed."""
    (name,) = (o.name for o in case.model.graph.output)
    shape = run_double(case.model, case.feeds)[name].shape
    starts = np.random.default_rng(6).standard_normal((2, *shape))
    inputs = [x for x in case.wanted if x in ("x", "xh")]
    runs = {in_double: EXACT, in_runtime: EXACT} if case.in_runtime else {in_double: EXACT}
    options = {"start": "input", "ledger": True, "inputs": inputs}
    check(case.model, method, [(case.feeds, {"start": starts})], runs, **options)


@pytest.mark.parametrize("rule", ["epsilon", "epsilon_alpha2_beta1", "input_x_gradient"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, rule: str) -> None:
    layer, net = LAYERS[name], Net(seed=3)
    shapes = [(*s[: layer.batch_axis], BATCH, *s[layer.batch_axis :]) for s in layer.shapes]
    names = [net.input(f"x{i}", *s[: layer.batch_axis], "N", *s[layer.batch_axis + 1 :]) for i, s in enumerate(shapes)]
    model = net.model(layer.build(net, names, "layer"))
    feeds = {n: numbers(*s) for n, s in zip(names, shapes, strict=True)}
    z = run_double(model, feeds)[model.graph.output[0].name]
    trials = [(feeds, {"start": numbers(4, *z.shape)})]
    check(model, rule, trials, {in_double: EXACT, in_runtime: SINGLE}, start="input")


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed: int) -> None:
    """Whatever becomes of the axis of samples on the way."""
    g, outputs = drawn(seed)
    tensors = dict(g.pool)
    feeds = {name: x.detach().numpy() for name, x in g.inputs.items()}
    starts = np.random.default_rng(seed).standard_normal((3, *tensors[outputs[0]].shape))
    options = {"start": "input", "output": outputs[0], "allow_gradient": True}
    for dtype, run, tolerance in ((np.float64, in_double, EXACT), (np.float32, in_runtime, SINGLE)):
        check(g.model(dtype, outputs), "gradient", [(feeds, {"start": starts})], {run: tolerance}, **options)


def test_masks_and_the_class_to_subtract_have_a_row_for_every_class() -> None:
    """Rows of their own, one per sample, or one for all."""
    model, x = pools(), numbers(3, 3, 9, 9)
    classes = classes_of(3, 2, 5)
    runs = {in_double: EXACT, in_runtime: SINGLE}
    layer = next(node.output[0] for node in model.graph.node if node.op_type == "Relu")
    masks = {f"mask/{layer}": (numbers(2, 3, 4) > 0).astype(np.float32)}
    check(model, "epsilon", [({"x": x}, {"target": classes} | masks)], runs, masks=[layer], ledger=True)
    for_all = {"x": x, "against": np.array([4])}, {"target": classes}
    for_each = {"x": x}, {"target": classes, "against": (classes + 1) % 5}
    check(model, "epsilon", [for_all, for_each], runs, against=True)
    one = {"x": x, **{name: rows[0, :1] for name, rows in masks.items()}}
    check(model, "epsilon", [(one, {"target": classes})], runs, masks=[layer])


def test_default_is_the_highest_and_further_ranks_follow() -> None:
    """Without a class the arg max; -k is the k-th highest, and the last one below that."""
    model, x = pools(), numbers(3, 3, 9, 9)
    many = rewrite(model, "gradient", multi_target=True).model
    found = in_double(many)({"x": x})
    for name, expected in in_double(rewrite(model, "gradient").model)({"x": x}).items():
        np.testing.assert_array_equal(found[name], expected)
    order = np.argsort(-found[model.graph.output[0].name], 1)
    ranks = in_double(many)({"x": x, "target": np.tile([-1, -2, -5, -9, 3], 3)})["target_used"]
    np.testing.assert_array_equal(ranks.reshape(3, 5), np.c_[order[:, [0, 1, 4, 4]], [3, 3, 3]])


def test_behind_a_switch() -> None:
    model, x, classes = pools(), numbers(2, 3, 9, 9), np.array([0, 3, 1, 4])
    runs = [
        in_runtime(rewrite(model, "epsilon", multi_target=True, switch=s).model)({"x": x, "target": classes})
        for s in (False, True)
    ]
    for name, expected in runs[0].items():
        np.testing.assert_allclose(runs[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 3}, "multi_target=True is for classes that are fed"),
        ({"portable": True}, "multi_target=True needs a Scan, which WebGPU lacks"),
        ({"inputs": ["w"]}, "multi_target=True: 'w' has no axis of samples"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    net = Net()
    model = net.model(net("MatMul", net.input("x", "N", 4), net.input("w", 4, 5)))
    with pytest.raises(InputError, match=message):
        rewrite(model, "epsilon", multi_target=True, **({"inputs": ["x"]} | options))
    assert not rewrite(model, "epsilon", **({"inputs": ["x"]} | options)).sharing


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "once"), [("epsilon_plus_flat", 2), ("epsilon", 1), ("gradient", 1)])
@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_one_forward_pass_for_all_classes(name: str, method: str, once: int) -> None:
    """K classes cost the passes forward once, and K passes back."""
    model, shapes = networks()[name]
    feeds = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    many = rewrite(model, method, multi_target=True).model
    forward = products(model, feeds)
    for count in (1, 5):
        assert products(many, feeds | {"target": np.arange(count)}) <= (once + count) * forward * 1.01


def body_of(model: onnx.ModelProto) -> set[str]:
    """The operators that run once per class."""
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan" and "classes" in node.name)
    return {node.op_type for a in scan.attribute if a.name == "body" for node in a.g.node}


def test_dense_layers_take_all_classes_at_once() -> None:
    """Their weights are read once, not once per class; a network of such layers needs no Scan."""
    found = body_of(rewrite(networks()["vgg16"][0], "epsilon_plus", multi_target=True).model)
    assert "Conv" in found
    assert not {"Gemm", "MatMul", "ArgMax", "TopK"} & found
    net = Net()
    h = net("Relu", net("Gemm", net.input("x", "N", 6), net.weight(6, 5), net.weight(5)))
    dense = rewrite(net.model(net("Gemm", h, net.weight(5, 4))), "epsilon", multi_target=True)
    assert "Scan" not in {node.op_type for node in dense.model.graph.node}


def test_the_benchmark_runs() -> None:
    head, _, *lines = table("resnet50", "epsilon_plus", (1, 2), Sizes(picture=32, shrink=16), threads=1, rounds=1)
    assert [line.split("|")[1].strip() for line in (head, *lines)] == ["classes", "1", "2"]
    assert all(float(cell) > 0 for line in lines for cell in line.strip("| ").split("|"))


def test_what_the_walk_needs_is_computed_outside_of_the_scan() -> None:
    """A Scan in a model that is walked through is run once, not once per class."""
    build, _ = FREE["recurrent"]
    many = rewrite(build(), "epsilon", multi_target=True).model
    assert not {"LSTM", "Sigmoid", "Tanh"} & body_of(many)


# ---- the explainer ---------------------------------------------------------------------------------------------------


def explainer(model: onnx.ModelProto, method: str = "epsilon_plus_flat", **options: Any) -> Explainer:
    return Explainer(model, method, device="cpu", threads=1, **options)


def assert_single_runs(explain: Explainer, feeds: Any, found: Explanation, **options: Any) -> None:
    """Every class as in a run of its own."""
    targets = found.by_sample(found.target)
    for k in range(found.per_sample):
        alone, part = explain(feeds, targets[:, k], **options), found[k :: found.per_sample]
        for name, expected in alone.arrays().items():
            np.testing.assert_allclose(part.arrays()[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
        for name, expected in alone.inputs.items():
            np.testing.assert_array_equal(part.inputs[name], expected)


@pytest.mark.parametrize("batch", ["N", 1, 2])
@pytest.mark.parametrize(
    ("target", "count"), [("all", 5), ("top:3", 3), ([[0, 3]], 2), ([[0, 1], [2, 3], [4, 0]], 2), ([[1], [2], [3]], 1)]
)
def test_classes_of_every_sample(target: Any, count: int, batch: int | str) -> None:
    explain = explainer(conv(batch), ledger=True, layers=["r"], values=["g"])
    x = numbers(3, 3, 8, 8)
    found = explain(x, target)
    assert len(found) == 3 * count
    assert found.per_sample == count
    assert found.by_sample(found.relevance["x"]).shape == (3, count, 3, 8, 8)
    assert found.outputs["logits"].shape == (3 * count, 5)
    if isinstance(target, list):
        np.testing.assert_array_equal(found.by_sample(found.target), np.broadcast_to(target, (3, count)))
    if target == "top:3":
        logits = found.by_sample(found.outputs["logits"])[:, 0]
        np.testing.assert_array_equal(found.by_sample(found.target), np.argsort(-logits, 1)[:, :3])
    assert_single_runs(explain, x, found)


def test_runs_are_bounded_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few classes several samples a run, with many several runs a sample."""
    model, explain = conv(classes=40), explainer(conv(classes=40), batch_size=2)
    runs: list[tuple[int, int]] = []
    _, session = explain._many
    run = session.run
    monkeypatch.setattr(
        session, "run", lambda feeds: runs.append((len(feeds["x"]), len(feeds["target"]))) or run(feeds)
    )
    x = numbers(3, 3, 8, 8)
    assert_single_runs(explainer(model), x, explain(x, [[3, 8, 1, 0, 2, 39]]))
    assert runs == [(2, 12), (1, 6)]
    runs.clear()
    assert_single_runs(explainer(model), x, explain(x, "all"))
    assert runs == [(1, 16), (1, 16), (1, 8)] * 3


def test_samples_on_another_axis_and_inputs_of_several_kinds() -> None:
    explain = explainer(two_inputs(), "epsilon")
    feeds = {"image": numbers(3, 3, 4, 4), "table": numbers(3, 2)}
    found = explain(feeds, [[0, 1], [1, 0], [0, 2]])
    assert found.outputs["state"].shape[1] == 6
    assert found.relevance["table"].shape == (6, 2)


def test_classes_share_nothing_where_a_tensor_has_no_samples() -> None:
    """Then samples are repeated, with the same result, and ranks are refused."""
    net = Net()
    model = net.model(net("MatMul", net.input("x", "N", 4), net.weight(4, 5)))
    explain, portable = explainer(model, "epsilon"), explainer(model, "epsilon", portable=True)
    assert (explain.explained.sharing, portable.explained.sharing) == (True, False)
    x = numbers(2, 4)
    ours, theirs = (e(x, [[0, 3], [4, 1]]) for e in (explain, portable))
    assert ours.per_sample == theirs.per_sample == 2
    for name, expected in theirs.arrays().items():
        np.testing.assert_allclose(ours.arrays()[name], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="'top:2': this model takes one class per sample"):
        portable(x, "top:2")


def test_positions_and_conditions_of_one_sample_share_it_too() -> None:
    explain = explainer(writer(mask=False), "epsilon")
    ids = np.array([[5, 6, 7, 8]])
    found = explain(ids, position="all")
    assert found.per_sample == 4
    for p in range(4):
        np.testing.assert_allclose(
            found.relevance["input_ids"][p], explain(ids, position=p).relevance["input_ids"][0], rtol=1e-4, atol=1e-6
        )
    masked = explainer(conv(), "epsilon", masks=["r"])
    x = numbers(1, 3, 8, 8)
    several = masked(x, masks={"r": [0, [1, 2], 5]})
    assert several.per_sample == 3
    for k, channels in enumerate(([0], [1, 2], [5])):
        alone = masked(x, masks={"r": [channels]})
        np.testing.assert_allclose(several.relevance["x"][k], alone.relevance["x"][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([[0, 1], [2, 3]], "classes of 2 samples, and there are 3"),
        ([[0, 7]], "class 7 is out of range: the output has 5 classes"),
        ([[0, -6]], "class -6 is out of range"),
        ("top:0", "give 1 to 5"),
        ("top:6", "the output has 5 classes; give 1 to 5"),
        ([0, 1], "one class for all or one per sample"),
    ],
)
def test_classes_that_cannot_be(target: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        explainer(conv())(numbers(3, 3, 8, 8), target)
