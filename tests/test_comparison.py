"""Methods measured alike: `evaluate.compare`, and the command `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

import onnx_lrp
from onnx_lrp import evaluate, show
from onnx_lrp.cli import main
from onnx_lrp.errors import InputError
from tests.small_models import build
from tests.support import numbers

EXAMPLES = Path(__file__).parents[1] / "examples"
SHAPES, PICTURE = EXAMPLES / "shapes" / "shapes.onnx", EXAMPLES / "shapes" / "picture.png"
WEIGHTS = np.array([[1.0, 0.5], [-2.0, 0.25], [3.0, 1.0], [0.0, -1.0]], np.float32)


def linear(weights: np.ndarray = WEIGHTS) -> onnx.ModelProto:
    """Two sums of four features."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return build([node], {"x": (1, ["N", 4])}, {"y": (1, ["N", 2])}, {"w": weights})


def test_a_linear_model_by_hand() -> None:
    """Deleting features takes what they are worth, so both curves and the area between follow by hand."""
    x = numbers(6, 4).astype(np.float32)
    verdict, chance = evaluate.compare(
        linear(), ["epsilon"], {"x": x}, evaluate.singles("x"), target=0, steps=4, device="cpu"
    )
    worth = -np.sort(-x * WEIGHTS[:, 0], axis=1)  # most relevant first
    left = worth.sum(1, keepdims=True) - np.concatenate([np.zeros((6, 1)), worth.cumsum(1)], 1)
    np.testing.assert_allclose(verdict.deletion.scores, left, atol=1e-5)
    back = np.concatenate([np.zeros((6, 1)), worth.cumsum(1)], 1)
    np.testing.assert_allclose(verdict.insertion.scores, back, atol=1e-5)
    area = lambda s: (s[:, 1:] + s[:, :-1]).sum(1) / 8  # noqa: E731
    least = worth.sum(1, keepdims=True) - np.concatenate([np.zeros((6, 1)), worth[:, ::-1].cumsum(1)], 1)
    np.testing.assert_allclose(verdict.faithfulness, area(least) - area(left), atol=1e-5)
    assert verdict.completeness is not None
    assert verdict.completeness.max() < 1e-4
    assert chance.method == evaluate.CHANCE
    assert chance.completeness is None
    assert (verdict.deletion.area() <= chance.deletion.area() + 1e-6).all()


def test_the_same_weights_make_the_same_map() -> None:
    """A model whose weights are all alike is its own randomised copy."""
    model, x = linear(np.ones((4, 2), np.float32)), np.abs(numbers(3, 4)).astype(np.float32)
    found = evaluate.compare(model, ["epsilon"], {"x": x}, evaluate.singles("x"))
    np.testing.assert_allclose(found[0].similarity, 1)
    bare = evaluate.compare(model, ["epsilon"], {"x": x}, evaluate.singles("x"), randomise=False)
    assert bare[0].similarity is None


def test_methods_share_the_predicted_class_and_parameters_go_where_they_belong() -> None:
    x = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    methods = ["epsilon_gamma_box", onnx_lrp.IntegratedGradients(steps=4), "gradient"]
    box = {"low": np.zeros(1, np.float32), "high": np.ones(1, np.float32)}
    box = {name: value.reshape(1, 1, 1, 1) for name, value in box.items()}
    features = evaluate.squares("image", x)
    found = evaluate.compare(SHAPES, methods, {"image": x}, features, parameters=box, randomise=False, steps=3)
    starts = [v.deletion.scores[:, 0] for v in found]
    for other in starts[1:]:
        np.testing.assert_allclose(other, starts[0], rtol=1e-5)
    assert [v.completeness is None for v in found] == [False, False, True, True]
    assert found[0].deletion.scores.shape == (2, 4)


