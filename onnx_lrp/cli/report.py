"""What ``explain`` prints about an input: its prediction, what is explained, and whether the relevance adds up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.explanation import Explanation
from onnx_lrp.rewrite import Explained
from onnx_lrp.show.figure import class_name


class Report:
    """The lines about one sample after another.

    Args:
        explained: the explained model.
        labels: names of the classes.
        top: how many classes of the prediction to name.
    """

    def __init__(self, explained: Explained, labels: Sequence[str] | None, top: int):
        self._explained, self._top = explained, top
        self._labels = None if labels is None else [f"{name} ({i})" for i, name in enumerate(labels)]

    def lines(self, explanations: Sequence[Explanation], conserves: Sequence[bool]) -> list[str]:
        """About one file: explanations by several methods, and whether each should add up to its score."""
        lines = []
        samples = len(explanations[0])
        for index in range(samples):
            if samples > 1:
                lines.append(f" [{index}]")
            prediction = self._prediction(explanations[0], index)
            lines += [f"  predicted   {prediction}"] if prediction else []
            for explanation, adds_up in zip(explanations, conserves, strict=True):
                what = class_name(explanation, index, self._labels)
                by = f" by {explanation.method}" if len(explanations) > 1 else ""
                lines.append(f"  explained   {what}, score {explanation.score[index]:.5g}{by}")
                lines += [f"  conserved   {_sums(explanation, index)}"] if adds_up else []
                lines += [f"  complete    {_rise(explanation, index)}"] if explanation.delta is not None else []
        return lines

    def _prediction(self, explanation: Explanation, index: int) -> str:
        """The classes of highest probability; the value of an output that is no classifier's; "" for neither."""
        explained, outputs = self._explained, explanation.outputs
        name = explained.explained if explained.explained in outputs else next(iter(outputs))
        array = outputs[name]
        if len(explained.classes) > 1 or array.dtype.kind != "f" or len(array) != len(explanation):
            return ""
        row = array[index].astype(np.float64).reshape(-1)
        if len(row) == 1:
            return f"{100 * row[0]:.1f} %" if explained.head == "Sigmoid" else f"{row[0]:.5g}"
        chances = probabilities(row, explained.head)
        best = np.argsort(-chances, kind="stable")[: self._top]
        names = self._labels or [f"class {i}" for i in range(len(row))]
        return ", ".join(f"{names[i] if i < len(names) else f'class {i}'} {100 * chances[i]:.1f} %" for i in best)


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


def probabilities(row: NDArray[np.float64], head: str) -> NDArray[np.float64]:
    """Probabilities of classes from an output, by softmax unless they are that already.

    Args:
        row: the output for one sample.
        head: what the model ends with: Softmax, LogSoftmax, Sigmoid or "".
    """
    if head == "LogSoftmax":
        return np.exp(row)
    if head in ("Softmax", "Sigmoid") or (row.min() >= 0 and abs(row.sum() - 1) < 1e-2):
        return row
    powers = np.exp(row - row.max())
    return np.asarray(powers / powers.sum())
