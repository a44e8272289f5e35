"""Captions explained word by word: where in the picture a word comes from, and from which words before it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lrp.captioner import Captioner, Vocabulary, joined
from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer
from onnx_lrp.methods import Method
from onnx_lrp.model import ModelLike
from onnx_lrp.runtime import Array, Device

__all__ = ["CaptionExplainer", "CaptionExplanation", "Captioner", "Vocabulary", "joined"]


@dataclass(frozen=True)
class CaptionExplanation:
    """A caption of T words, explained.

    Attributes:
        caption: numbers of the words, <start> first, (T + 1,).
        before: what the model had read before each word: <start> and all words but the last, as text, (T,).
        words: the explained words as text, (T,).
        image: the picture.
        images: relevance of the picture for each word, (T, *picture).
        texts: relevance of the words before for each word, (T, T): row t is of word t, and zero from column t + 1 on,
            since word t was told from columns 0 to t of `before`. None where words were not asked for.
        attention: where the model looked, by its own account, (T, h, w); None where it does not tell.
        probability: of each word, (T,).
        score: what was explained of each word, (T,): its logit.
        absorbed: what biases and stabilizers took, (T,); None unless the ledger was asked for.
        method: name of the method.
    """

    caption: Array
    before: tuple[str, ...]
    words: tuple[str, ...]
    image: Array
    images: Array
    texts: Array | None
    attention: Array | None
    probability: Array
    score: Array
    absorbed: Array | None
    method: str

    def __len__(self) -> int:
        """Number of words."""
        return len(self.words)

    def modality(self) -> Array:
        """How much of each word comes from the picture rather than from the words before it, (T,).

        abs(sum of the picture's relevance) / abs(sum of the words').

        Raises:
            InputError: the relevance of words was not asked for.
        """
        if self.texts is None:
            raise InputError("the relevance of words was not reported; leave inputs= out")
        image = self.images.reshape(len(self), -1).sum(1, dtype=np.float64)
        text = self.texts.sum(1, dtype=np.float64)
        return np.asarray(np.abs(image) / np.maximum(np.abs(text), np.finfo(np.float64).tiny))


class CaptionExplainer:
    """Explains captions of one model: every word of a caption in one run.

        explainer = CaptionExplainer("captioner.onnx", words)
        explanation = explainer(image)                         # of the caption that the model gives
        explanation = explainer(image, "a red disc on left")   # of one of your choice

    Args:
        model: see :class:`onnx_lrp.captioner.Captioner`.
        vocabulary: its words, in order.
        method: registered name, path of a rule book, or a method object; ``captioning`` is that of Sun et al. 2022.
        attention: name of an output with the attention at every place, (N, T, ...); default: an output that is called
            so, if there is one.
        output: name of the explained output; default: the first.
        device: where it runs.
        threads: threads per operator; default: ONNX Runtime's choice.
        batch_size: words explained side by side; default: as for :class:`onnx_lrp.Explainer`. Large pictures want few.
        options: as for :func:`onnx_lrp.rewrite`. Methods that draw maps on pictures alone, such as Grad-CAM, want
            ``inputs=[name of the picture]``.

    Raises:
        OnnxLrpError: as for :func:`onnx_lrp.rewrite`; InputError where the model is no captioner.
    """

    def __init__(
        self,
        model: ModelLike,
        vocabulary: Vocabulary | Sequence[str],
        method: str | os.PathLike[str] | Method = "captioning",
        *,
        attention: str | None = None,
        output: str | None = None,
        device: Device = "auto",
        threads: int | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.captioner = Captioner(model, vocabulary, output=output, device=device, threads=threads)
        outputs = self.captioner.session.outputs
        if attention is not None and attention not in outputs:
            raise InputError(f"the model has no output '{attention}'; outputs are {', '.join(outputs)}")
        self.attention = attention or ("attention" if "attention" in outputs else None)
        self.explainer = Explainer(
            model,
            method,
            output=self.captioner.output,
            device=device,
            threads=threads,
            batch_size=batch_size,
            **options,
        )

    def __call__(
        self, image: Array, caption: str | Sequence[str] | Sequence[int] | Array | None = None, *, beams: int = 1
    ) -> CaptionExplanation:
        """Explain every word of a caption.

        Args:
            image: one picture, without a batch axis.
            caption: words, or their numbers; default: what the model says of the picture.
            beams: of the search for it; 1 is greedy.

        Raises:
            InputError: an unknown word, a caption or a picture that the model does not take.
        """
        captioner, image = self.captioner, np.asarray(image)
        given = captioner.describe(image, beams=beams) if caption is None else caption
        numbers = captioner.vocabulary.numbers(given)
        count, told = len(numbers) - 1, numbers[1:]
        probability = captioner.along(image, numbers)[np.arange(count), told]
        if captioner.everywhere:
            feeds = captioner.fed(image[None], numbers[None, :-1])
            runs = [self.explainer(feeds, told, position=list(range(count)))]
        else:
            places = range(1, count + 1)
            runs = [self.explainer(captioner.fed(image[None], numbers[None, :t]), [numbers[t]]) for t in places]
        found = [run.relevance[captioner.picture] for run in runs]
        absorbed = [run.absorbed for run in runs if run.absorbed is not None]
        words = captioner.vocabulary.texts(numbers)
        return CaptionExplanation(
            caption=numbers,
            before=tuple(words[:-1]),
            words=tuple(words[1:]),
            image=image,
            images=np.concatenate(found),
            texts=self._texts([run.relevance.get(captioner.words) for run in runs], count),
            attention=self._attention([run.outputs for run in runs], count),
            probability=probability,
            score=np.concatenate([run.score for run in runs]),
            absorbed=np.concatenate(absorbed) if absorbed else None,
            method=self.explainer.explained.method,
        )

    @staticmethod
    def _texts(runs: Sequence[Array | None], count: int) -> Array | None:
        """Relevance (T, T) of the words before each word."""
        rows = [row for run in runs if run is not None for row in run]
        if not rows:
            return None
        return np.stack([np.pad(row[:count], (0, max(0, count - len(row)))) for row in rows])

    def _attention(self, runs: Sequence[Any], count: int) -> Array | None:
        """Attention (T, ...) at the place of each word: of one run at every place, or of the last place of each run."""
        if self.attention is None:
            return None
        found = [run[self.attention] for run in runs]
        if self.captioner.everywhere:
            return np.asarray(found[0][0, :count])
        return np.stack([attention[0, -1] for attention in found])
