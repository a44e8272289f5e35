"""Frame after frame: what the model sees, why it says so, and how many frames a second that makes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer
from onnx_lrp.explanation import Explanation, probabilities
from onnx_lrp.preprocess import Preprocess
from onnx_lrp.runtime import Array
from onnx_lrp.show.colormaps import CHANNELS
from onnx_lrp.show.figure import class_name
from onnx_lrp.show.heatmap import PERCENTILE, reduce_channels
from onnx_lrp.show.live import live_view

if TYPE_CHECKING:
    from PIL import Image

_STEADY = 0.9  # of the scale of colours that stays from frame to frame
_RATED = 30  # frames over which their rate is measured


@dataclass(frozen=True, eq=False)
class View:
    """One frame, explained.

    Attributes:
        explanation: of the frame.
        says: the explained class and its probability, for people.
        rate: frames per second, of the last ones.
        image: what the model saw, the relevance of its pixels, and both lines below.
    """

    explanation: Explanation
    says: str
    rate: float
    image: Image.Image


class Live:
    """Explains frames as they come: the session is made once, and nothing of a frame is kept.

        live = onnx_lrp.live.Live(explainer, Preprocess(size=224))
        for frame in onnx_lrp.frames.open_frames("0"):
            print(live(frame).says)

    Args:
        explainer: of a model that takes one picture.
        pre: how frames become its input.
        labels: names of the classes.
        target: the class to explain; None: the predicted one.
        colormap: a name in colormaps.NAMES or colormaps.CHANNELS.
        extra: what the method takes besides, such as `low` and `high`.

    Raises:
        InputError: the explained model reports no relevance of a picture.
    """

    def __init__(
        self,
        explainer: Explainer,
        pre: Preprocess,
        *,
        labels: Sequence[str] | None = None,
        target: int | None = None,
        colormap: str = "hot",
        extra: Mapping[str, Array] | None = None,
    ):
        self._explainer, self._pre, self._labels, self._target = explainer, pre, labels, target
        self._colormap, self._extra = colormap, dict(extra or {})
        if colormap == "rgb" and pre.color == "BGR":
            self._colormap = "bgr"
        (self._input,) = explainer.session.inputs
        if self._input not in explainer.explained.relevance:
            raise InputError(
                f"the relevance of '{self._input}' is not reported, so there is nothing to lay over frames"
            )
        self._scale = 0.0
        self._times: deque[float] = deque(maxlen=_RATED + 1)

    def __call__(self, frame: Image.Image) -> View:
        """Explain a frame of any size."""
        if not self._times:
            self._times.append(time.perf_counter())
        framed = self._pre.frame(frame)
        feeds: dict[str, Any] = {self._input: self._pre.normalize(np.asarray(framed)), **self._extra}
        explanation = self._explainer(feeds, self._target)
        relevance = explanation.relevance[self._input][0]
        layout = "CHW" if self._pre.layout == "NCHW" else "HWC"
        channels = relevance if layout == "CHW" else np.moveaxis(relevance, -1, 0)
        says = self._says(explanation)
        self._times.append(time.perf_counter())
        rate = (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)
        scale = None if self._colormap in CHANNELS else self._steady(reduce_channels(channels, "CHW"))
        image = live_view(framed, channels, self._colormap, says, f"{rate:.1f} frames/s", scale=scale)
        return View(explanation, says, rate, image)

    def _says(self, explanation: Explanation) -> str:
        name = class_name(explanation, 0, self._labels)
        explained = self._explainer.explained
        output = explanation.outputs.get(explained.explained, next(iter(explanation.outputs.values())))
        if len(explained.classes) != 1 or output[0].size < 2 or output.dtype.kind != "f":
            return name
        chances = probabilities(output[0].astype(np.float64).reshape(-1), explained.head)
        return f"{name} {100 * chances[int(explanation.target.reshape(-1)[0])]:.1f} %"

    def _steady(self, relevance: Array) -> float | None:
        """The relevance that has the strongest colour: it follows the frames slowly, so that maps do not flicker."""
        now = float(np.percentile(np.abs(relevance), PERCENTILE)) or float(np.abs(relevance).max())
        self._scale = _STEADY * self._scale + (1 - _STEADY) * now if self._scale else now
        return self._scale or None
