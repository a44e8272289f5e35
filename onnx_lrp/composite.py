"""Where which rule applies: the rules by name, and the rule books that assign them, read from TOML and printed."""

from __future__ import annotations

import inspect
import math
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
from onnx_lrp.adjoints.shapes import ints, shape_of
from onnx_lrp.backward import Step, gradient
from onnx_lrp.emit import Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.places import KINDS, POSITIONS, ROLES, Place, as_list, kind_of, matches
from onnx_lrp.tables import (
    alpha_beta_rule,
    epsilon_rule,
    flat_rule,
    gamma_rule,
    wplus_rule,
    wsquare_rule,
    zbox_rule,
    zplus_rule,
)
from onnx_lrp.view import WEIGHTED

Bound = float | Sequence[float] | str


def _zbox(low: Bound = "input", high: Bound = "input", epsilon: float = 1e-6) -> Step:
    """LRP-z^B in a box: numbers, one number per channel, or "input" (graph inputs, by default the data's own range)."""
    bounds = []
    for key, bound in (("low", low), ("high", high)):
        items = bound if isinstance(bound, list | tuple) else [bound]
        if bound != "input" and (not items or not all(_is_number(n) for n in items)):
            raise RuleError(f'is a number, a list of numbers or "input", got {bound!r}', key=key)
        bounds.append(tuple(items) if isinstance(bound, list | tuple) else bound)
    if all(_is_number(b) for b in bounds) and not bounds[0] < bounds[1]:  # type: ignore[operator]
        raise RuleError(f"has to be below high, got {low!r} and {high!r}", key="low")
    return zbox_rule(_Bounds(*bounds), epsilon)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class _Bounds:
    """The box of the z-box rule as values of the graph."""

    low: Bound
    high: Bound

    def __call__(self, e: Emitter, x: Value, kind: str) -> Value:
        given = self.low if kind == "low" else self.high
        if isinstance(given, str):
            bound = self._fed(e, x, kind)
        elif isinstance(given, Sequence):
            channels = x.shape[1] if x.rank > 1 else 1
            if isinstance(channels, int) and len(given) not in (1, channels):
                raise RuleError(
                    f"zbox has {len(given)} numbers for {kind}, but '{x.name}' has {channels} channels; "
                    "give as many, or one"
                )
            bound = e.const(np.array(given).reshape(1, -1, *([1] * (x.rank - 2))), x.dtype)
        else:
            bound = e.const(np.full((1,) * x.rank, given), x.dtype)
        return e.op("Expand", bound, shape_of(e, x), shape=x.shape)

    def _fed(self, e: Emitter, x: Value, kind: str) -> Value:
        """A graph input that defaults to NaN, which stands for the range of the sample at hand."""
        known = e.parameters.get(kind)
        # Inputs of another rank than the first (a picture and a vector) have bounds of their own.
        name = kind if known is None or known[0].rank == x.rank else f"{kind}/{x.name}"
        parameter = e.parameter(name, np.full((1,) * x.rank, np.nan, x.dtype))
        reduce = "ReduceMin" if kind == "low" else "ReduceMax"
        # Of a vector of inputs, the range of all: a single number has none. Of a sequence with a free number of
        # samples behind a fixed number of steps, the range of the sample.
        steps_first = x.rank > 2 and isinstance(x.shape[0], int) and isinstance(x.shape[1], str)
        axes = [i for i in range(x.rank) if i != int(steps_first) or x.rank == 1]
        own = e.op(reduce, x, ints(e, axes), keepdims=1) if x.rank else x
        return e.op("Where", e.op("IsNaN", parameter), own, parameter)


def _gate(gate: str = "auto", epsilon: float = 1e-6, exact: bool = False) -> Step:
    """Gate times signal: the signal takes all."""
    if gate not in ("auto", "first", "second"):
        raise RuleError(f"is auto, first or second, not {gate!r}", key="gate")
    return special.Gate(epsilon, exact, gate)  # type: ignore[arg-type]


