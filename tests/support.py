"""Helpers that several test files share."""

from __future__ import annotations

import numpy as np

from onnx_lrp.reference import run_double, to_double

__all__ = ["run_double", "to_double", "worst"]


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected magnitude."""
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())
