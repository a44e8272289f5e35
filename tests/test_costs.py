"""What explanations cost, counted: a change of nodes, multiplications or bytes has to be meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.costs import counted, methods

RECORDED = json.loads(Path(__file__).with_name("costs.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_costs_are_those_on_record(name: str) -> None:
    """After a change that is meant: `python -m benchmarks.costs --write tests/costs.json`, and say why."""
    assert {method: counted(name, method) for method in methods(name)} == RECORDED[name]


def test_passes_are_as_few_as_the_rules_allow() -> None:
    """One pass forward and one back where the output is the denominator; a third for that of z-plus."""
    for name in ("vgg16", "resnet18", "resnet50", "mobilenet"):
        row = {method: count["multiplications"] for method, count in RECORDED[name].items()}
        assert row["gradient"] <= row["epsilon"] <= 2.01
        assert row["epsilon_plus_flat"] <= 3.01
