"""Is the explanation of a caption any good: on the thing that a word names, on what the word needs, and telling.

The measures of Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning for image captioning models", sec. 5.
Their tables need their models and data. What the model is asked is said by a `NextWord`: pictures (N, ...) and words
so far (N, T), <start> first, to probabilities (N, words). :meth:`onnx_lrp.captioner.Captioner.next` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.evaluate.perturbation import patches, pooled
from onnx_lrp.runtime import Array

NextWord = Callable[[Array, Array], Array]
THRESHOLDS = tuple(i / 10 for i in range(10))  # 0, 0.1, ... 0.9
QUANTILES = (0.5, 0.75, 0.9, 0.95)


def box_correctness(
    relevance: Array, boxes: Sequence[Array] | Array, thresholds: Sequence[float] = THRESHOLDS
) -> Array:
    """Share of the strong positive relevance that lies in the box of what a word names, at every threshold.

    Positive relevance, averaged over channels and divided by its largest value; what is not above the threshold does
    not count. Of several things of one kind the best box is taken, each scored on the same map. For the evidence
    against a word, give the relevance negated.

    Args:
        relevance: of pictures, (N, C, H, W) or (N, H, W).
        boxes: left, top, right, bottom in pixels, right and bottom exclusive: per sample (K, 4), or (4,) for one box.
        thresholds: from 0, as shares of the map's largest value.

    Returns:
        Shares (N, thresholds); 0 where a map holds nothing positive, since then it points at nothing.

    Raises:
        InputError: relevance of another shape, not as many boxes as samples, or a box outside of the picture.
    """
    maps = _maps(relevance)
    if len(boxes) != len(maps):
        raise InputError(f"{len(boxes)} sets of boxes for {len(maps)} maps; give one set per map")
    positive = np.maximum(np.asarray(relevance, np.float64), 0)
    positive = positive.mean(1) if positive.ndim == 4 else positive
    top = positive.max((1, 2), keepdims=True)
    shares = np.divide(positive, top, out=np.zeros_like(positive), where=top > 0)
    found = np.zeros((len(maps), len(thresholds)))
    for n, share in enumerate(shares):
        inside = [_box(box, share.shape) for box in np.asarray(boxes[n]).reshape(-1, 4)]
        if not inside:
            raise InputError(f"sample {n} has no box; give those of what its word names, or leave the sample out")
        for s, threshold in enumerate(thresholds):
            kept = np.where(share > threshold, share, 0)  # a map of its own: the next box sees the whole one
            found[n, s] = max(float(kept[box].sum()) for box in inside) / max(float(kept.sum()), 1e-30)
    return found


def image_ablation(
    model: NextWord,
    image: Array,
    caption: Array,
    relevance: Array,
    *,
    size: int = 8,
    count: int = 20,
    fill: Array | float = 0.0,
    order: Literal["most", "random"] = "most",
    seed: int = 0,
) -> Array:
    """How far the probability of each word falls when the most relevant patches of the picture are painted over.

    The words before are those of the caption. Whether a word goes altogether is seen by describing the picture that
    :func:`without_patches` gives.

    Args:
        model: what is asked.
        image: the picture, (C, H, W), pixels as the model takes them.
        caption: T words behind <start>, (T + 1,).
        relevance: of the picture for each of them, (T, C, H, W) or (T, H, W).
        size: side of a patch in pixels.
        count: how many go.
        fill: the paint; best the mean of the data, which is 0 for a model that takes normalised pixels.
        order: the most relevant ones, or as many at random to compare with.
        seed: of those.

    Returns:
        Probability before minus after, (T,).

    Raises:
        InputError: shapes that do not go together.
    """
    caption = np.asarray(caption)
    painted = without_patches(image, relevance, size=size, count=count, fill=fill, order=order, seed=seed)
    if len(painted) != len(caption) - 1:
        raise InputError(f"relevance is of {len(painted)} words, the caption has {len(caption) - 1} behind <start>")
    fallen = []
    for t, word in enumerate(caption[1:]):
        before = caption[None, : t + 1]
        fallen.append(model(image[None], before)[0, word] - model(painted[t : t + 1], before)[0, word])
    return np.array(fallen)


def without_patches(
    image: Array,
    relevance: Array,
    *,
    size: int = 8,
    count: int = 20,
    fill: Array | float = 0.0,
    order: Literal["most", "random"] = "most",
    seed: int = 0,
) -> Array:
    """The picture without its most relevant patches, once for every word: (T, C, H, W). See `image_ablation`."""
    relevance = np.asarray(relevance)
    ranking = pooled(relevance[:, None] if relevance.ndim == 3 else relevance, size)
    if order == "random":
        ranking = np.asarray(np.random.default_rng(seed).random(ranking.shape))
    if not 0 < count <= ranking.shape[1]:
        raise InputError(f"{count} patches of {ranking.shape[1]} cannot go; give 1 to {ranking.shape[1]}")
    gone = _strongest(ranking, count)
    repeated = np.repeat(np.asarray(image)[None], len(ranking), 0)
    return np.asarray(patches("image", size, fill)({"image": repeated}, gone)["image"])


def word_ablation(
    model: NextWord,
    image: Array,
    caption: Array,
    relevance: Array,
    *,
    count: int = 3,
    first: int = 6,
    order: Literal["most", "random"] = "most",
    seed: int = 0,
) -> Array:
    """How far the probability of each word falls when the most relevant words before it are left out of the text.

    <start> always stays. Words with too few others before them are not measured: NaN.

    Args:
        model: what is asked.
        image: the picture, without a batch axis.
        caption: T words behind <start>, (T + 1,).
        relevance: of the words before each word, (T, T): row t is of word t, column 0 of <start>.
        count: how many words go.
        first: the first word that is measured, counted from 0.
        order: the most relevant ones, or as many at random to compare with.
        seed: of those.

    Returns:
        Probability before minus after, (T,).

    Raises:
        InputError: shapes that do not go together.
    """
    caption, relevance = np.asarray(caption), np.asarray(relevance, np.float64)
    words = len(caption) - 1
    if relevance.shape != (words, words):
        raise InputError(f"relevance of {words} words is ({words}, {words}): a row per word, got {relevance.shape}")
    rng, fallen = np.random.default_rng(seed), np.full(words, np.nan)
    for t in range(max(first, count), words):
        ranking = rng.random(t) if order == "random" else relevance[t, 1 : t + 1]
        kept = np.concatenate([[True], ~_strongest(ranking[None], count)[0]])
        texts = caption[: t + 1], caption[: t + 1][kept]
        whole, less = (model(image[None], text[None])[0, caption[t + 1]] for text in texts)
        fallen[t] = whole - less
    return fallen


def map_statistics(relevance: Array) -> dict[str, Array]:
    """What a map has to say about the word that it explains, as single numbers (N,) per map.

    For :func:`auc`: do maps of words that are in the picture differ from those of words that the model made up?

    Args:
        relevance: of pictures, (N, C, H, W) or (N, H, W); channels are averaged.

    Returns:
        mean, mean of magnitudes, mean of the positive part, largest value, and quantiles.
    """
    rows = _maps(relevance).reshape(len(relevance), -1)
    found = {
        "mean": rows.mean(1),
        "mean magnitude": np.abs(rows).mean(1),
        "mean positive": np.maximum(rows, 0).mean(1),
        "max": rows.max(1),
    }
    return found | {f"quantile {q:g}": np.quantile(rows, q, axis=1) for q in QUANTILES}


def auc(values: Array, positive: Array) -> float:
    """Area under the ROC curve: the chance that a positive sample has the larger value, ties counting half.

    It is the statistic of Mann and Whitney over the number of pairs (Hanley and McNeil 1982).

    Args:
        values: (N,).
        positive: which samples should have large ones, bool (N,).

    Raises:
        InputError: samples of one kind only, or NaN.
    """
    values, positive = np.asarray(values, np.float64).reshape(-1), np.asarray(positive, bool).reshape(-1)
    if values.shape != positive.shape or not np.isfinite(values).all():
        raise InputError(f"auc wants a finite number and a truth per sample, got {values.shape} and {positive.shape}")
    if positive.all() or not positive.any():
        raise InputError("auc compares two kinds of samples; all of these are of one kind")
    yes, no = values[positive], np.sort(values[~positive])
    below, upto = np.searchsorted(no, yes, "left"), np.searchsorted(no, yes, "right")
    return float((below + upto).mean() / 2 / len(no))


def aucs(values: Mapping[str, Array], positive: Array) -> dict[str, float]:
    """The :func:`auc` of several statistics of the same samples."""
    return {name: auc(numbers, positive) for name, numbers in values.items()}


def _maps(relevance: Array) -> Array:
    """(N, H, W): the mean over channels."""
    array = np.asarray(relevance, np.float64)
    if array.ndim not in (3, 4) or not np.isfinite(array).all():
        raise InputError(f"maps are finite and (N, C, H, W) or (N, H, W), got {array.shape}")
    return array.mean(1) if array.ndim == 4 else array


def _box(box: Array, shape: tuple[int, ...]) -> tuple[slice, slice]:
    left, top, right, bottom = (int(edge) for edge in box)
    if not (0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0]):
        raise InputError(f"box {box.tolist()} is not inside of a picture {shape[1]} wide and {shape[0]} high")
    return slice(top, bottom), slice(left, right)


def _strongest(ranking: Array, count: int) -> Array:
    """Which of F features are the `count` largest of each row, bool (N, F); of equal ones the first."""
    chosen = np.argsort(-ranking, axis=1, kind="stable")[:, :count]
    found = np.zeros(ranking.shape, bool)
    np.put_along_axis(found, chosen, True, 1)
    return found
