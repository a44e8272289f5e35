"""Benchmarks compare what computes the same: every engine of the table runs on its networks, small ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import measure, peers
from benchmarks.engines import ENGINES, FORWARD, TABLE, Case, beside, engines
from benchmarks.sizes import Sizes

SMALL = Sizes(picture=32, length=6, shrink=16)
AGREE = 1e-5
NAMED = [name for name in TABLE if name not in ("vgg19", "gru", "rnn")]  # which are another number or word of the same


def small(folder: Path, name: str, **options: object) -> Case:
    return Case(name, folder, **{"batch": 2, "sizes": SMALL, "threads": 1, "steps": 4} | options)  # type: ignore[arg-type]


def available(names: list[str]) -> list[str]:
    """Without the engines whose package is not installed: `make test` installs all."""
    missing = {name.split("_")[0] for name in ("zennit", "captum", "lxt") if not importable(name)}
    return [name for name in names if name.split("_")[0] not in missing]


def importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def agree(case: Case, names: list[str]) -> None:
    """Run engines, and compare each with the one of ours that it is listed beside."""
    peers.prepare(case, names, repeats=1)
    for group in peers.groups(case, names):
        found = {}
        for name in group:
            # Peers in float64, so that what differs is our own rounding.
            call = ENGINES[name].make(replace(case, dtype="float64") if ENGINES[name].torch else case)
            call()
            found[name] = call.found()
            assert np.isfinite(found[name]).all()
            assert np.any(found[name])
        for name in group:
            ours = found.get(beside(case, name))
            if ENGINES[name].same and ours is not None and name != FORWARD:
                assert peers.difference(ours, found[name]) < AGREE, name


@pytest.mark.parametrize("name", NAMED)
def test_engines_agree(tmp_path: Path, name: str) -> None:
    sizes = replace(SMALL, shrink=8) if name == "mobilenet_v2" else SMALL  # its thin layers would die
    case = small(tmp_path, name, sizes=sizes)
    agree(case, available(engines(case, list(ENGINES))))


def test_frames_are_explained(tmp_path: Path) -> None:
    case = small(tmp_path, "vgg16", batch=1)
    agree(case, engines(case, ["live"]))


def test_a_run_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path of --device cuda, on the CPU: fixed shapes, shares of the peak; then a table, numbers and a picture."""
    page, numbers, picture = tmp_path / "page.md", tmp_path / "numbers.json", tmp_path / "picture.svg"
    page.write_text("before\n<!-- peers:begin -->\nold\n<!-- peers:end -->\nafter\n")
    size = ["--shrink", "16", "--length", "4", "--threads", "1", "--rounds", "1", "--batches", "1,2"]
    chosen = ["--networks", "lstm", "--engines", "epsilon,gradient,torch_gradient", "--no-memory"]
    peers.main([*chosen, *size, "--graphs", "--peak-tflops", "1", "--json", str(numbers), "--write", str(page)])
    capsys.readouterr()
    found = json.loads(numbers.read_text())["networks"]["lstm"]
    assert list(found["batches"]) == ["1", "2"]
    for rows in found["batches"].values():
        assert list(rows) == [FORWARD, "epsilon", "gradient", "torch_gradient"]
        assert rows[FORWARD]["per_forward"] == 1
        assert all(row["ms"] > 0 and row["a_second"] > 0 for row in rows.values())
        assert 0 < rows["epsilon"]["share"] < 1
    assert found["differences"]["torch_gradient"] < AGREE
    text = page.read_text()
    assert text.startswith("before\n<!-- peers:begin -->\n")
    assert text.endswith("\n<!-- peers:end -->\nafter\n")
    assert "old" not in text
    assert "| gradient against torch, gradient of the input |" in text
    pytest.importorskip("matplotlib")
    peers.main(["--from", str(numbers), str(numbers), "--plot", str(picture)])
    assert capsys.readouterr().out.count("**lstm**") == 1
    assert "<svg" in picture.read_text()


def test_half_precision_runs(tmp_path: Path) -> None:
    case = small(tmp_path, "vit", dtype="float16")
    peers.prepare(case, ["attnlrp"], repeats=1)
    call = ENGINES["attnlrp"].make(case)
    call()
    assert call.found().dtype == np.float32  # relevance of a float16 model
    assert np.isfinite(call.found()).all()


def test_no_gpu_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^--device cuda: .*$"):
        peers.main(["--device", "cuda"])


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--networks", "vgg61"])
    assert "there is no vgg61; there are vgg16" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells of a process's memory")
def test_peaks_are_those_of_what_is_run() -> None:
    """An array of 80 MB made at the start, one of 40 MB in the call."""
    everything = measure.peak(holding)
    call = measure.peak(holding, beyond="loaded")
    assert everything is not None
    assert call is not None
    assert 110 < everything < 140
    assert 35 < call < 60


def holding() -> measure.Call:
    held = np.ones(10_000_000)
    return lambda: float(np.ones(5_000_000)[0] + held[0])


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n")
    with pytest.raises(SystemExit, match="no lines <!-- peers:begin -->"):
        measure.publish(["line"], page, "peers")
    assert page.read_text() == "text\n"
