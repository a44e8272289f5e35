"""Where which rule applies: rule books read from TOML, matched against calls by what they are and where they stand."""

from __future__ import annotations

import fnmatch
import inspect
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lrp import special
from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.shapes import expand_like, ints
from onnx_lrp.backward import Step, gradient
from onnx_lrp.canonical import WEIGHTED
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.relevance import (
    alpha_beta_rule,
    epsilon_rule,
    flat_rule,
    gamma_rule,
    wsquare_rule,
    zbox_rule,
    zplus_rule,
)

Bound = float | Sequence[float] | str


def _zbox(low: Bound = "input", high: Bound = "input", epsilon: float = 1e-6) -> Step:
    """LRP-z^B; a bound is a number, one number per channel, or "input": a graph input low or high, by default the data's range."""
    return zbox_rule(_Bounds(low if not isinstance(low, list) else tuple(low), high if not isinstance(high, list) else tuple(high)), epsilon)


@dataclass(frozen=True)
class _Bounds:
    """The box of the z-box rule as values of the graph."""

    low: Bound
    high: Bound

    def __call__(self, e: Emitter, x: Value, kind: str) -> Value:
        given = self.low if kind == "low" else self.high
        if isinstance(given, str):
            # The graph input defaults to NaN, which stands for the range of the sample at hand.
            parameter = e.parameter(kind, np.full((1,) * x.rank, np.nan, x.dtype))
            reduce = "ReduceMin" if kind == "low" else "ReduceMax"
            own = e.op(reduce, x, ints(e, range(1, x.rank)), keepdims=1)
            bound = e.op("Where", e.op("IsNaN", parameter), own, parameter)
        elif isinstance(given, Sequence):
            bound = e.const(np.array(given).reshape(1, -1, *([1] * (x.rank - 2))), x.dtype)
        else:
            bound = e.const(given, x.dtype)
        return e.op("Expand", bound, e.op("Shape", x), shape=x.shape) if not x.static else expand_like(e, e.op("Reshape", bound, ints(e, [1])) if bound.rank == 0 else bound, x)


def _gate(gate: str = "auto", epsilon: float = 1e-6) -> Step:
    """Gate times signal: the signal takes all."""
    if gate not in ("auto", "first", "second"):
        raise RuleError(f"gate is auto, first or second, not '{gate}'", key="gate")
    return special.Gate(gate, epsilon)  # type: ignore[arg-type]


def _factor(constant: str = "first", epsilon: float = 1e-6) -> Step:
    """One live factor is held constant."""
    if constant not in ("first", "second"):
        raise RuleError(f"constant is first or second, not '{constant}'", key="constant")
    return special.Constant(0 if constant == "first" else 1, epsilon)


def _fixed(step: Step) -> Callable[[], Step]:
    def make() -> Step:
        return step

    make.__doc__ = step.__doc__
    return make


# Every rule that a rule book can name, and what makes it; parameters are those of the function.
RULES: dict[str, Callable[..., Step]] = {
    "epsilon": epsilon_rule,
    "lrp_0": lambda: epsilon_rule(0.0),
    "zplus": zplus_rule,
    "alpha_beta": alpha_beta_rule,
    "gamma": gamma_rule,
    "wsquare": wsquare_rule,
    "flat": flat_rule,
    "zbox": _zbox,
    "norm": lambda epsilon=1e-6: epsilon_rule(epsilon),
    "pass": _fixed(special.pass_through),
    "route": _fixed(special.route),
    "winner_takes_all": _fixed(special.winner_takes_all),
    "proportional": special.ProportionalPool,
    "batchnorm_absolute": _fixed(special.batchnorm_absolute),
    "share": special.Share,
    "gate": _gate,
    "factor": _factor,
    "uniform": _fixed(special.uniform),
    "softmax": _fixed(special.softmax),
    "stop": _fixed(special.stop),
    "gradient": _fixed(gradient),
}

_WHERE_KEYS = ("op", "kind", "name", "position", "depth", "producer", "consumer", "live")
_POSITIONS = ("first", "last", "inner", "preprocessing")


@dataclass(frozen=True)
class Assignment:
    """One entry of a rule book: calls that match get this rule.

    Attributes:
        where: conditions, all of which must hold.
        rule: name of the rule.
        parameters: its parameters.
        file: rule book it stands in.
        line: line it stands on.
    """

    where: Mapping[str, Any]
    rule: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    line: int | None = None

    def step(self) -> Step:
        """The step that this entry assigns."""
        try:
            return RULES[self.rule](**self.parameters)
        except RuleError as error:
            raise RuleError(str(error), file=self.file or None, line=self.line) from None

    def __str__(self) -> str:
        parameters = ", ".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.rule}({parameters})" if parameters else self.rule


