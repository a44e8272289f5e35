"""How cost grows: the benchmark runs at small sizes, and its numbers come back as they were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks import scaling

PNG = b"\x89PNG\r\n"


def test_series_are_measured_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, page, picture = (tmp_path / name for name in ("numbers.json", "page.md", "picture.png"))
    page.write_text("before\n<!-- scaling:begin -->\nold\n<!-- scaling:end -->\nafter\n", encoding="utf-8")
    small = [
        "--rounds",
        "1",
        "--shrink",
        "16",
        "--most",
        "32",
        "--threads",
        "1",
        "--series",
        "conv",
        "matmul",
        "length",
    ]
    scaling.main([*small, "--json", str(numbers), "--picture", str(picture), "--write", str(page)])
    shown = capsys.readouterr().out
    assert picture.read_bytes().startswith(PNG)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert shown.strip() in text

    scaling.main(["--from", str(numbers)])
    assert capsys.readouterr().out.splitlines()[2:] == shown.splitlines()[2:]  # all but date and command


def test_growth_is_the_exponent_of_the_last_steps() -> None:
    points = [scaling.Point(n, 5.0 * n, {"m": 2.0 * n * n}, 1.0, n) for n in (1, 10, 20, 40)]
    series = scaling.Series("s", "title", "network", "axis", 1, points)
    assert series.growth(lambda p: p.forward) == pytest.approx(1)
    assert series.growth(lambda p: p.explained["m"]) == pytest.approx(2)
    table = list(scaling.lines_on(series, {}))
    assert table[0].strip() == "**title**: network"
    assert any(line.startswith("| m, ms |") and line.endswith("n^2.00 |") for line in table)


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_chains_keep_the_scale_of_what_they_read(op: str) -> None:
    """So that a deep one measures numbers, not zeros or infinities."""
    side = 8 if op == "Conv" else 1
    session = ort.InferenceSession(scaling.chain(op, 50, 32, side).SerializeToString())
    shape = (4, 32, side, side) if op == "Conv" else (4, 32)
    (y,) = session.run(None, {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)})
    assert 1e-3 < np.abs(y).max() < 1e3


def test_a_file_of_other_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds no numbers of"):
        scaling.main(["--from", str(path)])
