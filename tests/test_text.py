"""Relevance of tokens: pieces of words, totals, pages of HTML, terminals."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

import onnx_lrp
from onnx_lrp import Explainer, InputError
from onnx_lrp.explanation import Explanation
from onnx_lrp.pieces import pieces, shown, style_of
from onnx_lrp.roles import Spec, filled, kinds, role_of, text_inputs
from onnx_lrp.show import colormaps, text_lines, text_page, text_rows
from onnx_lrp.show.terminal import depth_of
from onnx_lrp.show.text import REACH, colours, number
from onnx_lrp.tokens import TokenRelevance
from tests.small_models import normal, reader, tokens, two_inputs

ANSI = re.compile(r"\x1b\[[\d;]*m")
NASTY = ["<script>alert(1)</script>", '" onmouseover="x', "'", "&lt;", "</data>", "\u202e\x1b[31m", "a\nb", "\ud800"]


def explained(relevance, ids=None, mask=None, outputs=None, target=None, **more):
    """An explanation of token ids with this relevance, (N, T)."""
    relevance = np.array(relevance, np.float32)
    count, length = relevance.shape
    inputs = {"input_ids": np.arange(count * length).reshape(count, length) if ids is None else np.array(ids)}
    if mask is not None:
        inputs["attention_mask"] = np.array(mask)
    outputs = {"logits": normal(count, 3)} if outputs is None else outputs
    target = np.zeros(count, np.int64) if target is None else np.array(target)
    score = np.arange(count) + 0.5
    return Explanation(outputs, {"input_ids": relevance}, target, score, None, inputs, "epsilon", **more)


class Page(HTMLParser):
    """What a browser makes of a page: its tokens, its text, and whether all tags are closed."""

    VOID = ("meta", "br")

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tokens, self.tags, self.rows, self.words = [], [], set(), 0, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not any(name.startswith("on") or name in ("src", "href") for name in attrs), "a page needs nothing else"
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "data":
            self.tokens.append({**attrs, "text": ""})
        self.rows += tag == "tr" and self.open.count("table") == 1 and "tbody" in self.open

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "data":
            self.tokens[-1]["text"] += data
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def said(self):
        return " ".join(" ".join(self.words).split())


def colour(token):
    """Background and letters as RGB."""
    back, ink = re.search(r"background:#(\w{6});color:#(\w{3})", token["style"]).groups()
    return tuple(bytes.fromhex(back)), tuple(bytes.fromhex(ink[0] * 6))


# ---- pieces of words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "style", "words"),
    [
        ("the un ##believ ##able ## cat", "wordpiece", "the un+believ+able ## cat"),
        ("the \u0120cat s \u0120\u010a x", "byte_level", "the cat+s \n x"),
        ("\u2581the \u2581cat s <0x21> \u2581", "metaspace", "the cat+s+! \u2581"),
        ("un believ able</w> cat</w>", "suffix", "un+believ+able cat"),
        ("plain words", "words", "plain words"),
    ],
)
def test_pieces_go_together(given, style, words):
    given = given.split(" ")
    assert style_of(given) == style
    seen = pieces(given)
    joined = "".join(("+" if p.glued else " ") * (i > 0) + p.text for i, p in enumerate(seen))
    assert joined.replace("+ ", " ") == words.replace("\u2581", " ")


def test_letters_of_several_bytes():
    smile = [bytes_to_letters(b) for b in "\U0001f600".encode()]
    seen = pieces(["\u0120" + smile[0], *smile[1:], "a"], "byte_level")
    assert [p.text for p in seen] == ["F0", "9F", "98", "\U0001f600", "a"]
    assert [p.glued for p in seen] == [False, True, True, True, True]
    seen = pieces(["\u2581x", *(f"<0x{b:02X}>" for b in "é".encode()), "y"])
    assert [p.text for p in seen] == ["x", "C3", "é", "y"]


def bytes_to_letters(byte):
    """GPT-2's letter for a byte: itself where it can be printed, else the next unused one from 256 on."""
    kept = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    return chr(byte) if byte in kept else chr(256 + [b for b in range(256) if b not in kept].index(byte))


