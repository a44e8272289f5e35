"""The coverage page says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.quantization import ROUND_TRIP
from tests.coverage_page import adjoint_form, operators, page

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
# Floats run through these, and they have no adjoint (or are built by other means: control flow, recurrent layers, ...).
WITHOUT = {"If", "Loop", "Scan", "SequenceMap", "LSTM", "GRU", "RNN"}
WITHOUT |= {"SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"}
WITHOUT |= {"ConcatFromSequence", "SplitToSequence", "Optional", "OptionalGetElement", "OptionalHasElement"}
WITHOUT |= {"MaxRoiPool"}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m tests.coverage_page --write docs/coverage.md"


def test_what_has_no_adjoint_is_known() -> None:
    assert {op for op in operators() if adjoint_form(op) == "none"} == WITHOUT


def test_the_page_lists_the_registry() -> None:
    assert set(OPERATORS) - {ROUND_TRIP} <= set(operators())  # but for a view that ONNX has no operator for
