"""The shipped model: as good as it says, and explained by the object that decides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lrp
from exporters import shapes

FOLDER = Path(shapes.__file__).resolve().parent.parent / "examples" / "shapes"
MODEL = FOLDER / "shapes.onnx"


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int, int]]]:
    """Fresh pictures as the model takes them, their labels, and the boxes of the objects that decide."""
    rng = np.random.default_rng(20260)
    items = [shapes.draw(rng, k % 6) for k in range(240)]
    pictures = np.stack([p for p, _, _ in items]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return pictures, np.array([label for _, label, _ in items]), [box for _, _, box in items]


def test_size_and_operators() -> None:
    assert MODEL.stat().st_size <= 500_000
    model = onnx.load(MODEL)
    ops = {node.op_type for node in model.graph.node}
    assert {"Conv", "BatchNormalization", "MaxPool", "Add", "Gemm"} <= ops
    classes = json.loads({p.key: p.value for p in model.metadata_props}["classes"])
    assert classes == (FOLDER / "labels.txt").read_text().split("\n")[: len(classes)]


def test_accuracy(drawn: tuple[np.ndarray, np.ndarray, list[tuple[int, int, int, int]]]) -> None:
    pictures, labels, _ = drawn
    found = onnx_lrp.Explainer(MODEL, device="cpu")(pictures).outputs["logits"].argmax(1)
    assert (found == labels).mean() >= 0.98


def test_relevance_lies_on_the_object(
    drawn: tuple[np.ndarray, np.ndarray, list[tuple[int, int, int, int]]],
) -> None:
    """A box holds about a tenth of the picture; the default rule book puts most of the relevance into it."""
    pictures, labels, boxes = drawn
    maps = onnx_lrp.Explainer(MODEL, device="cpu")(pictures, target=labels).relevance["image"].sum(1)
    inside, hit = [], []
    for relevance, (left, top, right, bottom) in zip(maps, boxes, strict=True):
        for_it = relevance.clip(min=0)
        inside.append(for_it[top:bottom, left:right].sum() / for_it.sum())
        y, x = np.unravel_index(relevance.argmax(), relevance.shape)
        hit.append(top <= y < bottom and left <= x < right)
    assert np.mean(inside) >= 0.7
    assert np.mean(hit) >= 0.97
