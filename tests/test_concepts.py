"""Which inputs a channel is most relevant in: the ranking, the command, and the sheet of pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrp import Explainer, InputError
from onnx_lrp.cli import main
from onnx_lrp.concepts import Concepts, Hit
from onnx_lrp.show import ConceptCell, ConceptRow, concept_sheet
from onnx_lrp.show.concepts import window
from tests.small_models import conv, normal, tokens

Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "examples" / "shapes" / "shapes.onnx"
FOLDER = ROOT / "examples" / "shapes"
LAYER = "block5b/relu"
FILES = [FOLDER / "picture.png", *sorted((FOLDER / "gallery").iterdir())]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test writes where it may."""
    monkeypatch.chdir(tmp_path)


def concepts(*argv: Any, code: int = 0) -> None:
    assert main(["concepts", *map(str, argv), "--threads", "1"]) == code


# ---- the ranking -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (7, 20, 23)])
@pytest.mark.parametrize("top", [1, 3, 60])
def test_the_best_samples_whatever_the_batches(top: int, sizes: tuple[int, ...]) -> None:
    """As a sort of everything has it; of equals the first one, and none that speaks against."""
    relevance = np.random.default_rng(0).integers(-4, 9, (50, 5)).astype(float)
    ranking = Concepts(top)
    for batch in np.split(relevance, np.cumsum(sizes)[:-1]):
        ranking.add(batch)
    assert ranking.count == 50
    np.testing.assert_allclose(ranking.mean, relevance.mean(0))
    for channel in range(5):
        order = sorted(range(50), key=lambda n: (-relevance[n, channel], n))[:top]
        expected = [Hit(n, relevance[n, channel]) for n in order if relevance[n, channel] > 0]
        assert ranking.hits(channel) == expected


def test_memory_does_not_grow() -> None:
    ranking = Concepts(4)
    for seed in range(100):
        ranking.add(np.random.default_rng(seed).standard_normal((8, 3)))
    assert ranking._relevance.shape == ranking._samples.shape == (3, 4)


def test_channels_that_lead_stand_out() -> None:
    """One that is always relevant says less than one that is so in a few samples."""
    ranking = Concepts(2)
    ranking.add(np.array([[0.5, 0.4, 0.0], [0.5, 0.0, 0.1], [0.5, 0.0, 0.1], [0.5, 0.4, 0.0]]))
    assert ranking.leading(3) == [1, 2, 0]
    assert ranking.leading(1) == [1]
    assert ranking.chosen([2, 0, 2], "layer") == [2, 0]


def test_what_the_ranking_refuses() -> None:
    ranking = Concepts()
    ranking.add(np.ones((2, 3)))
    with pytest.raises(InputError, match=r"shape \(N, 3\), not \(2, 4\)"):
        ranking.add(np.ones((2, 4)))
    with pytest.raises(InputError, match="NaN"):
        ranking.add(np.full((1, 3), np.nan))
    with pytest.raises(InputError, match="channel 3 is out of range: 'layer' has 3 channels, 0 to 2"):
        ranking.chosen([3], "layer")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_on_the_shipped_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Its table and files say what the library finds; every class has channels of its own."""
    concepts(SHAPES, *FILES, "--layer", LAYER, "--top", 2, "-o", "c.png", "-o", "c.json", "-o", "c.npz")
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[1] == f"4 inputs, 40 channels of {LAYER}; shares of the relevance there"
    assert lines[-3:] == [f"written  c.{kind}" for kind in ("png", "json", "npz")]
    content = json.loads(Path("c.json").read_text())
    assert (content["count"], content["layer"], len(content["channels"])) == (4, LAYER, 40)
    explainer = Explainer(SHAPES, layers=[LAYER], masks=[LAYER], device="cpu", threads=1)
    x = (
        np.stack([np.asarray(Image.open(f).convert("RGB")) for f in FILES]).transpose(0, 3, 1, 2).astype(np.float32)
        / 255
    )
    shares = explainer(x).channels(LAYER, share=True)
    for row in content["channels"]:
        mine = shares[:, row["channel"]]
        best = [n for n in np.argsort(-mine)[:2] if mine[n] > 0]
        assert [Path(i["input"]) for i in row["inputs"]] == [FILES[n] for n in best]
        np.testing.assert_allclose([i["relevance"] for i in row["inputs"]], mine[best], rtol=1e-3)
        np.testing.assert_allclose(row["mean"], mine.mean(), rtol=1e-3, atol=1e-6)
    with np.load("c.npz") as arrays:
        assert arrays["relevance"].shape == (40, 2)
        shown = [int(line.split()[0]) for line in lines[4:10]]
        assert {k for k in arrays if k.startswith("map/")} <= {f"map/{c}/{r}" for c in shown for r in (0, 1)}
        first = FILES.index(Path(str(arrays["input"][shown[0], 0])))
        alone = explainer(x[first : first + 1], masks={LAYER: shown[0]}).relevance["image"][0]
        np.testing.assert_allclose(arrays[f"map/{shown[0]}/0"], alone, rtol=1e-3, atol=1e-6)
        leaders = {str(arrays["input"][c, 0]) for c in shown}
    assert len(leaders) > 1
    with Image.open("c.png") as sheet:
        assert sheet.width > 300


def test_channels_maxima_and_classes(capsys: pytest.CaptureFixture[str]) -> None:
    concepts(SHAPES, *FILES, "--layer", LAYER, "--channels", "7,1", "--by", "max", "-t", "blue circle", "-m", "epsilon")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["7", "1"]
    explainer = Explainer(SHAPES, "epsilon", layers=[LAYER], device="cpu", threads=1)
    x = (
        np.stack([np.asarray(Image.open(f).convert("RGB")) for f in FILES]).transpose(0, 3, 1, 2).astype(np.float32)
        / 255
    )
    shares = explainer(x, target=2).channels(LAYER, by="max", share=True)
    assert f"{shares[:, 7].mean():.1%}" in lines[4]
    assert not os.listdir(), "nothing is written unless asked for"


def test_arrays_of_several_samples(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is a sample of its own; a model's input of three channels is shown as a picture."""
    onnx.save(conv(), "model.onnx")
    np.save("many.npy", normal(5, 3, 8, 8))
    concepts("model.onnx", "many.npy", "--layer", "c", "-m", "epsilon", "-o", "c.png", "-o", "c.json", "--whole")
    assert "5 inputs, 6 channels of c" in capsys.readouterr().out
    inputs = {i["input"] for row in json.loads(Path("c.json").read_text())["channels"] for i in row["inputs"]}
    assert inputs <= {f"many.npy[{n}]" for n in range(5)}
    assert len(inputs) == 5


