"""Questions about pictures, by integrated gradients: the network that examples/vqa ships, and the published sizes.

python -m pytest -m heavy -s tests/test_system_vqa.py      # ResNet-152 at 448 pixels
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lrp
from onnx_lrp import DeepLift, IntegratedGradients, evaluate
from onnx_lrp.cli import main
from onnx_lrp.runtime import Session
from onnx_lrp.verify import verify
from tests.layers import Net
from tests.support import run_double, to_double, worst, write_image

torch = pytest.importorskip("torch")
vqa = pytest.importorskip("exporters.vqa")
scenes = pytest.importorskip("exporters.scenes")

EXAMPLE = Path(__file__).parents[1] / "examples" / "vqa"
COUNT, STEPS = 40, 30
BASELINES = {"zero": 0, "pad": vqa.WORDS.index("pad")}  # rows of the table: that of padding is zero
PATH = IntegratedGradients(STEPS, {"image": 0.0, "question": "tokens"})


@functools.cache
def model() -> onnx.ModelProto:
    return onnx.load(EXAMPLE / "vqa.onnx")


@functools.cache
def samples(count: int = COUNT, seed: int = 2026) -> tuple[Any, Any, dict[str, np.ndarray]]:
    return vqa.examples(count, seed)


@functools.cache
def explained(start: str, steps: int = STEPS, count: int = COUNT) -> onnx_lrp.Explanation:
    """The right answers, explained from one of the two baselines."""
    _, asked, inputs = samples(COUNT)
    explainer = explainer_of(steps)
    feeds = {name: array[:count] for name, array in inputs.items()}
    return explainer({**feeds, "baseline": [[BASELINES[start]]]}, target=asked.answers[:count])


@functools.cache
def explainer_of(steps: int) -> onnx_lrp.Explainer:
    method = IntegratedGradients(steps, {"image": 0.0, "question": "tokens"})
    return onnx_lrp.Explainer(model(), method, device="cpu", threads=1)


@functools.cache
def twin() -> Any:
    """The network in torch and float64, with the weights of the file."""
    arrays = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in model().graph.initializer}
    net = vqa.small()
    own = net.state_dict()
    assert {n for n in own if "lstm" not in n} == {n for n in arrays if not n.startswith("onnx::")}
    own.update({name: arrays[name] for name in own if name in arrays})
    (lstm,) = (node for node in model().graph.node if node.op_type == "LSTM")
    w, r, b = (arrays[name][0] for name in lstm.input[1:4])
    order = [0, 2, 3, 1]  # of the gates: i, o, f, c in ONNX, i, f, c, o in torch

    def gates(x: Any) -> Any:
        return x.reshape(4, -1, *x.shape[1:])[order].reshape(x.shape)

    for name, array in (
        ("weight_ih", w),
        ("weight_hh", r),
        ("bias_ih", b[: len(b) // 2]),
        ("bias_hh", b[len(b) // 2 :]),
    ):
        own[f"question.lstm.{name}_l0"] = gates(array)
    net.load_state_dict(own)
    return net.double().eval()


class FromRows(torch.nn.Module):
    """The network from the embeddings on, where captum's path begins."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Any, rows: Any, length: Any) -> Any:
        words, self.net.question.words = self.net.question.words, torch.nn.Identity()
        try:
            return self.net(image, rows, length)
        finally:
            self.net.question.words = words


# ---- the model -------------------------------------------------------------------------------------------------------


def test_it_answers() -> None:
    _, asked, inputs = samples(1000)
    logits = Session(model(), device="cpu").run(inputs)["logits"]
    assert (logits.argmax(1) == asked.answers).mean() >= 0.9
    with torch.no_grad():
        theirs = twin()(
            torch.tensor(inputs["image"][:50]).double(), *(torch.tensor(inputs[n][:50]) for n in ("question", "length"))
        )
    assert worst(logits[:50], theirs.numpy()) <= 1e-5  # packed there, sequence_lens here


