"""Streams: order, errors at their place, threads that end, small batches run together, memory that does not grow."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
from onnx import helper

from onnx_lrp import Explainer, InputError
from onnx_lrp.stream import ahead, gathered
from tests.small_models import FLOAT, build, conv, normal, tokens, two_inputs
from tests.test_explainer import same

WAIT = 30  # seconds after which a thread that should have moved counts as stuck


def explainer(model=None, method="epsilon", **options):
    return Explainer(model or conv(), method, device="cpu", threads=1, **options)


def threads():
    return [t for t in threading.enumerate() if t.name == "onnx_lrp stream"]


def linear():
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "dense")]
    return build(nodes, {"x": (FLOAT, ("N", 3))}, {"y": (FLOAT, ("N", 2))}, {"w": normal(3, 2)})


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, 3, 100])
def test_every_batch_has_its_explanation_in_order(prefetch, gather):
    explain = explainer(ledger=True)
    batches = [normal(n, 3, 8, 8, seed=n) for n in (1, 1, 2, 7, 1, 3, 1, 4, 1)]
    found = list(explain.stream(iter(batches), prefetch=prefetch, gather=gather))
    assert len(found) == len(batches)
    for explanation, batch in zip(found, batches, strict=True):
        whole = explain(batch)
        same(explanation, whole)
        np.testing.assert_array_equal(explanation.inputs["x"], batch)
        np.testing.assert_allclose(explanation.absorbed, whole.absorbed, rtol=1e-5, atol=1e-6)
    assert not threads()


def test_what_is_read_ahead():
    explain, taken, free = explainer(), [], threading.Semaphore(0)

    def batches():
        for i in range(9):
            taken.append(i)
            yield normal(1, 3, 8, 8, seed=i)
            free.release()

    results = explain.stream(batches(), prefetch=0)
    next(results)
    assert taken == [0], "nothing is read ahead"
    results.close()
    taken.clear()
    results = explain.stream(batches(), prefetch=2)
    assert not threads(), "nothing begins before the first explanation is asked for"
    next(results)
    assert free.acquire(timeout=WAIT)
    assert free.acquire(timeout=WAIT), "the source is asked twice more while the first explanation is in use"
    results.close()
    assert taken == [0, 1, 2]
    assert not threads()


def test_the_next_batch_is_taken_while_the_present_one_runs(monkeypatch):
    explain = explainer()
    asked, run = threading.Event(), explain.session.run

    def batches():
        yield normal(1, 3, 8, 8)
        asked.set()
        yield normal(1, 3, 8, 8)

    def waits(*args):
        assert asked.wait(WAIT), "the second batch is asked for during the first run"
        return run(*args)

    monkeypatch.setattr(explain.session, "run", waits)
    assert len(list(explain.stream(batches()))) == 2


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, 8])
def test_errors_come_where_their_batch_would_have(prefetch, gather):
    explain = explainer(batch_size=3)

    def broken():
        yield from (normal(1, 3, 8, 8, seed=i) for i in range(4))
        raise OSError("the disk is gone")

    results = explain.stream(broken(), prefetch=prefetch, gather=gather)
    assert len([next(results) for _ in range(4)]) == 4
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)
    wrong = [normal(1, 3, 8, 8), normal(2, 3, 8, 8), normal(1, 3, 9), normal(1, 3, 8, 8)]
    results = explain.stream(wrong, prefetch=prefetch, gather=gather)
    assert [len(next(results)) for _ in range(2)] == [1, 2]
    with pytest.raises(InputError, match="wants shape") as caught:
        next(results)
    assert caught.value.__notes__ == ["in batch 2 of the stream, counted from 0"]
    assert not threads()


def test_an_interrupt_in_the_source_reaches_the_caller():
    def interrupted():
        yield normal(1, 3, 8, 8)
        raise KeyboardInterrupt

    results = explainer().stream(interrupted())
    next(results)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert not threads()


def test_a_run_that_fails_ends_the_thread(monkeypatch):
    explain = explainer()

    def fails(*args):
        raise MemoryError

    monkeypatch.setattr(explain.session, "run", fails)
    with pytest.raises(MemoryError):
        next(explain.stream(normal(1, 3, 8, 8) for _ in range(9)))
    assert not threads()


def test_a_loop_that_is_left_ends_the_thread():
    for _ in explainer().stream(normal(1, 3, 8, 8) for _ in range(1000)):
        break
    gc.collect()
    assert not threads()


def test_arguments_are_checked_at_once():
    with pytest.raises(InputError, match="prefetch is at least 0"):
        explainer().stream([], prefetch=-1)
    assert list(explainer().stream([])) == []


def test_small_batches_run_together(monkeypatch):
    explain, sizes = explainer(batch_size=4), []
    run = explain.session.run

    def counted(feeds):
        sizes.append(len(feeds["x"]))
        return run(feeds)

    monkeypatch.setattr(explain.session, "run", counted)
    list(explain.stream([normal(1, 3, 8, 8)] * 9, gather=True))
    assert sizes == [4, 4, 1]
    sizes.clear()
    list(explain.stream([normal(n, 3, 8, 8) for n in (3, 2, 2, 6)], gather=True))
    assert sizes == [3, 4, 4, 2]


def test_gathering_keeps_apart_what_differs():
    explain = explainer(tokens(), batch_size=8)
    batches = [{"ids": np.full((1, length), length)} for length in (3, 3, 5, 5, 3)]
    found = list(explain.stream(batches, gather=True))
    assert [e.relevance["ids"].shape for e in found] == [(1, 3), (1, 3), (1, 5), (1, 5), (1, 3)]
    for explanation, batch in zip(found, batches, strict=True):
        same(explanation, explain(batch))


@pytest.mark.parametrize("batch", [3, "N"])
def test_gathering_where_the_batch_is_another_axis(batch):
    explain = explainer(two_inputs(batch), batch_size=8)
    batches = [{"image": normal(n, 3, 4, 4, seed=n), "table": normal(n, 2, seed=n)} for n in (1, 2, 5, 8, 1)]
    for explanation, fed in zip(explain.stream(batches, gather=True), batches, strict=True):
        same(explanation, explain(fed))
        assert explanation.outputs["state"].shape == (8, len(fed["table"]))


def test_gathering_tells_parameters_of_the_method_apart():
    explain = explainer(method="epsilon_gamma_box", batch_size=8)
    x = normal(1, 3, 8, 8)
    batches = [{"x": x, "low": np.full((1, 3, 1, 1), low), "high": np.full((1, 3, 1, 1), 5.0)} for low in (-5, -5, -9)]
    found = list(explain.stream(batches, gather=True))
    same(found[1], explain(batches[1]))
    same(found[2], explain(batches[2]))
    assert not np.allclose(found[1].relevance["x"], found[2].relevance["x"])


@pytest.mark.parametrize("gather", [False, True])
def test_ten_thousand_batches_take_no_more_memory_than_ten(gather):
    explain, most = explainer(linear()), {}
    for count in (10, 10_000):
        alive: set[int] = set()
        largest = 0

        def batches(count=count, alive=alive):
            for i in range(count):
                x = np.full((1, 3), i, np.float32)
                alive.add(i)
                weakref.finalize(x, alive.discard, i)
                yield x

        for i, explanation in enumerate(explain.stream(batches(), prefetch=2, gather=gather)):
            assert explanation.inputs["x"][0, 0] == i
            largest = max(largest, len(alive))
        del explanation
        gc.collect()
        assert not alive
        most[count] = largest
    bound = (4 if gather else 1) * (2 + 3)
    assert most[10_000] <= bound, most


def test_ahead_takes_no_more_than_it_may():
    taken = []

    def source():
        for i in range(100):
            taken.append(i)
            yield i

    for i in ahead(source(), 3):
        assert len(taken) <= i + 4
    assert len(taken) == 100


def test_gathered():
    def groups(sizes, limit, joins=lambda one, other: True):
        return list(gathered(sizes, lambda n: n, limit, joins))

    assert groups([1, 1, 1, 1, 1], 2) == [[1, 1], [1, 1], [1]]
    assert groups([1, 5, 1], 2) == [[1], [5], [1]]
    assert groups([1, 2, 1], 2) == [[1], [2], [1]]
    assert groups([1, 1], 1) == [[1], [1]]
    assert groups([1, 1, 2, 2], 4, lambda one, other: one == other) == [[1, 1], [2, 2]]
    assert groups([], 4) == []
