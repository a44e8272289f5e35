"""The command `benchmark` and what it measures with: no figure is compared with a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import onnx_lrp
from onnx_lrp import InputError, ModelError, measure
from onnx_lrp.cli import main
from onnx_lrp.measure import FORWARD, alone, benchmark, knows_memory, medians, resident, turns
from onnx_lrp.roles import Spec, noise
from tests.small_models import FLOAT, INT64, build, conv, normal, tokens, two_inputs

QUICK = {"threads": 1, "rounds": 1, "enough": 0.0}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*argv, code=0):
        capsys.readouterr()
        found = main(["benchmark", *map(str, argv), "--threads", "1", "--rounds", "1"])
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed

    return run


@pytest.fixture
def quick(monkeypatch):
    """Turns of one call each."""
    monkeypatch.setattr(measure.benchmark, "__kwdefaults__", {**measure.benchmark.__kwdefaults__, "enough": 0.0})


def masked():
    """A classifier of token ids that sums the rows of those that count."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"], "embed"),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["column"], "column"),
        helper.make_node("Cast", ["column"], ["counts"], "counts", to=FLOAT),
        helper.make_node("Mul", ["e", "counts"], ["kept"], "keep"),
        helper.make_node("ReduceSum", ["kept", "middle"], ["s"], "sum", keepdims=0),
        helper.make_node("Gemm", ["s", "v"], ["logits"], "dense"),
    ]
    weights = {"table": normal(10, 4), "last": np.array([-1]), "middle": np.array([1]), "v": normal(4, 3, seed=1)}
    inputs = dict.fromkeys(("input_ids", "attention_mask"), (INT64, ("N", "T")))
    return build(nodes, inputs, {"logits": (FLOAT, ("N", 3))}, weights)


def saved(model, name="model.onnx"):
    onnx.save(model, name)
    return name


def test_the_command_prints_and_writes_all_figures(call, quick):
    model = saved(conv())
    printed = call(
        model, "-m", "epsilon", "-m", "gradient", "--batch-size", 1, "--batch-size", 4, "--json", "figures.json"
    )
    found = json.loads(Path("figures.json").read_text())
    assert found["model"] == model
    assert found["providers"] == ["CPUExecutionProvider"]
    methods = [FORWARD, "epsilon", "gradient"]
    assert [(c["batch"], c["method"]) for c in found["costs"]] == [(n, m) for n in (1, 4) for m in methods]
    for cost in found["costs"]:
        assert cost["seconds"] > 0
        assert cost["samples_per_second"] == pytest.approx(cost["batch"] / cost["seconds"])
        assert (cost["peak_bytes"] or 0) > 1e5 if knows_memory() else cost["peak_bytes"] is None
    for forward, *others in (found["costs"][:3], found["costs"][3:]):
        assert forward["per_forward"] == 1
        assert all(c["per_forward"] == pytest.approx(c["seconds"] / forward["seconds"]) for c in others)
    source, *made = found["made"]
    assert source["file_bytes"] == Path(model).stat().st_size
    for row in made:
        explained = onnx_lrp.rewrite(model, row["method"])
        explained.save("explained.onnx")
        assert row["nodes"] == len(explained.model.graph.node)
        assert row["file_bytes"] == Path("explained.onnx").stat().st_size
        assert row["rewriting_seconds"] > 0
        assert row["placement"]["nodes"].keys() == {"CPUExecutionProvider"}
    lines = printed.out.splitlines()
    assert lines[0] == "model.onnx on CPUExecutionProvider, threads: 1; medians of 1"
    assert "batch                ms  per forward  samples/s  peak MB" in " ".join(lines[3:4])
    assert sum(line.split()[1:2] == ["forward"] for line in lines) == 2
    assert f"  gradient  {made[1]['placement']['nodes']['CPUExecutionProvider']} on CPUExecutionProvider" in lines


def test_quiet_and_without_memory(call, quick):
    model = saved(conv(2))
    printed = call(model, "-q", "--no-memory", "--json", "figures.json")
    assert printed.out == printed.err == ""
    costs = json.loads(Path("figures.json").read_text())["costs"]
    assert [(c["batch"], c["method"], c["peak_bytes"]) for c in costs] == [
        (2, FORWARD, None),
        (2, "epsilon_plus_flat", None),
    ], "the batch is fixed at two"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "3"], "the model takes batches of 2 only, not of 3: leave --batch-size out"),
        (["-m", "epsilon", "-m", "epsilon"], "method epsilon is given twice"),
        (["-m", "lrp"], "lrp"),
        (["--batch-size", "0"], "0 is below 1"),
        (["--json", "missing/figures.json"], "the folder missing is missing"),
        (["--json", "model.onnx"], "this is an input"),
        (["--device", "cuda"], "no CUDA provider"),
    ],
)
def test_wrong_usage_is_one_line(call, options, words):
    saved(conv(2))
    printed = call("model.onnx", "--no-memory", *options, code=2)
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_open_lengths_are_asked_for(call, quick):
    model = saved(tokens())
    line = call(model, code=2).err
    assert line == "onnx-lrp: input 'ids' has open lengths (N, T): say them with --shape, or give an input\n"
    call(model, "--shape", "ids:?,7", "--no-memory", "--batch-size", 2)


