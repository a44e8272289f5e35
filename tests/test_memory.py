"""Memory: what is alive at once, what a loaded explainer holds, and models beyond what protobuf can hold."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnx_lrp
from benchmarks.measure import MB, Call, alone, peak
from benchmarks.memory import live
from onnx_lrp import Explainer, IntegratedGradients, ModelError, SmoothGrad, runtime
from onnx_lrp.order import by_depth, reads
from onnx_lrp.runtime import Session
from tests.small_models import FLOAT, build, conv, normal

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process")


# ---- order -------------------------------------------------------------------------------------------------------


def test_nodes_stand_by_depth_and_equally_deep_ones_as_they_stood() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["late"]),
        helper.make_node("Neg", ["a2"], ["late2"]),
        helper.make_node("Neg", ["x"], ["early"]),
        helper.make_node("Add", ["late2", "early"], ["sum"]),
        helper.make_node("Neg", ["late"], ["second"]),
    ]
    before = [helper.make_node("Abs", ["x"], ["a1"]), helper.make_node("Abs", ["a1"], ["a2"])]
    names = [node.output[0] for node in by_depth(nodes, before)]
    assert names == ["late", "early", "second", "late2", "sum"]


@pytest.mark.parametrize("method", ["epsilon_plus", IntegratedGradients(8)])
def test_bodies_are_in_order_too(method: object) -> None:
    """No node stands before one that is less deep, and each behind what it reads."""

    def check(nodes: list[onnx.NodeProto], depths: dict[str, int]) -> int:
        inner = last = 0
        for node in nodes:
            depth = 1 + max((depths.get(name, 0) for name in reads(node)), default=0)
            assert depth >= last
            assert not set(reads(node)) & {o for n in nodes for o in n.output} - depths.keys()
            depths |= dict.fromkeys(node.output, depth)
            last = depth
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    inner += 1 + check(list(attribute.g.node), {})
        return inner

    explained = onnx_lrp.rewrite(conv(), method)
    own = len(explained.source.skeleton.graph.node)
    nodes = list(explained.model.graph.node)
    depths: dict[str, int] = {}
    for node in nodes[:own]:
        depths |= dict.fromkeys(node.output, 1 + max((depths.get(name, 0) for name in reads(node)), default=0))
    assert check(nodes[own:], depths) == (method != "epsilon_plus")


# ---- what is alive at once -----------------------------------------------------------------------------------------


def test_alive_is_what_will_still_be_read() -> None:
    """x (not counted) -> a -> b -> c, of 400 bytes each: two at a time, three where the last reads the first."""
    inputs, outputs = {"x": (FLOAT, (1, 100))}, {"c": (FLOAT, (1, 100))}
    chain = [helper.make_node("Neg", [i], [o], name=o) for i, o in ("xa", "ab", "bc")]
    feeds = {"x": np.ones((1, 100), np.float32)}
    assert live(build(chain, inputs, outputs, {}), feeds) == 800
    skip = [*chain[:2], helper.make_node("Add", ["a", "b"], ["c"], name="c")]
    assert live(build(skip, inputs, outputs, {}), feeds) == 1200
    weight = helper.make_node("Neg", ["w"], ["n"], name="n")
    derived = [weight, helper.make_node("Add", ["x", "n"], ["c"], name="c")]
    assert live(build(derived, inputs, outputs, {"w": np.ones((1, 100), np.float32)}), feeds) == 400


@pytest.mark.parametrize("make", [IntegratedGradients, SmoothGrad])
def test_methods_of_many_versions_are_bounded_by_their_chunk(make: Callable[..., object]) -> None:
    """Fivefold steps take not a byte more; a larger chunk does."""
    x = {"x": np.ones((1, 3, 32, 32), np.float32)}

    def bytes_of(count: int, chunk: int) -> int:
        return live(onnx_lrp.rewrite(conv(size=32), make(count, chunk=chunk)).model, x)

    assert bytes_of(8, 2) == bytes_of(40, 2)
    assert bytes_of(8, 8) > 2.5 * bytes_of(8, 2)


# ---- what a loaded explainer holds ---------------------------------------------------------------------------------


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are loaded as large ones."""
    monkeypatch.setattr(runtime, "_LARGE", 0)


def wide() -> onnx.ModelProto:
    """A Gemm of weights as raw bytes, whose bias is a list of floats, and an input that has a default."""
    bias = helper.make_tensor("b", TensorProto.FLOAT, [300], normal(300))
    inputs = {"x": (FLOAT, ("N", 50)), "scale": (FLOAT, (50,))}
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["s"], "scale"),
        helper.make_node("Gemm", ["s", "w", "b"], ["y"], "dense"),
    ]
    constants = {"w": normal(50, 300), "scale": normal(50), "b": normal(300)}
    model = build(nodes, inputs, {"y": (FLOAT, ("N", 300))}, constants)
    model.graph.initializer[2].CopyFrom(bias)
    return model


