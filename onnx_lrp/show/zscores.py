"""Gradients as standard scores, as Kim and Zhang (2017) show them: how far each place is from what is usual there."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnx_lrp.errors import InputError

Scores = NDArray[np.float64]


def z_pixels(gradient: ArrayLike) -> Scores:
    """Standard scores of every channel over its pixels, (g - mean) / std (Kim and Zhang 2017).

    Args:
        gradient: (..., H, W), such as the relevance (N, C, H, W) of a picture.

    Returns:
        The same shape: mean 0 and standard deviation 1 over the pixels of each channel; 0 where a channel is constant.

    Raises:
        InputError: fewer than two axes, NaN or infinity.
    """
    array = _finite(gradient)
    if array.ndim < 2:
        raise InputError(f"z_pixels wants (..., height, width), got shape {array.shape}")
    rows = array.reshape(*array.shape[:-2], -1)
    return _scores(rows, np.ones(rows.shape, bool)).reshape(array.shape)


def z_tokens(gradient: ArrayLike, content: ArrayLike | None = None) -> Scores:
    """Standard scores of the tokens of each text, (n - mean) / std of n_i = Σ_d |g_id| (Kim and Zhang 2017).

    Args:
        gradient: of the embedded tokens, (N, T, D), as reported with ``layers``; or (N, T), the magnitudes n that
            ``Hadamard(magnitude=True)`` reports for an input of token ids.
        content: which tokens are of the text, bool (N, T); what is not (padding) has no part in mean and deviation, and
            gets 0. Default: all.

    Returns:
        (N, T): mean 0 and standard deviation 1 over the tokens of each text; 0 where they are all the same.

    Raises:
        InputError: fewer than two axes, NaN or infinity, a `content` of another shape.
    """
    array = np.abs(_finite(gradient))
    if array.ndim < 2:
        raise InputError(f"z_tokens wants (texts, tokens, features), got shape {array.shape}")
    sums = array.reshape(*array.shape[:2], -1).sum(-1)
    among = np.ones(sums.shape, bool) if content is None else np.asarray(content, bool)
    if among.shape != sums.shape:
        raise InputError(f"content wants an entry per token, {sums.shape}, got shape {among.shape}")
    return _scores(sums, among)


def _scores(rows: Scores, among: NDArray[np.bool_]) -> Scores:
    """Scores over the last axis, of the entries that count."""
    count = np.maximum(among.sum(-1, keepdims=True), 1)
    away = np.where(among, rows - (rows * among).sum(-1, keepdims=True) / count, 0.0)
    # Told by the entries themselves: the mean of equal numbers may be off by a rounding, and so may each from it.
    high = rows.max(-1, keepdims=True, where=among, initial=-np.inf)
    spread = high > rows.min(-1, keepdims=True, where=among, initial=np.inf)
    size = np.abs(away).max(-1, keepdims=True)
    away = np.where(spread, away / np.where(spread, size, 1.0), 0.0)  # in units whose squares are no underflow
    deviation = np.sqrt((away**2).sum(-1, keepdims=True) / count)
    return np.asarray(away / np.where(spread, deviation, 1.0))


def _finite(gradient: ArrayLike) -> Scores:
    array = np.asarray(gradient, np.float64)
    if not np.isfinite(array).all():
        raise InputError("the gradient holds NaN or infinity; look for overflow or division by zero in the model")
    return array
