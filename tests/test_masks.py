"""Relevance conditional on channels: zennit and torch with masked hooks, linearity, batches, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnx_lrp import Explainer, InputError, rewrite
from onnx_lrp.cli import main
from tests.layers import Net
from tests.peers.networks import NETS
from tests.peers.zennit_peer import zennit_conditional
from tests.small_models import conv, normal, two_inputs
from tests.support import run_double, to_double, worst

if TYPE_CHECKING:
    import torch

TARGETS = [3, 7]
EXACT, SINGLE = 1e-9, 1e-4
BLOCK = "/blocks/blocks.1/bn1/BatchNormalization_output_0"  # a shortcut goes around it
STEM = "/bn1/BatchNormalization_output_0"  # everything passes through it
MODULES = {
    BLOCK: "blocks.1.bn1",
    STEM: "bn1",
    "/features/features.6/Relu_output_0": "features.6",
    "/features/features.9/Relu_output_0": "features.9",
    "/classifier/classifier.1/Relu_output_0": "classifier.1",
}


@functools.cache
def net(name: str) -> torch.nn.Module:
    pytest.importorskip("torch")
    return NETS[name]()


@functools.cache
def source(name: str) -> onnx.ModelProto:
    from exporters.torch_nets import export

    return export(net(name), None, (1, 3, 32, 32))


def pictures() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(TARGETS), 3, 32, 32)).astype(np.float32)


def some(tensor: str, rows: int, seed: int = 2) -> np.ndarray:
    """Masks of zeros, ones and what is between, for a tensor of the nets above."""
    channels = {BLOCK: 16, STEM: 8, "/classifier/classifier.1/Relu_output_0": 32}.get(tensor, 16)
    if tensor == "/features/features.9/Relu_output_0":
        channels = 32
    return np.random.default_rng(seed).choice([0.0, 0.0, 1.0, 0.5], (rows, channels)).astype(np.float32)


def double(model: onnx.ModelProto, method: str, masks: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    """Relevance of the pictures in float64 under these masks."""
    explained = rewrite(to_double(model), method, masks=list(masks), **options).model
    feeds = {"input": pictures(), "target": np.array(TARGETS)} | {f"mask/{t}": m for t, m in masks.items()}
    return run_double(explained, feeds)["relevance/input"]


# ---- as zennit has it ------------------------------------------------------------------------------------------------

PLACES = [
    ("resnet_basic", (BLOCK,)),
    ("resnet_basic", (BLOCK, STEM)),
    ("vgg", ("/features/features.6/Relu_output_0",)),
    ("vgg", ("/classifier/classifier.1/Relu_output_0", "/features/features.6/Relu_output_0")),
]


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("method", ["epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "gradient"])
@pytest.mark.parametrize(("name", "places"), PLACES, ids=str)
def test_zennit(name: str, places: tuple[str, ...], method: str, exclude: bool) -> None:
    """Every mask multiplies what arrives at a module's output; a shortcut around it counts or does not."""
    masks = {tensor: some(tensor, len(TARGETS)) for tensor in places}
    theirs = [(MODULES[t], m[(..., *[None] * (2 if "classifier" not in t else 0))]) for t, m in masks.items()]
    composite = None if method == "gradient" else method
    expected = zennit_conditional(net(name), pictures(), composite, TARGETS, theirs, exclude)
    assert worst(double(source(name), method, masks, exclude_parallel=exclude), expected) <= EXACT
    explainer = Explainer(
        source(name), method, masks=list(masks), exclude_parallel=exclude, device="cpu", threads=1, batch_size=1
    )
    assert worst(explainer(pictures(), TARGETS, masks=masks).relevance["input"], expected) <= SINGLE


