"""Scans of a known length, written out step by step: for a single step, and where no loop may be."""

from __future__ import annotations

from onnx_lrp.adjoints.shapes import ints
from onnx_lrp.emit import Call, Emitter, Operand, Value
from onnx_lrp.subgraphs import Scanned, lay_out, states_of

LONGEST = 256  # steps that are written out; the graph grows by some fifty operators with each


def is_short(call: Call) -> bool:
    """Whether a Scan can be written out."""
    length = Scanned(call).length
    return isinstance(length, int) and 0 < length <= LONGEST


def unrolled(e: Emitter, call: Call) -> list[Call]:
    """The steps of a Scan one after another; the last calls make what the Scan makes.

    Args:
        e: the emitter.
        call: a Scan whose length is known, and not zero.
    """
    over, states, calls = Scanned(call), states_of(call), list[Call]()
    count, length = len(states), over.length
    assert isinstance(length, int)

    def ops(kind: str, *inputs: Operand, outputs: int = 1, **attrs: int) -> tuple[Value, ...]:
        values = e.ops(kind, *inputs, outputs=outputs, **attrs)  # type: ignore[arg-type]
        maker = e.producers.get(values[0].name)
        if maker is not None:  # what is small and constant is folded
            calls.append(maker)
        return values

    columns: list[list[Value]] = []
    with e.scope(call.site, doc=f"steps of {call.site}"):
        for track in over.tracks:
            parts: tuple[Value, ...] = (track.value,)
            if length > 1:
                parts = ops("Split", track.value, ints(e, [1] * length), outputs=length, axis=track.axis)
            column = [ops("Squeeze", part, ints(e, [track.axis]))[0] for part in parts]
            columns.append(column[::-1] if track.back else column)
    rows: list[list[Value]] = []
    for slices in zip(*columns, strict=True):
        inner, names = lay_out(e, call, "body", [*states, *slices])
        calls += inner
        results = [names[o.name] for o in call.attrs["body"].output]
        states = results[:count]
        rows.append(results[count:])
    with e.scope(call.site, doc=f"results of {call.site}"):
        for k, output in enumerate(call.outputs):
            if output is None:
                continue
            if k < count:
                calls.append(Call("Identity", (states[k],), (output,), {}, call.site))
                continue
            back, column = over.output_directions[k - count], [row[k - count] for row in rows]
            axis = over.output_axis(k - count, column[0].rank)
            column = [ops("Unsqueeze", part, ints(e, [axis]))[0] for part in column]
            calls.append(Call("Concat", tuple(column[::-1] if back else column), (output,), {"axis": axis}, call.site))
    unique = list(dict.fromkeys(calls))
    for part in unique:
        part.note = part.note or call.note
    return unique
