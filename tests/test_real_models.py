"""Real architectures: the onnx package's light models, and trained models where they lie beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest

import onnx_lrp
from onnx_lrp.runtime import Session
from onnx_lrp.verify import verify

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
SHARED = Path(os.environ.get("ONNX_LRP_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "models"
BOOKS = ("epsilon_plus_flat", "zplus", "epsilon", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box")
TRAINED = sorted(p for p in SHARED.glob("*.onnx") if "vad_16k_if" not in p.name)


def explain_noise(explained: onnx_lrp.Explained) -> dict[str, np.ndarray]:
    session = Session(explained.model, device="cpu", threads=2)
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.random([d if isinstance(d, int) else 1 for d in info.shape]).astype(session.dtype(name))
        for name, info in session.inputs.items()
    }
    return session.run(feeds)


def assert_conserved(results: dict[str, np.ndarray], scale: float) -> None:
    """Everything is finite, and relevance and what was absorbed make up the score."""
    relevance = [v for name, v in results.items() if name.startswith("relevance/")]
    assert all(np.isfinite(r).all() for r in relevance)
    total = sum(r.astype(np.float64).sum() for r in relevance) + results["absorbed"].astype(np.float64).sum()
    score = float(results["score"].sum())
    assert abs(total - score) <= scale * abs(score)


@pytest.mark.parametrize("name", sorted(p.name for p in LIGHT.glob("*.onnx")))
def test_light_models(name: str) -> None:
    """AlexNet, DenseNet-121, Inception, ResNet-50, ShuffleNet, SqueezeNet, VGG-19, ZFNet at opset 9, weights made."""
    results = explain_noise(onnx_lrp.rewrite(LIGHT / name, "epsilon_plus_flat", ledger=True))
    assert_conserved(results, 1e-3)


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["epsilon_plus_flat", "gradient"])
@pytest.mark.parametrize("name", sorted(p.name for p in LIGHT.glob("*.onnx")))
def test_light_models_verify(name: str, method: str) -> None:
    found = verify(LIGHT / name, method=method)
    assert found.reference
    assert found.ok


@pytest.mark.skipif(not TRAINED, reason="the trained models do not lie beside the checkout")
@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("path", TRAINED, ids=lambda p: p.stem)
def test_trained_models_conserve(path: Path, book: str) -> None:
    results = explain_noise(onnx_lrp.rewrite(path, book, ledger=True))
    assert_conserved(results, 1e-3)


VOICE = [SHARED / f"silero_vad_16k_{form}_lstm.onnx" for form in ("if", "static")]


@pytest.mark.skipif(not all(p.exists() for p in VOICE), reason="the trained models do not lie beside the checkout")
@pytest.mark.parametrize("method", ["gradient", "epsilon_plus_flat"])
def test_nested_ifs_of_torch_are_seen_through(method: str) -> None:
    """The same network with and without the Ifs that torch leaves around an LSTM: the same relevance."""
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.1, (1, 576)).astype(np.float32)
    state = rng.normal(0, 0.1, (2, 1, 128)).astype(np.float32)
    feeds = {"input": wave, "in": wave, "state": state, "sr": np.array(16000)}
    found = []
    for model, shapes in ((VOICE[0], {"input": (None, 576)}), (VOICE[1], None)):  # ranks inside depend on it
        explained = onnx_lrp.rewrite(model, method, shapes=shapes)
        session = Session(explained.model, device="cpu", threads=1)
        results = session.run({name: feeds[name] for name in session.inputs})
        found.append([results[name] for name in explained.relevance.values()])
    for one, other in zip(*found, strict=True):
        assert np.abs(other).max() > 0
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