def test_what_cannot_be_seen_is_shown():
    assert shown("a\tb\r\n") == "a\u21e5b\u23ce"
    assert shown("") == shown(" ") == "\u2423"
    assert shown("   ") == "\u2423" * 3
    assert shown("\x1b[31m\u202e\ud800\x00") == "\ufffd[31m\ufffd\ufffd\ufffd"


# ---- inputs by their names ---------------------------------------------------------------------------------------


def test_roles():
    given = {
        "input_ids": "ids", "attention_mask": "mask", "token_type_ids": "segments", "position_ids": "positions",
        "decoder_input_ids": "ids", "input_mask": "mask", "segment_ids": "segments", "question": "ids",
    }  # fmt: skip
    assert {name: role_of(name, "i", 2) for name in given} == given
    assert role_of("past_key_values.0.key", "f", 4) == "past"
    assert role_of("use_cache_branch", "b", 1) == "branch"
    assert role_of("cache_position", "i", 1) == "positions"
    assert role_of("attention_mask", "f", 2) == "mask"
    assert [role_of(*spec) for spec in (("image", "f", 4), ("image", "u", 4), ("mask", "f", 4))] == ["", "", ""]


def test_lengths_of_texts():
    """Up to the last token that counts, whichever side is padded; filled in where they are not given."""
    assert [role_of(name, "i", 1) for name in ("length", "seq_lens", "question_length")] == ["lengths"] * 3
    assert role_of("length", "i", 2) == "ids"
    specs = {"question": Spec(np.dtype(np.int64), ("N", 4)), "length": Spec(np.dtype(np.int32), ("N",))}
    (group,) = text_inputs(kinds(specs))
    assert (group.ids, group.lengths) == ("question", "length")
    ids = np.array([[5, 6, 0, 0], [0, 0, 5, 6], [5, 0, 6, 0], [0, 0, 0, 0]])
    found = filled({"question": ids}, specs, 0)["length"]
    assert found.dtype == np.int32
    assert found.tolist() == [2, 4, 3, 1]
    assert filled({"question": ids}, specs)["length"].tolist() == [4] * 4
    assert "length" not in filled({"question": ids, "length": found}, specs, 0)


def test_normalized_relevance():
    unit, none = explained([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]]).tokens()
    np.testing.assert_allclose(unit.normalized, [0.6, -0.8, 0.0])
    assert not none.normalized.any()


def test_a_page_says_what_is_true_and_what_is_missing():
    found = explained([[3.0, -4.0, 0.5]])
    assert "true" not in text_page([found])
    found.delta = np.array([0.25])
    page = text_page([found], truths=["cat & dog"])
    for part in ("true cat &amp; dog", "<span>total \u22120.5</span>", "<span>delta +0.25</span>"):
        assert part in page


def test_two_texts_have_their_own_masks():
    names = ["mask_b", "input_ids_a", "attention_mask_a", "input_ids_b", "type_ids_b"]
    first, second = text_inputs(dict.fromkeys(names, ("i", 2)))
    assert (first.ids, first.mask, first.segments) == ("input_ids_a", "attention_mask_a", None)
    assert (second.ids, second.mask, second.segments) == ("input_ids_b", "mask_b", "type_ids_b")


# ---- the value ---------------------------------------------------------------------------------------------------


def test_tokens_of_an_explanation():
    e = explained([[1, -3, 0.5, 8], [1, 2, 3, 4]], mask=[[1, 1, 1, 0], [1, 1, 1, 1]])
    first, second = e.tokens()
    assert first.texts == ["0", "1", "2", "3"], "ids, where nothing says what they mean"
    np.testing.assert_array_equal(first.padding, [False, False, False, True])
    assert first.totals == {"content": -1.5, "special": 0, "padding": 8}
    assert first.scale == 3, "padding does not count"
    assert first.top(2) == [("0", 1), ("2", 0.5)]
    assert second.totals["content"] == 10
    assert len(second) == 4
    named = e.tokens(tokens=[["un", "##do", "it", "now"]] * 2)
    assert named[0].texts == ["un", "do", "it", "now"]
    words = named[0].words()
    assert words.texts == ["undo", "it", "now"]
    np.testing.assert_array_equal(words.relevance, [-2, 0.5, 8])
    np.testing.assert_array_equal(words.places, [0, 2, 3])
    np.testing.assert_array_equal(words.padding, [False, False, True])
    assert words.totals == first.totals


