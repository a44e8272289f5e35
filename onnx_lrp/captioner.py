"""Captions from a model that gives, for a picture and the words so far, the next word: greedily or by beam search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnx_lrp import model as models
from onnx_lrp.errors import InputError, ModelError
from onnx_lrp.model import ModelLike
from onnx_lrp.runtime import Array, Device, Session


@dataclass(frozen=True)
class Vocabulary:
    """The words of a model by their numbers, and which of them are no words.

    Attributes:
        words: all of them.
        start: what a caption begins with.
        end: what it ends with.
        pad: what stands behind it, where a model wants texts of one length.
    """

    words: Sequence[str]
    start: str = "<start>"
    end: str = "<end>"
    pad: str = "<pad>"
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Look the special words up."""
        object.__setattr__(self, "_numbers", {word: number for number, word in enumerate(self.words)})
        for word in (self.start, self.end, self.pad):
            self.number(word)

    def number(self, word: str) -> int:
        """The number of a word.

        Raises:
            InputError: there is no such word.
        """
        if word not in self._numbers:
            raise InputError(
                f"the vocabulary of {len(self.words)} words lacks {word!r}; name the special words that it has with "
                "Vocabulary(words, start=..., end=..., pad=...), and use no others"
            )
        return self._numbers[word]

    def numbers(self, caption: str | Sequence[str] | Sequence[int] | Array) -> Array:
        """A caption as numbers (T + 1,), from words apart by blanks, a list of them, or numbers.

        <start> goes without saying.

        Raises:
            InputError: an empty caption, or words that are not known.
        """
        given = caption.split() if isinstance(caption, str) else list(caption)
        found = [self.number(word) if isinstance(word, str) else int(word) for word in given]
        bad = [number for number in found if not 0 <= number < len(self.words)]
        if bad:
            raise InputError(f"word {bad[0]} is out of range: there are {len(self.words)} words")
        start = self.number(self.start)
        found = found if found[:1] == [start] else [start, *found]
        if len(found) < 2:
            raise InputError("the caption holds no word; give one at least")
        return np.array(found, np.int64)

    def texts(self, numbers: Sequence[int] | Array) -> list[str]:
        """The words of numbers."""
        return [self.words[int(number)] for number in numbers]

    def text(self, numbers: Sequence[int] | Array) -> str:
        """A caption to read: without what begins, ends and fills it."""
        return " ".join(word for word in self.texts(numbers) if word not in (self.start, self.end, self.pad))


class Captioner:
    """A model that describes pictures.

    Its inputs are pictures (or features of them) as floats, and the words so far as integers (N, T), <start> first.
    Its output are logits or probabilities of the next word: (N, T, words), at every place, or (N, words) at the last.
    At every place it must know nothing of the words after it; then texts can be filled up to any fixed length.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph; of two files give :func:`joined` of both.
        vocabulary: its words, in order.
        output: name of the output; default: the first.
        device: where it runs.
        threads: threads per operator; default: ONNX Runtime's choice.

    Raises:
        InputError: inputs or output are of another kind, or the vocabulary is of another length.
    """

    def __init__(
        self,
        model: ModelLike,
        vocabulary: Vocabulary | Sequence[str],
        *,
        output: str | None = None,
        device: Device = "auto",
        threads: int | None = None,
    ) -> None:
        source = models.load(model)
        self.vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(tuple(vocabulary))
        self.session = Session(source.original, device=device, threads=threads, folder=source.folder)
        self.picture, self.words = _inputs(self.session)
        self.output = output or self.session.outputs[0]
        if self.output not in self.session.outputs:
            raise InputError(f"the model has no output '{self.output}'; outputs are {', '.join(self.session.outputs)}")
        shape = self.session.shapes[self.output]
        if len(shape) not in (2, 3):
            raise InputError(f"a captioner's output is (N, T, words) or (N, words), '{self.output}' is {shape}")
        if isinstance(shape[-1], int) and shape[-1] != len(self.vocabulary.words):
            raise InputError(
                f"'{self.output}' tells {shape[-1]} words, the vocabulary has {len(self.vocabulary.words)}"
            )
        self.everywhere = len(shape) == 3  # words are told at every place, in one run
        length = self.session.inputs[self.words].shape[1]
        self.length: int | None = length if isinstance(length, int) else None

    def fed(self, images: Array, texts: Array) -> dict[str, Array]:
        """Inputs of the model for pictures (N, ...) and the words before each next one (N, T), filled up behind.

        Raises:
            InputError: a text that is longer than the model takes, or shorter where it cannot be filled up.
        """
        texts = np.asarray(texts)
        if self.length is not None and texts.shape[1] != self.length:
            if texts.shape[1] > self.length:
                raise InputError(
                    f"the model takes {self.length} words, these are {texts.shape[1]}; shorten the caption"
                )
            if not self.everywhere:
                raise InputError(
                    f"the model takes {self.length} words and tells the next one only, so that shorter texts cannot be "
                    "filled up; export it with a free length, or with logits at every place"
                )
            short = self.length - texts.shape[1]
            texts = np.pad(texts, ((0, 0), (0, short)), constant_values=self.vocabulary.number(self.vocabulary.pad))
        feeds = {self.picture: images, self.words: texts}
        return {name: self.session.checked(name, array) for name, array in feeds.items()}

    def next(self, images: Array, texts: Array) -> Array:
        """Probabilities (N, words) of the word after each text.

        Args:
            images: pictures (N, ...), or one for all texts (1, ...).
            texts: words so far (N, T).
        """
        images = np.repeat(images, len(texts), 0) if len(images) == 1 else images
        found = self.session.run(self.fed(images, texts), [self.output])[self.output]
        return probabilities(found[:, np.shape(texts)[1] - 1] if self.everywhere else found)

    def along(self, image: Array, caption: Array) -> Array:
        """Probabilities (T, words) of each word of a caption after those before it.

        Args:
            image: one picture, without a batch axis.
            caption: words (T + 1,), <start> first.
        """
        before = np.asarray(caption)[None, :-1]
        if self.everywhere:
            found = self.session.run(self.fed(image[None], before), [self.output])[self.output]
            return probabilities(found[0, : before.shape[1]])
        return np.concatenate([self.next(image[None], before[:, :t]) for t in range(1, before.shape[1] + 1)])

    def describe(self, image: Array, *, beams: int = 1, length: int = 20) -> Array:
        """The caption of a picture: numbers of words, <start> first and, if it came, <end> last.

        Args:
            image: one picture, without a batch axis.
            beams: how many captions are followed side by side; 1 takes the likeliest word each time. Of those that
                ended, the likeliest is given, its probability being the product of its words'; if none did within
                the length, the likeliest of all.
            length: the most words after <start>; also that of a model of fixed length.
        """
        if beams < 1:
            raise InputError(f"beams is 1 or more, not {beams}")
        end = self.vocabulary.number(self.vocabulary.end)
        going = [(0.0, [self.vocabulary.number(self.vocabulary.start)])]
        ended: list[tuple[float, list[int]]] = []
        for _ in range(length if self.length is None else min(length, self.length)):
            found = np.log(self.next(image[None], np.array([words for _, words in going])) + 1e-30)
            scored = [(score + row[w], words, w) for (score, words), row in zip(going, found, strict=True)
                      for w in np.argsort(-row, kind="stable")[:beams]]  # fmt: skip
            scored.sort(key=lambda item: -item[0])
            best = [(float(score), [*words, int(word)]) for score, words, word in scored[:beams]]
            ended += [item for item in best if item[1][-1] == end]
            going = [item for item in best if item[1][-1] != end]
            # What goes on can only become less likely.
            if not going or (ended and max(ended)[0] >= max(going)[0]):
                break
        return np.array(max(ended or going)[1], np.int64)