def test_tokens_have_no_sheet_but_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(tokens(), "model.onnx")
    np.save("ids.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    concepts("model.onnx", "ids.npy", "--layer", "m", "-m", "epsilon", "-o", "c.npz")
    with np.load("c.npz") as arrays:
        assert any(k.startswith("map/") and arrays[k].shape == (3,) for k in arrays)
    concepts("model.onnx", "ids.npy", "--layer", "m", "-m", "epsilon", "-o", "c.png", code=2)
    assert "a sheet shows pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: --layer"),
        (["--layer", "nope"], "no tensor named 'nope'"),
        (["--layer", LAYER, "--channels", "40"], f"channel 40 is out of range: '{LAYER}' has 40 channels"),
        (["--layer", LAYER, "--channels", "a"], "--channels 'a' is no list of numbers"),
        (["--layer", LAYER, "--axis", "4"], "no channels on axis 4"),
        (["--layer", LAYER, "-o", "c.gif"], "written as .png, .json or .npz"),
        (["--layer", LAYER, "-o", "no/c.png"], "the folder no is missing"),
        (["--layer", LAYER, "--colormap", "pink"], "--colormap pink is unknown"),
        (["--layer", LAYER, "-t", "7"], "class 7 is out of range"),
        (["--layer", LAYER, "-m", "smoothgrad"], "--mask is for methods that walk through the model once"),
    ],
    ids=str,
)
def test_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    concepts(SHAPES, FILES[0], *argv, code=2)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not os.listdir()


# ---- the sheet -------------------------------------------------------------------------------------------------------


def test_the_window_holds_what_counts() -> None:
    heat = np.zeros((1, 40, 60))
    heat[0, 10:18, 30:40] = 1
    left, top, right, bottom = window(heat, (80, 120))
    assert (left, top, right, bottom) == window(-heat, (80, 120))
    assert right - left == bottom - top
    assert left <= 62
    assert right >= 78
    assert top <= 22
    assert bottom >= 34
    assert right - left < 40
    assert window(np.zeros((4, 6)), (80, 120)) == (0, 0, 120, 80)
    heat[:] = 0
    heat[0, 0, 59] = 1
    assert window(heat, (80, 120)) == (100, 0, 120, 20), "at least a quarter, and inside"


def test_a_sheet_has_a_block_per_channel() -> None:
    picture = np.full((32, 32, 3), 200, np.uint8)
    heat = np.zeros((3, 32, 32))
    heat[:, 4:12, 4:12] = 1
    rows = [
        ConceptRow("one", [ConceptCell(picture, heat, "a")] * 3),
        ConceptRow("two", [ConceptCell(picture, -heat, "b")]),
    ]
    sheet = np.asarray(concept_sheet(rows, "heading", crop=False)).astype(int)
    red = (sheet[..., 0] - sheet[..., 2]) > 60
    blue = (sheet[..., 2] - sheet[..., 0]) > 60
    assert red[: len(sheet) // 2].any()
    assert not blue[: len(sheet) // 2].any()
    assert blue[len(sheet) // 2 :, : sheet.shape[1] // 3].any()
    one = np.asarray(concept_sheet(rows[:1]))
    assert len(one) < len(sheet)
    with pytest.raises(InputError, match="at least one sample"):
        concept_sheet([ConceptRow("none", [])])
