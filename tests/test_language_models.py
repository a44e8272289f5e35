"""Language models and readers of text: tokenizers, positions, the next token, hidden words, a past."""

from __future__ import annotations

import builtins
import re

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lrp
from onnx_lrp import Explainer, InputError, Tokenizer
from onnx_lrp.roles import Spec, filled
from tests.small_models import normal, reader, tokens, two_inputs, writer
from tests.tokenizer_files import WORDS, byte_level, metaspace, wordpiece

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LONG = np.array([[5, 6, 7, 8, 21], [15, 16, 17, 18, 19]])


def explainer(model, method="epsilon", **options):
    return Explainer(model, method, device="cpu", threads=1, **options)


def logits_of(model, ids, place, past=None):
    """The writer in torch: embeddings that ask for gradients, and its logits."""
    torch = pytest.importorskip("torch")
    w = {t.name: torch.tensor(numpy_helper.to_array(t)).double() for t in model.graph.initializer}
    e = w["words"][torch.tensor(ids)].requires_grad_()
    past = [torch.tensor(p).double().requires_grad_() for p in past or ()]
    before, length = (past[0].shape[1] if past else 0), e.shape[1]
    x = e + w["places"][before : before + length]
    q, k, v = x @ w["wq"], x @ w["wk"], x @ w["wv"]
    if past:
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    scores = q @ k.transpose(1, 2) + w["later"][before : before + length, : before + length]
    logits = (x + scores.softmax(-1) @ v) @ w["head"]
    logits[(0, *place)].backward()
    shares = [(t * t.grad).detach().numpy() for t in (e, *past)]
    return logits.detach().numpy(), [shares[0].sum(-1), *shares[1:]]


