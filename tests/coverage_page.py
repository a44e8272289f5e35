"""The page docs/coverage.md: what is known of every operator of ONNX, and by what it is tested.

``python -m tests.coverage_page --write docs/coverage.md`` writes it; without ``--write`` it is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import onnx

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.quantization import QUANTIZED
from onnx_lrp.bodies import has_body
from onnx_lrp.composite import read_book, rules_of
from onnx_lrp.own_bodies import OWN_BODIES
from onnx_lrp.places import kind_of
from tests.backend_cases import NEWEST, OTHERS, TESTED, trials

BOOK = "epsilon_plus"
INTRO = f"""# Which operators are covered

Written by `python -m tests.coverage_page --write docs/coverage.md` from the registry, the rule books and the tests; a
test holds the page to them. Operators are those of ai.onnx up to opset {NEWEST}.

- **kind**: the operator's algebra, as rule books name it (`movement`: a linear operator that only moves elements).
- **adjoint**: *own*: registered in `onnx_lrp/adjoints/`; *body*: seen through the function body in ONNX's schema; *our
  body*: through one in `onnx_lrp/own_bodies.py`; *floats*: quantised, seen on the floats that its integers stand
  for; *barrier*: no derivative, influence stops there; *none*: refused, with
  the node's name, wherever a float that matters runs through it.
- **rule**: what the rule book `{BOOK}` does with one live input; *none*: no published rule, an error lists such nodes
  (the gradient family goes through them).
- **backend**: single-node cases of ONNX's backend tests that the adjoint passes in float64 (of several in which a float
  depends on a float); **random**: cases of our own, each in float64 and float32, with known and with symbolic lengths.
"""
PEERS = """## Beside the others

Per family, from running captum 0.9.0 and zennit 0.5.1 and from reading LXT and iNNvestigate. *rule*: a relevance rule;
*gradient*: passes as the plain gradient without saying so; *error*: refused.

| family | here | captum LRP | zennit | LXT | iNNvestigate |
| --- | --- | --- | --- | --- | --- |
| Linear, Conv2d | rule | rule | rule | rule | rule |
| Conv1d, Conv3d, transposed convolution | rule | error | rule | rule, by zennit | rule (those of Keras) |
| activations besides ReLU and Tanh | rule | error | rule, 22 of them | rule | rule |
| sums of two branches | rule | gradient: relevance doubles | gradient, but for ResNets | rule | rule |
| MaxPool, AveragePool | rule | rule | gradient, rule | gradient, none | gradient, rule |
| softmax within the model, attention | rule | error | gradient | rule, per architecture | error |
| layer and group normalization | rule | error | gradient | rule, layer and RMS | gradient |
| reshaping, slicing, gathering | rule | error as modules | gradient: exact | gradient: exact | gradient: exact |
| a layer used twice | each use apart | error | wrong: the last use counts | each use apart | each use apart |
| an operator without a rule | error that lists all | error | gradient | error or table | gradient |
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRO, *_table(), "", PEERS])


def _table() -> list[str]:
    from tests.test_adjoints_random import CASES

    random = Counter(case.op for case in CASES)
    tested = Counter(t.op for t in trials().values() if t.verdict == TESTED)
    book = read_book(BOOK)
    rows = ["| operator | kind | adjoint | rule | backend | random |", "| --- | --- | --- | --- | ---: | ---: |"]
    for op in operators():
        kind, form, rule = "", adjoint_form(op), ""
        if form in ("own", "barrier"):
            kind = kind_of(op)
        if form == "own":
            rule = rules_of(book, op, 1)[-1][0].split("(")[0].split(":")[0]
        counts = [str(n) if n else "" for n in (tested[op], random[op])]
        rows.append(f"| {op} | {kind} | {form} | {rule} | {' | '.join(counts)} |")
    return rows


def operators() -> list[str]:
    """All operators of ai.onnx that are not deprecated in the newest version."""
    latest: dict[str, onnx.defs.OpSchema] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        known = latest.get(schema.name)
        if not schema.domain and schema.since_version <= NEWEST:
            latest[schema.name] = schema if known is None or known.since_version < schema.since_version else known
    return sorted(name for name, schema in latest.items() if not schema.deprecated)


def adjoint_form(op: str) -> str:
    """How an operator comes by its adjoint."""
    if op in OPERATORS:
        return "barrier" if OPERATORS[op].verb == "barrier" else "own"
    if op in OWN_BODIES:
        return "our body"
    if op in QUANTIZED:
        return "floats"
    return "body" if has_body(op, NEWEST) and op not in OTHERS else "none"


def main() -> None:
    """Write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file to write")
    given = parser.parse_args()
    if given.write is None:
        sys.stdout.write(page())
    else:
        given.write.write_text(page())


if __name__ == "__main__":
    main()