def test_what_goes_in_is_what_texts_would_feed(monkeypatch):
    fed = []
    monkeypatch.setattr(
        measure, "_call", lambda session, feeds: fed.append(feeds) or (lambda: session.run(None, feeds))
    )
    shapes = dict.fromkeys(("input_ids", "attention_mask"), (None, 6))
    found = benchmark(masked(), ["epsilon"], batch_sizes=[2], shapes=shapes, memory=False, **QUICK)
    assert [c.method for c in found.costs] == [FORWARD, "epsilon"]
    assert fed[0]["input_ids"].shape == (2, 6)
    np.testing.assert_array_equal(fed[0]["attention_mask"], np.ones((2, 6)))


def test_noise_of_every_kind_of_input():
    ids, flags = np.dtype(np.int64), np.dtype(bool)
    found = noise(
        {
            "x": Spec(np.dtype(np.float32), ("N", 3)),
            "input_ids": Spec(ids, ("N", 5)),
            "attention_mask": Spec(ids, ("N", 5)),
            "position_ids": Spec(ids, ("N", 5)),
            "past_key": Spec(np.dtype(np.float32), ("N", 2, "P", 4)),
            "use_cache": Spec(flags, (1,)),
            "steps": Spec(ids, ()),
        },
        batch=3,
    )
    assert {name: array.shape for name, array in found.items()} == {
        "x": (3, 3),
        "input_ids": (3, 5),
        "attention_mask": (3, 5),
        "position_ids": (3, 5),
        "past_key": (3, 2, 0, 4),
        "use_cache": (1,),
        "steps": (),
    }
    assert set(np.unique(found["input_ids"])) == {0, 1}
    assert (found["attention_mask"] == 1).all()
    np.testing.assert_array_equal(found["position_ids"][0], range(5))
    assert found["x"].dtype == np.float32
    with pytest.raises(InputError, match=r"input 'x' has open lengths \(N, \?\)"):
        noise({"x": Spec(np.dtype(np.float32), ("N", None))})


def test_external_data_stays_where_it_is(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(conv(channels=64), path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    found = benchmark(path, ["epsilon"], **QUICK)
    weights = (tmp_path / "weights.bin").stat().st_size
    assert found.made[0].file_bytes == path.stat().st_size + weights
    assert found.made[1].file_bytes > weights
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]


def test_several_inputs_and_methods_as_objects():
    found = benchmark(two_inputs(), [onnx_lrp.Gradient(), "epsilon"], memory=False, **QUICK)
    assert [m.method for m in found.made] == [FORWARD, "gradient", "epsilon"]
    with pytest.raises(InputError, match="rounds is at least 1"):
        benchmark(conv(), rounds=0)
    with pytest.raises(InputError, match="at least one method"):
        benchmark(conv(), [])
    with pytest.raises(InputError, match="batch_size is at least 1"):
        benchmark(conv(), batch_sizes=[0])


def test_calls_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert medians(calls, 2, 0.0).keys() == {"a", "b"}
    assert order == [*"aabb", *"ab"], "the first call of each does not count"


def test_short_calls_are_warmed_up_in_every_turn():
    ticks, order = iter(range(1000)), []
    turns({"a": lambda: order.append("a")}, 2, enough=2.5, clock=lambda: next(ticks))
    assert order == [*"aaaa", *"aaaa"], "one that does not count, and three until three ticks have passed"


@pytest.mark.skipif(not knows_memory(), reason="this system does not tell the peak of a process")
def test_memory_is_that_of_the_process_alone(tmp_path):
    ballast = np.ones(25_000_000)  # 200 MB here, of which the other process knows nothing
    assert resident("VmRSS") > 200e6
    found = benchmark(conv(), ["epsilon"], **QUICK)
    assert all(1e5 < cost.peak_bytes < 150e6 for cost in found.costs)
    assert ballast[0]
    large = benchmark(conv(size=512), ["epsilon"], batch_sizes=[8], **QUICK)
    image = 8 * 3 * 512 * 512 * 4
    assert all(cost.peak_bytes > 2 * image for cost in large.costs), "input and convolution"


def test_a_process_that_fails_is_told():
    with pytest.raises(ModelError, match=r"ends with code 1: .*no\.npz"):
        alone("onnx_lrp.measure", {"feeds": "no.npz"})


def test_a_device_that_does_not_load_is_told_once(call, quick, monkeypatch):
    model = saved(conv())
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    printed = call(model, "--no-memory")
    assert printed.err.count("the CUDA provider does not load, so the CPU runs") == 1
    assert printed.out.startswith("model.onnx on CPUExecutionProvider,")
