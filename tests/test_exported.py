"""Models fresh from the exporters of other frameworks: they rewrite, run, and pass verification.

Written by `python -m exporters.keras_nets --out DIR` and `python -m exporters.jax_nets --out DIR`, each where its
framework is installed (these do not get along with each other); then
`ONNX_LRP_EXPORTED=DIR python -m pytest -m heavy tests/test_exported.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnx_lrp.verify import verify

FOLDER = os.environ.get("ONNX_LRP_EXPORTED", "")
MODELS = sorted(Path(FOLDER).glob("*.onnx")) if FOLDER else []


@pytest.mark.heavy
@pytest.mark.skipif(not MODELS, reason="ONNX_LRP_EXPORTED names no folder with exported models")
@pytest.mark.parametrize("method", ["epsilon_plus_flat", "gradient"])
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_exported_models_verify(path: Path, method: str) -> None:
    found = verify(path, method=method, threads=1)
    assert found.reference
    assert found.ok