@dataclass(frozen=True)
class Place:
    """Where a call stands in the data flow.

    Attributes:
        call: the call.
        depth: number of weighted layers (Conv, ConvTranspose, Gemm, MatMul) between it and the explained inputs.
        height: the same towards the explained tensor.
        producers: operators that feed its live inputs.
        consumers: operators that read its outputs.
    """

    call: Call
    depth: int
    height: int
    producers: frozenset[str]
    consumers: frozenset[str]

    @property
    def weighted(self) -> bool:
        """True for a layer with constant weights."""
        return self.call.op in WEIGHTED and len(self.call.active) == 1

    def at(self, position: str) -> bool:
        """Whether the call stands at a named position."""
        if position == "preprocessing":
            return self.depth == 0 and self.height > 0 and not self.weighted
        if position == "first":
            return self.depth == 0 and self.weighted
        if position == "last":
            return self.height == 0 and self.weighted
        return self.depth > 0 and self.height > 0


def places(calls: Sequence[Call]) -> dict[int, Place]:
    """Place of every call, by its id."""
    maker = {o: c for c in calls for o in c.outputs if o is not None}
    readers: dict[Value, list[Call]] = {}
    for call in calls:
        for i in call.active:
            readers.setdefault(call.given(i), []).append(call)

    def counts(call: Call) -> int:
        return int(call.op in WEIGHTED and len(call.active) == 1)

    depth: dict[int, int] = {}
    for call in calls:
        above = [maker[call.given(i)] for i in call.active if call.given(i) in maker]
        depth[id(call)] = max((depth[id(a)] + counts(a) for a in above), default=0)
    height: dict[int, int] = {}
    for call in reversed(calls):
        below = [r for o in call.outputs if o is not None for r in readers.get(o, [])]
        height[id(call)] = max((height[id(b)] + counts(b) for b in below), default=0)
    return {
        id(call): Place(
            call,
            depth[id(call)],
            height[id(call)],
            frozenset(maker[call.given(i)].op for i in call.active if call.given(i) in maker),
            frozenset(r.op for o in call.outputs if o is not None for r in readers.get(o, [])),
        )
        for call in calls
    }


def kind_of(op: str) -> str:
    """What a rule book calls an operator: its verb, or movement for linear operators that only move elements."""
    operator = OPERATORS.get(op)
    if operator is None:
        return "unknown"
    return "movement" if operator.moves and operator.verb == "linear" else operator.verb


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def matches(where: Mapping[str, Any], place: Place) -> bool:
    """Whether a call fulfils all conditions of an entry."""
    call = place.call
    for key, wanted in where.items():
        options = _as_list(wanted)
        if key == "op":
            good = call.op in options
        elif key == "kind":
            good = kind_of(call.op) in options
        elif key == "name":
            good = any(fnmatch.fnmatchcase(call.site, pattern) for pattern in options)
        elif key == "position":
            good = any(place.at(p) for p in options)
        elif key == "depth":
            good = place.depth in options
        elif key == "producer":
            good = bool(place.producers & set(options))
        elif key == "consumer":
            good = bool(place.consumers & set(options))
        else:
            good = len(call.active) in options
        if not good:
            return False
    return True


@dataclass(frozen=True)
class Composite:
    """A rule book: assignments, the first match wins.

    Attributes:
        name: its name.
        title: what it is, in one line.
        assignments: its entries in order.
        note: where it comes from.
    """

    name: str
    title: str
    assignments: tuple[Assignment, ...]
    note: str = ""

    def find(self, place: Place) -> Assignment | None:
        """The first entry that matches a call; None where none does."""
        return next((a for a in self.assignments if matches(a.where, place)), None)

    def step_for(self, place: Place) -> Step | None:
        """The step a call takes; None where no entry matches."""
        found = self.find(place)
        return None if found is None else found.step()


# ---- reading -----------------------------------------------------------------------------------------------------


def rules_folder() -> Any:
    """Where the bundled rule books lie: in the installed package, or beside it in a checkout."""
    packed = resources.files("onnx_lrp") / "rules"
    return packed if packed.is_dir() else Path(__file__).resolve().parent.parent / "rules"


def book_names() -> list[str]:
    """Names of the bundled rule books."""
    return sorted(p.name.removesuffix(".toml") for p in rules_folder().iterdir() if p.name.endswith(".toml") and not p.name.startswith("_"))


def read_book(book: str | os.PathLike[str]) -> Composite:
    """Read a rule book by name, or by the path of a .toml file.

    Raises:
        RuleError: no such book; or a malformed one, with file, line and key.
    """
    text = os.fspath(book)
    if text.endswith(".toml") or os.sep in text:
        path: Any = Path(text)
    else:
        path = rules_folder() / f"{text}.toml"
        if text not in book_names():
            raise RuleError(f"there is no rule book '{text}'; there are {', '.join(book_names())}, or give the path of a .toml file")
    return _parse(path, ())