def _factor(constant: str = "first", epsilon: float = 1e-6, exact: bool = False) -> Step:
    """One live factor is held constant."""
    if constant not in ("first", "second"):
        raise RuleError(f"is first or second, not {constant!r}", key="constant")
    return special.Constant(epsilon, exact, 0 if constant == "first" else 1)


def _lrp_0() -> Step:
    """LRP-0 (Bach et al. 2015, eq. 56): epsilon without a stabilizer; a sum that is zero is divided by one."""
    return epsilon_rule(0.0)


def _norm(epsilon: float = 1e-6, exact: bool = False, equal_at_zero: bool = False) -> Step:
    """A sum shares in proportion to its summands: the epsilon rule, named after what it does to sums."""
    return special.Sum(epsilon) if equal_at_zero else epsilon_rule(epsilon, exact)


def _fixed(step: Step) -> Callable[[], Step]:
    def make() -> Step:
        return step

    make.__doc__ = step.__doc__
    return make


# Every rule that a rule book can name, and what makes it; parameters are those of the function.
RULES: dict[str, Callable[..., Step]] = {
    "epsilon": epsilon_rule,
    "lrp_0": _lrp_0,
    "zplus": zplus_rule,
    "alpha_beta": alpha_beta_rule,
    "gamma": gamma_rule,
    "wsquare": wsquare_rule,
    "wplus": wplus_rule,
    "flat": flat_rule,
    "zbox": _zbox,
    "norm": _norm,
    "pass": special.Pass,
    "route": _fixed(special.route),
    "winner_takes_all": _fixed(special.winner_takes_all),
    "proportional": special.Proportional,
    "batchnorm_absolute": _fixed(special.batchnorm_absolute),
    "share": special.Share,
    "gate": _gate,
    "factor": _factor,
    "uniform": _fixed(special.uniform),
    "softmax": special.Softmax,
    "normalization": special.Normalization,
    "stop": _fixed(special.stop),
    "gradient": _fixed(gradient),
}


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
        return RULES[self.rule](**self.parameters)

    def __str__(self) -> str:
        parameters = ", ".join(_parameter(k, v) for k, v in self.parameters.items())
        return f"{self.rule}({parameters})" if parameters else self.rule


def _parameter(key: str, value: Any) -> str:
    """A parameter as the tables show it: a flag that is set by its name alone."""
    return key if value is True else f"{key}={value:g}" if _is_number(value) else f"{key}={value}"


@dataclass(frozen=True)
class Composite:
    """A rule book: assignments, the first match wins.

    Attributes:
        name: its name.
        title: what it is, in one line.
        assignments: its entries in order.
        note: where it comes from.
        fold_batchnorm: whether BatchNormalization is to be seen as part of a linear neighbour.
    """

    name: str
    title: str
    assignments: tuple[Assignment, ...]
    note: str = ""
    fold_batchnorm: bool = True

    def find(self, place: Place) -> Assignment | None:
        """The first entry that matches a call; None where none does."""
        return next((a for a in self.assignments if matches(a.where, place)), None)

    def step_for(self, place: Place) -> Step | None:
        """The step a call takes; None where no entry matches."""
        found = self.find(place)
        return None if found is None else found.step()

    def __str__(self) -> str:
        return book_table(self)


# ---- reading -----------------------------------------------------------------------------------------------------


def rules_folder() -> Any:
    """Where the bundled rule books lie: in the installed package, or beside it in a checkout."""
    packed = resources.files("onnx_lrp") / "rules"
    return packed if packed.is_dir() else Path(__file__).resolve().parent.parent / "rules"


