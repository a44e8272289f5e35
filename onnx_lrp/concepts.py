"""Which samples of a data set a channel is most relevant in: relevance maximization (Achtibat et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_lrp.errors import InputError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Hit:
    """A sample among those in which a channel is most relevant: its number in the data set, and how relevant."""

    sample: int
    relevance: float


@dataclass
class Concepts:
    """The best samples of every channel, in memory that does not grow with the data set.

    Attributes:
        top: how many samples to keep per channel.
        count: how many samples were seen.
    """

    top: int = 8
    count: int = 0
    _relevance: Array = field(default_factory=lambda: np.empty((0, 0)), repr=False)
    _samples: Array = field(default_factory=lambda: np.empty((0, 0), np.int64), repr=False)
    _sum: Array = field(default_factory=lambda: np.zeros(0), repr=False)

    def add(self, relevance: Array) -> None:
        """Take in further samples.

        Args:
            relevance: of every channel, (N, C), as :meth:`onnx_lrp.Explanation.channels` gives it.

        Raises:
            InputError: another number of channels than before, or NaN.
        """
        if relevance.ndim != 2 or (self.count and relevance.shape[1] != len(self._sum)):
            raise InputError(f"relevance of channels has shape (N, {len(self._sum) or 'C'}), not {relevance.shape}")
        if not np.isfinite(relevance).all():
            raise InputError("the relevance of channels holds NaN or infinite values")
        if not self.count:
            self._sum = np.zeros(relevance.shape[1])
            self._relevance, self._samples = np.empty((len(self._sum), 0)), np.empty((len(self._sum), 0), np.int64)
        numbers = np.broadcast_to(np.arange(self.count, self.count + len(relevance)), relevance.T.shape)
        both = np.concatenate([self._relevance, relevance.T], 1), np.concatenate([self._samples, numbers], 1)
        best = np.argsort(-both[0], axis=1, kind="stable")[:, : self.top]  # of equals the one that came first
        self._relevance, self._samples = (np.take_along_axis(part, best, 1) for part in both)
        self._sum += relevance.sum(0)
        self.count += len(relevance)

    @property
    def mean(self) -> Array:
        """Mean relevance of every channel over all samples, (C,)."""
        return self._sum / max(self.count, 1)

    def hits(self, channel: int) -> list[Hit]:
        """The samples in which a channel is most relevant, the best one first; none in which it speaks against."""
        pairs = zip(self._samples[channel], self._relevance[channel], strict=True)
        return [Hit(int(sample), float(relevance)) for sample, relevance in pairs if relevance > 0]

    def leading(self, count: int) -> list[int]:
        """The channels that stand out most in their best samples: above what they have in all of them on average."""
        best = self._relevance.mean(1) if self.count else self.mean
        return [int(c) for c in np.argsort(self.mean - best, kind="stable")[:count]]

    def chosen(self, channels: Sequence[int], tensor: str) -> list[int]:
        """Channels by number, each once.

        Args:
            channels: their numbers.
            tensor: whose channels they are, for messages.

        Raises:
            InputError: the tensor has no such channel.
        """
        wrong = [c for c in channels if not 0 <= c < len(self._sum)]
        if wrong:
            many = len(self._sum)
            raise InputError(f"channel {wrong[0]} is out of range: '{tensor}' has {many} channels, 0 to {many - 1}")
        return list(dict.fromkeys(channels))
