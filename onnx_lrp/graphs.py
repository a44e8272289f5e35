"""Graphs that are being filled: what they hold, and what of it is needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from onnx_lrp.facts import Facts
from onnx_lrp.values import Call, Value


class Fills(Protocol):
    """What a body needs of its emitter."""

    def local(self, name: str, facts: Facts, body: Body) -> Value:
        """A tensor that lives in a body, as one of its inputs."""

    def copied(self, value: Value, body: Body) -> Value:
        """A tensor by a name of its own, to be an output of a body."""


class Body:
    """A graph that is being filled: the model's own, or one inside a Loop, Scan or If.

    Attributes:
        name: its name.
        once: what depends on nothing inside is emitted before it (not in an If, where a branch may not be taken).
        inputs: its inputs, in order.
        outputs: its outputs, in order.
        calls: its nodes by name, in order.
    """

    def __init__(self, emitter: Fills, name: str, once: bool):
        self.name, self.once = name, once
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.calls: dict[str, Call] = {}
        self.memo: dict[Any, tuple[Value, ...]] = {}
        self._emitter = emitter

    def input(self, name: str, facts: Facts) -> Value:
        """A further input of the body."""
        value = self._emitter.local(f"{self.name}/{name}", facts, self)
        self.inputs.append(value)
        return value

    def output(self, value: Value) -> None:
        """A further output of the body; a tensor from outside, an input or a repeated one goes out as a copy."""
        self.outputs.append(self._emitter.copied(value, self))

    def prune(self) -> None:
        """Let nodes go that none of the outputs needs."""
        self.calls, _ = alive(self.calls, {v.name for v in self.outputs})


def alive(calls: Mapping[str, Call], wanted: Collection[str]) -> tuple[dict[str, Call], set[str]]:
    """The nodes that the wanted tensors need, in order, and all tensors that are needed then."""
    needed, found = set(wanted), list[str]()
    for name in reversed(list(calls)):
        call = calls[name]
        if any(v is not None and v.name in needed for v in call.outputs):
            needed |= read_by(call)
            found.append(name)
    return {name: calls[name] for name in reversed(found)}, needed


def read_by(call: Call) -> set[str]:
    """Tensors that a node reads, those that its bodies read from outside among them."""
    names = {v.name for v in call.inputs if v is not None}
    for body in call.attrs.values():
        if isinstance(body, Body):
            names |= {v.name for v in body.outputs}.union(*map(read_by, body.calls.values()))
    return names


def calls_in(body: Body) -> Iterator[Call]:
    """The nodes of a body, those of bodies in it among them."""
    for call in body.calls.values():
        yield call
        for inner in call.attrs.values():
            if isinstance(inner, Body):
                yield from calls_in(inner)
