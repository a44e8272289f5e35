"""The constructions that benchmarks time: each is right at small sizes, and what is wrong is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from benchmarks import constructions as c
from benchmarks.ways import graph as w
from benchmarks.ways.pooling import MAX_POOL


def small(family: w.Family) -> list[w.Case]:
    """The family's cases with few channels, at an even and at an odd size."""
    found = []
    for case in family.cases:
        group = 1 if case.group == 1 else 16 if case.group == case.channels else 4
        few = [min(n, 16) for n in (case.channels, case.made)]
        least = max(10, 2 * case.kernel)
        for size in (least, least + 1):
            kept = replace(case, channels=few[0], made=few[1], size=size, group=group, batch=min(case.batch, 2))
            found.append(kept if case.size > 1 else replace(kept, size=1))
    return list(dict.fromkeys(found))


CASES = [
    pytest.param(family, case, id=f"{name}: {case}") for name, family in c.FAMILIES.items() for case in small(family)
]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_every_way_is_equal(family: w.Family, case: w.Case) -> None:
    wrong = {"Resize, Equal"}  # gives every one of several largest elements the whole cotangent
    found = {}
    for way in family.ways:
        built = w.model_of(family, way, case)
        if built is not None:
            found[way] = c.bound(*built, 1)[1]
    assert family.used(case) in found
    assert len(found) > 1
    first = next(iter(found.values()))
    off = {way for way, outputs in found.items() if c.difference(outputs, first) > w.LIMIT}
    assert off == wrong & found.keys()


def convolved(case: w.Case) -> Callable[[torch.Tensor], torch.Tensor]:
    weights = torch.from_numpy(w.weights_of(case))
    return lambda x: F.conv2d(x, weights, stride=case.stride, padding=case.pad, groups=case.group)


def pooled(case: w.Case) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.max_pool2d(x, case.kernel, case.stride, case.pad)


def averaged(case: w.Case) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.avg_pool2d(x, case.kernel, case.stride, case.pad)


ORACLES = {
    "stride_one": convolved,
    "strided": convolved,
    "depthwise": convolved,
    "max_pool": pooled,
    "average_pool": averaged,
}


@pytest.mark.parametrize("name", ORACLES)
def test_the_first_way_is_the_gradient(name: str) -> None:
    """Torch's autograd in float64; the convolutions before and after are taken out by making them identities."""
    family = c.FAMILIES[name]
    for case in small(family):
        graph, given = w.Graph(), family.inputs(case)
        made = family.ways[next(iter(family.ways))](graph, {n: n for n in given}, case)
        assert made is not None
        *_, found = c.bound(graph.model(given, made), given, 1)[1]
        x = torch.from_numpy(given.get("x", w.numbers(*w.picture(case), seed=3))).double().requires_grad_()
        y = ORACLES[name](case)(x)
        (expected,) = torch.autograd.grad(y, x, torch.from_numpy(given["d"]).double())
        assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_a_wrong_way_is_refused_not_timed() -> None:
    row = c.measured(MAX_POOL, w.Case(16, size=8, kernel=2, stride=2), 1, 1)
    assert row.error["Resize, Equal"] > w.LIMIT
    assert "Resize, Equal" not in row.ms
    assert row.best in row.ms
    lines = list(c.table([row]))
    assert "off by" in lines[-1]


def test_numbers_come_back_as_they_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    c.main(["--families", "dense", "--rounds", "1", "--threads", "1", "--json", str(numbers)])
    shown = capsys.readouterr().out.splitlines()[2:]
    c.main(["--from", str(numbers)])
    assert capsys.readouterr().out.splitlines()[2:] == shown  # all but date and command
