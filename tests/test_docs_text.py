"""The page on text: its Python runs, in the order in which it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx

from tests.small_models import reader, two_towers, writer
from tests.tokenizer_files import WORDS, wordpiece

PAGE = Path(__file__).resolve().parent.parent / "docs" / "text.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(reader(len(WORDS)), "classifier.onnx")
    onnx.save(writer(len(WORDS)), "writer.onnx")
    onnx.save(two_towers(words=len(WORDS)), "embedding.onnx")
    wordpiece().save("tokenizer.json")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.S)
    assert len(blocks) == 4
    names = {"images": np.ones((3, 6), np.float32)}
    for block in blocks:
        exec(block, names)
    assert "not(" in capsys.readouterr().out
    assert "review 17" in names["html"]
    assert names["explanation"].relevance["input_ids"].shape == (7, 7)
    assert "explained here" in Path("prompt.html").read_text("utf-8")
    assert len(names["pairs"]) == 6
    assert names["table"].count("<td data-title=") == 6
