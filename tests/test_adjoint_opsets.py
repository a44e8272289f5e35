"""Adjoints at every version of the operator set in which an operator changed, from 18 to the newest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx
import pytest

from onnx_lrp.adjoints import OPERATORS
from tests.adjoint_tools import Case, check
from tests.backend_cases import NEWEST

peer = pytest.importorskip("tests.adjoint_torch")
CASES = pytest.importorskip("tests.test_adjoints_random").CASES
SAMPLES = 3  # cases of an operator, spread over all that there are
UNRUN = {"GlobalLpPool", "RoiAlign"}  # ONNX Runtime 1.32 has no kernel of their newest version


def versions(op: str) -> list[int]:
    """The versions in which an operator changed, the oldest that is emitted among them."""
    found = {s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == op and not s.domain}
    return sorted({max(18, v) for v in found if v <= NEWEST})


def cases() -> Iterator[Case]:
    for op, operator in OPERATORS.items():
        own = [c for c in CASES if c.op == op and operator.adjoint is not None]
        own = [c for c in own if op != "DFT" or "axis" not in c.attrs]  # an input since opset 20
        for case in own[:: max(1, len(own) // SAMPLES)][:SAMPLES]:
            for version in versions(op):
                if version > case.opset:  # the attributes of a case want at least its own version
                    runs = case.in_runtime and op not in UNRUN
                    yield replace(case, opset=version, in_runtime=runs, note=f"{case.note}opset{version}")


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_adjoint(case: Case) -> None:
    check(case, peer.autograd if case.op in peer.TORCH and not case.unseeded else None)