@pytest.mark.parametrize("dynamo", [False, True])
def test_both_exporters(dynamo: bool) -> None:
    """The same relevance from the file of either, features of zeros included."""
    _, asked, inputs = samples()
    feeds = {name: array[:3] for name, array in inputs.items()}
    proto = vqa.write(copied(), None, dynamo=dynamo)
    found = onnx_lrp.Explainer(proto, PATH, device="cpu", threads=1)({**feeds, "baseline": [[16]]}, asked.answers[:3])
    for name in ("image", "question"):
        assert worst(found.relevance[name], explained("pad").relevance[name][:3]) <= 1e-4
    (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name == "features.6.bias")
    # Now every feature is zero, and so is its norm.
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) - 100, bias.name))
    found = onnx_lrp.Explainer(proto, PATH, device="cpu", threads=1)(feeds)
    assert np.isfinite(found.outputs["logits"]).all()
    assert not found.relevance["image"].any()
    assert np.isfinite(found.relevance["question"]).all()
    assert np.abs(found.relevance["question"]).max() > 1e-3


def copied() -> Any:
    net = vqa.small()
    net.load_state_dict(twin().state_dict())
    return net.float().eval()


def test_padding_gets_nothing() -> None:
    """The length is an argument that is not explained; what stands behind it is not read."""
    _, _, inputs = samples()
    relevance = explained("pad").relevance["question"]
    behind = np.arange(relevance.shape[1]) >= inputs["length"][:, None]
    assert behind.any()
    assert not relevance[behind].any()
    assert (relevance[~behind] != 0).all()


# ---- 1: agreement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", BASELINES)
def test_captum(start: str) -> None:
    attr = pytest.importorskip("captum.attr")
    count, (_, asked, inputs) = 4, samples()
    image, ids, length = (torch.tensor(array[:count]) for array in inputs.values())
    table = twin().question.words.weight.detach()
    rows, row = table[ids], table[BASELINES[start]]
    assert (row == 0).all() == (start == "zero")
    whole, delta = attr.IntegratedGradients(FromRows(twin())).attribute(
        (image.double(), rows),
        (torch.zeros_like(image).double(), row.expand_as(rows)),
        target=torch.tensor(asked.answers[:count]),
        additional_forward_args=length,
        n_steps=STEPS,
        method="gausslegendre",
        return_convergence_delta=True,
    )
    expected = {"image": whole[0].numpy(), "question": whole[1].sum(-1).numpy()}
    found = explained(start)[:count]
    for name, theirs in expected.items():
        assert worst(found.relevance[name], theirs) <= 1e-3
    size = sum(np.abs(theirs).sum() for theirs in expected.values())
    assert np.abs(found.delta - delta.numpy()).max() <= 1e-4 * size


# ---- 2 and 3: completeness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", BASELINES)
def test_it_is_complete_in_the_limit(start: str) -> None:
    """By median at most 5 % are missing with 30 steps, and the fewer the more steps there are."""
    off = [np.median(evaluate.completeness(explained(start, steps))) for steps in (5, STEPS, 60)]
    print(f"missing from {start}, by 5, {STEPS} and 60 steps: {', '.join(f'{x:.1%}' for x in off)}")
    assert off[0] > off[1] > off[2]
    assert off[1] <= 0.05


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_an_affine_network_is_exact(steps: int) -> None:
    """A convolution, the mean of its features and that of embeddings, a dense layer."""
    net = Net(seed=6)
    seen = net("Conv", net.input("image", "N", 3, 8, 8), net.weight(5, 3, 3, 3), net.weight(5))
    seen = net("Flatten", net("GlobalAveragePool", seen))
    words = net("Gather", net.weight(17, 6), net.input("question", "N", 10, dtype=onnx.TensorProto.INT64))
    read = net("ReduceMean", words, net.const([1], np.int64), keepdims=0)
    proto = net.model(net("Gemm", net("Concat", seen, read, axis=1), net.weight(11, 4), net.weight(4)))
    rng = np.random.default_rng(0)
    feeds = {"image": rng.standard_normal((3, 3, 8, 8)).astype(np.float32), "question": rng.integers(17, size=(3, 10))}
    method = IntegratedGradients(steps, {"image": 0.0, "question": "tokens"})
    found = onnx_lrp.Explainer(proto, method, device="cpu")({**feeds, "baseline": [[16]]})
    assert np.abs(found.delta).max() <= 1e-5
    assert np.abs(found.total()).min() > 1e-2
    exact = run_double(onnx_lrp.rewrite(to_double(proto), method).model, {**feeds, "baseline": np.array([[16]])})
    assert np.abs(exact["delta"]).max() <= 1e-12


