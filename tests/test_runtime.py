"""Sessions: what they ask ONNX Runtime for, where nodes run, and CUDA graphs; the device is one in name only."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import onnx_lrp
from onnx_lrp import Explainer, InputError
from onnx_lrp.placement import Placement, placed, placement, shape_nodes
from onnx_lrp.rewrite import rewrite
from onnx_lrp.runtime import choose_providers
from onnx_lrp.verify import verify
from tests.small_models import FLOAT, HALF, INT64, build, conv, normal
from tests.test_explainer import same

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
BATCH = {"x": (4, 3, 8, 8)}


class InName:
    """A session on the CPU that says it runs on the providers that were asked for."""

    made: ClassVar[list[InName]] = []

    def __init__(self, model, options, providers):
        self.asked, self.options, self.graphs = providers, options, []
        self.real = REAL(model, options, providers=[CPU])
        self.made.append(self)

    def get_providers(self):
        return [p if isinstance(p, str) else p[0] for p in self.asked]

    def io_binding(self):
        return Binding(self.real.io_binding())

    def run_with_iobinding(self, binding, options):
        self.graphs.append(options.get_run_config_entry("gpu_graph_id"))
        self.real.run_with_iobinding(binding.real, options)

    def __getattr__(self, name):
        return getattr(self.real, name)


class Binding:
    def __init__(self, real):
        self.real = real

    def bind_output(self, name, device):
        assert device == "cuda"
        self.real.bind_output(name, "cpu")

    def copy_outputs_to_cpu(self):
        return [np.array(a) for a in self.real.copy_outputs_to_cpu()]

    def __getattr__(self, name):
        return getattr(self.real, name)


REAL, VALUE = ort.InferenceSession, ort.OrtValue.ortvalue_from_numpy


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA that loads, in name only; the sessions that were made."""

    def value(array, device, number):
        assert (device, number) == ("cuda", 0)
        return VALUE(array.copy())

    monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(ort, "InferenceSession", InName)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", value)
    monkeypatch.setattr(InName, "made", [])
    return InName.made


# ---- what is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shapes", "search"), [(BATCH, "EXHAUSTIVE"), ({}, "HEURISTIC")])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_algorithms_are_searched_once_per_shape_or_not_at_all(cuda, device, shapes, search):
    explain = Explainer(conv(), "epsilon", device=device, shapes=shapes)
    assert cuda[-1].asked == [(CUDA, {"cudnn_conv_algo_search": search}), CPU]
    assert explain.providers == [CUDA, CPU]
    assert explain.chunk == (4 if shapes else 32)


def test_providers_with_options_go_through(cuda):
    wanted = [(TENSORRT, {"trt_fp16_enable": True}), CUDA, CPU]
    assert Explainer(conv(), providers=wanted).providers == [TENSORRT, CUDA, CPU]
    assert cuda[-1].asked == wanted
    assert choose_providers("cpu") == [CPU]


@pytest.mark.parametrize("provider", [TENSORRT, (TENSORRT, {"device_id": 0})])
def test_a_provider_asked_for_by_name_must_load(provider):
    with pytest.raises(InputError, match=f"{TENSORRT} was asked for and does not load"):
        Explainer(conv(), providers=[provider, CPU])


def test_cuda_graphs_are_refused_where_they_cannot_be(cuda):
    with pytest.raises(InputError, match=r"wants fixed lengths, and input 'x' has \(N, 3, 8, 8\)"):
        Explainer(conv(), device="cuda", cuda_graph=True)
    for options in ({"device": "cpu"}, {"providers": [TENSORRT, CUDA]}):
        with pytest.raises(InputError, match="cuda_graph=True is for CUDA"):
            Explainer(conv(), cuda_graph=True, shapes=BATCH, **options)
    assert not cuda, "nothing was loaded"


def test_cuda_graphs_are_refused_without_cuda(monkeypatch):
    with pytest.raises(InputError, match="cuda_graph=True is for CUDA"):
        Explainer(conv(), cuda_graph=True, shapes=BATCH)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(InputError, match=f"{CUDA} was asked for and does not load"):
        Explainer(conv(), cuda_graph=True, shapes=BATCH)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"providers": [(CUDA, {"device_id": 0}), CPU]}])
def test_cuda_graphs_are_replayed_with_new_inputs(cuda, options):
    plain = Explainer(conv(), "epsilon", device="cpu", threads=1)
    explain = Explainer(conv(), "epsilon", cuda_graph=True, shapes=BATCH, **options)
    assert cuda[-1].asked[0][1]["enable_cuda_graph"] == "1"
    x = normal(11, 3, 8, 8)
    same(explain(x), plain(x))
    same(explain(x[:2], target=3), plain(x[:2], target=3))
    same(explain(x[5:], target=[0, 1, 2, 3, 4, 0]), plain(x[5:], target=[0, 1, 2, 3, 4, 0]))
    same(explain(x[3:4]), plain(x[3:4]))
    assert cuda[-1].graphs == [*"111", "2", *"22", "1"], "a graph of its own where classes are fed"


# ---- where nodes run ---------------------------------------------------------------------------------------------


