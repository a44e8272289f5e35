"""Colour maps for relevance: values -1..1, where -1 speaks against, 0 says nothing and 1 speaks for.

A map is a few control points. Between them colours run straight in Oklab, where equal steps look equal, so that
no value is made to stand out by the map itself.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnx_lrp.errors import InputError

_STEPS = 255  # table entries on each side of the centre, which is exact

# From the strongest "against" over zero to the strongest "for", equally spaced. The lightness of "diverging" and
# "purplegreen" is mirrored, so neither sign looks stronger than the other.
_DIVERGING = {
    "diverging": "1a4094 2f79d6 73b7f7 c0e4fc ffffff fdd3ca fb8e80 d93032 86101f",
    "purplegreen": "552481 9459c8 c69cec e8d5f7 ffffff c3eac9 6fc884 2a904b 085023",
    "bwr": "0000ff ffffff ff0000",
    "seismic": "00004d 0000ff ffffff ff0000 800000",
    "coldnhot": "d9f7ff 35b6f2 1b5cb8 0b2350 000000 5a0d0b c23a14 f7a12b fff6cf",
    "gray": "000000 808080 ffffff",
}
# From zero to the strongest "for"; what speaks against is shown as zero.
_SEQUENTIAL = {
    "reds": "ffffff fdd3ca fb8e80 d93032 86101f",
    "hot": "000000 5a0d0b c23a14 f7a12b fff6cf",
    "ink": "ffffff 000000",
}
NAMES = (*_DIVERGING, *_SEQUENTIAL)
# No maps of one number, but of three: what each channel of a picture says, as its own colour. The order is the model's.
CHANNELS = ("rgb", "bgr")

_RGB_TO_LMS = np.array([[0.4122, 0.5363, 0.0515], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
_LMS_TO_LAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def apply(values: ArrayLike, name: str = "diverging") -> NDArray[np.uint8]:
    """Colour values of any shape.

    Args:
        values: numbers in -1..1; what lies outside is taken as the nearer end.
        name: one of NAMES.

    Returns:
        uint8 of shape (*values.shape, 3), RGB.

    Raises:
        InputError: an unknown name, or NaN among the values.
    """
    table = _table(name)
    numbers = np.asarray(values, np.float64)
    if np.isnan(numbers).any():
        raise InputError("cannot colour NaN; look for overflow or division by zero in the relevance")
    return table[np.rint((np.clip(numbers, -1, 1) + 1) * _STEPS).astype(np.intp)]


def is_sequential(name: str) -> bool:
    """Whether the map shows only what speaks for."""
    return name in _SEQUENTIAL


def is_dark(name: str) -> bool:
    """Whether zero is dark, so that lines drawn on it must be light."""
    return bool(apply(0.0, name).mean() < 100)


@cache
def _table(name: str) -> NDArray[np.uint8]:
    """The colours of -1..1 in 2 * _STEPS + 1 steps."""
    if name in CHANNELS:
        raise InputError(f"colour map {name!r} is for the relevance of pictures; give one of {', '.join(NAMES)}")
    if name not in NAMES:
        raise InputError(f"colour map {name!r} is unknown; give one of {', '.join(NAMES)}")
    points = (_DIVERGING | _SEQUENTIAL)[name].split()
    if name in _SEQUENTIAL:
        points = [points[0]] * (len(points) - 1) + points
    lab = _to_lab(np.array([list(bytes.fromhex(p)) for p in points]) / 255)
    places, where = np.linspace(-1, 1, len(points)), np.linspace(-1, 1, 2 * _STEPS + 1)
    mixed = np.stack([np.interp(where, places, channel) for channel in lab.T], axis=-1)
    table = np.rint(_to_rgb(mixed) * 255).astype(np.uint8)
    table.flags.writeable = False
    return table


def _to_lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T, np.float64)


def _to_rgb(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = np.clip((lab @ np.linalg.inv(_LMS_TO_LAB).T) ** 3 @ np.linalg.inv(_RGB_TO_LMS).T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