# ---- linearity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["epsilon_plus_flat", "epsilon_alpha2_beta1", "gradient"])
@pytest.mark.parametrize(("name", "place"), [("vgg", "/features/features.6/Relu_output_0"), ("resnet_basic", STEM)])
def test_channels_add_up_to_the_whole(name: str, place: str, method: str) -> None:
    """Relevance behind a tensor is linear in that at the tensor: its channels, in three parts, give all of it."""
    part_of = np.arange(some(place, 1).shape[1]) % 3
    masks = [np.ones((1, len(part_of))), *((part_of[None] == k).astype(float) for k in range(3))]
    explained = rewrite(to_double(source(name)), method, masks=[place], target=3).model
    plain = rewrite(to_double(source(name)), method, target=3).model
    whole = run_double(plain, {"input": pictures()[:1]})["relevance/input"]
    found = [run_double(explained, {"input": pictures()[:1], f"mask/{place}": m})["relevance/input"] for m in masks]
    np.testing.assert_array_equal(found[0], whole)
    assert all(np.abs(part).max() > 1e-3 * np.abs(whole).max() for part in found[1:])
    assert worst(found[1] + found[2] + found[3], whole) <= EXACT


@pytest.mark.parametrize("method", ["epsilon", "zplus", "input_x_gradient", "guided_backprop"])
def test_one_channel_after_another_adds_up_to_the_whole(method: str) -> None:
    """Behind the tensor lies a convolution, which is linear for guided backpropagation, too."""
    x = normal(1, 3, 8, 8)
    found = explainer(method=method)(x, 1, masks={"c": list(range(6))}).relevance["x"]
    close(found.sum(0), explainer(method=method)(x, 1).relevance["x"][0])


def test_what_goes_around_and_what_passes_add_up_to_the_whole() -> None:
    """With a shortcut: all paths with a mask of zeros, and the paths through the tensor alone."""
    method, nothing, all_of_it = "epsilon_plus", np.zeros((1, 16), np.float32), np.ones((1, 16), np.float32)
    whole = double(source("resnet_basic"), method, {BLOCK: all_of_it}, exclude_parallel=False)
    around = double(source("resnet_basic"), method, {BLOCK: nothing}, exclude_parallel=False)
    through = double(source("resnet_basic"), method, {BLOCK: all_of_it})
    assert worst(around + through, whole) <= EXACT
    assert np.abs(around).max() > 1e-2 * np.abs(whole).max()
    assert not double(source("resnet_basic"), method, {BLOCK: nothing}).any()


# ---- paths by hand ---------------------------------------------------------------------------------------------------


def paths() -> onnx.ModelProto:
    """y = (x A + x B) C + x D, tensors a, b, s = a + b, c: side by side, in a row, and around all."""
    model = Net(seed=5)
    x = model.input("x", "N", 4)
    a, b = (model("MatMul", x, model.weight(4, 4), out=n) for n in "ab")
    c = model("MatMul", model("Add", a, b, out="s"), model.weight(4, 4), out="c")
    return model.model(model("Add", c, model("MatMul", x, model.weight(4, 4), out="d"), out="y"), "d")


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("names", ["a", "s", "ab", "ac", "cs", "abc", "d", "cd", "x", "y", "xs"])
def test_paths_by_hand(names: str, exclude: bool) -> None:
    """The gradient of a linear model is a sum of products of matrices, one per path."""
    model = paths()
    wa, wb, wc, wd = (onnx.numpy_helper.to_array(w).astype(float) for w in model.graph.initializer)
    rng = np.random.default_rng(1)
    masks = {n: rng.standard_normal((3, 4)) for n in names}
    x, start = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    explained = rewrite(to_double(model), "gradient", masks=list(names), exclude_parallel=exclude, start="input").model
    found = run_double(explained, {"x": x, "start": start} | {f"mask/{n}": m for n, m in masks.items()})
    m = {n: masks.get(n, 1.0) for n in "abcdsxy"}
    routes = {
        "yacsx": ((((start * m["y"]) * m["c"]) @ wc.T * m["s"]) * m["a"]) @ wa.T * m["x"],
        "ybcsx": ((((start * m["y"]) * m["c"]) @ wc.T * m["s"]) * m["b"]) @ wb.T * m["x"],
        "ydx": (((start * m["y"]) * m["d"]) @ wd.T) * m["x"],
    }
    # Side by side: a and b, and either of them (with s and c) and d.
    levels = [set(names) & {"y"}, set(names) & {"c", "d"}, set(names) & {"s", "d"}, set(names) & {"a", "b", "d"}]
    levels = [level for level in levels if level - {"d"} or level == set(names)]
    counted = [r for path, r in routes.items() if not exclude or all(level & set(path) for level in levels)]
    np.testing.assert_allclose(found["relevance/x"], sum(counted), rtol=1e-9, atol=1e-12)


