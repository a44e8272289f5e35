"""The command explain on texts: what it reads, prints and writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lrp import Explainer
from onnx_lrp.cli import main
from tests.small_models import conv, normal, reader, tokens, writer
from tests.tokenizer_files import WORDS, wordpiece

LABELS = ["bad", "good", "neutral"]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Every test writes where it may, beside a tokenizer and some models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    os.mkdir("m")
    wordpiece().save("m/tokenizer.json")
    onnx.save(reader(), "m/reader.onnx")
    onnx.save(writer(len(WORDS)), "m/writer.onnx")
    onnx.save(reader(len(WORDS), hidden=True), "m/hidden.onnx")
    Path("m/labels.txt").write_text("\n".join(LABELS))


@pytest.fixture
def call(capsys):
    """Run the command in this process; what it printed."""

    def run(*argv, code=0, method="epsilon"):
        capsys.readouterr()
        found = main(["explain", *map(str, argv), "--threads", "1", *(["-m", method] if method else [])])
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed

    return run


def files():
    return sorted(str(p) for p in Path().rglob("*") if p.is_file() and p.parts[0] != "m")


def test_a_text(call):
    out = call("m/reader.onnx", "the movie was unbelievable", "--labels", "m/labels.txt").out.splitlines()
    assert out[0] == "m/reader.onnx on CPUExecutionProvider; texts by tokenizer.json"
    assert out.pop(1).endswith("the rule book attnlrp was made: -m attnlrp")
    assert out[2] == "text 1"
    e = Explainer("m/reader.onnx", "epsilon", device="cpu", threads=1, tokenizer="m", ledger=True)(
        "the movie was unbelievable"
    )
    label = LABELS[e.target[0]]
    assert out[3].startswith(f"  predicted   {label} ({e.target[0]}) ")
    assert out[4] == f"  explained   {label} ({e.target[0]}), score {e.score[0]:.5g}"
    assert out[5].startswith("    [CLS] the(")
    assert out[5].endswith(") [SEP]")
    totals = e.tokens()[0].totals
    assert out[6].startswith(
        f"  tokens      content {totals['content']:+.5g}, special {totals['special']:+.5g}, token_"
    )
    assert out[7].startswith("  conserved   relevance ")
    assert out[8] == "  written     text-1.epsilon.html"
    page = Path("text-1.epsilon.html").read_text("utf-8")
    assert f"explained <b>{label}</b>" in page
    assert ">believ</data>" in page
    assert files() == ["text-1.epsilon.html"]


def test_a_file_of_texts(call):
    Path("reviews.txt").write_text("\ufeffthe movie was great\n\n  not bad \nparis\tfrance\n", "utf-8")
    out = call("m/reader.onnx", "reviews.txt", "bad movie").out
    for name in ("reviews.txt:1", "reviews.txt:3", "reviews.txt:4", "text 1"):
        assert f"\n{name}\n" in out
    assert files() == ["reader.epsilon.html", "reviews.txt"]
    call("m/reader.onnx", "reviews.txt", "-q")
    assert Path("reviews.epsilon.html").read_text("utf-8").count("<td>") - 1 > 3
    call("m/reader.onnx", "reviews.txt", "-o", "out/", "-q")
    assert sorted(os.listdir("out")) == [f"reviews-{k}.epsilon.html" for k in (1, 3, 4)]


def test_arrays_of_texts_of_different_length(call):
    call("m/reader.onnx", "the movie was great", "bad", "-o", "r.npz", "--batch-size", 1)
    with np.load("r.npz") as file:
        assert file["input/input_ids"].tolist() == [[2, 5, 6, 7, 8, 3], [2, 9, 3, -1, -1, -1]]
        assert (file["relevance/input_ids"][1, 3:] == 0).all()
        assert file["path"].tolist() == ["text 1", "text 2"]
        total = file["relevance/input_ids"].sum(1) + file["relevance/token_type_ids"].sum(1)
        np.testing.assert_allclose(total + file["absorbed"], file["score"], rtol=1e-4)
        alone = file["relevance/input_ids"]
    call("m/reader.onnx", "the movie was great", "bad", "-o", "r.npz", "--batch-size", 2)
    with np.load("r.npz") as file:
        np.testing.assert_allclose(file["relevance/input_ids"], alone, rtol=1e-4, atol=1e-6)
    call("m/writer.onnx", "the movie was great", "bad", "-o", "r.npz")
    with np.load("r.npz") as file:
        assert file["output/logits"].shape == (2, 6, len(WORDS))


def test_methods_and_classes_side_by_side(call):
    call("m/reader.onnx", "the movie", "-m", "input_x_gradient", "-o", "x.html")
    page = Path("x.html").read_text("utf-8")
    assert '<th scope="col">input_x_gradient</th><th scope="col">epsilon</th>' in page
    call("m/reader.onnx", "the movie", "-t", "good", "-t", "2", "--labels", "m/labels.txt", "-o", "y.html")
    page = Path("y.html").read_text("utf-8")
    assert "explained <b>good</b>" in page
    assert "explained <b>neutral</b>" in page
    call("m/reader.onnx", "the movie", "not bad", "-t", "good,bad", "--labels", "m/labels.txt", "-o", "z.html")
    page = Path("z.html").read_text("utf-8")
    assert page.index("explained <b>good</b>") < page.index("explained <b>bad</b>")


def test_the_next_word(call):
    out = call("m/writer.onnx", "paris is in", "-t", "france", "-o", "x.npz").out
    assert f"explained   \u201cfrance\u201d ({WORDS.index('france')}) at 4, score" in out
    assert "  predicted   \u201c" in out
    with np.load("x.npz") as file:
        assert file["target"].tolist() == [[4, WORDS.index("france")]]
    call("m/writer.onnx", "paris is in", "-t", '"is"', "-o", "x.npz")
    with np.load("x.npz") as file:
        assert file["target"].tolist() == [[4, WORDS.index("is")]]
    call("m/writer.onnx", "paris is in", "the movie was great", "-t", "france,great", "-o", "x.npz")
    with np.load("x.npz") as file:
        assert file["target"].tolist() == [[4, 17], [5, 8]]


def test_one_word_rather_than_another(call):
    out = call("m/writer.onnx", "paris is in", "-t", "france", "--against", "bad", "-o", "x.npz").out
    assert "explained   \u201cfrance\u201d (17) rather than \u201cbad\u201d (9) at 4, score" in out
    assert "(off by " in out
    with np.load("x.npz") as file:
        assert file["against"].tolist() == [9]
    call("m/reader.onnx", "the movie", "-t", "good", "--against", "next", "--labels", "m/labels.txt", "-o", "x.html")
    assert "<b>good rather than " in Path("x.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("position", "places"), [("last", [4]), ("-2", [3]), ("0", [0]), ("all", [0, 1, 2, 3, 4]), ("1,-1", [1, 4])]
)
def test_positions(call, position, places):
    out = call("m/writer.onnx", "paris is in", "--position", position, "-o", "x.npz").out
    with np.load("x.npz") as file:
        assert file["target"][:, 0].tolist() == places
        assert file["path"].tolist() == ["text 1"] * len(places)
    assert out.count("  explained ") == len(places)
    call("m/writer.onnx", "paris is in", "--position", position, "-q")
    page = Path("text-1.epsilon.html").read_text("utf-8")
    assert page.count('scope="row" class="about"') == len(places)
    assert page.count("explained here") == len(places)


def test_hidden_words(call):
    out = call("m/hidden.onnx", "paris is [MASK] france", "the movie").out
    assert ">[MASK](" in out
    assert ">[SEP]<" in out


def test_ids_as_json(call):
    Path("ids.json").write_text(json.dumps([2, 5, 6, 3]))
    out = call("m/reader.onnx", "ids.json", "-o", "x.html").out
    assert "    2(" in out
    out = call("m/reader.onnx", "ids.json", "--tokenizer", "m").out
    assert "    [CLS] the(" in out
    assert files() == ["ids.epsilon.html", "ids.json", "x.html"]
    Path("ids.json").write_text(json.dumps({"input_ids": [2, 5, 6, 3], "attention_mask": [1, 1, 1, 0]}))
    assert "padding +0" in call("m/reader.onnx", "ids.json", "--tokenizer", "m").out


def test_words_figures_and_limits(call):
    call("m/reader.onnx", "it was unbelievable", "--words", "-o", "w.html")
    assert ">unbelievable</data>" in Path("w.html").read_text("utf-8")
    pytest.importorskip("PIL")
    call("m/reader.onnx", "it was unbelievable", "-o", "w.png")
    printed = call("m/reader.onnx", "the movie was great", "--max-tokens", 4)
    assert "[CLS] the(" in printed.out
    assert "great" not in printed.out
    assert "is cut to 4 tokens" in printed.err


def test_colours_of_a_terminal(call, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    assert "\x1b[2m[CLS]\x1b[0m" in call("m/reader.onnx", "the movie").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in call("m/reader.onnx", "the movie").out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["reader.onnx", "the movie"], "the movie: text needs --tokenizer FILE"),
        (["reader.onnx", "movie"], "movie: cannot be read"),
        (["reader.onnx", "reviews.txt"], "text needs --tokenizer FILE"),
        (["m/reader.onnx", "absent.txt"], "absent.txt: not a usable .txt file"),
        (["m/reader.onnx", "empty.txt"], "empty.txt: there is no text in it"),
        (["m/reader.onnx", " "], "there is no text in it"),
        (["m/reader.onnx", "absent.png"], "absent.png: cannot be read"),
        (["m/reader.onnx", "the movie", "--tokenizer", "absent.json"], "absent.json: the tokenizer cannot be read"),
        (["m/reader.onnx", "the movie", "--tokenizer", "m/labels.txt"], "no tokenizer.json"),
        (["m/reader.onnx", "the movie", "--position", "last"], "--position is for outputs"),
        (["m/reader.onnx", "the movie", "--position", "first"], "not last, mask, all"),
        (["m/writer.onnx", "the movie", "--position", "9"], "text 1: position 9 is out of range"),
        (["m/writer.onnx", "the movie", "-t", "unbelievable"], "'unbelievable' is not one token"),
        (["conv.onnx", "the movie", "--tokenizer", "m"], "text 1: the model takes no token ids"),
        (["conv.onnx", "x.npy", "-o", "x.html"], "x.npy has no tokens for a page of text"),
        (["m/reader.onnx", "the movie", "-o", "x.pdf"], ".png, .html, .npz or into a folder/"),
    ],
)
def test_wrong_usage_is_one_line(call, argv, words):
    onnx.save(reader(), "reader.onnx")
    onnx.save(conv(), "conv.onnx")
    np.save("x.npy", normal(1, 3, 8, 8))
    Path("reviews.txt").write_text("the movie\n")
    Path("empty.txt").write_text("\n \n")
    before = files()
    err = call(*argv, code=2).err
    assert words in err
    assert err.count("\n") == 1
    assert files() == before


def test_a_model_of_plain_ids_is_as_before(call):
    pytest.importorskip("PIL")
    onnx.save(tokens(), "ids.onnx")
    Path("ids.json").write_text("[1, 2, 3]")
    out = call("ids.onnx", "ids.json").out
    assert "arrays as they are" in out
    assert "  tokens " not in out
    assert "ids.epsilon.png" in files()