def test_tokens_of_other_tensors():
    e = explained(np.ones((2, 4)), mask=[[0, 1, 1, 1], [1, 1, 1, 1]])
    hidden = normal(2, 4, 5)
    e.relevance["hidden"] = hidden
    e.relevance["pooled"] = hidden[:, 0, 0]
    found = e.tokens(tensor="hidden")
    np.testing.assert_allclose(found[1].relevance, hidden[1].sum(1), rtol=1e-6)
    np.testing.assert_array_equal(found[0].padding, [True, False, False, False])
    for tensor, words in (("pooled", "no axis of tokens"), ("absent", "not reported")):
        with pytest.raises(InputError, match=words):
            e.tokens(tensor=tensor)
    with pytest.raises(InputError, match=r"1 texts of 3 tokens, the relevance of 'input_ids' 2 of 4"):
        e.tokens(tokens=[["a", "b", "c"]])
    e.relevance["input_ids"][0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        e.tokens()
    pictures = Explainer(two_inputs(), "epsilon", device="cpu", threads=1)
    with pytest.raises(InputError, match=r"no relevance of tokens; name a tensor of image, table"):
        pictures({"image": normal(1, 3, 4, 4), "table": normal(1, 2)}).tokens()


def test_a_sample_keeps_its_words():
    e = explained(normal(3, 4), mask=np.ones((3, 4), int))
    np.testing.assert_array_equal(e[1].tokens()[0].relevance, e.tokens()[1].relevance)


# ---- pages -------------------------------------------------------------------------------------------------------


def test_numbers_of_a_page_are_those_of_the_array(tmp_path):
    e = explained(normal(3, 7), mask=[[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    page = Page(e.save(tmp_path / "words.html", heading="Some words", names=["a", "b", "c"]).read_text("utf-8"))
    assert page.rows == 3
    found = iter(page.tokens)
    for i, mask in enumerate(e.inputs["attention_mask"]):
        values = e.relevance["input_ids"][i].astype(float)
        scale = np.abs(values[mask == 1]).max()
        k = 0
        while k < 7:
            token = next(found)
            if mask[k] == 0:
                stop = next((j for j in range(k, 7) if mask[j]), 7)
                assert float(token["value"]) == values[k:stop].sum()
                assert token["text"] == f"{stop - k} \u00d7 padding"
                assert "style" not in token
                assert token["class"] == "padding"
                k = stop
                continue
            assert float(token["value"]) == values[k]
            assert token["text"] == str(e.inputs["input_ids"][i, k])
            assert number(values[k]) in token["title"]
            assert colour(token)[0] == tuple(colormaps.apply(REACH * values[k] / scale)), "symmetric, 0 is white"
            k += 1
    assert next(found, None) is None
    totals = [t.totals for t in e.tokens()]
    for part in ("content", "padding"):
        assert f"{part} {number(totals[1][part])}" in page.said
    assert "special" not in page.said, "there are none"
    assert "score +2.5" in page.said
    assert page.said.startswith("Some words")


@pytest.mark.parametrize("values", [[0, 0, 0], [2, 2, 2], [-1e-38, 1e-38, 0], [3e38, -3e38, 1], [0.5, 1, 2]])
def test_scales(values):
    tokens = Page(text_page([explained([values])])).tokens
    top = max(map(abs, values)) or 1
    wanted = [tuple(colormaps.apply(REACH * (np.float32(v) / np.float64(np.float32(top))))) for v in values]
    assert [colour(t)[0] for t in tokens] == wanted
    if any(values):
        strongest = int(np.argmax(np.abs(values)))
        assert wanted[strongest] == tuple(colormaps.apply(REACH * np.sign(values[strongest])))
    else:
        assert wanted == [(255, 255, 255)] * 3


def test_letters_are_read_on_every_colour():
    """WCAG 2.1, contrast (minimum): 4.5 : 1."""
    shares = np.linspace(-1, 1, 401)
    back, white = colours(shares)
    linear = np.where(back / 255 <= 0.03928, back / 255 / 12.92, ((back / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    contrast = np.where(white, 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05)
    assert contrast.min() >= 4.5
    assert white.any()
    assert not white.all()


def test_everything_is_escaped():
    e = explained(normal(1, len(NASTY)))
    html = text_page(
        [e, e],
        ["<b>one</b>", "two & three"],
        "<h1>&</h1>",
        tokens=[NASTY],
        labels=["<i>class</i>", "b", "c"],
        names=["<u>name</u>"],
        predictions=['<img src="x">'],
    )
    page = Page(html)
    own = "html head meta title style body main h1 p i b table thead tbody tr th td data span details summary br"
    assert page.tags <= set(own.split())
    assert [t["text"] for t in page.tokens[: len(NASTY)]] == [shown(text) for text in NASTY]
    for text in ("<b>one</b>", "two & three", "<h1>&</h1>", "<i>class</i>", "<u>name</u>", '<img src="x">'):
        assert text in page.said
    assert "\x1b" not in html
    html.encode()


def test_a_page_stands_alone_and_states_its_paper():
    html = text_page([explained(normal(1, 3))])
    assert html.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|url\(|@import|<script", html)
    assert 'content="only light"' in html
    assert "background: #fff" in html
    assert "print-color-adjust: exact" in html
    assert '<html lang="en">' in html
    assert 'dir="auto"' in html


def test_columns_and_places():
    logits = normal(2, 4, 6)
    one = explained(normal(2, 4), outputs={"logits": logits}, target=[[1, 5], [3, 0]])
    page = Page(text_page([one, one], ["first", "second"]))
    assert "first second" in page.said
    assert [i for i, t in enumerate(page.tokens) if "here" in t.get("class", "")] == [1, 5, 11, 15]
    assert "class 5 at 1" in page.said
    assert f"predicted class {logits[1, 3].argmax()}" in page.said
    with pytest.raises(InputError, match="differ in number"):
        text_page([one, one[:1]])
    with pytest.raises(InputError, match="3 titles for 2 explanations side by side"):
        text_page([one, one], ["first", "second", "third"])
    with pytest.raises(InputError, match="no text"):
        text_page([])


def test_words_of_a_page():
    e = explained([[1, 2, 4]], outputs={"logits": normal(1, 3, 5)}, target=[[1, 2]])
    (row,) = text_rows([e], tokens=[["un", "##do", "it"]], words=True)
    (words,) = row.cells[0].passages
    assert words.texts == ["undo", "it"]
    page = Page(text_page([e], tokens=[["un", "##do", "it"]], words=True))
    assert [float(t["value"]) for t in page.tokens] == [3, 4]
    assert [i for i, t in enumerate(page.tokens) if "here" in t.get("class", "")] == [0], "the word it is part of"


def test_what_is_no_text_has_no_page(tmp_path):
    pictures = Explainer(two_inputs(), "epsilon", device="cpu", threads=1)
    e = pictures({"image": normal(1, 3, 4, 4), "table": normal(1, 2)})
    with pytest.raises(InputError, match=r"save it as \.png or \.npz"):
        e.save(tmp_path / "x.html")
    with pytest.raises(InputError, match="folder"):
        explained(normal(1, 3)).save(tmp_path / "absent" / "x.html")
    with pytest.raises(InputError, match=r"\.png, \.html or \.npz"):
        e.save(tmp_path / "x.pdf")
    assert list(tmp_path.iterdir()) == []


def test_embeddings_that_are_fed_have_words_too():
    e = explained(np.ones((1, 3)))
    e.inputs.clear()
    e.relevance.clear()
    e.inputs["inputs_embeds"], e.relevance["inputs_embeds"] = normal(1, 3, 8), normal(1, 3, 8, seed=1)
    page = Page(text_page([e], tokens=[["a", "b", "c"]]))
    np.testing.assert_allclose([float(t["value"]) for t in page.tokens], e.relevance["inputs_embeds"][0].sum(1), 1e-6)


def test_a_model_of_ids_alone(tmp_path):
    e = Explainer(tokens(), "epsilon", device="cpu", threads=1)([[1, 2, 3], [4, 5, 6]])
    page = Page(e.save(tmp_path / "x.html").read_text())
    assert [t["text"] for t in page.tokens] == list("123456")
    assert [float(t["value"]) for t in page.tokens] == e.relevance["ids"].reshape(-1).tolist()


def test_other_inputs_are_said(tmp_path):
    explain = Explainer(reader(), "epsilon", device="cpu", threads=1, ledger=True)
    ids = np.array([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    e = explain({"input_ids": ids, "attention_mask": mask})
    (_, row) = text_rows([e])
    totals = dict(row.cells[0].totals)
    assert set(totals) == {"content", "padding", "token_type_ids", "absorbed by biases"}
    np.testing.assert_allclose(sum(totals.values()), e.score[1], rtol=1e-5)
    assert totals["padding"] == 0
    alone = explain({"input_ids": ids[1:, :2]})
    np.testing.assert_allclose(alone.relevance["input_ids"], e.relevance["input_ids"][1:, :2], rtol=1e-4, atol=1e-6)


# ---- terminals ---------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_depth_of_a_terminal(monkeypatch):
    for name in ("NO_COLOR", "COLORTERM", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert depth_of(io.StringIO()) == "none"
    assert depth_of(Terminal()) == "256"
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert depth_of(Terminal()) == "full"
    monkeypatch.setenv("NO_COLOR", "1")
    assert depth_of(Terminal()) == "none"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert depth_of(Terminal()) == "none"


def test_a_text_without_colours_has_numbers():
    e = explained([[0.25, -1, 2, 0, 9, 9]], mask=[[1, 1, 1, 1, 0, 0]])
    (row,) = text_rows([e], tokens=[["un", "##do", "it", "now", "x", "y"]])
    (line,) = text_lines(row.cells[0])
    assert line == "  un(+0.25)do(\u22121) it(+2) now(0) 2 \u00d7 padding"


@pytest.mark.parametrize("depth", ["none", "256", "full"])
def test_lines_are_as_wide_as_asked(depth):
    words = ["\u4e2d\u6587", "caf\u0065\u0301", *["word"] * 40, "a\nb", "\x1b[2J"]
    (row,) = text_rows([explained(normal(1, len(words)))], tokens=[words])
    lines = text_lines(row.cells[0], depth, width=40)
    bare = [ANSI.sub("", line) for line in lines]
    assert len(lines) > 3
    assert all(line.startswith("  ") and len(line) + 4 * line.count("\u4e2d") <= 44 for line in bare)
    assert max(map(len, bare)) > 30
    assert "\x1b" not in "".join(bare), "what a text brings along is no command"
    if depth != "none":
        assert " ".join(bare).split() == [shown(w) for w in words]


def test_colours_of_a_terminal():
    e = explained([[1, -1, 0.001]], outputs={"logits": normal(1, 3, 5)}, target=[[2, 1]])
    (row,) = text_rows([e], tokens=[["good", "bad", "so"]])
    (line,) = text_lines(row.cells[0], "full")
    red, blue = ("48;2;{};{};{}".format(*colormaps.apply(side * REACH)) for side in (1, -1))
    assert f"{red}mgood\x1b[0m" in line
    assert f"{blue}mbad\x1b[0m" in line
    assert line.endswith("\x1b[4mso\x1b[0m"), "says next to nothing, and is where the class was explained"


def test_names_of_the_package():
    assert onnx_lrp.TokenRelevance is TokenRelevance