# ---- 4 and 6: where it lies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", BASELINES)
def test_it_lies_on_what_was_asked_for(start: str) -> None:
    drawn, asked, _ = samples()
    rows, relevance = np.arange(COUNT), explained(start).relevance
    boxes = [drawn.boxes[rows, thing] for thing in (asked.asked, 1 - asked.asked)]
    regions = [evaluate.region_of(box, scenes.SIZE, scenes.SIZE) for box in boxes]
    for kind, heat in (("R", relevance["image"]), ("|R|", np.abs(relevance["image"].sum(1)))):
        here, there = (float(evaluate.relevance_mass(heat, region).mean()) for region in regions)
        print(f"mass of {kind} from {start}: {here:.2f} on what was asked for, {there:.2f} on the other thing")
        assert here > 1.5 * there
    top = np.abs(relevance["question"]).argmax(1) == asked.content
    print(f"the colour has the largest |R| of a question's words from {start}: {top.mean():.2f}")  # no gate


# ---- 5: plumbing -----------------------------------------------------------------------------------------------------


def test_chunks_are_equal() -> None:
    _, asked, inputs = samples()
    feeds = {**{name: array[:3] for name, array in inputs.items()}, "baseline": [[16]]}
    for chunk in (1, 7, 30):
        method = IntegratedGradients(STEPS, PATH.baseline, chunk=chunk)
        found = onnx_lrp.Explainer(model(), method, device="cpu", threads=1)(feeds, asked.answers[:3])
        for name in ("image", "question"):
            assert worst(found.relevance[name], explained("pad").relevance[name][:3]) <= 1e-4
    exact = [
        run_double(
            onnx_lrp.rewrite(to_double(model()), IntegratedGradients(4, PATH.baseline, chunk=chunk)).model,
            {name: np.asarray(array)[:1] for name, array in feeds.items()},
        )
        for chunk in (1, 3)
    ]
    for name in ("relevance/image", "relevance/question", "delta"):
        assert worst(exact[0][name], exact[1][name]) <= 1e-9


@pytest.mark.parametrize("make", [functools.partial(IntegratedGradients, 5), DeepLift])
def test_the_input_as_its_own_baseline(make: Any) -> None:
    _, _, inputs = samples()
    feeds = {name: array[:3] for name, array in inputs.items()}
    explainer = onnx_lrp.Explainer(model(), make(baseline={"image": "input", "question": "tokens"}), device="cpu")
    found = explainer({**feeds, "baseline/image": feeds["image"], "baseline/question": feeds["question"]})
    assert not any(relevance.any() for relevance in found.relevance.values())
    assert np.abs(found.delta).max() <= 1e-6  # of two runs of the model, which the runtime fuses differently


def test_the_baselines_differ() -> None:
    """The text's total depends on where its path begins; what there is to explain, and completeness, with it."""
    text = {start: explained(start).relevance["question"].sum(1) for start in BASELINES}
    assert (np.abs(text["zero"] - text["pad"]) > 1e-3 * np.abs(text["pad"])).all()
    rises = {start: explained(start).total() - explained(start).delta for start in BASELINES}
    for start, row in BASELINES.items():
        _, asked, inputs = samples()
        image, length = torch.zeros(COUNT, 3, 24, 24).double(), torch.tensor(inputs["length"])
        with torch.no_grad():
            logits = twin()(image, torch.full((COUNT, scenes.LENGTH), row), length).numpy()
        risen = explained(start).score - logits[np.arange(COUNT), asked.answers]
        np.testing.assert_allclose(rises[start], risen, atol=1e-4)


