"""Where relevance lies: how much of it in a region, and whether it is gathered or spread.

A map is (N, H, W), or (N, C, H, W) whose channels are summed. Only its positive part speaks for the class, so that is
what is measured; give `abs(map)` where the sign says nothing, as for gradients. A region is bool (N, H, W).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnx_lrp.errors import InputError
from onnx_lrp.runtime import Array

Region = npt.NDArray[np.bool_]


def region_of(boxes: npt.ArrayLike, height: int, width: int) -> Region:
    """The pixels inside of boxes, bool (N, H, W).

    Args:
        boxes: left, top, right, bottom in pixels, right and bottom exclusive: (N, 4), or (N, K, 4) for regions of K
            boxes.
        height: of the maps.
        width: likewise.

    Raises:
        InputError: boxes are of another shape.
    """
    found = np.asarray(boxes)
    if found.ndim not in (2, 3) or found.shape[-1] != 4:
        raise InputError(f"boxes are (N, 4) or (N, K, 4): left, top, right, bottom; got {found.shape}")
    left, top, right, bottom = np.moveaxis(found.reshape(len(found), -1, 4), -1, 0)[..., None, None]
    y, x = np.arange(height)[:, None], np.arange(width)
    return np.asarray(((left <= x) & (x < right) & (top <= y) & (y < bottom)).any(1))


def relevance_mass(relevance: Array, region: Region) -> Array:
    """Share of the positive relevance that lies in the region, (N,): relevance mass accuracy.

    Arras, Osman and Samek 2022 (CLEVR-XAI). By chance it is the region's share of the area; 0 for a map without
    positive relevance.

    Raises:
        InputError: map and region do not fit together, or the map is not finite.
    """
    heat, where = _maps(relevance, region)
    return _share((heat * where).sum(1), heat.sum(1))


def relevance_rank(relevance: Array, region: Region) -> Array:
    """Share of the K most relevant pixels that lie in a region of K pixels, (N,): relevance rank accuracy.

    Arras, Osman and Samek 2022 (CLEVR-XAI). Pixels of equal relevance share what is left of the K places, so a
    flat map has the region's share of the area, as by chance. 0 for an empty region.

    Raises:
        InputError: as for `relevance_mass`.
    """
    heat, where = _maps(relevance, region)
    wanted = where.sum(1)
    found = np.zeros(len(heat))
    for n, count in enumerate(wanted):
        if count:
            least = np.sort(heat[n])[-count]  # of the K most relevant
            above, level = heat[n] > least, heat[n] == least
            places = (count - above.sum()) / level.sum()
            found[n] = ((above & where[n]).sum() + places * (level & where[n]).sum()) / count
    return found


def pointing(relevance: Array, region: Region) -> Array:
    """Whether the most relevant pixel lies in the region, bool (N,): the pointing game.

    Zhang et al. 2018 (excitation backprop), with a tolerance of zero pixels: grow the region for another. False
    for a map without positive relevance. A single pixel says little: networks of random weights can win this game.

    Raises:
        InputError: as for `relevance_mass`.
    """
    heat, where = _maps(relevance, region)
    rows, best = np.arange(len(heat)), heat.argmax(1)
    return np.asarray(where[rows, best] & (heat[rows, best] > 0))


def entropy(relevance: Array) -> Array:
    """Shannon entropy of the positive relevance over the pixels, divided by its maximum, (N,).

    0 where one pixel has all, 1 where all have the same; 1 for a map without positive relevance, which points nowhere.

    Raises:
        InputError: the map is of another shape, or not finite.
    """
    heat = _heat(relevance)
    part = heat / np.where(heat.sum(1) > 0, heat.sum(1), 1)[:, None]
    bits = -np.sum(part * np.log(np.where(part > 0, part, 1)), axis=1) / np.log(heat.shape[1])
    return np.where(heat.sum(1) > 0, bits, 1.0)


def _heat(relevance: Array) -> Array:
    """Positive relevance of every pixel, float64 (N, H*W)."""
    found = np.asarray(relevance, np.float64)
    if found.ndim not in (3, 4) or not np.isfinite(found).all():
        raise InputError(f"a map is (N, H, W) or (N, C, H, W) of finite numbers, got {found.shape}")
    found = found.sum(1) if found.ndim == 4 else found
    return np.maximum(found.reshape(len(found), -1), 0)


def _maps(relevance: Array, region: Region) -> tuple[Array, Region]:
    heat, where = _heat(relevance), np.asarray(region)
    shape = (len(heat), *np.shape(relevance)[-2:])
    if where.dtype != bool or where.shape != shape:
        raise InputError(f"a region is bool {shape} for a map {np.shape(relevance)}, got {where.dtype} {where.shape}")
    return heat, where.reshape(len(where), -1)


def _share(part: Array, whole: Array) -> Array:
    return np.asarray(np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0))
