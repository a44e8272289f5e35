"""Explanations of a Hadamard product: what of two inputs is said by their joint representation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.shapes import expand_like, ints, zeros_like
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.methods.contract import Found, Plan, StepFor, Walk, summed
from onnx_lrp.methods.gradients import Gradient, GuidedBackprop
from onnx_lrp.target import Start
from onnx_lrp.view import View, mark_active


@dataclass(frozen=True)
class Hadamard:
    """Gradient of the distance between a factor and its product with another (Kim and Zhang 2017).

    Of a product F = V * Q of two tensors that both depend on inputs, as where a picture and a question meet, this is
    the gradient of 1/2 |V - F|^2 with F held constant (likewise of 1/2 |Q - F|^2): V - F at V, walked back. It tells
    what the other factor changes, and needs no answer: class, start and output have no say. The score is the half
    squared distance, (N,), of the factors that are used.

    An input that reaches both factors (in the example the question, which also steers what is looked at in the
    picture) is explained by the one that depends on fewer of the model's inputs, so by its own one; by both, summed,
    where they depend on equally many.

    Attributes:
        node: name of the Mul, or of the tensor that it gives; default: the only one of two live tensors of one shape.
        factor: 0 or 1, to explain every input by this factor alone.
        guided: pass a ReLU only where what comes back is positive, as in guided backpropagation.
        magnitude: a token gets Σ|g| over the features of its embedding, which the paper shows as standard scores
            (:func:`onnx_lrp.show.z_tokens`), and not their sum, in which the signs of a derivative cancel.
    """

    node: str | None = None
    factor: int | None = None
    guided: bool = True
    magnitude: bool = False
    name: ClassVar[str] = "hadamard"
    start: ClassVar[Start] = "one"
    tensors: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        """See that the options make sense."""
        if self.factor not in (None, 0, 1):
            raise InputError(f"factor is 0 or 1, the first or the second of the product, not {self.factor!r}")
        for option in ("guided", "magnitude"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"{option} is True or False, not {getattr(self, option)!r}")

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        """A walk from every factor that explains any input."""
        call = self._find(v)
        wanted = self._wanted(v, call, list(reported))
        if not any(wanted):
            raise InputError(
                f"{', '.join(reported.values())} has no influence on the factors of {call.site}; "
                "name others with inputs="
            )
        step_for = (GuidedBackprop() if self.guided else Gradient()).step_for
        with v.e.scope(call.site, self.name, f"distance of the factors of {call.site} from their product"):
            walks = [_walk(v.e, call, k, step_for, wanted[k]) for k in (0, 1) if wanted[k]]
            score = _half_squares(v.e, [r.factor for walk in walks for r in (walk.seeds or {}).values()])
        return Plan(walks, _report, score=score, per_token=_magnitude if self.magnitude else summed)

    def _find(self, v: View) -> Call:
        """The product, by its name or because there is no other.

        Raises:
            InputError: there is none, or not one only, or what is named is none.
        """
        found = [call for call in v.calls if _is_product(call)]
        names = ", ".join(call.site for call in found)
        if not found:
            raise InputError(
                "hadamard needs a Mul of two tensors of one shape that both depend on inputs; there is none"
            )
        named = found if self.node is None else [c for c in found if str(self.node) in (c.site, v.name_of(c.output))]
        if len(named) != 1:
            what = f"'{self.node}' is no" if self.node is not None else "there are several"
            kind = "Mul of two tensors of one shape that both depend on inputs"
            # The last one is mostly what is meant: those before it steer attention.
            raise InputError(f"{what} {kind}: {names}; name one, such as hadamard:node={found[-1].site}")
        return named[0]

    def _wanted(self, v: View, call: Call, reported: Sequence[Value]) -> list[list[Value]]:
        """What each of the two factors explains."""
        behind = _inputs_behind(v)
        wanted: list[list[Value]] = [[], []]
        for x in reported:
            reached = [k for k in (0, 1) if _reaches(v, x, call.given(k))]
            fewest = min((len(behind[call.given(k)]) for k in reached), default=0)
            own = [k for k in reached if len(behind[call.given(k)]) == fewest]
            for k in own if self.factor is None else [k for k in reached if k == self.factor]:
                wanted[k].append(x)
        return wanted


def _is_product(call: Call) -> bool:
    """Whether a call multiplies two different tensors of one shape that both depend on inputs."""
    if call.op != "Mul" or call.domain or call.output.dtype.kind != "f":
        return False
    a, b = call.given(0), call.given(1)
    if a is b or a.facts.const or b.facts.const or a.facts.shape is None or b.facts.shape is None:
        return False
    return a.rank == b.rank > 0 and all(map(_may_be_same, a.shape, b.shape))


def _may_be_same(x: int | str | None, y: int | str | None) -> bool:
    """Whether two lengths are one; a length of 1 beside one that is not known is there to be broadcast."""
    return x == y or (1 not in (x, y) and not (isinstance(x, int) and isinstance(y, int)))


def _reaches(v: View, x: Value, factor: Value) -> bool:
    mark_active(v, [x], factor)
    return factor.facts.active


def _inputs_behind(v: View) -> dict[Value, frozenset[str]]:
    """The graph inputs that every tensor depends on, other than by a barrier such as Shape."""
    behind = {value: frozenset([name]) for name, value in v.inputs.items()}
    for call in v.calls:
        operator = OPERATORS.get(call.op)
        passes = operator is None or operator.verb != "barrier"
        sources = frozenset[str]().union(*(behind.get(x, frozenset()) for x in call.inputs if x is not None and passes))
        behind |= {o: sources for o in call.outputs if o is not None}
    return behind


def _walk(e: Emitter, call: Call, k: int, step_for: StepFor, wanted: Sequence[Value]) -> Walk:
    """Back from one factor, beginning with its difference to the product."""
    factor = call.given(k)
    difference = e.op("Sub", factor, call.output, label="difference")
    return Walk(step_for, wanted, seeds={factor: Relevance(difference)})


def _half_squares(e: Emitter, differences: Sequence[Value]) -> Value:
    """1/2 sum d^2 of each sample, (N,)."""
    total = None
    for d in differences:
        axes = list(range(1, d.rank))
        squares = e.op("ReduceSumSquare", d, ints(e, axes), keepdims=0) if axes else d * d
        total = squares if total is None else total + squares
    assert total is not None
    return total * 0.5


def _magnitude(e: Emitter, rows: Value) -> Value:
    return e.op("ReduceL1", rows, ints(e, [-1]), keepdims=0)


def _report(e: Emitter, x: Value, found: Found) -> Value:
    """The sum of what the walks found, in the shape of what is reported."""
    parts = [expand_like(e, walk[x].whole(e), x) for walk in found if x in walk]
    if not parts:
        return zeros_like(e, x)
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
