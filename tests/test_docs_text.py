"""The page on text: its Python runs, in the order in which it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from tests.small_models import reader, writer
from tests.tokenizer_files import WORDS, wordpiece

PAGE = Path(__file__).resolve().parent.parent / "docs" / "text.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(reader(len(WORDS)), "classifier.onnx")
    onnx.save(writer(len(WORDS)), "writer.onnx")
    wordpiece().save("tokenizer.json")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.S)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert "not(" in capsys.readouterr().out
    assert "review 17" in names["html"]
    assert names["explanation"].relevance["input_ids"].shape == (7, 7)
    assert "explained here" in Path("prompt.html").read_text("utf-8")
