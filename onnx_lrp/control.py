"""If, Loop and Scan: the reverse walk run inside their bodies.

The relevance of an If goes back through an If on the same condition, each branch computed once more and walked through.
A Scan or Loop is computed once more to note its states before every step; then a Scan or Loop runs over the steps in
reverse, computes each step again from its noted state, and walks back through it. It carries the relevance of the
states, and sums up that of the outer tensors which the body reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from onnx_lrp.adjoints.shapes import expand_like, zeros_like
from onnx_lrp.backward import Relevance, Step, add, reverse
from onnx_lrp.emit import Body, Call, Emitter, Value
from onnx_lrp.errors import ModelError
from onnx_lrp.facts import Dim, Facts
from onnx_lrp.ledger import ACCOUNTS
from onnx_lrp.lifting import Track, scan
from onnx_lrp.places import Beyond, Places
from onnx_lrp.subgraphs import (
    BODIES,
    Scanned,
    lay_out,
    loop_states_before,
    own_inputs,
    scan_states_before,
    sliced,
    state_facts,
    states_of,
)
from onnx_lrp.view import View, activate, lead, reach

_INDEX, _FLAG = Facts(np.dtype(np.int64), ()), Facts(np.dtype(bool), ())
# (emitter, calls inside a body, what lies before and after their tensors) -> the step of each
Within = Callable[[Emitter, Sequence[Call], Mapping[Value, Beyond], Mapping[Value, Beyond]], Callable[[Call], Step]]
# A page of the ledger: opened around a body, it gives what was booked inside, summed up per sample.
Page = Callable[[], AbstractContextManager[Callable[[], list[Value]]]]
# The canonical passes.
See = Callable[[View], None]


@dataclass(frozen=True)
class Around:
    """What lies before each input of a call, and after each output."""

    before: Sequence[Beyond]
    after: Sequence[Beyond]


@dataclass(frozen=True)
class Inside:
    """The step of an If, Loop or Scan.

    Attributes:
        around: where the call stands.
        within: the steps of the calls inside.
        page: opens a page of the ledger.
        see: the canonical passes.
        conserves: whether the walk carries relevance, so that what is lost on constants is booked; not so a gradient.
    """

    around: Around
    within: Within
    page: Page
    see: See
    conserves: bool

    def __call__(self, e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
        """Relevance of the node's own inputs, and of the outer tensors that its bodies read."""
        arrived = [
            None if r is None or y is None else expand_like(e, r.whole(e), y)
            for r, y in zip(out, call.outputs, strict=True)
        ]
        return {"If": self._if, "Loop": self._loop, "Scan": self._scan}[call.op](e, call, arrived)

    def _if(self, e: Emitter, call: Call, arrived: Sequence[Value | None]) -> Sequence[Relevance | None]:
        outer = _outer(call)
        bodies: dict[str, Body] = {}
        accounts: list[Value] = []
        for key in BODIES["If"]:
            with e.body(key, once=False) as body, self.page() as totals:
                inner = enter(e, call, key, [], self.see)
                found = self._walk(e, call, inner, list(zip(inner.ends, arrived, strict=True)), outer)
                accounts = totals()
                for x in [*(_full(e, found, x) for x in outer), *accounts]:
                    body.output(x)
            bodies[key] = body
        facts = [_plain(x) for x in (*outer, *accounts)]
        results = e.control("If", call.given(0), bodies=bodies, facts=facts)
        _book(e, call, results[len(outer) :])
        return _by_input(call, {}, dict(zip(outer, results, strict=False)))

    def _scan(self, e: Emitter, call: Call, arrived: Sequence[Value | None]) -> Sequence[Relevance | None]:
        over, states, outer = Scanned(call), states_of(call), _outer(call)
        noted = scan_states_before(e, call)
        asked = {k: r for k, r in enumerate(arrived[len(states) :]) if r is not None}
        with e.body("reverse") as body:
            given = inputs_of(e, call, body)
            inner = enter(e, call, "body", given, self.see)
            ends = {k: (over.output_axis(k, inner.ends[k].rank), bool(over.output_directions[k])) for k in asked}
            slices = {k: body.input("relevance", sliced(r, ends[k][0])) for k, r in asked.items()}
            scanned, body.inputs = body.inputs, []
            found, carried = self._turn(e, call, inner, body, [(inner.ends[k], r) for k, r in slices.items()], outer)
            body.inputs += scanned
            active = [i for i in range(over.count) if given[over.first + i] in found]
            sent = {i: _sent(e, found, given[over.first + i]) for i in active}
            for x in (*carried, *(x for x, _ in sent.values())):
                body.output(x)
        tracks = [*noted, *over.tracks, *(Track(r, *ends[k]) for k, r in asked.items())]
        results = scan(
            e,
            body,
            self._begin(e, call, inner, arrived),
            [replace(t, back=not t.back) for t in tracks],
            [_plain(x) for x in (*carried, *(over.inputs[i] for i in active))],
            [(over.axes[i], not over.directions[i]) for i in active],
        )
        by_index = {
            over.first + i: Relevance(r, over.inputs[i] if sent[i][1] else None)
            for i, r in zip(active, results[len(carried) :], strict=True)
        }
        return self._shared(e, call, inner, arrived, results[: len(carried)], by_index)

    def _loop(self, e: Emitter, call: Call, arrived: Sequence[Value | None]) -> Sequence[Relevance | None]:
        refuse_changing_states(e, call)
        outer, (numbers, noted) = _outer(call), loop_states_before(e, call)
        count = e.op("Size", numbers)
        asked = {k: r for k, r in enumerate(arrived[len(noted) :]) if r is not None}
        with e.body("reverse") as body:
            turned, again = body.input("turn", _INDEX), body.input("again", _FLAG)
            number = e.op("Sub", e.op("Sub", count, e.const(1)), turned)
            at = [e.op("Gather", x, number, axis=0) for x in noted]
            inner = enter(e, call, "body", [number, e.const(np.array(True)), *at], self.see)
            pairs = [(inner.ends[k], e.op("Gather", r, number, axis=0)) for k, r in asked.items()]
            _, carried = self._turn(e, call, inner, body, pairs, outer)
            for x in (again, *carried):
                body.output(x)
        results = e.control(
            "Loop",
            count,
            e.const(np.array(True)),
            *self._begin(e, call, inner, arrived),
            bodies={"body": body},
            facts=[_plain(x) for x in carried],
        )
        return self._shared(e, call, inner, arrived, results, {})

    def _turn(
        self,
        e: Emitter,
        call: Call,
        inner: Inner,
        body: Body,
        pairs: Sequence[tuple[Value, Value]],
        outer: Sequence[Value],
    ) -> tuple[Mapping[Value, Relevance], list[Value]]:
        """One step back, from the relevance of a step's results (pairs of both) and of the states that it leaves.

        Returns what it finds, and what is carried on: relevance of the live states, sums for outer tensors, accounts.
        """
        relevance = [body.input("relevance", _plain(inner.states[k])) for k in inner.live]
        sums = [body.input("sum", _plain(x)) for x in outer]
        ends = [*pairs, *zip([inner.after[k] for k in inner.live], relevance, strict=True)]
        states = [inner.states[k] for k in inner.live]
        with self.page() as totals:
            found = self._walk(e, call, inner, ends, [*states, *outer, *inner.slices])
            accounts = totals()
        kept = [body.input("account", _plain(x)) for x in accounts]
        after = [_full(e, found, x) for x in states]
        after += [total + _full(e, found, x) for total, x in zip(sums, outer, strict=True)]
        after += [total + x for total, x in zip(kept, accounts, strict=True)]
        return found, after

    def _shared(
        self,
        e: Emitter,
        call: Call,
        inner: Inner,
        arrived: Sequence[Value | None],
        results: Sequence[Value],
        by_index: dict[int, Relevance],
    ) -> Sequence[Relevance | None]:
        """Relevance of every input, from what was carried back to before the first step."""
        states, rest = results[: len(inner.live)], results[len(inner.live) :]
        offset = 2 if call.op == "Loop" else 0
        lost = [r for k, r in enumerate(arrived[: len(inner.states)]) if r is not None and k not in inner.live]
        for k, r in zip(inner.live, states, strict=True):
            if call.given(offset + k).facts.active:
                by_index[offset + k] = Relevance(r)
            else:  # a state that begins with a constant
                lost.append(r)
        self._lose(e, call, lost)
        _book(e, call, rest[len(inner.outer) :])
        return _by_input(call, by_index, dict(zip(inner.outer, rest, strict=False)))

    def _lose(self, e: Emitter, call: Call, lost: Sequence[Value]) -> None:
        """Book relevance that came to what depends on nothing explained."""
        for r in lost if self.conserves else ():
            e.book(call, "bias", partial(_itself, r))

    def _begin(self, e: Emitter, call: Call, inner: Inner, arrived: Sequence[Value | None]) -> list[Value]:
        """What is carried before the first step back: the relevance of the last states, and zeros."""
        begin = states_of(call)
        last = [zeros_like(e, begin[k]) if (r := arrived[k]) is None else r for k in inner.live]
        with self.page() as nothing:
            return [*last, *(zeros_like(e, x) for x in inner.outer), *nothing()]

    def _walk(
        self,
        e: Emitter,
        call: Call,
        inner: Inner,
        ends: Sequence[tuple[Value, Value | None]],
        wanted: Sequence[Value],
    ) -> Mapping[Value, Relevance]:
        """The walk through a body, from the relevance of its results."""
        begin: dict[Value, Relevance] = {}
        for y, r in ends:
            if r is None:
                continue
            if not y.facts.active:  # a result that depends on nothing explained keeps what it gets
                self._lose(e, call, [r])
                continue
            known = r if r.facts.shape == y.facts.shape else e.op("Identity", r, shape=y.facts.shape)
            total = add(e, begin.get(y), Relevance(known), y)
            assert total is not None
            begin[y] = total
        step_for = self.within(e, inner.calls, *edges_of(call, self.around, inner))
        return reverse(e, inner.calls, begin, step_for, wanted)


