"""Helpers that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from onnx_lrp.reference import run_double, to_double

__all__ = ["RNG", "numbers", "run_double", "to_double", "worst", "write_image"]

# Wound back before every test (conftest.py), so that no test depends on which ones ran before it.
RNG = np.random.default_rng(7)
BEGIN = RNG.bit_generator.state


def numbers(*shape: int) -> np.ndarray:
    """Return random numbers."""
    return RNG.standard_normal(shape).astype(np.float32)


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected magnitude."""
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def write_image(path: Path, pixels: Any, **options: Any) -> Path:
    """Write pixels as a picture."""
    from PIL import Image

    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path