def book_names() -> list[str]:
    """Names of the bundled rule books."""
    files = (p.name for p in rules_folder().iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml") and not name.startswith("_"))


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
            raise RuleError(
                f"there is no rule book '{text}'; there are {', '.join(book_names())}, or give the path of a .toml file"
            )
    return _Reader(path).composite()


# What must not be searched for keys: comments, and text that is no key itself.
_OPAQUE = re.compile(
    r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:\\.|[^"\\\n])*"(?!\s*[=.\]])|\'[^\'\n]*\'(?!\s*[=.\]])|#[^\n]*'
)
_ENTRY = re.compile(r"\s*\[\[\s*assign\s*\]\]")
_BOOK_KEYS = ("title", "note", "base", "fold_batchnorm", "assign")
_WHERE_KEYS = ("op", "kind", "role", "name", "position", "depth", "producer", "consumer", "live")
_NUMBERS = ("epsilon", "gamma", "alpha", "beta")
_SWITCHES = ("exact", "bias", "equal_at_zero")


class _Reader:
    """One rule book on its way from text to a composite; every complaint names file, line and key."""

    def __init__(self, path: Any, above: tuple[str, ...] = ()):
        self.path, self.file, self.above = path, str(path), above
        try:
            source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror or error}); check the path") from None
        except UnicodeDecodeError:
            raise self._error("is not a text file; a rule book is TOML in UTF-8") from None
        # The rows with everything blanked out that is no key, and the first rows of the entries.
        self.rows = _OPAQUE.sub(lambda found: "\n" * found.group().count("\n"), source).split("\n")
        self.starts = [i for i, row in enumerate(self.rows, 1) if _ENTRY.match(row)]
        try:
            self.data = tomllib.loads(source)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            line = re.search(r"line (\d+)", str(error))
            last = len(source.rstrip().split("\n"))
            raise self._error(f"is no valid TOML: {error}", line=int(line.group(1)) if line else last) from None

    def _error(self, message: str, key: str | None = None, line: int | None = None) -> RuleError:
        return RuleError(message, file=self.file, line=line, key=key)

    def _line(self, key: str, entry: int | None = None) -> int | None:
        """The row on which a key stands: in an entry (else its first row), or before all entries, or as a table."""
        begin, end = 1, min(self.starts, default=len(self.rows) + 1)
        if entry is not None:
            if entry >= len(self.starts):  # entries written as one list
                return self._line("assign")
            begin = self.starts[entry]
            end = self.starts[entry + 1] if entry + 1 < len(self.starts) else len(self.rows) + 1
        name = rf"""["']?{re.escape(key)}["']?\s*[=.\]]"""
        found = [i for i in range(begin, end) if re.search(rf"(?<![\w-]){name}", self.rows[i - 1])]
        if entry is None:
            found += [i for i, row in enumerate(self.rows, 1) if re.match(rf"\s*\[+\s*{name}", row)]
        return found[0] if found else None if entry is None else begin

    def composite(self) -> Composite:
        """The book and all that its base adds."""
        for key, value in self.data.items():
            if key not in _BOOK_KEYS:
                message = "unknown key; a rule book has title, note, base, fold_batchnorm and [[assign]]"
                raise self._error(message, key, self._line(key))
            if key in ("title", "note") and not isinstance(value, str):
                raise self._error(f"is text, got {value!r}", key, self._line(key))
            if key == "fold_batchnorm" and not isinstance(value, bool):
                raise self._error(f"is true or false, got {value!r}", key, self._line(key))
        entries = self.data.get("assign", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise self._error("write [[assign]] with double brackets", "assign", self._line("assign"))
        assignments = [self._entry(number, entry) for number, entry in enumerate(entries)]
        fold = True
        if "base" in self.data:
            base = self._base(self.data["base"])
            assignments.extend(base.assignments)
            fold = base.fold_batchnorm
        stem = self.path.name.removesuffix(".toml")
        title, note = self.data.get("title", stem), self.data.get("note", "")
        return Composite(stem, title, tuple(assignments), note, self.data.get("fold_batchnorm", fold))

    def _base(self, base: Any) -> Composite:
        line = self._line("base")
        if not isinstance(base, str):
            message = "is the name of a bundled rule book, or a path relative to this file"
            raise self._error(message, "base", line)
        beside = Path(self.file).parent / base
        bundled = rules_folder() / f"{base.removesuffix('.toml')}.toml"
        path: Any = beside if base.endswith(".toml") and beside.is_file() else bundled
        if not path.is_file():
            raise self._error(f"there is no rule book '{base}' beside this file, nor a bundled one", "base", line)
        chain = (*self.above, self.file)
        identities = [os.path.realpath(file) for file in chain]
        if os.path.realpath(str(path)) in identities:
            raise self._error(f"is its own base ({' -> '.join((*chain, str(path)))})", "base", line)
        return _Reader(path, chain).composite()

    def _entry(self, number: int, entry: dict[str, Any]) -> Assignment:
        def fail(message: str, key: str) -> RuleError:
            return self._error(message, key, self._line(key, number))

        where = entry.get("where", {})
        if not isinstance(where, dict):
            raise fail('is a table such as { op = "Conv" }', "where")
        for key, value in where.items():
            if complaint := _condition_complaint(key, as_list(value)):
                raise fail(complaint, key)
        rule = entry.get("rule")
        if rule is None:
            raise fail(f"every entry names its rule; rules are {', '.join(RULES)}", "rule")
        if not isinstance(rule, str) or rule not in RULES:
            raise fail(f"no rule is called {rule!r}; rules are {', '.join(RULES)}", "rule")
        parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k not in ("where", "rule")}
        allowed = inspect.signature(RULES[rule]).parameters
        for key, value in parameters.items():
            if key not in allowed:
                takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no parameters"
                raise fail(f"rule {rule} has no parameter '{key}'; {takes}", key)
            if key in _SWITCHES and not isinstance(value, bool):
                raise fail(f"is true or false, got {value!r}", key)
            if key in _NUMBERS and not (isinstance(value, int | float) and _is_number(value) and value >= 0):
                raise fail(f"is a number that is not negative, got {value!r}", key)
        start = self.starts[number] if number < len(self.starts) else self._line("assign")
        assignment = Assignment(where, rule, parameters, self.file, start)
        try:
            assignment.step()
        except RuleError as error:
            key = error.key or "rule"
            raise fail(str(error).removeprefix(f"key '{error.key}': "), key) from None
        return assignment