picture = functools.partial(conv, channels=16)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("source", [wide, picture])
def test_weights_that_are_mapped_are_the_same(source: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    model = source()
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    x = normal(3, 50) if source is wide else normal(3, 16, 8, 8)
    explained = onnx_lrp.rewrite(model, "epsilon_plus")
    expected = onnx.ModelProto.FromString(explained.model.SerializeToString())
    session = runtime.onnxruntime().InferenceSession(
        expected.SerializeToString(), runtime.session_options(), providers=["CPUExecutionProvider"]
    )
    wanted = session.run(["relevance/x"], {"x": x})[0]
    for given in (model, path):
        explainer = Explainer(given, "epsilon_plus", device="cpu")
        np.testing.assert_array_equal(explainer(x).relevance["x"], wanted)
        assert explainer.explained.model == expected
    np.testing.assert_array_equal(Session(expected, device="cpu").run({"x": x})["relevance/x"], wanted)


@pytest.mark.usefixtures("apart")
def test_an_explainer_does_not_need_its_file(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", normal(2, 16, 8, 8)
    onnx.save(picture(), path)
    explainer = Explainer(path, "epsilon", device="cpu")
    expected = explainer(x).relevance["x"]
    before = path.read_bytes()
    onnx.save(picture(classes=6), path)
    with pytest.raises(ModelError, match="has changed since it was explained"):
        explainer.explained.save(tmp_path / "explained.onnx")
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        explainer.explained.save(tmp_path / "explained.onnx")
    np.testing.assert_array_equal(explainer(x).relevance["x"], expected)
    path.write_bytes(before)
    assert explainer.explained.model == onnx_lrp.rewrite(path, "epsilon").model


@pytest.mark.usefixtures("apart")
def test_where_no_file_can_be_written_bytes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2, 16, 8, 8)
    expected = Explainer(picture(), "epsilon", device="cpu")(x).relevance["x"]

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime, "write_apart", full)
    np.testing.assert_array_equal(Explainer(picture(), "epsilon", device="cpu")(x).relevance["x"], expected)


def resident() -> float:
    """Memory of this process in MB."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / MB


def held_by(make: Callable[[], object]) -> float:
    """MB that a process holds more once this is made."""
    runtime.onnxruntime()
    before = resident()
    kept = make()
    found = resident() - before
    del kept
    return found


def bare(path: Path) -> object:
    """The explained file in ONNX Runtime, and nothing else."""
    options = runtime.session_options(1)
    session = runtime.onnxruntime().InferenceSession(path, options, providers=["CPUExecutionProvider"])
    runtime._give_back()
    return session


@linux
def test_an_explainer_holds_what_its_session_holds(tmp_path: Path) -> None:
    weights = normal(3000, 4000)  # 48 MB
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], "dense")
    path = tmp_path / "net.onnx"
    onnx.save(build([gemm], {"x": (FLOAT, ("N", 3000))}, {"y": (FLOAT, ("N", 4000))}, {"w": weights}), path)
    onnx_lrp.rewrite(path, "epsilon").save(tmp_path / "explained.onnx")
    least = alone(held_by, functools.partial(bare, tmp_path / "explained.onnx"))
    make = functools.partial(Explainer, path, "epsilon", device="cpu", threads=1)
    assert alone(held_by, make) < least + weights.nbytes / MB / 2


# ---- beyond 2 GiB --------------------------------------------------------------------------------------------------

SIDE = 24_000


def rewritten(path: Path) -> Call:
    """Rewrite and save beside it."""

    def call() -> None:
        onnx_lrp.rewrite(path, "epsilon_plus").save(path.with_name("explained.onnx"))

    return call


@linux
def test_models_above_2_gib_are_rewritten_by_reference(tmp_path: Path) -> None:
    """Of 2.3 GB of weights (a file with a hole, which takes no room) nothing is read."""
    path, size = tmp_path / "large.onnx", 4 * SIDE * SIDE
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(size)
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], "dense")
    model = build([gemm], {"x": (FLOAT, ("N", SIDE))}, {"y": (FLOAT, ("N", SIDE))}, {"w": normal(1)})
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.dims[:] = [SIDE, SIDE]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="large.bin")
    path.write_bytes(model.SerializeToString())
    assert size > 2**31
    taken = peak(functools.partial(rewritten, path), ("onnx_lrp",), runs=1)
    assert taken is not None
    assert taken < size / MB / 20
    explained = onnx.load(path.with_name("explained.onnx"), load_external_data=False)
    assert [t.external_data[0].value for t in explained.graph.initializer if t.name == "w"] == ["large.bin"]
    assert os.stat(tmp_path / "large.bin").st_blocks * 512 < size / 100