@dataclass(frozen=True)
class Inner:
    """A body laid out and seen through the canonical passes.

    Attributes:
        calls: its calls on the way of influence, in order.
        states: its states as they come in.
        after: its states as they go out.
        live: numbers of the states that carry influence.
        slices: what it gets of the scan inputs in a step.
        ends: its other results: those of a branch, or what is put together over the steps.
        outer: the outer tensors that carry influence into it.
    """

    calls: Sequence[Call]
    states: Sequence[Value]
    after: Sequence[Value]
    live: Sequence[int]
    slices: Sequence[Value]
    ends: Sequence[Value]
    outer: Sequence[Value]


def enter(e: Emitter, call: Call, key: str, given: Sequence[Value], see: See) -> Inner:
    """Lay a body out where the emitter stands, run the passes on it, and mark what carries influence there.

    Args:
        e: the emitter.
        call: the If, Loop or Scan.
        key: which of its bodies.
        given: the body's inputs.
        see: the canonical passes.
    """
    older = len(e.values)
    calls, names = lay_out(e, call, key, given)
    v = View(e, calls, {}, [o.name for o in call.attrs[key].output], alias=names)
    with e.staying():
        see(v)
    for value in (*given, *islice(e.values.values(), older, None)):
        value.facts = replace(value.facts, active=False)
    results = [v.value(name) for name in v.outputs]
    begin = states_of(call) if call.op != "If" else []
    lead_in, lead_out = (2, 1) if call.op == "Loop" else (0, 0)
    states, slices = list(given[lead_in : lead_in + len(begin)]), list(given[lead_in + len(begin) :])
    after, ends = results[lead_out : lead_out + len(begin)], results[lead_out + len(begin) :]
    outer = _outer(call)
    scanned = own_inputs(call)[len(begin) :] if call.op == "Scan" else ()
    sources = [*outer, *(s for s, x in zip(slices, scanned, strict=True) if x is not None and x.facts.active)]
    asked = [y is not None and y.facts.active for y in call.outputs]
    targets = [y for y, wanted in zip(ends, asked[len(begin) :], strict=True) if wanted]
    # What has influence on a state in one step has it in the next; what a state leads to in one step, it did before.
    reached = {k for k, x in enumerate(begin) if x.facts.active}
    needed = {k for k in range(len(begin)) if asked[k]}
    grown = True
    while grown:
        before = len(reached) + len(needed)
        touched, forward = reach(v.calls, [*sources, *(states[k] for k in reached)])
        reached |= {k for k, y in enumerate(after) if y in touched}
        leading, _ = lead(forward, touched, [*targets, *(after[k] for k in needed)])
        needed |= {k for k, x in enumerate(states) if x in leading}
        grown = len(reached) + len(needed) > before
    live = sorted(reached & needed)
    hidden = next((y for y in (*targets, *(after[k] for k in live)) if y.dtype.kind != "f"), None)
    if hidden is not None:
        raise ModelError(
            f"node '{call.site}' ({call.op}) makes quantised integers, which are not seen through there; explain the "
            "model as it was before quantisation"
        )
    chain = activate(v.calls, [*sources, *(states[k] for k in live)], [*targets, *(after[k] for k in live)])
    return Inner(chain, states, after, live, slices, ends, outer)