# ---- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(0, 3), (2, 30), (4, 1)])
def test_a_position_is_that_of_torch(place):
    model = writer(mask=False)
    logits, (shares,) = logits_of(model, LONG[:1], place)
    e = explainer(model, "input_x_gradient")(LONG[:1], place[1], position=place[0])
    np.testing.assert_allclose(e.outputs["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(e.relevance["input_ids"], shares, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(e.score, [logits[0][place]], rtol=1e-4)
    assert (e.relevance["input_ids"][0, place[0] + 1 :] == 0).all(), "what comes later says nothing"


@pytest.mark.parametrize("method", ["epsilon", "gradient"])
def test_several_positions_in_one_run_are_those_of_single_runs(method):
    explain = explainer(writer(), method, batch_size=8)
    runs = []
    _, session = explain._many
    run = session.run
    session.run = lambda feeds: runs.append((len(feeds["input_ids"]), len(feeds["target"]))) or run(feeds)
    together = explain(LONG[:1], position="all")
    assert runs == [(1, 5)]
    assert together.relevance["input_ids"].shape == (5, 5)
    for p in range(5):
        alone = explain(LONG[:1], position=p)
        np.testing.assert_allclose(together.relevance["input_ids"][p], alone.relevance["input_ids"][0], **CLOSE)
        np.testing.assert_allclose(together.score[p], alone.score[0], **CLOSE)
        np.testing.assert_array_equal(together.target[p], [p, alone.outputs["logits"][0, p].argmax()])
        by_target = explain(LONG[:1], target=(p, int(alone.target[0, 1])))
        np.testing.assert_allclose(alone.relevance["input_ids"], by_target.relevance["input_ids"], **CLOSE)
    some = explain(LONG[:1], [7, 9], position=[3, -1])
    np.testing.assert_array_equal(some.target, [[3, 7], [4, 9]])
    np.testing.assert_array_equal(explain(LONG[:1], 7, position=range(2)).target, [[0, 7], [1, 7]])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_many_positions_in_chunks(batch_size):
    explain = explainer(writer(), batch_size=batch_size)
    np.testing.assert_allclose(
        explain(LONG[:1], position="all").relevance["input_ids"],
        explainer(writer(), batch_size=5)(LONG[:1], position="all").relevance["input_ids"],
        **CLOSE,
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_position_is_no_padding(side):
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    mask = mask[:, ::-1].copy() if side == "left" else mask
    feeds = {"input_ids": LONG, "attention_mask": mask}
    explain = explainer(writer())
    e = explain(feeds, position="last")
    np.testing.assert_array_equal(e.target[:, 0], [4 if side == "left" else 2, 4])
    best = e.outputs["logits"].argmax(2)
    np.testing.assert_array_equal(e.target[:, 1], best[[0, 1], e.target[:, 0]])
    assert (e.relevance["input_ids"][mask == 0] == 0).all()
    np.testing.assert_array_equal(explain(feeds, position=-3).target[:, 0], [2 if side == "left" else 0, 2])
    np.testing.assert_array_equal(explain(feeds, position=[1, -1]).target[:, 0], [1, 4])
    np.testing.assert_array_equal(explain(feeds, [3, 4], position="last").target[:, 1], [3, 4])
    first = {name: array[:1] for name, array in feeds.items()}
    np.testing.assert_array_equal(explain(first, position="all").target[:, 0], np.flatnonzero(mask[0]))
    if side == "right":
        short = explain({"input_ids": LONG[:1, :3]}, position="last")
        np.testing.assert_allclose(e.relevance["input_ids"][0, :3], short.relevance["input_ids"][0], **CLOSE)


@pytest.mark.parametrize(
    ("position", "target", "words"),
    [
        (5, None, "position 5 is out of range: the text has 5 tokens of 5"),
        (-6, None, "position -6 is out of range"),
        ("first", None, "'auto', 'last', 'mask', 'all', a number"),
        (1.5, None, "not 1.5"),
        (True, None, "not True"),
        ([], None, "a list of numbers"),
        ([1, 2, 3], None, "3 positions for 2 samples"),
        ("all", None, "one text at a time"),
        ("mask", None, "tokenizer with a mask token"),
        ("last", [1, 2, 3], r"one per position \(2\)"),
        ("last", [(1, 2)], "one per position"),
        ("last", 40, "class 40 is out of range"),
        ("last", "movie", "text needs a tokenizer"),
    ],
)
def test_wrong_positions(position, target, words):
    with pytest.raises(InputError, match=words):
        explainer(writer())(LONG, target, position=position)


def test_positions_are_of_models_with_positions():
    with pytest.raises(InputError, match="one axis of classes"):
        explainer(tokens())([[1, 2]], position="last")


@pytest.mark.parametrize("method", ["epsilon", "gradient"])
def test_one_token_rather_than_another(method):
    model = writer(len(WORDS))
    explain, plain = explainer(model, method, against=True, tokenizer=wordpiece()), explainer(model, method)
    e = explain("paris is in", "france", position=[2, -1], against="bad")
    ids = e.inputs["input_ids"]
    france, bad = (plain(ids, WORDS.index(word), position=[2, 4]) for word in ("france", "bad"))
    np.testing.assert_allclose(e.score, france.score - bad.score, **CLOSE)
    wanted = france.relevance["input_ids"] - bad.relevance["input_ids"]
    np.testing.assert_allclose(e.relevance["input_ids"], wanted, rtol=1e-4, atol=1e-5)
    assert e.against.tolist() == e[1:].against.tolist() * 2 == [WORDS.index("bad")] * 2
    nearest = explain("paris is in", position="last")
    order = np.argsort(-nearest.outputs["logits"][0, -1])
    assert (nearest.target[0, 1], nearest.against[0]) == tuple(order[:2])
    np.testing.assert_allclose(
        explain(LONG, [3, 4], position="last", against=[5, 6]).score,
        [row[-1, a] - row[-1, b] for row, a, b in zip(plain(LONG).outputs["logits"], (3, 4), (5, 6), strict=True)],
        **CLOSE,
    )
    for wrong, words in ((99, "class 99 is out of range"), ([1, 2, 3], r"one per sample \(2\)"), (1.5, "got 1.5")):
        with pytest.raises(InputError, match=words):
            explain(LONG, against=wrong)
    with pytest.raises(InputError, match="rewrite it with against=True"):
        plain(LONG, against=3)
    with pytest.raises(InputError, match="give classes as against="):
        explain({"input_ids": LONG, "against": [1]})


# ---- a past ------------------------------------------------------------------------------------------------------


def test_no_past_is_an_empty_one():
    with_past, without = explainer(writer(past=True)), explainer(writer())
    e = with_past(LONG, position="last")
    plain = without(LONG, position="last")
    assert e.inputs["past.k"].shape == e.relevance["past.v"].shape == (2, 0, 8)
    np.testing.assert_allclose(e.outputs["logits"], plain.outputs["logits"], **CLOSE)
    np.testing.assert_allclose(e.relevance["input_ids"], plain.relevance["input_ids"], **CLOSE)
    np.testing.assert_allclose(e.total(), plain.total(), **CLOSE)


def test_a_past_that_is_given_has_relevance():
    model, past = writer(past=True, mask=False), [normal(1, 3, 8), normal(1, 3, 8, seed=1)]
    logits, (shares, *theirs) = logits_of(model, LONG[:1, :2], (1, 7), past)
    feeds = {"input_ids": LONG[:1, :2], "past.k": past[0], "past.v": past[1]}
    e = explainer(model, "input_x_gradient")(feeds, 7, position="last")
    np.testing.assert_allclose(e.outputs["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(e.relevance["input_ids"], shares, rtol=1e-4, atol=1e-5)
    for name, share in zip(("past.k", "past.v"), theirs, strict=True):
        np.testing.assert_allclose(e.relevance[name], share, rtol=1e-4, atol=1e-5)
    only = explainer(model, "input_x_gradient", inputs=["input_ids"])(feeds, 7, position="last")
    assert list(only.relevance) == ["input_ids"]
    # A mask over past and present: what is hidden of the present is padding.
    long = {**feeds, "input_ids": LONG[:1, :3], "attention_mask": np.array([[1, 1, 1, 1, 1, 0]])}
    masked = explainer(writer(past=True))(long, position="last")
    np.testing.assert_array_equal(masked.tokens()[0].padding, [False, False, True])
    assert masked.target[0, 0] == 1


def test_what_is_no_past_may_not_be_empty():
    with pytest.raises(InputError, match="which holds nothing"):
        explainer(tokens())(np.zeros((1, 0), int))


def test_what_goes_without_saying():
    ids = Spec(np.dtype(np.int64), ("N", "T"))
    wanted = {
        "input_ids": ids,
        "attention_mask": Spec(np.dtype(np.float32), ("N", "all")),
        "token_type_ids": ids,
        "cache_position": Spec(np.dtype(np.int64), ("T",)),
        "past_key_values.0.key": Spec(np.dtype(np.float16), ("N", 2, "past", 4)),
        "use_cache_branch": Spec(np.dtype(np.bool_), (1,)),
        "pixels": Spec(np.dtype(np.float32), ("N", 3, 8, 8)),
    }
    found = filled({"input_ids": np.array([[5, 6, 0], [0, 7, 8]])}, wanted, pad=0)
    assert {n: (a.dtype, a.shape) for n, a in found.items()} == {
        "attention_mask": (np.float32, (2, 3)),
        "token_type_ids": (np.int64, (2, 3)),
        "cache_position": (np.int64, (3,)),
        "past_key_values.0.key": (np.float16, (2, 2, 0, 4)),
        "use_cache_branch": (np.bool_, (1,)),
    }
    assert found["attention_mask"].tolist() == [[1, 1, 0], [0, 1, 1]]
    assert not found["use_cache_branch"].any()
    past = {"past_key_values.0.key": np.zeros((1, 2, 3, 4)), "input_ids": np.ones((1, 2), int)}
    assert set(filled(past, wanted)) == {"token_type_ids", "use_cache_branch"}
    assert filled({"pixels": np.zeros((1, 3, 8, 8))}, wanted) == {}
    wanted["past_key_values.0.key"] = Spec(np.dtype(np.float32), ("N", "heads", "past", 4))
    with pytest.raises(InputError, match="does not say which axis is the past's length"):
        filled({"input_ids": np.ones((1, 2), int)}, wanted)


# ---- tokenizers --------------------------------------------------------------------------------------------------


def specs(model):
    return {
        i.name: Spec(
            onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type),
            tuple(d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim),
        )
        for i in model.graph.input
    }


def test_texts_are_what_the_tokenizer_says(tmp_path):
    theirs = wordpiece()
    theirs.save(str(tmp_path / "tokenizer.json"))
    texts = ["the movie was unbelievable", "bad"]
    for source in (tmp_path / "tokenizer.json", str(tmp_path), theirs, Tokenizer(theirs)):
        explain = explainer(reader(), tokenizer=source)
        e = explain(texts)
        for i, text in enumerate(texts):
            encoded = theirs.encode(text)
            length = len(encoded.ids)
            np.testing.assert_array_equal(e.inputs["input_ids"][i, :length], encoded.ids)
            np.testing.assert_array_equal(e.inputs["input_ids"][i, length:], 0)
            np.testing.assert_array_equal(e.inputs["attention_mask"][i], np.arange(8) < length)
            alone = explain(text)
            np.testing.assert_allclose(e.relevance["input_ids"][i, :length], alone.relevance["input_ids"][0], **CLOSE)
            np.testing.assert_allclose(e.score[i], alone.score[0], **CLOSE)
    first, second = e.tokens()
    assert first.texts == ["[CLS]", "the", "movie", "was", "un", "believ", "able", "[SEP]"]
    assert first.words().texts == ["[CLS]", "the", "movie", "was", "unbelievable", "[SEP]"]
    np.testing.assert_array_equal(np.flatnonzero(first.special), [0, 7])
    np.testing.assert_array_equal(np.flatnonzero(second.special), [0, 2])
    np.testing.assert_array_equal(np.flatnonzero(second.padding), [3, 4, 5, 6, 7])
    for row, one in zip(e.relevance["input_ids"].astype(float), (first, second), strict=True):
        np.testing.assert_allclose(sum(one.totals.values()), row.sum(), rtol=1e-6)
        np.testing.assert_allclose(one.totals["special"], row[one.special].sum(), rtol=1e-6)


def test_pairs_have_segments():
    e = explainer(reader(), tokenizer=wordpiece())([("the movie", "bad"), "great"])
    np.testing.assert_array_equal(e.inputs["token_type_ids"], [[0, 0, 0, 0, 1, 1], [0] * 6])
    e = explainer(reader(), tokenizer=wordpiece())(("the movie", "bad"))
    np.testing.assert_array_equal(e.inputs["token_type_ids"], [[0, 0, 0, 0, 1, 1]])


def test_two_inputs_of_ids_take_a_text_each():
    model = writer()
    for value in (*model.graph.input, *model.graph.node):
        assert value.name
    spec = specs(model)["input_ids"]
    wanted = {f"{name}_{k}": spec for k in "ab" for name in ("input_ids", "attention_mask")}
    feeds = Tokenizer(wordpiece()).feeds([("the movie", "bad"), ("paris", "is in france")], wanted)
    np.testing.assert_array_equal(feeds["input_ids_a"], [[2, 5, 6, 3], [2, 14, 3, 0]])
    np.testing.assert_array_equal(feeds["input_ids_b"], [[2, 9, 3, 0, 0], [2, 15, 16, 17, 3]])
    np.testing.assert_array_equal(feeds["attention_mask_b"], [[1, 1, 1, 0, 0], [1] * 5])
    with pytest.raises(InputError, match="two texts \\(input_ids_a and input_ids_b\\): give pairs"):
        Tokenizer(wordpiece()).feeds(["the movie"], wanted)


def test_padding_and_cutting(caplog):
    file = wordpiece(length=9)
    file.enable_truncation(6)
    wanted = specs(reader())
    made = Tokenizer(file)
    feeds = made.feeds(["the", "the movie was great and not bad"], wanted)
    assert feeds["input_ids"].tolist() == [[2, 5, 3, 0, 0, 0], [2, 5, 6, 7, 8, 3]], "no longer than need be"
    assert "is cut to 6 tokens" in caplog.text
    assert Tokenizer(file, limit=4).feeds(["the movie was great"], wanted)["input_ids"].tolist() == [[2, 5, 6, 3]]
    left = Tokenizer(file, side="left").feeds(["the", "the movie"], wanted)
    assert left["input_ids"].tolist() == [[0, 2, 5, 3], [2, 5, 6, 3]]
    assert left["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    fixed = {**wanted, "input_ids": Spec(np.dtype(np.int32), ("N", 5)), "position_ids": wanted["input_ids"]}
    feeds = made.feeds(["the"], fixed)
    assert feeds["input_ids"].dtype == np.int32
    assert feeds["input_ids"].tolist() == [[2, 5, 3, 0, 0]]
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 2, 2]]
    assert file.padding["length"] == 9, "whose tokenizer it is keeps it as it was"
    assert file.truncation["max_length"] == 6


@pytest.mark.parametrize("made", [byte_level(), metaspace()])
def test_words_of_every_kind_of_vocabulary(made):
    text = "the cats caf\u00e9 \U0001f600"
    seen = Tokenizer(made).pieces(np.array(made.encode(text).ids))
    assert {p.text for p in seen if p.glued} >= {"s", "f"}
    whole = [p for p in seen if not re.fullmatch(r"[0-9A-F]{2}", p.text)]
    assert len(seen) - len(whole) == 4, "the first bytes of letters of two and four"
    spaced = ("" if p.glued or not i or p.text == " " else " " for i, p in enumerate(seen))
    joined = "".join(gap + (p.text if p in whole else "") for gap, p in zip(spaced, seen, strict=True))
    assert joined == text


def test_tokens_by_their_text():
    made = Tokenizer(wordpiece())
    assert made.number("great") == WORDS.index("great")
    assert made.number("##able") == WORDS.index("##able")
    assert made.number("[MASK]") == 4
    with pytest.raises(InputError, match=r"'unbelievable' is not one token of the tokenizer, it is cut into 'un', "):
        made.number("unbelievable")
    with pytest.raises(InputError, match="not one token"):
        made.number("quux")
    gpt = byte_level()
    assert Tokenizer(gpt).number("cat") == gpt.token_to_id("\u0120cat"), "a word begins with its space"
    assert Tokenizer(gpt).number("he") == gpt.token_to_id("he")
    assert Tokenizer(gpt).labels[gpt.token_to_id("\u0120cat")] == "\u201ccat\u201d"
    assert made.labels[WORDS.index("##able")] == "\u201c##able\u201d"


def test_kinds_of_special_tokens():
    made = Tokenizer(wordpiece())
    assert made.special == {0, 2, 3}, "an unknown word is text, and so is a hidden one"
    assert (made.pad, made.mask, made.size) == (0, 4, len(WORDS))
    assert Tokenizer(byte_level()).special == {0}
    assert Tokenizer(metaspace()).special == {1, 2}


def test_next_and_hidden_words():
    explain = explainer(writer(len(WORDS)), tokenizer=wordpiece())
    e = explain(["paris is in", "the movie was great"], "france", position="last")
    assert e.target.tolist() == [[4, 17], [5, 17]]
    assert explain("paris is in", ["france", "bad"], position=[2, 3]).target.tolist() == [[2, 17], [3, 9]]
    hidden = explainer(reader(len(WORDS), hidden=True), tokenizer=wordpiece())
    e = hidden(["paris [MASK] in", "the movie was [MASK]"], position="mask")
    assert e.target[:, 0].tolist() == [2, 4]
    assert hidden(["paris [MASK] in", "the movie"], position="auto").target[:, 0].tolist() == [2, 3]
    assert hidden("[MASK] is [MASK]", position="mask").target[:, 0].tolist() == [1, 3]
    with pytest.raises(InputError, match="a text has no mask token"):
        hidden("paris", position="mask")


def test_padding_without_a_mask_is_what_the_tokenizer_says():
    explain = explainer(writer(len(WORDS), mask=False), tokenizer=wordpiece())
    e = explain(["paris", "the movie was great"], position="last")
    assert e.target[:, 0].tolist() == [2, 5]
    np.testing.assert_array_equal(np.flatnonzero(e.tokens()[0].padding), [3, 4, 5])


def test_text_in_a_dict():
    explain = explainer(reader(), tokenizer=wordpiece())
    one, other = explain({"input_ids": "the movie"}), explain("the movie")
    np.testing.assert_array_equal(one.relevance["input_ids"], other.relevance["input_ids"])
    with pytest.raises(InputError, match="input 'attention_mask' takes no text; texts go to input_ids"):
        explain({"input_ids": [[1]], "attention_mask": "the"})


def test_wrong_texts(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="text needs a tokenizer"):
        explainer(reader())("the movie")
    explain = explainer(reader(), tokenizer=wordpiece())
    for wrong in ([("a", "b", "c")], ["a", 3], [], [[1], [2, 3]], {"input_ids": [[1], [2, 3]]}):
        with pytest.raises(InputError):
            explain(wrong)
    with pytest.raises(InputError, match="takes no token ids, its inputs are image, table; so it takes no text"):
        explainer(two_inputs(), tokenizer=wordpiece())("the movie")
    with pytest.raises(InputError, match="has no tokens in"):
        explainer(writer(), tokenizer=byte_level())("")
    no_pad = wordpiece()
    made = Tokenizer(no_pad)
    made.pad = None
    with pytest.raises(InputError, match="no padding token and the model no mask"):
        explainer(tokens(), tokenizer=made)(["the", "the movie"])
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    for path, words in (
        ("x.json", "no tokenizer.json"),
        ("x.bin", "cannot be read"),
        ("absent.json", "No such file"),
        ("", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            Tokenizer(tmp_path / path)
    with pytest.raises(InputError, match="not int"):
        Tokenizer(3)
    real = builtins.__import__

    def without(name, *args):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install onnx-lrp\[tokenizers\]"):
        Tokenizer(tmp_path / "x.json")


def test_importing_the_package_imports_no_tokenizer():
    import subprocess
    import sys

    code = "import sys, onnx_lrp, onnx_lrp.cli; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_figures_and_files(tmp_path):
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    explain = explainer(writer(len(WORDS), past=True), tokenizer=wordpiece())
    e = explain("paris is in", position="all")
    with Image.open(e.save(tmp_path / "x.png")) as picture:
        assert picture.height > 300
    page = e.save(tmp_path / "x.html").read_text("utf-8")
    assert page.count('class="here"') + page.count(' here"') == 5
    assert "explained <b>\u201c" in page, "classes are words"
    assert page.count("france") == 0 or "\u201cfrance\u201d" in page
    with np.load(e.save(tmp_path / "x.npz")) as file:
        assert file["relevance/input_ids"].shape == (5, 5)
    assert onnx_lrp.Tokenizer is Tokenizer