def test_what_lies_beside_the_tensor_has_no_part() -> None:
    """Relevance of another input does not pass through it."""
    found = Explainer(two_inputs(), "epsilon", masks=["c"], device="cpu", threads=1)
    free = Explainer(two_inputs(), "epsilon", masks=["c"], exclude_parallel=False, device="cpu", threads=1)
    feeds = {"image": normal(2, 3, 4, 4), "table": normal(2, 2)}
    assert not found(feeds).relevance["table"].any()
    assert found(feeds).relevance["image"].any()
    assert free(feeds, masks={"c": 1}).relevance["table"].any()


def test_parts_of_a_split() -> None:
    """Several outputs of one node, of which one is masked."""
    model = Net(seed=1)
    x = model.input("x", "N", 6)
    left, right = model("Split", x, outputs=2, axis=1, num_outputs=2, name="halves")
    y = model.model(model("Add", model("MatMul", left, model.weight(3, 2)), model("MatMul", right, model.weight(3, 2))))
    x = np.arange(1.0, 7.0)[None]
    whole = run_double(rewrite(y, "epsilon").model, {"x": x})["relevance/x"]
    half = run_double(rewrite(y, "epsilon", masks=[left]).model, {"x": x})["relevance/x"]
    np.testing.assert_array_equal(half, whole * [1, 1, 1, 0, 0, 0])


# ---- batches and forms -----------------------------------------------------------------------------------------------