def flatten():
    """A classifier that flattens by shape arithmetic, and looks a row up."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "shape", end=1),
        helper.make_node("Concat", ["shape", "rest"], ["to"], "to", axis=0),
        helper.make_node("Reshape", ["x", "to"], ["flat"], "flatten"),
        helper.make_node("Expand", ["one", "to"], ["ones"], "ones"),
        helper.make_node("Mul", ["flat", "ones"], ["m"], "times"),
        helper.make_node("Add", ["index", "step"], ["next"], "next"),
        helper.make_node("Gather", ["table", "next"], ["row"], "look_up"),
        helper.make_node("Add", ["m", "row"], ["y"], "sum"),
    ]
    weights = {"rest": np.array([12]), "one": np.ones(1, np.float32), "step": np.array([1]), "table": normal(5, 12)}
    inputs = {"x": (FLOAT, ("N", 3, 2, 2)), "index": (INT64, (1,))}
    return build(nodes, inputs, {"y": (FLOAT, ("N", 12))}, weights)


def events(model, feeds, **providers):
    """A profile; nodes by name as if other providers had run them."""
    options = ort.SessionOptions()
    options.enable_profiling, options.graph_optimization_level = True, ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    for _ in range(2):
        session.run(None, feeds)
    with open(session.end_profiling()) as file:
        found = json.load(file)
    for event in found:
        if "provider" in event.get("args", {}):
            name = event["name"].removesuffix("_kernel_time")
            event["args"]["provider"] = providers.get(name, CPU)
    return found


def test_shape_arithmetic_is_told_by_what_it_reads():
    assert shape_nodes(flatten().graph) == {"shape", "to", "ones"}


def test_shape_arithmetic_in_bodies():
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["again"], "again"),
            helper.make_node("Add", ["length", "length"], ["twice"], "twice"),
            helper.make_node("Add", ["length", "kept"], ["next"], "next"),
        ],
        "body",
        [helper.make_tensor_value_info(n, t, []) for n, t in (("i", INT64), ("go", 9), ("kept", INT64))],
        [helper.make_tensor_value_info(n, t, []) for n, t in (("again", 9), ("next", INT64))],
    )
    nodes = [
        helper.make_node("Size", ["x"], ["length"], "size"),
        helper.make_node("Loop", ["length", "", "start"], ["y"], "loop", body=body),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", FLOAT, ["N"])], [])
    assert shape_nodes(graph) == {"size", "twice"}


def test_nodes_left_on_the_cpu_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = flatten()
    feeds = {"x": normal(2, 3, 2, 2), "index": np.array([2])}
    found = events(model, feeds, flatten=CUDA, times=CUDA, look_up=CUDA, sum=CUDA)
    copy = {"cat": "Node", "name": "Memcpy_1_kernel_time", "args": {"op_name": "MemcpyFromHost", "provider": CUDA}}
    places = placed([*found, copy], CUDA, shape_nodes(model.graph))
    assert places.counts() == {CUDA: 4, CPU: 4}, "nodes that ran twice count once"
    assert places.left_behind() == ["next (Add)", "ones (Expand)"], "ones of a tensor's size are no shape"
    assert str(places) == (
        f"4 on {CPU}, 4 on {CUDA} (2 for shapes), copies between host and device: 1; "
        "on the CPU, and not for shapes: next (Add), ones (Expand)"
    )
    assert places.to_json() == {"nodes": places.counts(), "copies": 1, "left_behind": places.left_behind()}
    on_cpu = placed(events(model, feeds), CPU, shape_nodes(model.graph))
    assert str(on_cpu) == f"8 on {CPU}"
    assert on_cpu.left_behind() == []


def test_placement_of_what_really_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = rewrite(conv(), "epsilon").model
    places = placement(model, {"x": normal(2, 3, 8, 8)}, device="cpu", threads=1)
    assert places.provider == CPU
    assert set(places.counts()) == {CPU}
    ops = {node.op for node in places.nodes}
    assert {"Conv", "Gemm", "Div"} <= ops
    assert not list(tmp_path.iterdir()), "the profile is gone"


def test_verify_tells_where_nodes_run_on_a_device(cuda):
    told = verify(conv(), normal(1, 3, 8, 8), "epsilon", device="cuda", threads=1)
    assert told.ok
    assert isinstance(told.placement, Placement)
    assert "(Conv)" in str(told), "here all of them run on the CPU, and are named"
    assert told.to_json()["placement"]["left_behind"]
    assert verify(conv(), normal(1, 3, 8, 8), "epsilon", threads=1).placement is None


# ---- 16 bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["epsilon", "epsilon_plus_flat", "gradient"])
def test_relevance_of_a_float16_model_is_computed_in_float32(method):
    explained = onnx_lrp.rewrite(conv(half=True), method)
    graph = onnx.shape_inference.infer_shapes(explained.model, strict_mode=True).graph
    types = {i.name: i.type.tensor_type.elem_type for i in (*graph.value_info, *graph.output)}
    assert types["logits"] == HALF
    assert types["relevance/x"] == FLOAT
    own = {node.name for node in explained.source.skeleton.graph.node}
    ours = [node for node in graph.node if node.name not in own]
    half = {node.op_type for node in ours if any(types.get(name) == HALF for name in node.output)}
    assert half == set(), "the model's own nodes alone make 16-bit numbers"
    assert {"Conv", "ConvTranspose"} & {node.op_type for node in ours}