def inputs_of(e: Emitter, call: Call, body: Body) -> list[Value]:
    """Inputs for a body that is laid out as an input of the emitted one: states and slices."""
    if call.op == "If":
        return []
    given = [body.input("state", f) for f in state_facts(e, call)]
    if call.op == "Loop":
        return [body.input("iteration", _INDEX), body.input("again", _FLAG), *given]
    scan = Scanned(call)
    return given + [body.input("slice", sliced(x, axis)) for x, axis in zip(scan.inputs, scan.axes, strict=True)]


def bodies_of(
    e: Emitter, call: Call, around: Around, see: See
) -> Iterator[tuple[Sequence[Call], Mapping[Value, Beyond], Mapping[Value, Beyond]]]:
    """The calls inside an If, Loop or Scan and what lies before and after them, laid out for a look only.

    Raises:
        ModelError: its state has not the same shape in every step.
    """
    if call.op == "Loop":
        refuse_changing_states(e, call)
    for key in BODIES[call.op]:
        with e.body("look", once=call.op != "If") as body:
            inner = enter(e, call, key, inputs_of(e, call, body), see)
            yield inner.calls, *edges_of(call, around, inner)


def edges_of(call: Call, around: Around, inner: Inner) -> tuple[Mapping[Value, Beyond], Mapping[Value, Beyond]]:
    """What lies before and after the tensors of a body; around a state there are other steps of the same body."""
    first, count, lead_in = len(own_inputs(call)), len(inner.states), 2 if call.op == "Loop" else 0
    captured = zip(call.inputs[first:], around.before[first:], strict=True)
    before = {x: beyond for x, beyond in captured if x is not None}
    before |= zip(inner.slices, around.before[count:], strict=False)
    after: dict[Value, Beyond] = {}
    for y, beyond in zip(inner.ends, around.after[count:], strict=True):
        after[y] = after.get(y, Beyond()) | beyond
    fixed = dict(after)
    for _ in range(len(inner.live) + 1):  # one round per state: by then everything has come around
        where = Places(inner.calls, before, after)
        for k in inner.live:
            before[inner.states[k]] = around.before[lead_in + k] | where.before(inner.after[k])
        after = dict(fixed)
        for k in inner.live:
            y = inner.after[k]
            after[y] = after.get(y, Beyond()) | around.after[k] | where.after(inner.states[k])
    return before, after