def _condition_complaint(key: str, values: Sequence[Any]) -> str | None:
    """What is wrong with one condition of an entry."""
    if key not in _WHERE_KEYS:
        return f"unknown condition; there are {', '.join(_WHERE_KEYS)}"
    whole = key in ("depth", "live")
    for value in values:
        if not isinstance(value, int if whole else str) or isinstance(value, bool):
            return f"wants {'whole numbers' if whole else 'text'}, got {value!r}"
        if key in ("op", "producer", "consumer") and value not in OPERATORS:
            return f"no operator is called '{value}' (names are ONNX's, such as Conv, Gemm, MatMul)"
        if key == "kind" and value not in KINDS:
            return f"no kind is called '{value}'; kinds are {', '.join(KINDS)}"
        if key == "role" and value not in ROLES:
            return f"no role is called '{value}'; roles are {', '.join(ROLES)}"
        if key == "position" and value not in POSITIONS:
            return f"no position is called '{value}'; positions are {', '.join(POSITIONS)}"
    return None if values else "is an empty list, which nothing matches"


# ---- printing ----------------------------------------------------------------------------------------------------

# Operators in the order in which a reader looks for them; all others follow.
_FIRST = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "Mul", "Add", "Sub", "Sum", "Mean")
_NONE = "none: an error lists such nodes"
_SHOWN, _WIDE = 6, 64  # how many names of operators stand in one row, and how many characters these take
_SEVERAL = ("Add", "Sub", "Sum", "Mean", "Max", "Min", "Div", "Pow", "Concat", "Where")  # may read two live tensors
_PLACES = {
    "first": "the first layer",
    "last": "the last layer",
    "inner": "between the first and the last layer",
    "preprocessing": "before the first layer",
}


