"""The ledger: relevance that biases and stabilizers take on the way from the explained tensor to the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from onnx_lrp.adjoints.shapes import expand_like, sum_per_sample
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError

Accounts = Literal["none", "total", "node"]
ACCOUNTS = ("bias", "stabilizer")


@dataclass(frozen=True)
class Entry:
    """One item of the ledger: what a node's account took, as the name of a graph output of shape (N,)."""

    node: str
    account: str
    output: str


class Ledger:
    """What biases and stabilizers take, node by node, each from its own formula.

    Args:
        e: the emitter; rules book with it.
        score: the explained score (N,).
        mode: nothing, the total, or every node's own accounts.
        like: further tensors that begin with the batch. Inference may not know how long the score is, or know it under
            a name of its own; then these tell which axis holds the samples, else the steps of a recurrent operator,
            which come first, would be taken for them.
    """

    def __init__(self, e: Emitter, score: Value, mode: Accounts, like: Sequence[Value] = ()):
        self._e, self._mode, self._score, self._depth = e, mode, score, e.depth
        shapes = [x.facts.shape for x in (score, *like)]
        self._batches = [shape[0] for shape in shapes if shape and shape[0] is not None]
        self._items: list[tuple[str, str, Value]] = []
        self._pages: list[list[tuple[str, Value]]] = []
        self.entries: list[Entry] = []
        if mode != "none":
            e.book = self._book

    def _book(self, call: Call, account: str, share: Any) -> None:
        if self._e.depth > self._depth and not self._pages:
            return  # what is inside a Loop over versions cannot be read outside
        value = share()
        if value is None:
            return
        taken = self._per_sample(value, call)
        if self._pages:
            self._pages[-1].append((account, taken))
        else:
            self._items.append((call.site, account, taken))

    @contextmanager
    def page(self) -> Iterator[Callable[[], list[Value]]]:
        """A page of its own for what is booked inside a body; yields what sums it up: (N,) for each of ``ACCOUNTS``.

        Nothing where no accounts are kept. The sums are to leave the body, and to be booked outside.
        """
        page: list[tuple[str, Value]] = []
        self._pages.append(page)
        try:
            yield lambda: [self._sum(page, account) for account in ACCOUNTS if self._mode != "none"]
        finally:
            self._pages.pop()

    def _sum(self, items: Iterable[tuple[str, Value]], *accounts: str) -> Value:
        total = self._score * 0.0
        for account, value in items:
            if account in accounts:
                total = total + value
        return total

    def flow(self, call: Call, out: Sequence[Relevance | None], shares: Iterable[Relevance | None]) -> None:
        """Note what came into a node and what left it."""
        if self._mode != "node" or self._e.depth > self._depth:
            return
        pairs = [("out", r, o) for r, o in zip(out, call.outputs, strict=False)]
        pairs += [("in", r, x) for r, x in zip(shares, call.inputs, strict=False)]
        for account, relevance, like in pairs:
            if relevance is not None and like is not None:
                whole = expand_like(self._e, relevance.whole(self._e), like)
                self._items.append((call.site, account, self._per_sample(whole, call)))

    def _per_sample(self, value: Value, call: Call) -> Value:
        """Sum over everything but the batch."""
        names = [name for name in self._batches if name in value.shape] or self._batches
        total = sum_per_sample(self._e, value, names[0] if names else None)
        if total is None:
            raise ModelError(
                f"node '{call.site}' ({call.op}): the ledger needs the batch axis, and {value.shape} shows none; "
                "rewrite without ledger"
            )
        return total

    def outputs(self) -> dict[str, Value]:
        """The ledger's graph outputs by name, each (N,)."""
        if self._mode == "none":
            return {}
        with self._e.scope("ledger", doc="relevance absorbed by biases and stabilizers"):
            result = {"absorbed": self._sum((item[1:] for item in self._items), *ACCOUNTS)}
        if self._mode == "node":
            for number, (site, account, value) in enumerate(self._items):
                name = f"account/{number}/{account}"
                self.entries.append(Entry(site, account, name))
                result[name] = value
        return result