def refuse_changing_states(e: Emitter, call: Call) -> None:
    """See that a Loop's states keep their shapes, as far as these are known.

    Raises:
        ModelError: one does not.
    """
    begin = states_of(call)
    with e.body("look") as body:
        given = [body.input("iteration", _INDEX), body.input("again", _FLAG)]
        given += [body.input("state", _plain(x)) for x in begin]
        names = lay_out(e, call, "body", given)[1]
    for k, x in enumerate(begin):
        name = call.attrs["body"].output[1 + k].name
        old, new = x.facts.shape, names[name].facts.shape
        if old is None or new is None:
            continue
        if len(old) != len(new) or any(_changes(a, b) for a, b in zip(old, new, strict=True)):
            raise ModelError(
                f"node '{call.site}' (Loop): its state '{name}' begins with shape {old} and leaves a step with {new}; "
                "only a state whose shape stays can be explained: give it its full shape before the loop, or explain "
                "a tensor before the loop with output="
            )


def _changes(before: Dim, after: Dim) -> bool:
    """Whether a length is known to change; 1 to a free length is a broadcast in the first step."""
    if isinstance(before, int) and isinstance(after, int):
        return before != after
    return before == 1 and isinstance(after, str)


# ---- relevance in and out --------------------------------------------------------------------------------------------


def _outer(call: Call) -> list[Value]:
    """The outer tensors that carry influence into the bodies of a call."""
    outside = call.inputs[len(own_inputs(call)) :]
    return list(dict.fromkeys(x for x in outside if x is not None and x.facts.active))


def _by_input(call: Call, own: Mapping[int, Relevance], outer: Mapping[Value, Value]) -> list[Relevance | None]:
    """Relevance of every input of a call; an outer tensor that is read by two names gets it once."""
    shares: list[Relevance | None] = [None] * len(call.inputs)
    for i, r in own.items():
        shares[i] = r
    first = len(own_inputs(call))
    for x, total in outer.items():
        shares[call.inputs.index(x, first)] = Relevance(total)
    return shares


def _book(e: Emitter, call: Call, sums: Sequence[Value]) -> None:
    """Book what was booked inside, summed up."""
    for account, total in zip(ACCOUNTS, sums, strict=False):
        e.book(call, account, partial(_itself, total))


def _itself(value: Value) -> Value:
    return value


def _full(e: Emitter, found: Mapping[Value, Relevance], x: Value) -> Value:
    """The relevance of a tensor in its shape; zeros where none came."""
    return expand_like(e, found[x].whole(e), x) if x in found else zeros_like(e, x)


def _sent(e: Emitter, found: Mapping[Value, Relevance], x: Value) -> tuple[Value, bool]:
    """The relevance of a slice as it leaves the body, and whether as a factor of the slice."""
    factored = found[x].of is x
    return expand_like(e, found[x].factor if factored else found[x].whole(e), x), factored


def _plain(x: Value) -> Facts:
    """A tensor's type and shape, and nothing else that is known of it."""
    return Facts(x.dtype, x.facts.shape)