def book_table(composite: Composite) -> str:
    """A rule book as a table: which rule each family of operators takes, and where."""
    families: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[str]] = {}
    for op in [*_FIRST, *(name for name in OPERATORS if name not in _FIRST)]:
        if op not in OPERATORS or OPERATORS[op].adjoint is None:
            continue
        one, two = rules_of(composite, op, 1), rules_of(composite, op, 2)
        several = op in _SEVERAL or (OPERATORS[op].verb == "bilinear" and op != "BatchNormalization")
        variants = [("one live input", one), ("two live inputs", two)] if several and one != two else [("", one)]
        for live, found in variants:
            families.setdefault((kind_of(op), live, found), []).append(op)
    rows = [("operator", "rule", "where")]
    uncovered = ((_NONE, ""),)
    for (_, live, found), names in families.items():
        if found == uncovered:
            continue
        label = _listed(names) + (f" ({live})" if live else "")
        rows.extend((label if k == 0 else "", rule, where) for k, (rule, where) in enumerate(found))
    if any(found == uncovered for _, _, found in families):
        rows.append(("everything else", _NONE, ""))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
    head = [f"{composite.name}: {composite.title}", *([composite.note] if composite.note else []), ""]
    return "\n".join([*head, *lines])


def _listed(names: Sequence[str]) -> str:
    """As many names as fit in a row, and how many there are besides."""
    shown = len(names) if len(names) <= _SHOWN + 1 else _SHOWN
    while len(", ".join(names[:shown])) > _WIDE:
        shown -= 1
    return ", ".join([*names[:shown], *([f"and {len(names) - shown} more"] if shown < len(names) else [])])


def rules_of(composite: Composite, op: str, live: int) -> tuple[tuple[str, str], ...]:
    """What calls of an operator can take, in order: rule, and in words the condition that decides at run time."""
    found: list[tuple[str, str]] = []
    before: list[Mapping[str, list[Any]]] = []
    for assignment in composite.assignments:
        where = assignment.where
        if not _possible(where, op, live):
            continue
        positions = [p for p in as_list(where.get("position", [])) if _can_stand(op, live, p)]
        if "position" in where and not positions:
            continue
        rest = {**where, "position": positions} if positions else where
        rest = {key: as_list(value) for key, value in rest.items() if key not in _STATIC}
        if any(all(set(rest.get(k, [None])) <= set(v) for k, v in other.items()) for other in before):
            continue  # an entry before this one takes all of them
        before.append(rest)
        condition = ", ".join(_words(key, value) for key, value in rest.items())
        found.append((str(assignment), condition))
        if not condition:
            break
    else:
        found.append((_NONE, ""))
    while len(found) > 1 and found[-2][0] == found[-1][0]:  # here and otherwise the same
        found.pop(-2)
    return (*found[:-1], (found[-1][0], "otherwise" if len(found) > 1 else ""))


_STATIC = ("op", "kind", "live")


def _possible(where: Mapping[str, Any], op: str, live: int) -> bool:
    """Whether some call of this operator can match what does not depend on where it stands."""
    facts = {"op": op, "kind": kind_of(op), "live": live}
    return all(facts[key] in as_list(where[key]) for key in _STATIC if key in where)


def _can_stand(op: str, live: int, position: str) -> bool:
    weighted = op in WEIGHTED and live == 1
    return position == "inner" or weighted == (position in ("first", "last"))


def _words(key: str, values: Sequence[Any]) -> str:
    prefix = {"name": "named ", "role": "role ", "producer": "fed by ", "consumer": "read by ", "depth": "depth "}.get(
        key, ""
    )
    words = [_PLACES[v] if key == "position" else str(v) for v in values]
    return prefix + (words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}")