def probabilities(scores: Array) -> Array:
    """Probabilities along the last axis from logits, their logarithms, or probabilities, which stay; float64."""
    scores = np.asarray(scores, np.float64)
    if scores.min() >= 0 and np.allclose(scores.sum(-1), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def joined(encoder: ModelLike, decoder: ModelLike) -> onnx.ModelProto:
    """One model of two: an encoder's output, such as features of a picture, becomes a decoder's input.

    Args:
        encoder: the first output is handed on.
        decoder: takes it by the same name, or by its only float input; its other inputs stay.

    Returns:
        The model; names inside the encoder get the prefix ``encoder/``, save those of its inputs.

    Raises:
        InputError: the decoder has no such input.
        ModelError: the two do not fit together, as with other opsets.
    """
    first, second = (models.load(model).original for model in (encoder, decoder))
    given = first.graph.output[0].name
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    weights = {tensor.name for tensor in second.graph.initializer}
    takes = [i for i in second.graph.input if i.name not in weights]
    named = [i.name for i in takes if i.name == given] or [
        i.name for i in takes if i.type.tensor_type.elem_type in floats
    ]
    if len(named) != 1:
        raise InputError(f"the decoder takes no '{given}', and {len(named)} other float inputs; name its input so")
    try:
        kept = [i.name for i in first.graph.input]
        inner = onnx.compose.add_prefix(first, "encoder/", rename_inputs=False, rename_functions=False)
        version = max(first.ir_version, second.ir_version)
        inner.ir_version = version
        outer = onnx.ModelProto.FromString(second.SerializeToString())
        outer.ir_version = version
        merged = onnx.compose.merge_models(inner, outer, io_map=[(f"encoder/{given}", named[0])])
    except ValueError as error:
        raise ModelError(f"encoder and decoder cannot be joined: {' '.join(str(error).split())[:200]}") from None
    assert [i.name for i in merged.graph.input][: len(kept)] == kept
    return merged


def _inputs(session: Session) -> tuple[str, str]:
    """Names of the picture and of the words."""
    kinds = {name: np.dtype(session.dtype(name)).kind for name in session.inputs}
    floats, integers = ([n for n, k in kinds.items() if k in kind] for kind in ("f", "iu"))
    if len(floats) != 1 or len(integers) != 1 or len(session.inputs[integers[0]].shape) != 2:
        found = ", ".join(f"{n} {session.inputs[n].type} {session.inputs[n].shape}" for n in session.inputs)
        raise InputError(f"a captioner takes a picture as floats and words (N, T) as integers; the inputs are {found}")
    return floats[0], integers[0]