def test_squares_choose_a_side_that_divides() -> None:
    for size, side in ((224, 16), (28, 2), (64, 4), (17, 1)):
        x = np.zeros((1, 3, size, size), np.float32)
        assert evaluate.squares("x", x).pool(x).shape == (1, (size // side) ** 2)
    wide = np.random.default_rng(0).random((2, 8, 12, 3))
    features = evaluate.squares("x", wide, 4, channels=3)
    gone = np.zeros((2, 6), bool)
    gone[:, 1] = True
    painted = features.delete({"x": wide}, gone)["x"]
    np.testing.assert_allclose(painted[:, :4, 4:8], wide.mean((1, 2), keepdims=True) * np.ones((1, 4, 4, 1)))
    painted[:, :4, 4:8] = wide[:, :4, 4:8]
    np.testing.assert_array_equal(painted, wide)


def test_what_compare_refuses() -> None:
    x = numbers(2, 4).astype(np.float32)
    with pytest.raises(InputError, match="one method at least"):
        evaluate.compare(linear(), [], {"x": x}, evaluate.singles("x"))
    with pytest.raises(InputError, match="no relevance of 'z'"):
        evaluate.compare(linear(), ["epsilon"], {"x": x}, evaluate.singles("z"))


def test_scores_are_the_same_in_pieces() -> None:
    x = numbers(7, 4).astype(np.float32)
    whole, pieces = (evaluate.Scorer(linear(), 1, batch_size=size, device="cpu")({"x": x}) for size in (16, 2))
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)
    np.testing.assert_allclose(whole, x @ WEIGHTS[:, 1], rtol=1e-5)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_with_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, data = tmp_path / "curves.png", tmp_path / "curves.json"
    arguments = ["evaluate", str(SHAPES), str(PICTURE), "-m", "epsilon_plus_flat", "-m", "gradient"]
    assert main([*arguments, "-o", str(plot), "-o", str(data), "--steps", "4", "--patch", "8"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:4]] == ["epsilon_plus_flat", "gradient", "random"]
    assert Image.open(plot).width == 720
    found = json.loads(data.read_text())
    assert found["inputs"] == 1
    assert [m["method"] for m in found["methods"]] == ["epsilon_plus_flat", "gradient", evaluate.CHANCE]
    assert len(found["methods"][0]["deletion"]["scores"]) == 5
    assert found["methods"][1]["completeness"] is None
    capsys.readouterr()
    assert main([*arguments, "--json", "--no-randomise", "--steps", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"][0]["similarity"] is None


def test_command_with_arrays_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(linear(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", numbers(5, 4).astype(np.float32))
    assert main(["evaluate", str(tmp_path / "m.onnx"), str(tmp_path / "x.npy"), "-m", "epsilon", "-t", "1"]) == 0
    assert "means over 5 input(s)" in capsys.readouterr().out
    lookup = EXAMPLES / "lookup" / "lookup.onnx"
    texts = ["d 4 . a 7 k 1 ? a", "b 3 . a 2 c 1 ? b"]
    assert main(["evaluate", str(lookup), *texts, "-m", "attnlrp", "--steps", "3", "--no-randomise"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[0] == "attnlrp"
    assert float(row[1]) < float(row[2]), "deleting hurts more than it leaves"


def test_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 64, 64), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((1, 3, 32, 32), np.float32))
    both = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    for arguments, message in (
        ([str(PICTURE), "-o", "x.gif"], "as .png or .json"),
        ([str(tmp_path / "missing.png")], "cannot be read"),
        ([str(PICTURE), "--patch", "7"], "multiples of it"),
        (both, "another shape"),
    ):
        assert main(["evaluate", str(SHAPES), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# ---- the plot --------------------------------------------------------------------------------------------------------


def test_curves_are_drawn_where_they_lie() -> None:
    rising = show.curves({"a": [0.0, 1.0]}, [0.0, 1.0], width=400, height=200)
    pixels = np.asarray(rising).astype(int)
    blue = np.argwhere((abs(pixels - [0, 0x72, 0xB2]).sum(2) < 60) & (np.arange(pixels.shape[0])[:, None] < 230))
    y, x = blue.T
    assert np.corrcoef(x, -y)[0, 1] > 0.999
    with pytest.raises(InputError, match="length of their places"):
        show.curves({"a": [1.0]}, [0.0, 1.0])
    with pytest.raises(InputError, match="NaN"):
        show.curves({"a": [1.0, np.nan]}, [0.0, 1.0])
