"""Which words a captioning model gets right: precision, recall and F1 of words, over many captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from onnx_lrp.errors import InputError


@dataclass(frozen=True)
class WordScore:
    """How well one word is predicted.

    Attributes:
        word: the word.
        true: captions that have it, and so has a reference.
        false: captions that have it, and no reference does: hallucinated.
        missed: captions that lack it, though a reference has it.
    """

    word: str
    true: int
    false: int
    missed: int

    @property
    def precision(self) -> float:
        """Share of the captions with the word that are right; 0 where none has it."""
        return self.true / (self.true + self.false) if self.true else 0.0

    @property
    def recall(self) -> float:
        """Share of the references with the word that are met; 0 where none is."""
        return self.true / (self.true + self.missed) if self.true else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.true / (2 * self.true + self.false + self.missed) if self.true else 0.0


def word_scores(
    predicted: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], words: Collection[str]
) -> list[WordScore]:
    """Precision, recall and F1 of words: is a word of the caption in any reference?

    The measure of hallucination of Sun et al. 2022, there of the most frequent object words, of which
    `frequent_words` gives the list and the mean over words is reported. A word counts once in a caption.

    Args:
        predicted: one caption per picture, as words.
        references: any number of captions per picture.
        words: which words are scored.

    Returns:
        One score per word, in the order of `words`.

    Raises:
        InputError: not one set of references per caption.
    """
    if len(predicted) != len(references):
        raise InputError(f"{len(predicted)} captions, {len(references)} sets of references: give one set per caption")
    said = [set(caption) for caption in predicted]
    seen = [{word for caption in captions for word in caption} for captions in references]
    pairs = list(zip(said, seen, strict=True))
    return [
        WordScore(
            word,
            true=sum(word in s and word in r for s, r in pairs),
            false=sum(word in s and word not in r for s, r in pairs),
            missed=sum(word not in s and word in r for s, r in pairs),
        )
        for word in words
    ]


def frequent_words(captions: Sequence[Sequence[str]], count: int, *, without: Collection[str] = ()) -> list[str]:
    """The words that most captions have, most frequent first; equally frequent ones in alphabetical order.

    Args:
        captions: as words.
        count: how many at most.
        without: words that do not count, such as stop words.
    """
    found = Counter(word for caption in captions for word in set(caption) if word not in without)
    return sorted(found, key=lambda word: (-found[word], word))[:count]
