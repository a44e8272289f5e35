"""Einsum: the adjoint is an Einsum again, with the terms exchanged."""

from __future__ import annotations

import string
from collections.abc import Collection

from onnx_lrp.adjoints.registry import Cotangents, Operator, enter
from onnx_lrp.adjoints.shapes import arange_like, cast_like, ints
from onnx_lrp.emit import Call, Emitter, Value


def plain_terms(call: Call) -> tuple[list[str], str]:
    """The terms of the operands and of the output, with letters for an ellipsis and the output written out."""
    equation = str(call.attrs["equation"]).replace(" ", "")
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        output = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    hidden = [call.given(i).rank - len(term.replace("...", "")) if "..." in term else 0 for i, term in enumerate(terms)]
    longest = max(hidden)
    names = "".join(c for c in string.ascii_letters if c not in equation)[:longest]
    # Axes behind an ellipsis are aligned from the right, as in broadcasting.
    whole = [term.replace("...", names[longest - n :]) for term, n in zip(terms, hidden, strict=True)]
    return whole, output.replace("...", names)


def _operand(e: Emitter, call: Call, d: Value, index: int) -> Value:
    """Of ab,bc->ac the first operand gets ac,bc->ab.

    An axis that is summed in this operand alone stays of length 1. A letter that stands twice in the operand picks its
    diagonal: the second one becomes a letter of its own, tied to the first by an identity matrix.
    """
    terms, output = plain_terms(call)
    mine, spare = "", [c for c in string.ascii_letters if c not in "".join(terms) + output]
    others = [(term, call.given(i)) for i, term in enumerate(terms) if i != index]
    for axis, letter in enumerate(terms[index]):
        if letter in mine:
            twin = spare.pop(0)
            numbers = arange_like(e, call.given(index), axis)
            same = e.op("Equal", e.op("Unsqueeze", numbers, ints(e, [1])), numbers)
            others.append((letter + twin, cast_like(e, same, d)))
            letter = twin
        mine += letter
    seen = output + "".join(term for term, _ in others)
    kept = "".join(c for c in mine if c in seen)
    equation = ",".join([output, *(term for term, _ in others)]) + "->" + kept
    result = e.op("Einsum", d, *(value for _, value in others), equation=equation)
    alone = [axis for axis, c in enumerate(mine) if c not in seen]
    return e.op("Unsqueeze", result, ints(e, alone)) if alone else result


def _einsum(e: Emitter, call: Call, cotangents: Cotangents, wanted: Collection[int]) -> Cotangents:
    d = cotangents[0]
    assert d is not None
    return [_operand(e, call, d, i) if i in wanted else None for i in range(len(call.inputs))]


enter(Operator("Einsum", "bilinear", _einsum, broadcasts=True))