def explainer(batch: int | str = "N", **options: Any) -> Explainer:
    return Explainer(conv(batch), **{"method": "epsilon", "masks": ["c"], "device": "cpu", "threads": 1} | options)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", ["N", 1, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_conditions_in_one_batch_are_single_runs(batch: int | str, size: int) -> None:
    """One condition per sample, one for all, and several of one sample; in whatever chunks they run."""
    explain, x = explainer(batch, batch_size=size), normal(3, 3, 8, 8)
    each = explain(x, 1, masks={"c": [0, [1, 2], 3]})
    for i, chosen in enumerate((0, [1, 2], 3)):
        alone = explain(x[i : i + 1], 1, masks={"c": [chosen]})
        close(each.relevance["x"][i], alone.relevance["x"][0])
    both = explain(x[:1], 1, masks={"c": [[0], [1], [0, 1]]})
    assert len(both) == 3
    assert both.inputs["x"].shape == (3, 3, 8, 8)
    close(both.relevance["x"][0] + both.relevance["x"][1], both.relevance["x"][2])
    close(explain(x, 1, masks={"c": 2}).relevance["x"], explain(x, 1, masks={"c": [2, 2, 2]}).relevance["x"])
    masks = np.array([[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
    for form in (masks, masks.astype(float), masks.astype(bool)):
        np.testing.assert_array_equal(explain(x, 1, masks={"c": form}).relevance["x"], each.relevance["x"])
    assert not explain(x, 1, masks={"c": np.zeros(6)}).relevance["x"].any()
    np.testing.assert_array_equal(explain(x, 1).relevance["x"], explain(x, 1, masks={"c": np.ones(6)}).relevance["x"])


def test_forms() -> None:
    """A switch, the portable form, a 16-bit model, and channels on another axis."""
    x, masks = normal(2, 3, 8, 8), {"c": [1, 4]}
    expected = explainer()(x, 1, masks=masks).relevance["x"]
    for options in ({"switch": True}, {"portable": True}):
        close(explainer(**options)(x, 1, masks=masks).relevance["x"], expected)
    model = Net()
    tokens = model("MatMul", model.input("x", "N", 5, 4), model.weight(4, 3), out="tokens")
    proto = model.model(
        model("MatMul", model("ReduceSum", tokens, model.const([1], np.int64), keepdims=0), model.weight(3, 2))
    )
    for axes in ({"tokens": 2}, {"tokens": -1}):
        explained = rewrite(proto, "epsilon", masks=axes, target=0).model
        assert [d.dim_value for d in explained.graph.input[1].type.tensor_type.shape.dim][1] == 3
        parts = [run_double(explained, {"x": x[:, 0, :5, :4], "mask/tokens": row[None]}) for row in np.eye(3)]
        whole = run_double(explained, {"x": x[:, 0, :5, :4]})["relevance/x"]
        np.testing.assert_allclose(sum(p["relevance/x"] for p in parts), whole, rtol=1e-9)
    model = Net()
    half = model(
        "Conv",
        model.input("x", "N", 3, 4, 4, dtype=TensorProto.FLOAT16),
        model.const(np.ones((2, 3, 1, 1)), np.float16),
        out="maps",
    )
    proto = model.model(model("Flatten", model("GlobalAveragePool", half)), dtype=TensorProto.FLOAT16)
    explain = Explainer(proto, "epsilon", masks=["maps"], device="cpu", threads=1)
    assert explain(np.ones((1, 3, 4, 4), np.float16), 0, masks={"maps": 0}).relevance["x"].any()
    assert not explain(np.ones((1, 3, 4, 4), np.float16), 0, masks={"maps": 1}).relevance["x"].any()


def test_an_open_number_of_channels() -> None:
    model = Net()
    hidden = model("MatMul", model.input("x", "N", 4), model.input("w", 4, "C"), out="hidden")
    proto = model.model(model("ReduceSum", hidden, model.const([1], np.int64), keepdims=1))
    explain = Explainer(proto, "gradient", inputs=["x"], masks=["hidden"], device="cpu", threads=1)
    feeds = {"x": normal(2, 4), "w": normal(4, 3)}
    whole = explain(feeds).relevance["x"]
    parts = [explain(feeds, masks={"hidden": row}).relevance["x"] for row in np.eye(3)]
    close(parts[0] + parts[1] + parts[2], whole)
    with pytest.raises(InputError, match="leaves open how many channels 'hidden' has"):
        explain(feeds, masks={"hidden": 1})


def test_the_graph_and_what_it_says_of_itself() -> None:
    explained = rewrite(conv(), "epsilon", masks=["c"])
    assert [i.name for i in explained.model.graph.input] == ["x", "target", "mask/c"]
    assert explained.masks == {"c": 1}
    (info,) = (p.value for p in explained.model.metadata_props if p.key == "onnx_lrp")
    assert '"masks": {"c": 1}' in info
    assert '"exclude_parallel": true' in info
    plain = rewrite(conv(), "epsilon")
    assert "mask" not in next(p.value for p in plain.model.metadata_props if p.key == "onnx_lrp")


def test_the_masked_tensor_itself() -> None:
    """What is reported of it is conditional, too."""
    explained = explainer(layers=["c"])(normal(1, 3, 8, 8), 1, masks={"c": [2]})
    relevance = explained.relevance["c"]
    assert relevance[:, 2].any()
    assert not np.delete(relevance, 2, axis=1).any()


# ---- relevance of channels -------------------------------------------------------------------------------------------


def test_channels() -> None:
    explained = explainer(masks=[], layers=["c"])(normal(2, 3, 8, 8), 1)
    relevance = explained.relevance["c"].astype(float)
    np.testing.assert_allclose(explained.channels("c"), relevance.sum((2, 3)))
    np.testing.assert_allclose(explained.channels("c", by="max"), relevance.max((2, 3)))
    np.testing.assert_allclose(np.abs(explained.channels("c", share=True)).sum(1), 1)
    np.testing.assert_allclose(explained.channels("c", axis=3), relevance.sum((1, 2)))
    with pytest.raises(InputError, match="'d' is not reported; there is x, c"):
        explained.channels("d")
    with pytest.raises(InputError, match="no channels on axis 4"):
        explained.channels("c", axis=4)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (["nope"], "no tensor named 'nope'"),
        ("c", r"masks is a list of tensors, not one name; give masks=\['c'\]"),
        ({"c": 4}, "no channels on axis 4"),
        ({"c": 0}, "no channels on axis 0"),
        ({"c": -4}, "no channels on axis -4"),
        (["aside"], "names aside, which does not lie between x and"),
        (["shape"], "'shape' is int64, which has no relevance"),
    ],
    ids=str,
)
def test_masks_that_are_refused(masks: Any, words: str) -> None:
    model = Net()
    x = model.input("x", "N", 3, 4, 4)
    c = model("Conv", x, model.weight(2, 3, 1, 1), out="c")
    y = model("Flatten", model("GlobalAveragePool", c))
    proto = model.model(y, model("Relu", x, out="aside"))
    model("Shape", x, out="shape")
    proto.graph.node.extend(model.nodes[-1:])
    with pytest.raises(InputError, match=words):
        rewrite(proto, "epsilon", masks=masks)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"d": 1}, "the model has no masks at 'd'; it has c"),
        ({"c": 6}, "channel 6 is out of range: 'c' has 6 channels, 0 to 5"),
        ({"c": [0, -1]}, "channel -1 is out of range"),
        ({"c": [0, 1, 2]}, "3 conditions for 2 samples"),
        ({"c": [0.5]}, "are channel numbers"),
        ({"c": "all"}, "are channel numbers"),
        ({"c": []}, "are channel numbers"),
        ({"c": np.ones((2, 5))}, r"want shape \(conditions, 6\), got float64 \(2, 5\)"),
        ({"c": np.full((1, 6), np.nan)}, "NaN"),
    ],
    ids=str,
)
def test_conditions_that_are_refused(masks: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        explainer()(normal(2, 3, 8, 8), masks=masks)
    assert "\n" not in str(error.value)


def test_masks_belong_into_their_argument() -> None:
    with pytest.raises(InputError, match="give masks as masks="):
        explainer()({"x": normal(2, 3, 8, 8), "mask/c": np.ones((1, 6), np.float32)})
    with pytest.raises(InputError, match=r"no masks at 'c'; it has none; rewrite it with masks=\[tensor\]"):
        explainer(masks=[])(normal(2, 3, 8, 8), masks={"c": 1})


def test_the_command_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(conv(), file)
    assert main(["rewrite", str(file), str(out), "--mask", "c", "--keep-parallel"]) == 0
    assert "mask/c: float [mask/c.0, 6] (optional)" in capsys.readouterr().out
    assert '"exclude_parallel": false' in next(p.value for p in onnx.load(out).metadata_props if p.key == "onnx_lrp")
    assert main(["check", str(file), "--mask", "nope"]) == 2
    assert "no tensor named 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad"])
