"""What ``explain`` prints about an input: its prediction, what is explained, and whether the relevance adds up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lrp.explanation import Explanation, probabilities
from onnx_lrp.rewrite import Explained
from onnx_lrp.show.figure import class_name
from onnx_lrp.show.terminal import Depth, text_lines
from onnx_lrp.show.text import ABSORBED, DELTA, TOTAL, TextCell, TextRow, text_rows
from onnx_lrp.tokens import token_tensors


class Report:
    """The lines about one sample after another.

    Args:
        explained: the explained model.
        labels: names of the classes.
        top: how many classes of the prediction to name.
        words: texts are shown in words instead of pieces of words.
    """

    def __init__(self, explained: Explained, labels: Sequence[str] | None, top: int, *, words: bool = False):
        self._explained, self._top, self._words, self._names = explained, top, words, labels
        self._labels = None if labels is None else [f"{name} ({i})" for i, name in enumerate(labels)]

    def rows(self, name: str, explanations: Sequence[Explanation]) -> list[TextRow]:
        """One input's texts with their explanations side by side; none where its relevance is not that of tokens."""
        if not token_tensors(explanations[0]):
            return []
        count = len(explanations[0])
        said = [self._prediction(explanations[0], i) for i in range(count)]
        names = [name if count == 1 else f"{name} [{i}]" for i in range(count)]
        return text_rows(explanations, labels=self._names, names=names, predictions=said, words=self._words)

    def lines(
        self, explanations: Sequence[Explanation], conserves: Sequence[bool], rows: Sequence[TextRow], depth: Depth
    ) -> list[str]:
        """About one input.

        Args:
            explanations: by several methods.
            conserves: whether the relevance of each should add up to its score.
            rows: its texts, to be shown in `depth` colours.
            depth: of the terminal.
        """
        lines = []
        samples = len(explanations[0])
        for index in range(samples):
            if samples > 1:
                lines.append(f" [{index}]")
            prediction = self._prediction(explanations[0], index)
            lines += [f"  predicted   {prediction}"] if prediction else []
            for k, (explanation, adds_up) in enumerate(zip(explanations, conserves, strict=True)):
                what = class_name(explanation, index, self._labels)
                by = f" by {explanation.method}" if len(explanations) > 1 else ""
                lines.append(f"  explained   {what}, score {explanation.score[index]:.5g}{by}")
                lines += _text(rows[index].cells[k], depth) if rows else []
                lines += [f"  conserved   {_sums(explanation, index)}"] if adds_up else []
                lines += [f"  complete    {_rise(explanation, index)}"] if explanation.delta is not None else []
        return lines

    def _prediction(self, explanation: Explanation, index: int) -> str:
        """The classes of highest probability; the value of an output that is no classifier's; "" for neither."""
        explained, outputs = self._explained, explanation.outputs
        name = explained.explained if explained.explained in outputs else next(iter(outputs))
        array = outputs[name]
        if array.dtype.kind != "f" or len(array) != len(explanation):
            return ""
        row = array[index]
        if len(explained.classes) > 1:
            if not (token_tensors(explanation) and row.ndim == explanation.target.ndim == 2):
                return ""
            row = row[int(explanation.target[index, 0])]
        row = row.astype(np.float64).reshape(-1)
        if len(row) == 1:
            return f"{100 * row[0]:.1f} %" if explained.head == "Sigmoid" else f"{row[0]:.5g}"
        chances = probabilities(row, explained.head)
        best = np.argsort(-chances, kind="stable")[: self._top]
        names = self._labels or [f"class {i}" for i in range(len(row))]
        return ", ".join(f"{names[i] if i < len(names) else f'class {i}'} {100 * chances[i]:.1f} %" for i in best)


def _text(cell: TextCell, depth: Depth) -> list[str]:
    """The words with their relevance, and what its parts add up to."""
    parts = ", ".join(f"{name} {total:+.5g}" for name, total in cell.totals if name not in (ABSORBED, TOTAL, DELTA))
    return [*text_lines(cell, depth, indent=4), f"  tokens      {parts}"]


def _sums(explanation: Explanation, index: int) -> str:
    """Relevance and what was absorbed against the score."""
    total, score = float(explanation.total()[index]), float(explanation.score[index])
    if explanation.absorbed is None:
        return f"relevance {total:.5g} of score {score:.5g}"
    absorbed = float(explanation.absorbed[index])
    off = abs(total + absorbed - score) / (abs(score) or 1.0)
    return f"relevance {total:.5g} + absorbed {absorbed:.5g} = {total + absorbed:.5g} (off by {off:.0e} of the score)"


def _rise(explanation: Explanation, index: int) -> str:
    """Relevance against the rise of the score above the baseline."""
    assert explanation.delta is not None
    total, delta = float(explanation.total()[index]), float(explanation.delta[index])
    rise = total - delta
    off = abs(delta) / (abs(rise) or 1.0)
    return f"relevance {total:.5g} of a rise of {rise:.5g} above the baseline (off by {off:.0e})"