def _parse(path: Any, seen: tuple[str, ...]) -> Composite:
    name = str(path)
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RuleError(f"cannot be read ({error.strerror or error}); check the path", file=name) from None
    except UnicodeDecodeError:
        raise RuleError("is not a text file; a rule book is TOML in UTF-8", file=name) from None
    try:
        data = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise RuleError(f"is no valid TOML: {error}", file=name, line=int(line.group(1)) if line else None) from None
    lines = [i for i, row in enumerate(source.splitlines(), 1) if row.strip().replace(" ", "") == "[[assign]]"]
    for key in data:
        if key not in ("title", "note", "base", "assign"):
            raise RuleError("unknown key; a rule book has title, note, base and [[assign]]", file=name, line=_line_of(source, key), key=key)
    entries = data.get("assign", [])
    if not isinstance(entries, list):
        raise RuleError("write [[assign]] with double brackets", file=name, line=_line_of(source, "assign"), key="assign")
    assignments = [_entry(e, name, lines[k] if k < len(lines) else None, source) for k, e in enumerate(entries)]
    if "base" in data:
        if name in seen:
            raise RuleError(f"is its own base ({' -> '.join((*seen, name))})", file=name, key="base")
        assignments.extend(_base(path, data["base"], source, (*seen, name)).assignments)
    stem = path.name.removesuffix(".toml")
    return Composite(stem, str(data.get("title", stem)), tuple(assignments), str(data.get("note", "")))


def _base(path: Any, base: Any, source: str, seen: tuple[str, ...]) -> Composite:
    line = _line_of(source, "base")
    if not isinstance(base, str):
        raise RuleError("is the name of a bundled rule book, or a path relative to this file", file=str(path), line=line, key="base")
    beside = Path(str(path)).parent / base
    if base.endswith(".toml") and beside.is_file():
        return _parse(beside, seen)
    bundled = rules_folder() / f"{base.removesuffix('.toml')}.toml"
    if not bundled.is_file():
        raise RuleError(f"there is no rule book '{base}' beside this file, nor a bundled one", file=str(path), line=line, key="base")
    return _parse(bundled, seen)


def _line_of(source: str, key: str, start: int = 1) -> int | None:
    pattern = re.compile(rf"""(^|[\s{{,\[])["']?{re.escape(key)}["']?\s*[=\].]""")
    for i, row in enumerate(source.splitlines(), 1):
        if i >= start and pattern.search(row.split("#")[0]):
            return i
    return start if start > 1 else None


def _entry(entry: Any, file: str, line: int | None, source: str) -> Assignment:
    def fail(message: str, key: str) -> RuleError:
        return RuleError(message, file=file, line=_line_of(source, key, line or 1), key=key)

    where = entry.get("where", {})
    if not isinstance(where, dict):
        raise fail('is a table such as { op = "Conv" }', "where")
    for key, value in where.items():
        if key not in _WHERE_KEYS:
            raise fail(f"unknown condition; there are {', '.join(_WHERE_KEYS)}", key)
        wrong = [v for v in _as_list(value) if not isinstance(v, int if key in ("depth", "live") else str)]
        if wrong:
            raise fail(f"wants {'whole numbers' if key in ('depth', 'live') else 'text'}, got {wrong[0]!r}", key)
        if key == "op":
            unknown = [o for o in _as_list(value) if o not in OPERATORS]
            if unknown:
                raise fail(f"no operator is called '{unknown[0]}' (names are ONNX's, such as Conv, Gemm, MatMul)", key)
        if key == "kind" and (bad := set(_as_list(value)) - {"linear", "bilinear", "pointwise", "nonlinear", "movement"}):
            raise fail(f"no kind is called '{sorted(bad)[0]}'; kinds are linear, bilinear, pointwise, nonlinear, movement", key)
        if key == "position" and (bad := set(_as_list(value)) - set(_POSITIONS)):
            raise fail(f"no position is called '{sorted(bad)[0]}'; positions are {', '.join(_POSITIONS)}", key)
    rule = entry.get("rule")
    if not isinstance(rule, str) or rule not in RULES:
        raise fail(f"no rule is called {rule!r}; rules are {', '.join(RULES)}", "rule")
    parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k not in ("where", "rule")}
    allowed = inspect.signature(RULES[rule]).parameters
    for key, value in parameters.items():
        if key not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no parameters"
            raise fail(f"rule {rule} has no parameter '{key}'; {takes}", key)
        if key in ("epsilon", "gamma", "alpha", "beta") and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise fail(f"is a number that is not negative, got {value!r}", key)
    assignment = Assignment(where, rule, parameters, file, line)
    assignment.step()
    return assignment