def test_methods_of_many_walks_are_refused(method: str) -> None:
    with pytest.raises(
        InputError, match=f"masks= is for methods that walk through the model once, which {method} does"
    ):
        rewrite(conv(), method, masks=["c"])


def test_contributions_to_a_difference() -> None:
    """DeepLIFT's multipliers are linear in those of a tensor, too."""
    x = normal(1, 3, 8, 8)
    parts = explainer(method="deeplift")(x, 1, masks={"c": list(range(6))}).relevance["x"]
    close(parts.sum(0), explainer(method="deeplift")(x, 1).relevance["x"][0])


def test_a_walk_that_ends_before_the_mask_is_free() -> None:
    """Guided Grad-CAM walks to its layer, which the mask does not reach, and to the input, which it does."""
    model = Net()
    first = model("Relu", model("Conv", model.input("x", "N", 3, 8, 8), model.weight(4, 3, 3, 3)), out="first")
    last = model("Relu", model("Conv", first, model.weight(4, 4, 3, 3)), out="last")
    proto = model.model(model("MatMul", model("Flatten", model("GlobalAveragePool", last)), model.weight(4, 3)))
    x = normal(1, 3, 8, 8)

    def found(method: str, **options: Any) -> np.ndarray:
        explained = Explainer(proto, method, device="cpu", threads=1, **options)
        return explained(x, 1, masks={"first": 2} if options else None).relevance["x"]

    cam = found("grad_cam")
    assert cam.any()
    np.testing.assert_allclose(
        found("guided_grad_cam", masks=["first"]), found("guided_backprop", masks=["first"]) * cam, rtol=1e-5, atol=1e-9
    )
    with pytest.raises(InputError, match="names first, which does not lie between"):
        rewrite(proto, "grad_cam", masks=["first"])
