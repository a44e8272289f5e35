"""Gradients as standard scores, and words on coloured ground."""

import numpy as np
import pytest

from onnx_lrp import show
from onnx_lrp.errors import InputError

RNG = np.random.default_rng(0)


def test_pixels_against_a_loop():
    gradient = RNG.standard_normal((2, 3, 5, 7)).astype(np.float32) * 1e-6 + 3
    found = show.z_pixels(gradient)
    for sample in range(2):
        for channel in range(3):
            pixels = gradient[sample, channel].astype(np.float64)
            expected = (pixels - np.mean(pixels)) / np.std(pixels)
            np.testing.assert_allclose(found[sample, channel], expected, rtol=1e-9, atol=1e-9)
    assert show.z_pixels(gradient[0, 0]).shape == (5, 7)


def test_tokens_against_a_loop():
    """n_i is a sum of magnitudes; padding has no part, and stays zero."""
    gradient = RNG.standard_normal((3, 6, 4))
    lengths = [6, 4, 2]
    content = np.arange(6) < np.array(lengths)[:, None]
    found, whole = show.z_tokens(gradient, content), show.z_tokens(gradient)
    for sample, length in enumerate(lengths):
        sizes = [sum(abs(number) for number in row) for row in gradient[sample]]
        expected = (np.array(sizes[:length]) - np.mean(sizes[:length])) / np.std(sizes[:length])
        np.testing.assert_allclose(found[sample, :length], expected, rtol=1e-9, atol=1e-12)
        assert not found[sample, length:].any()
        np.testing.assert_allclose(whole[sample], (sizes - np.mean(sizes)) / np.std(sizes), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(show.z_tokens(np.abs(gradient).sum(2)), whole, rtol=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.1, -1e30, 1e-300])
def test_what_is_constant_gets_zero(level):
    """Nothing is divided by zero, nor by the rounding of a mean."""
    with np.errstate(all="raise", under="ignore"):
        assert not show.z_pixels(np.full((2, 3, 5, 7), level)).any()
        assert not show.z_tokens(np.full((2, 7, 3), level)).any()
        alone = np.array([[True, False], [False, False]])  # one token, and none
        assert not show.z_tokens(np.array([[1.0, 2.0], [3.0, 4.0]]), alone).any()


def test_scores_of_what_is_not_constant_by_a_rounding_stay_finite():
    values = np.array([[5e-324, 0.0, 0.0]])
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(show.z_tokens(values)).all()
    assert np.abs(show.z_tokens(np.array([[1e-200, 3e-200]]))).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("score", [show.z_pixels, show.z_tokens])
@pytest.mark.parametrize(("bad", "words"), [([[1.0, np.nan]], "NaN or infinity"), ([1.0, 2.0], "got shape")])
def test_no_scores(score, bad, words):
    with pytest.raises(InputError, match=words):
        score(bad)


def test_content_of_another_shape():
    with pytest.raises(InputError, match=r"content wants an entry per token, \(2, 3\), got shape \(3,\)"):
        show.z_tokens(np.ones((2, 3, 4)), [True, True, False])


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_have_the_colour_of_their_relevance():
    pytest.importorskip("PIL")
    picture = np.asarray(show.words_picture(["aaa", "bbb", "ccc"], [2.0, -2.0, 0.0], numbers=False)).astype(int)
    red, green, blue = (picture[..., k] for k in range(3))
    favour, against = (red > blue + 80) & (red > green + 80), blue > red + 80
    assert favour.any()
    assert against.any()
    assert np.nonzero(favour)[1].max() < np.nonzero(against)[1].min(), "in their order"


def test_words_go_to_the_next_line_and_keep_their_scale():
    pytest.importorskip("PIL")
    words = ["word"] * 30
    narrow, wide = (show.words_picture(words, np.arange(30), width=width) for width in (200, 3000))
    assert narrow.width == 200
    assert narrow.height > 5 * wide.height
    pale, strong = (np.asarray(show.words_picture(["a"], [1.0], scale=s)).astype(int) for s in (100.0, 1.0))
    assert pale.sum() > strong.sum()


def test_no_words():
    for words, values in ((["a"], [1.0, 2.0]), ([], [])):
        with pytest.raises(InputError, match="do not belong together"):
            show.words_picture(words, values)
    with pytest.raises(InputError, match="NaN"):
        show.words_picture(["a"], [np.nan])