# ---- as a user has it ------------------------------------------------------------------------------------------------


def test_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture, a question and baselines to three totals, the delta, the words as HTML, and the picture as PNG."""
    pytest.importorskip("tokenizers")
    drawn, asked, _ = samples()
    picture = write_image(tmp_path / "scene.png", np.rint(drawn.image[0].transpose(1, 2, 0) * 255))
    question = " ".join(scenes.text(asked.tokens[0]))
    command = ["explain", str(EXAMPLE / "vqa.onnx"), str(picture), "--text", question, "--device", "cpu", "--masked"]
    command += [
        "-m",
        f"integrated_gradients:steps={STEPS}",
        "--baseline",
        "image=0",
        "--baseline",
        "question=token:pad",
    ]
    outs = [tmp_path / name for name in ("words.html", "picture.png", "all.npz")]
    assert main([*command, *(part for out in outs for part in ("-o", str(out)))]) == 0
    said = capsys.readouterr().out
    found = np.load(outs[2])
    reference = explained("pad")
    assert found["target"] == asked.answers[0]
    # The picture's pixels are whole numbers from 0 to 255.
    assert worst(found["relevance/question"], reference.relevance["question"][:1]) <= 0.2
    text, image = (float(found[f"relevance/{n}"].sum()) for n in ("question", "image"))
    assert f"content {text:+.5g}" in said
    assert f"image {image:+.5g}" in said
    assert "above the baseline" in said
    page = outs[0].read_text()
    for part in (scenes.SHAPES[asked.answers[0]], "total", "delta", "image", question.split()[0]):
        assert part in page
    assert outs[1].stat().st_size > 1000


def test_baselines_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    picture = write_image(tmp_path / "scene.png", np.zeros((24, 24, 3)))
    command = ["explain", str(EXAMPLE / "vqa.onnx"), str(picture), "--text", "what is red ?", "-m"]
    cases = {
        ("integrated_gradients", "question"): "is not TENSOR=VALUE",
        ("integrated_gradients", "question=pad"): "'pad' is not a number, token:WORD",
        ("integrated_gradients", "image=token:pad"): "for the embeddings of token ids, which 'image' is not",
        ("integrated_gradients", "picture=0"): "has a baseline for 'picture', which is not moved",
        ("integrated_gradients", "question=token:tomato"): "tomato",
        ("epsilon", "image=0"): "--baseline is for integrated_gradients and deeplift",
    }
    for (method, text), message in cases.items():
        assert main([*command, method, "--baseline", text, "-o", str(tmp_path / "x.npz")]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert main(["explain", str(EXAMPLE / "vqa.onnx"), str(picture), "-m", "gradient"]) == 2
    assert "--text TEXT" in capsys.readouterr().err
    arrays = tmp_path / "a.npz"
    np.savez(arrays, image=np.zeros((1, 3, 24, 24), np.float32))
    assert main(["explain", str(EXAMPLE / "vqa.onnx"), str(arrays), "--text", "what ?", "-m", "gradient"]) == 2
    assert "--text goes with pictures" in capsys.readouterr().err


# ---- published sizes -------------------------------------------------------------------------------------------------


def test_published_layers_in_small() -> None:
    """All kinds of layers of the published network, fewer and narrower: outputs unchanged, relevance as in float64."""
    torch.manual_seed(0)
    features = vqa.caffe_resnet((1, 2, 1, 1), width=4)
    sizes = {"tokens": 20, "embedding": 6, "hidden": 8, "attention": 8, "classifier": 8, "answers": 5}
    net = vqa.randomize(vqa.Vqa(features, 128, **sizes), 0)
    assert features(torch.zeros(1, 3, 64, 64)).shape == (1, 128, 2, 2)
    assert [features[4][1].conv1.stride, features[4][1].conv2.stride] == [(2, 2), (1, 1)]
    proto = vqa.write(net, None, size=64, words=5)
    image = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    feeds = {"image": image, "question": np.array([[3, 4, 5, 0, 0]]), "length": np.array([3], np.int32)}
    checked = verify(proto, feeds, method=IntegratedGradients(2, 0.0), threads=1)
    assert checked.ok
    assert set(checked.reference) >= {"relevance/image", "relevance/question"}


@pytest.mark.heavy
def test_published_sizes(tmp_path: Path) -> None:
    """ResNet-152 at 448 pixels: rewritten, run at three steps, and verified."""
    path = tmp_path / "vqa.onnx"
    vqa.write(vqa.published(), path, size=448, words=23)
    rng = np.random.default_rng(0)
    length = np.array([9], np.int32)
    ids = np.where(np.arange(23) < length, rng.integers(1, 15193, (1, 23)), 0)
    feeds = {"image": rng.standard_normal((1, 3, 448, 448)).astype(np.float32), "question": ids, "length": length}
    begin = time.perf_counter()
    explainer = onnx_lrp.Explainer(path, IntegratedGradients(3, PATH.baseline, chunk=1), device="cpu")
    made = time.perf_counter()
    found = explainer({**feeds, "baseline": [[5]]})
    print(f"rewritten and loaded in {made - begin:.1f} s, three steps in {time.perf_counter() - made:.1f} s")
    assert found.relevance["image"].shape == (1, 3, 448, 448)
    assert np.isfinite(found.relevance["image"]).all()
    assert not found.relevance["question"][0, 9:].any()
    del explainer
    # Relevance of z-plus is continuous where ReLUs and pools switch, so it can be compared; see the next test.
    checked = verify(path, feeds, "epsilon_plus")
    print(checked.outputs, checked.reference)
    assert checked.ok


@pytest.mark.heavy
def test_published_sizes_against_float64(tmp_path: Path) -> None:
    """One step of the path, to the middle: as far from torch in float64 as torch in float32 is, by the norm.

    ReLUs and pools of 152 layers switch where float32 rounds otherwise, so that no two float32 programs agree to 1e-3
    there, and `verify` says so. Elsewhere they agree: of all pixels but a few the difference is small.
    """
    net, path = vqa.published(), tmp_path / "vqa.onnx"
    rng = np.random.default_rng(0)
    length = np.array([9], np.int32)
    ids = np.where(np.arange(23) < length, rng.integers(1, 15193, (1, 23)), 0)
    image = rng.standard_normal((1, 3, 448, 448)).astype(np.float32)
    vqa.write(net, path, size=448, words=23)
    explainer = onnx_lrp.Explainer(path, IntegratedGradients(1, 0.0, chunk=1), device="cpu")
    found = explainer({"image": image, "question": ids, "length": length})
    single, double = (_middle(net, dtype, image, ids, length, int(found.target[0])) for dtype in ("float", "double"))
    for name, ours in (("image", found.relevance["image"]), ("question", found.relevance["question"])):
        norm = np.linalg.norm(double[name])
        off, theirs = (np.linalg.norm(x - double[name]) / norm for x in (ours, single[name]))
        print(f"{name}: off from float64 by {off:.1e}, torch in float32 by {theirs:.1e}")
        assert off <= max(1e-4, 2 * theirs)
        assert np.median(abs(ours - double[name])) <= 1e-4 * abs(double[name]).max()


def _middle(net: Any, kind: str, image: np.ndarray, ids: np.ndarray, length: np.ndarray, answer: int) -> Any:
    """Input times the gradient halfway from zero, by torch."""
    module = getattr(net, kind)()
    rows = module.question.words(torch.tensor(ids)).detach()
    inputs = [torch.tensor(image).to(rows.dtype) / 2, rows / 2]
    for x in inputs:
        x.requires_grad_()
    logits = FromRows(module)(inputs[0], inputs[1], torch.tensor(length))
    logits[0, answer].backward()
    grads = [x.grad.double().numpy() for x in inputs]
    return {"image": grads[0] * image, "question": (grads[1] * rows.double().numpy()).sum(-1)}
