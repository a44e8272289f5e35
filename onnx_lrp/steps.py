"""Which step every call takes, those inside bodies among them: the rule table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.backward import Relevance, Step, gradient
from onnx_lrp.control import Around, Inside, bodies_of
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import UnsupportedNode, UnsupportedOps
from onnx_lrp.ledger import Ledger
from onnx_lrp.methods import StepFor
from onnx_lrp.model import Source
from onnx_lrp.places import Beyond, Places
from onnx_lrp.subgraphs import is_control
from onnx_lrp.view import View


@dataclass(frozen=True)
class Row:
    """One line of the rule table: which node takes which rule, and why."""

    node: str
    op: str
    rule: str
    why: str


class Table(list[Row]):
    """The rule table; prints aligned."""

    def __str__(self) -> str:
        rows = [("node", "op", "rule", "why"), *((r.node, r.op, r.rule, r.why) for r in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
        )


class Steps:
    """Steps of one walk: those of a method, each emitting under the name of its call and booked in the ledger.

    Args:
        source: the model.
        method: name of the method.
        step_for: the step that it takes at a place.
        allow_gradient: whether nodes without a rule take the gradient.
        keeper: the ledger; None where the steps are to be looked up and not taken.
        see: the canonical passes, to be run on what stands inside a body.
        conserves: whether the walk carries relevance; not so a gradient.
    """

    def __init__(
        self,
        source: Source,
        method: str,
        step_for: StepFor,
        allow_gradient: bool,
        keeper: Ledger | None,
        see: Callable[[View], None],
        conserves: bool,
    ):
        self._source, self._method, self._step_for, self._allow = source, method, step_for, allow_gradient
        self._keeper, self._see, self._conserves = keeper, see, conserves

    def assign(self, e: Emitter, calls: Sequence[Call]) -> tuple[Callable[[Call], Step], Table]:
        """The step of every call, and the rule table.

        Raises:
            UnsupportedOps: some calls have no step; all of them are listed.
        """
        table = Table()
        step_for, missing = self._assign(e, calls, {}, {}, table)
        if missing:
            raise UnsupportedOps(missing)
        return step_for, table

    def _assign(
        self,
        e: Emitter,
        calls: Sequence[Call],
        before: Mapping[Value, Beyond],
        after: Mapping[Value, Beyond],
        table: Table | None = None,
    ) -> tuple[Callable[[Call], Step], list[UnsupportedNode]]:
        """Steps for calls, with that before and after them, and the calls that have none.

        With a table to be filled, those inside bodies are looked up as well.
        """
        where = Places(calls, before, after)
        steps: dict[Call, tuple[Step, str]] = {}
        missing: list[UnsupportedNode] = []
        rows = Table() if table is None else table
        for call in calls:
            if is_control(call):
                around = Around([where.before(x) for x in call.inputs], [where.after(y) for y in call.outputs])
                steps[call] = (Inside(around, self._within, self._page, self._see, self._conserves), "inside")
                rows.append(Row(call.site, call.op, "inside", "the walk goes through its bodies"))
                for inside, first, last in bodies_of(e, call, around, self._see) if table is not None else ():
                    missing += self._assign(e, inside, first, last, table)[1]
                continue
            if call.op not in OPERATORS or call.domain or call.refused:
                missing.append(_unsupported(self._source, call, "no adjoint is registered for this operator"))
                continue
            found = self._step_for(where[call])
            if found is None and self._allow and OPERATORS[call.op].adjoint is not None:
                found = (gradient, "gradient", "no rule matches; allowed by allow_gradient")
            if found is None:
                missing.append(_unsupported(self._source, call, f"no entry of '{self._method}' matches it"))
                continue
            steps[call] = found[:2]
            rows.append(Row(call.site, call.op, found[1], found[2] + (f"; {call.note}" if call.note else "")))
        return lambda call: self._scoped(*steps[call]), missing

    def _within(
        self, e: Emitter, calls: Sequence[Call], before: Mapping[Value, Beyond], after: Mapping[Value, Beyond]
    ) -> Callable[[Call], Step]:
        """Steps for the calls of a body that is walked through: it was looked at before, and nothing is missing."""
        return self._assign(e, calls, before, after)[0]

    def _page(self) -> AbstractContextManager[Callable[[], list[Value]]]:
        """A page of the ledger for what is booked inside a body."""
        assert self._keeper is not None
        return self._keeper.page()

    def _scoped(self, step: Step, rule: str) -> Step:
        """A step that emits under the call's name, and is booked in the ledger."""

        def run(e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
            with e.scope(
                call.site, rule, f"{rule} rule for {call.op} {call.site}" + (f" ({call.note})" if call.note else "")
            ):
                assert self._keeper is not None
                shares = step(e, call, out)
                self._keeper.flow(call, out, shares)
            return shares

        return run


def _unsupported(source: Source, call: Call, reason: str) -> UnsupportedNode:
    version = next((o.version for o in source.skeleton.opset_import if o.domain == call.domain), source.opset)
    hint = "add an entry for it to a rule book, or allow the gradient there with allow_gradient=True"
    if call.refused is not None:
        reason, hint = call.refused
    elif call.domain == "com.microsoft":
        hint = "use the model as it was before ONNX Runtime's optimisation, and quantise to QDQ format"
    elif call.domain or call.op not in OPERATORS:
        hint = "explain a tensor before it with output=, or export the model without it"
    return UnsupportedNode(call.site, f"{call.domain}.{call.op}" if call.domain else call.op, version, reason, hint)
