"""The command, end to end: what it prints, writes and returns."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lrp
from onnx_lrp import doctor
from onnx_lrp.cli import console, main, options
from onnx_lrp.explanation import probabilities
from tests.small_models import FLOAT, build, conv, normal, pixels, tokens, two_inputs

Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "examples" / "shapes" / "shapes.onnx"
PICTURE = ROOT / "examples" / "shapes" / "picture.png"
GALLERY = ROOT / "examples" / "shapes" / "gallery"
SHARED = Path(os.environ.get("ONNX_LRP_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Every test writes where it may."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(capsys):
    """Run the command in this process; what it printed."""

    def run(*argv, code=0):
        capsys.readouterr()
        found = main([*map(str, argv), *(["--threads", "1"] if argv and argv[0] in ("explain", "verify") else [])])
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed

    return run


def process(*argv, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "onnx_lrp", *map(str, argv)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def saved(model, name="model.onnx", **metadata):
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, name)
    return name


def files():
    return sorted(str(p) for p in Path().rglob("*") if p.is_file())


def photo(name, size=(8, 8), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(name)
    return name


# ---- explain -----------------------------------------------------------------------------------------------------


def test_the_shipped_example_as_a_process(tmp_path):
    running = process("explain", SHAPES, PICTURE)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0
    assert err == ""
    first, _, name, *lines = out.splitlines()
    assert "on CPUExecutionProvider" in first
    assert first.endswith("pictures as RGB 64x64 (crop), / 255, NCHW (from the model's metadata)")
    assert name == str(PICTURE)
    assert lines[0].startswith("  predicted   red star (1) 99.")
    assert lines[1].startswith("  explained   red star (1), score 4.74")
    assert lines[2].startswith("  conserved   relevance 4.1")
    assert lines[3] == "  written     picture.epsilon_plus_flat.png"
    with Image.open("picture.epsilon_plus_flat.png") as figure:
        assert figure.width > 3 * 256
    assert len(list(tmp_path.iterdir())) == 1


def test_the_figure_points_at_the_star(call):
    call("explain", SHAPES, PICTURE, "-o", "r.npz")
    with np.load("r.npz") as file:
        assert set(file) == {"relevance/image", "output/logits", "target", "score", "absorbed", "path"}
        heat = file["relevance/image"].sum(1)[0]
    assert heat[24:44, 24:44].sum() > 0.6 * heat.sum(), "the red star stands there"


def test_many_inputs_in_one_picture_a_folder_or_arrays(call):
    printed = call("explain", SHAPES, PICTURE, GALLERY)
    assert files() == ["shapes.epsilon_plus_flat.png"]
    assert printed.out.count("  predicted ") == 4
    assert printed.out.endswith("written     shapes.epsilon_plus_flat.png\n")
    call("explain", SHAPES, GALLERY, "-m", "epsilon", "-o", "out/")
    assert sorted(os.listdir("out")) == [
        f"{c}.epsilon.png" for c in ("blue-circle", "blue-triangle", "yellow-triangle")
    ]
    call("explain", SHAPES, GALLERY, PICTURE, "-o", "all.npz", "--batch-size", 3)
    with np.load("all.npz") as file:
        assert file["target"].tolist() == [2, 3, 4, 1], "the order given"
        assert [Path(p).stem for p in file["path"]] == ["blue-circle", "blue-triangle", "yellow-triangle", "picture"]
        np.testing.assert_allclose(file["relevance/image"].sum((1, 2, 3)) + file["absorbed"], file["score"], rtol=1e-4)


def test_files_of_the_same_name_do_not_overwrite_each_other(call):
    for folder in ("a", "b"):
        os.mkdir(folder)
        shutil.copy(PICTURE, folder)
    shutil.copy(PICTURE, "a/picture.jpg")
    call("explain", SHAPES, "a", "b", "-o", "out")
    assert sorted(os.listdir("out")) == [f"picture{n}.epsilon_plus_flat.png" for n in ("-2", "-3", "")]


def test_more_inputs_than_fit_in_a_picture_become_a_folder(call):
    os.mkdir("in")
    for i in range(65):
        shutil.copy(PICTURE, f"in/{i:02}.png")
    assert "too many" in call("explain", SHAPES, "in", "-o", "grid.png", code=2).err
    call("explain", SHAPES, *(f"in/{i:02}.png" for i in range(17)), "-q")
    assert len(os.listdir("shapes.epsilon_plus_flat")) == 17


@pytest.mark.parametrize("method", ["guided_backprop", "deconvnet", "grad_cam", "guided_grad_cam"])
def test_methods_of_the_gradient_family(call, method):
    call("explain", SHAPES, PICTURE, "-m", method, "-m", "epsilon")
    call("explain", SHAPES, PICTURE, "-m", method)
    assert files() == [f"picture.{method}+epsilon.png", f"picture.{method}.png"]
    assert "verified" in call("verify", SHAPES, "-m", method).out


def test_several_methods_and_classes_side_by_side(call):
    out = call("explain", SHAPES, PICTURE, "-m", "epsilon", "-m", "gradient").out
    assert files() == ["picture.epsilon+gradient.png"]
    assert out.count("conserved") == 1, "a gradient does not add up to the score"
    assert "by gradient" in out
    call("explain", SHAPES, PICTURE, "-m", "epsilon", "-t", "red star", "-t", "3", "-o", "classes.png")
    call("explain", SHAPES, PICTURE, "-m", "epsilon", "-m", "zplus", "-t", "red star", "-t", "3", "-o", "both.npz")
    with np.load("both.npz") as file:
        assert file["epsilon, red star/target"].tolist() == [1]
        assert file["zplus, 3/target"].tolist() == [3]
    call("explain", SHAPES, PICTURE, GALLERY, "-m", "epsilon", "-m", "zplus", "-o", "out/")
    for path in files():
        if path.endswith(".png"):
            Image.open(path).verify()


def test_classes_that_score_highest_side_by_side(call):
    """Columns that share a run are those of runs of their own."""
    inputs = [PICTURE, GALLERY / "blue-circle.png"]
    call("explain", SHAPES, *inputs, "-m", "epsilon", "-t", "top:3", "-t", "5", "-t", "0,1", "-o", "several.npz")
    with np.load("several.npz") as file:
        shared = dict(file)
    order = np.argsort(-shared["top 1/output/logits"], 1)
    for title, classes in {**{f"top {k + 1}": order[:, k] for k in range(3)}, "5": [5, 5], "0,1": [0, 1]}.items():
        np.testing.assert_array_equal(shared[f"{title}/target"], classes)
        call("explain", SHAPES, *inputs, "-m", "epsilon", "-t", ",".join(map(str, classes)), "-o", "alone.npz")
        with np.load("alone.npz") as file:
            for name in file.files:
                if name != "path":
                    most = np.abs(file[name]).max()
                    np.testing.assert_allclose(shared[f"{title}/{name}"], file[name], rtol=0, atol=1e-5 * most)
    call("explain", SHAPES, *inputs, "-m", "epsilon", "-t", "top:2", "-o", "top.png")
    call("explain", SHAPES, PICTURE, "-m", "epsilon", "-t", "all", "-o", "all.png")
    assert {"top.png", "all.png"} <= set(files())
    for text in ("top:0", "top:99"):
        assert "the model has 6 classes" in call("explain", SHAPES, PICTURE, "-t", text, code=2).err


@pytest.mark.parametrize(
    ("text", "classes"),
    [("2", [2, 2]), ("Blue Circle", [2, 2]), ("-1", [1, 2]), ("0,5", [0, 5]), ("yellow star,-1", [5, 2])],
)
def test_classes(call, text, classes):
    call("explain", SHAPES, PICTURE, GALLERY / "blue-circle.png", "-t", text, "-o", "r.npz", "--batch-size", 1)
    with np.load("r.npz") as file:
        assert file["target"].tolist() == classes


def test_classes_that_are_not_there(call):
    for text, words in (("red", "there is red circle, red star"), ("9", "0 to 5"), ("1,2,3", "3 classes for 2 inputs")):
        assert words in call("explain", SHAPES, PICTURE, GALLERY / "blue-circle.png", "-t", text, code=2).err


def test_places_and_classes(call):
    np.save("x.npy", normal(1, 3, 8, 8))
    out = call("explain", saved(pixels()), "x.npy", "-t", "7,1").out
    assert "explained   class 1 at 7, score" in out
    assert "predicted" not in out, "a map of classes has no single prediction"


@pytest.mark.parametrize(
    "content",
    [
        "a\nb\nc, d\nd\ne\n\n",
        '["a", "b", "c, d", "d", "e"]',
        '{"0": "a", "1": "b", "2": ["n123", "c, d"], "4": "e"}',
        '{"a": 0, "b": 1, "c, d": 2, "d": 3, "e": 4}',
    ],
)
def test_labels(call, content):
    Path("labels.txt").write_text(content)
    np.save("x.npy", normal(1, 3, 8, 8))
    for text in ("2", "c, d", "c"):
        out = call("explain", saved(conv()), "x.npy", "-t", text, "--labels", "labels.txt", "--top", "5").out
        assert "explained   c (2)" in out
        assert "a (0)" in out


@pytest.mark.parametrize(
    "content", ["{}", '{"x": "a"}', "[1, {}]", "[]", '["a"]', '{"9999999999": "a"}', "[", "", "\0"]
)
def test_labels_that_do_not_fit(call, content):
    Path("labels.json").write_text(content)
    np.save("x.npy", normal(1, 3, 8, 8))
    assert "labels.json" in call("explain", saved(conv()), "x.npy", "--labels", "labels.json", code=2).err
    assert files() == ["labels.json", "model.onnx", "x.npy"]


def test_one_name_less_than_classes_means_background(call):
    Path("labels.txt").write_text("a\nb\nc\nd")
    np.save("x.npy", normal(1, 3, 8, 8))
    printed = call("explain", saved(conv()), "x.npy", "-t", "1", "--labels", "labels.txt")
    assert "explained   a (1)" in printed.out
    assert "class 0 is taken as background" in printed.err


def test_options_come_before_the_models_metadata(call):
    model = saved(conv(), preprocess='{"size": 8, "scale": 1, "color": "BGR"}', classes='["a", "b", "c", "d", "e"]')
    photo("x.png")
    first = [
        call("explain", model, "x.png", *more).out.splitlines()[0]
        for more in ((), ("--mean", "3"), ("--preprocess", "tf"))
    ]
    assert "BGR 8x8 (crop), values 0..255, NCHW (from the model's metadata)" in first[0]
    assert "BGR 8x8 (crop), - (3), NCHW (from the model's metadata)" in first[1]
    assert "RGB 8x8 (crop), / 127.5, - (1), NCHW (as asked)" in first[2]
    assert " a (0) " in call("explain", model, "x.png", "--top", "5").out


@pytest.mark.parametrize("text", ["no json", "[]", "3", '{"size": "big"}', '{"crop": 3}', '{"size": 9}', "null"])
def test_metadata_that_means_something_else(call, text):
    photo("x.png")
    printed = call("explain", saved(conv(), preprocess=text, classes=text), "x.png")
    assert "imagenet" not in printed.err
    assert "(assumed; if the model was trained otherwise" in printed.out
    assert printed.err == "" or "not used" in printed.err
    assert "class 0" in printed.out or "class" in printed.out


def test_the_box_of_pictures_is_known(call):
    model = saved(conv(), preprocess='{"mean": [0.5, 0.4, 0.3], "std": 0.2, "scale": 255}')
    photo("x.png")
    call("explain", model, "x.png", "-m", "epsilon_gamma_box", "-o", "known.npz")
    low, high = (str([round((v - m) / 0.2, 6) for m in (0.5, 0.4, 0.3)])[1:-1].replace(" ", "") for v in (0, 1))
    call("explain", model, "x.png", "-m", "epsilon_gamma_box", "-o", "given.npz", "--low", low, "--high", high)
    call("explain", model, "x.png", "-m", "epsilon_gamma_box", "-o", "other.npz", "--low", "-9", "--high=9")
    known, given, other = (np.load(f"{n}.npz")["relevance/x"] for n in ("known", "given", "other"))
    np.testing.assert_allclose(known, given, rtol=1e-4, atol=1e-6)
    assert np.abs(known - other).max() > 1e-3
    for argv, words in ((("--low", "a"), "no number"), (("--low", "1,2"), "one per channel")):
        assert words in call("explain", model, "x.png", "-m", "epsilon_gamma_box", *argv, code=2).err
    assert "z-box" in call("explain", model, "x.png", "--low", "0", code=2).err


@pytest.mark.parametrize(
    "model", [conv(1), conv(3), conv(half=True), conv(last=True), conv(1, half=True), conv(channels=1)]
)
def test_every_form_of_image_model(call, model):
    for i in range(4):
        photo(f"{i}.png", seed=i)
    out = call("explain", saved(model), "0.png", "1.png", "2.png", "3.png", "-o", "r.npz").out
    assert out.count("conserved") == 4
    with np.load("r.npz") as file:
        assert len(file["relevance/x"]) == 4
        np.testing.assert_allclose(file["relevance/x"].sum((1, 2, 3)) + file["absorbed"], file["score"], rtol=2e-3)


def test_pictures_of_different_sizes(call):
    photo("a.png", (8, 8)), photo("b.png", (8, 8), 1), photo("c.png", (12, 9), 2)
    model = saved(conv(size="S"))
    call("explain", model, "a.png", "b.png", "c.png", "--size", "8", "-o", "same.npz")
    call("explain", model, "a.png", "b.png", "c.png", "-o", "out/")
    assert len(os.listdir("out")) == 3


def test_a_gpu_that_is_not_there(call, monkeypatch):
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    printed = call("explain", SHAPES, PICTURE)
    assert (
        printed.err == "onnx-lrp: warning: the CUDA provider does not load, so the CPU runs; onnx-lrp doctor says why\n"
    )
    assert "on CPUExecutionProvider" in printed.out
    assert "does not load" in call("explain", SHAPES, PICTURE, "--device", "cuda", code=2).err


def test_several_inputs_come_as_npz(call):
    np.savez("x.npz", image=normal(2, 3, 4, 4), table=normal(2, 2))
    out = call("explain", saved(two_inputs()), "x.npz", "-m", "epsilon").out
    assert " [1]" in out
    assert files() == ["model.onnx", "x.epsilon.png", "x.npz"]
    call("explain", "model.onnx", "x.npz", "--input", "table", "-o", "r.npz")
    with np.load("r.npz") as file:
        assert "relevance/image" not in file
    np.save("x.npy", normal(2, 3, 4, 4))
    photo("x.png")
    for name in ("x.npy", "x.png"):
        assert "2 inputs (image, table)" in call("explain", "model.onnx", name, code=2).err


def test_tokens_series_and_tables(call):
    Path("ids.json").write_text("[1, 2, 3, 9]")
    call("explain", saved(tokens()), "ids.json", "-m", "epsilon")
    assert "ids.epsilon.png" in files()
    Path("ids.json").write_text("[1, 2, 30]")
    assert "ONNX Runtime fails" in call("explain", "model.onnx", "ids.json", code=2).err


def test_inner_tensors_and_starts(call):
    np.save("x.npy", normal(1, 3, 8, 8))
    call("explain", saved(conv()), "x.npy", "--layer", "r", "--start", "softmax", "-o", "r.npz")
    with np.load("r.npz") as file:
        assert file["relevance/r"].shape == (1, 6, 8, 8)
        np.testing.assert_allclose(file["score"], 1, rtol=1e-5)
    call("explain", "model.onnx", "x.npy", "--layer", "r", "-o", "r.png")
    out = call("explain", "model.onnx", "x.npy", "--output", "r", "--no-ledger").out
    assert "predicted" not in out
    assert " of score " in out


def test_a_map_that_says_nothing_is_named(call):
    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], "dense")
    saved(build([node], {"x": (FLOAT, ("N", 4))}, {"y": (FLOAT, ("N", 3))}, {"w": normal(4, 3)}))
    Path("x.json").write_text("[1.5, 2, 3, 4]")
    assert "try -m epsilon" in call("explain", "model.onnx", "x.json").err
    assert call("explain", "model.onnx", "x.json", "-m", "epsilon").err == ""


def test_quiet_and_verbose(call):
    printed = call("explain", SHAPES, PICTURE, "-q")
    assert printed == ("", "")
    assert "on CPUExecutionProvider" in call("explain", SHAPES, PICTURE, "-v").err
    assert call("check", SHAPES, "-q").out == ""


def test_probabilities():
    np.testing.assert_allclose(probabilities(np.array([1.0, 2.0]), "").sum(), 1)
    np.testing.assert_allclose(probabilities(np.log([0.2, 0.8]), "LogSoftmax"), [0.2, 0.8])
    for head in ("", "Softmax"):
        np.testing.assert_allclose(probabilities(np.array([0.2, 0.8]), head), [0.2, 0.8])
    np.testing.assert_allclose(probabilities(np.array([0.9, 0.8]), "Sigmoid"), [0.9, 0.8])
    assert np.isfinite(probabilities(np.array([1e4, -1e4]), "")).all()


# ---- trained models ------------------------------------------------------------------------------------------------

TRAINED = {
    "mnist_cntk": ["--preprocess", "raw"],
    "mnist01_dianna": ["--preprocess", "raw"],
    "shapes_dianna": [],
    "leafsnap30_dianna": ["--scale", "255"],
    "penguin_mlp_dianna": [],
    "season_conv1d_dianna": [],
    "squeezenet1.1_fp16": ["--preprocess", "caffe"],
    "squeezenet1.1_fp32": ["--preprocess", "caffe"],
    "mobilenet_v2_1.0_224_coral_fp32": ["--preprocess", "tf"],
    "resnet8_cifar10_mlperf_bn": ["--preprocess", "raw"],
}


def given(text, number):
    """The input of an expectation as a file: an image, a series by its formula, or a list of features."""
    path = SHARED / "images" / text
    if path.suffix in (".png", ".jpg"):
        return path
    if "sin" in text:
        np.save(f"{number}.npy", float(text.split("+")[0]) + 3 * np.sin(np.arange(28)))
        return f"{number}.npy"
    Path(f"{number}.json").write_text(text.split("(")[0])
    return f"{number}.json"


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_predict_as_expected(call, name):
    model = SHARED / "models" / f"{name}.onnx"
    if not model.exists():
        pytest.skip(f"{model} is not here")
    expected = json.loads((SHARED / "models" / "expected.json").read_text())[model.name]["expected"]
    inputs = [given(case["input"], i) for i, case in enumerate(expected)]
    methods = ("-m", "epsilon_plus_flat", "-m", "epsilon")
    call("explain", model, *inputs, *methods, *TRAINED[name], "-o", "r.npz", "--device", "cpu")
    with np.load("r.npz") as file:
        for method in ("epsilon_plus_flat", "epsilon"):
            assert file[f"{method}/target"].tolist() == [case["top"][0][0] for case in expected]
            (key,) = (k for k in file if k.startswith(f"{method}/relevance/"))
            total = file[key].astype(np.float64).reshape(len(inputs), -1).sum(1)
            scale = np.abs(file[f"{method}/score"])
            off = np.abs(total + file[f"{method}/absorbed"] - file[f"{method}/score"])
            assert (off <= (1e-3 if "fp16" in name else 1e-4) * scale).all()
        values = file[next(k for k in file if k.startswith("epsilon/output/"))].reshape(len(inputs), -1)
        top = [v[case["top"][0][0]] for v, case in zip(values, expected, strict=True)]
    if name in ("mnist01_dianna", "shapes_dianna"):  # these end with LogSoftmax
        top = np.exp(top)
    np.testing.assert_allclose(top, [case["top"][0][2] for case in expected], rtol=0.02)


# ---- rewrite, check, verify ----------------------------------------------------------------------------------------


def test_rewrite_writes_beside_the_model(call):
    shutil.copy(SHAPES, "shapes.onnx")
    out = call("rewrite", "shapes.onnx").out
    assert files() == ["shapes.lrp.onnx", "shapes.onnx"]
    for words in (
        "written  shapes.lrp.onnx",
        "epsilon_plus_flat",
        "+ target: int64",
        "+ relevance/image: float [N, 3, 64, 64]",
    ):
        assert words in out
    onnx.checker.check_model("shapes.lrp.onnx")
    assert Path("shapes.lrp.onnx").read_bytes() == onnx_lrp.rewrite("shapes.onnx").model.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize(
    ("argv", "inputs", "outputs"),
    [
        (["--target", "argmax"], [], []),
        (["--target", "2"], [], []),
        (["--ledger"], ["target"], ["absorbed"]),
        (["--start", "input"], ["target", "start"], []),
        (
            ["--layer", "block2/pool", "--layer", "block4/pool"],
            ["target"],
            ["relevance/block2/pool", "relevance/block4/pool"],
        ),
        (["-m", "epsilon_gamma_box", "--no-fold-batchnorm"], ["target", "low", "high"], []),
        (["--switch"], ["target", "explain"], []),
        (["--portable", "-m", "gradient", "--allow-gradient"], ["target"], []),
    ],
)
def test_rewrite_options(call, argv, inputs, outputs):
    printed = call("rewrite", SHAPES, "out.onnx", *argv).out
    graph = onnx.load("out.onnx").graph
    added = {i.name for i in graph.input} - {"image"}
    assert added == set(inputs)
    assert set(outputs) <= {o.name for o in graph.output}
    assert all(f"+ {name}: " in printed for name in (*inputs, *outputs))


def test_rewrite_and_external_data(call):
    onnx.save_model(conv(), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    assert "size     " in call("rewrite", "big.onnx", "-m", "epsilon").out
    x = normal(1, 3, 8, 8)
    result = onnx_lrp.runtime.Session(onnx.load("big.lrp.onnx")).run({"x": x})
    np.testing.assert_allclose(
        result["relevance/x"], onnx_lrp.Explainer(conv(), "epsilon")(x).relevance["x"], rtol=1e-5
    )


def test_check(call):
    out = call("check", SHAPES).out
    assert "head/classifier  Gemm" in out
    assert "22 nodes between image and logits: all have a rule of epsilon_plus_flat" in out
    found = json.loads(call("check", SHAPES, "-m", "epsilon", "--json").out)
    assert found["ok"]
    assert found["method"] == "epsilon"
    assert found["classes"] == [6]
    assert {"node", "op", "rule", "why"} == set(found["nodes"][0])
    assert files() == [], "nothing is written"


def unsupported():
    model = conv()
    for name in ("relu", "flat"):
        node = next(n for n in model.graph.node if n.name == name)
        node.op_type, node.domain = "Frobnicate", "com.nobody"
    model.opset_import.add(domain="com.nobody", version=1)
    return saved(model)


def test_check_lists_all_that_is_not_supported(call):
    printed = call("check", unsupported(), code=1)
    assert printed.err.count("com.nobody.Frobnicate") == 2
    assert len(printed.err.splitlines()) == 3
    found = json.loads(call("check", "model.onnx", "--json", code=1).out)
    assert not found["ok"]
    assert [n["name"] for n in found["unsupported"]] == ["relu", "flat"]
    np.save("x.npy", normal(1, 3, 8, 8))
    for argv in (("rewrite", "model.onnx"), ("explain", "model.onnx", "x.npy"), ("verify", "model.onnx")):
        assert "--output" in call(*argv, code=1).err
    assert files() == ["model.onnx", "x.npy"]


def test_verify(call, monkeypatch):
    assert "verified" in call("verify", SHAPES, PICTURE, "-m", "epsilon").out
    found = json.loads(call("verify", SHAPES, "--json").out)
    assert found["ok"]
    np.savez("x.npz", image=normal(1, 3, 4, 4), table=normal(1, 2))
    call("verify", saved(two_inputs()), "x.npz", "-m", "epsilon")
    assert "conv " not in call("verify", saved(two_inputs()), "x.npz", "-m", "epsilon", "--input", "table").out
    monkeypatch.setattr("onnx_lrp.verify.OUTPUT_TOLERANCE", -1.0)
    assert "NOT" in call("verify", SHAPES, code=1).out
    assert "takes one input" in call("verify", SHAPES, GALLERY, code=2).err


def test_verify_does_not_pass_for_want_of_memory(call, monkeypatch):
    """What could not be compared because memory ran out is not verified."""

    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("onnx_lrp.verify.run_double", full)
    assert "not enough memory" in call("verify", SHAPES, code=2).err


# ---- listings and doctor -------------------------------------------------------------------------------------------


def test_methods_and_rules(call):
    listed = dict(line.split(maxsplit=1) for line in call("methods").out.splitlines())
    for name in ("epsilon_plus_flat", "gradient", "guided_backprop", "deconvnet", "grad_cam", "guided_grad_cam"):
        assert len(listed[name].split()) > 3
    assert "epsilon_plus_flat" in call("rules").out
    assert "Conv" in call("rules", "epsilon_plus_flat").out
    Path("mine.toml").write_text(
        'title = "Mine"\nbase = "epsilon"\n[[assign]]\nwhere = { op = "Conv" }\nrule = "zplus"\n'
    )
    assert "zplus" in call("rules", "mine.toml").out
    assert "no rule book 'nope'" in call("rules", "nope", code=2).err


def test_doctor(call):
    out = call("doctor").out
    for word in ("python", "numpy", "onnx-graphsurgeon", "onnxruntime", "opset", "IR version", "CPUExecutionProvider"):
        assert word in out
    assert "no problems" in out


def test_doctor_finds_what_is_broken(call, monkeypatch):
    versions = {"onnxruntime": "1.0", "onnxruntime-gpu": "1.1"}
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_version", versions.get)
        out = call("doctor", code=1).out
        assert "onnxruntime 1.0 and onnxruntime-gpu 1.1 overwrite each other" in out
        assert "missing" in out
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert "pip install onnx-lrp[cpu]" in call("doctor", code=1).out
    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        assert "! CUDAExecutionProvider" in call("doctor", code=1).out
        said = b"FAIL : Failed to load library a.so with error: libcudnn.so.9: cannot open shared object file: No such"
        session = doctor._session

        def loud(ort, model, provider):
            os.write(2, said)
            return session(ort, model, "CPUExecutionProvider")

        patch.setattr(doctor, "_session", loud)
        found = call("doctor", code=1).out
        assert "CUDAExecutionProvider       does not load: libcudnn.so.9: cannot open shared object file; " in found
    with monkeypatch.context() as patch:
        patch.setattr(doctor.util, "find_spec", lambda name: None)
        assert "pip install onnx-lrp[image]" in call("doctor").out


# ---- manners -------------------------------------------------------------------------------------------------------


def test_help_and_version(capsys):
    for argv, words in (
        (["--help"], "explain"),
        (["explain", "--help"], "--preprocess"),
        (["--version"], "onnx-lrp 0."),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(argv)
        assert words in capsys.readouterr().out


def test_a_reader_that_leaves_early():
    running = process("check", SHAPES)
    running.stdout.close()
    assert running.wait(timeout=60) == 0
    assert running.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "onnx_lrp", "methods"]
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "onnx-lrp: No space left on device\n"


def test_internal_errors_are_one_line(call, monkeypatch):
    def fail(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("onnx_lrp.cli.listings.method_names", fail)
    printed = call("methods", code=2)
    assert printed.err == "onnx-lrp: internal error: RuntimeError: two lines; please report it, with what -v prints\n"
    assert "Traceback" in call("methods", "-v", code=2).err
    monkeypatch.setattr("onnx_lrp.cli.listings.method_names", lambda: np.empty(1 << 50))
    assert "not enough memory" in call("methods", code=2).err


def test_progress_is_for_terminals(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = console.Progress(3)
        progress.show(1, "a.png")
        progress.show(2, "b.png")
        progress.clear()
        assert ("2/3 b.png" in stream.getvalue()) == shown
        assert stream.getvalue() == "" or stream.getvalue().endswith("\r")


def test_letters_that_the_terminal_lacks():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    Path("labels.txt").write_text("\n".join(["größe"] * 6), encoding="utf-8")
    command = [sys.executable, "-m", "onnx_lrp", "explain", str(SHAPES), str(PICTURE), "--labels", "labels.txt"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0
    assert "gr\\xf6\\xdfe (1)" in done.stdout


def test_an_interrupt_leaves_complete_files_only():
    os.mkdir("in")
    for i in range(300):
        shutil.copy(PICTURE, f"in/{i:03}.png")
    running = process("explain", SHAPES, "in", "-o", "out", "-q", "--threads", "1")
    end = time.monotonic() + 60
    while time.monotonic() < end and not (Path("out").is_dir() and any(Path("out").glob("*.png"))):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.startswith("onnx-lrp: interrupted: ")
    assert err.count("\n") == 1
    assert 0 < len(os.listdir("out")) < 300
    for path in Path("out").iterdir():
        assert path.suffix == ".png"
        Image.open(path).verify()


def test_options_that_are_numbers_may_be_negative(call):
    photo("x.png")
    line = call("explain", saved(conv()), "x.png", "--mean", "0.5,0.4,0.3", "--std", ".5", "-t", "-1").out.splitlines()[
        0
    ]
    assert "- (0.5, 0.4, 0.3), / (0.5)" in line


def test_classes_by_one_of_their_names():
    names = ["crane, bird", "crane, machine", "tabby, tabby cat"]
    assert options.class_number("tabby cat", names) == 2
    assert options.class_number("crane, machine", names) == 1
    with pytest.raises(onnx_lrp.InputError, match="several classes"):
        options.class_number("crane", names)
