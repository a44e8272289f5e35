"""Pictures of explanations: zero is neutral, signs keep their colour, sums survive, files are whole or absent."""

import errno

import numpy as np
import pytest

from onnx_lrp import show
from onnx_lrp.errors import InputError
from onnx_lrp.show import canvas, charts, colormaps

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
TWO_SIDED = [name for name in colormaps.NAMES if not colormaps.is_sequential(name)]


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", colormaps.NAMES)
def test_colour_maps_have_a_neutral_centre_and_two_ends(name):
    centre, low, high = (colormaps.apply(v, name).astype(int) for v in (0, -1, 1))
    assert np.ptp(centre) <= 1, "zero is white, gray or black"
    assert np.abs(high - centre).max() > 60
    assert (np.abs(low - centre).max() > 60) != colormaps.is_sequential(name)
    assert colormaps.apply(np.zeros((2, 3)), name).shape == (2, 3, 3)
    assert (colormaps.apply([-9, 9], name) == [low, high]).all(), "outside is clipped"
    steps = np.abs(np.diff(colormaps.apply(np.linspace(-1, 1, 511), name).astype(int), axis=0))
    assert steps.max() < 40, "no jump that the values do not have"


def test_the_default_map_is_fair_and_says_red_for_blue_against():
    values = np.linspace(0, 1, 64)
    favour, against = (colormaps.apply(side * values) / 255 for side in (1, -1))
    light = [colormaps._to_lab(colors)[:, 0] for colors in (favour, against)]
    np.testing.assert_allclose(*light, atol=0.01)
    assert (np.diff(light[0]) < 0.003).all()
    assert favour[-1].argmax() == 0
    assert against[-1].argmax() == 2


def test_colour_map_errors():
    with pytest.raises(InputError, match="diverging, purplegreen"):
        colormaps.apply(0.0, "jet")
    with pytest.raises(InputError, match="NaN"):
        colormaps.apply(np.nan)


@pytest.mark.parametrize(
    ("shape", "layout", "axis"),
    [
        ((3, 5, 4), None, 0),
        ((1, 8, 8), None, 0),
        ((8, 6, 3), None, 2),
        ((512, 14, 14), None, 0),
        ((14, 14, 512), None, 2),
        ((3, 5, 4), "HWC", 2),
        ((8, 6, 3), "CHW", 0),
    ],
)
def test_channels_are_summed(shape, layout, axis):
    relevance = RNG.normal(size=shape)
    np.testing.assert_allclose(show.reduce_channels(relevance, layout), relevance.sum(axis))
    np.testing.assert_allclose(show.reduce_channels(relevance[None], layout), relevance.sum(axis))


def test_no_image_relevance():
    assert show.reduce_channels(np.ones((4, 5))).shape == (4, 5)
    for shape in ((3,), (2, 3, 4, 5), (0, 4)):
        with pytest.raises(InputError, match="shape"):
            show.reduce_channels(np.zeros(shape))
    with pytest.raises(InputError, match="CHW or HWC"):
        show.reduce_channels(np.zeros((3, 4, 4)), "NCHW")


def test_normalize_keeps_zero_and_signs():
    relevance = RNG.normal(size=(30, 30)) * 1e-20
    values = show.normalize(relevance, percentile=None)
    np.testing.assert_allclose(values, relevance / np.abs(relevance).max())
    assert (show.normalize(np.zeros((4, 4))) == 0).all()
    np.testing.assert_allclose(show.normalize([-1.0, 0, 3], scale=2), [-0.5, 0, 1])
    assert show.normalize(np.full(3, 60000, np.float16)).max() == 1, "no overflow in half precision"


def test_normalize_clips_hot_pixels_but_never_all():
    relevance = np.ones((100, 100))
    relevance[0, 0] = 1e6
    assert show.normalize(relevance)[5, 5] == 1
    assert show.normalize(relevance, percentile=None)[5, 5] == pytest.approx(1e-6)
    lonely = np.zeros((100, 100))
    lonely[3, 4] = -2
    assert show.normalize(lonely)[3, 4] == -1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_refused(bad):
    relevance = np.ones((8, 8))
    relevance[1, 1] = bad
    for draw in (show.normalize, show.render, lambda r: show.triptych(None, r), lambda r: show.series(r[0], r[1])):
        with pytest.raises(InputError, match="NaN"):
            draw(relevance)
    with pytest.raises(InputError, match="percentile"):
        show.normalize(np.ones(3), percentile=120)


def test_white_pictures_stay_white_under_an_overlay():
    white = np.full((16, 16, 3), 255, np.uint8)
    assert pixels(show.overlay(white, np.zeros((16, 16)))).min() == 255


def test_render_repeats_whole_pixels_and_interpolates_the_rest():
    relevance = np.array([[1.0, -1.0], [0.0, 0.5]])
    small = pixels(show.render(relevance, percentile=None))
    assert (small == colormaps.apply(relevance)).all()
    assert (pixels(show.render(relevance, size=(6, 4), percentile=None)) == small.repeat(3, 0).repeat(2, 1)).all()
    assert show.render(relevance, size=(5, 7)).size == (7, 5)


def test_overlay_shows_gray_where_nothing_speaks():
    picture = RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    relevance = np.zeros((16, 16))
    relevance[:, :4], relevance[:, 12:] = 1, -1
    seen = pixels(show.overlay(picture, relevance))
    assert np.ptp(seen[:, 4:12], axis=-1).max() == 0
    assert (seen[:, :4, 0] > seen[:, :4, 2]).all()
    assert (seen[:, 12:, 2] > seen[:, 12:, 0]).all()
    gray_only = pixels(show.overlay(picture, -np.ones((16, 16)), "reds"))
    assert np.ptp(gray_only, axis=-1).max() == 0, "a map without a negative side shows no tint there"


def test_small_inputs_are_enlarged_by_whole_pixels():
    digit = RNG.integers(0, 256, (28, 28)).astype(np.uint8)
    image = show.enlarge(digit)
    assert image.size == (280, 280)
    assert (pixels(image)[::10, ::10, 0] == digit).all()
    assert show.enlarge(np.zeros((300, 400, 3), np.uint8)).size == (400, 300)


@pytest.mark.parametrize("colormap", colormaps.NAMES)
def test_triptych_holds_the_picture_itself_on_white(colormap):
    picture = RNG.integers(0, 256, (300, 260, 3)).astype(np.uint8)
    sheet = pixels(show.triptych(picture, RNG.normal(size=(3, 300, 260)), "a heading", colormap))
    assert (sheet[[0, -1]] == 255).all()
    assert (sheet[:, [0, -1]] == 255).all()
    corner = np.argwhere((sheet[:, 24:284] == picture[0]).all((1, 2)))
    assert len(corner) == 1
    top = int(corner[0, 0])
    assert (sheet[top : top + 300, 24:284] == picture).all()


def test_triptych_of_a_coarse_map_and_without_a_picture():
    picture = np.zeros((64, 64, 3), np.uint8)
    assert show.triptych(picture, RNG.normal(size=(7, 7))).width > 3 * 256
    assert show.triptych(None, RNG.normal(size=(7, 7))).width < 2 * 280


def test_grid_has_a_row_per_input_and_a_column_per_method():
    picture = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    rows = [[picture, RNG.normal(size=(3, 32, 32)), RNG.normal(size=(4, 4))]] * 2
    one, two = show.grid(rows[:1], cell=96), show.grid(rows, ["input", "a", "b"], ["x", "y"], "title", cell=96)
    assert one.width == two.width == 2 * 24 + 3 * 96 + 2 * 10
    assert two.height > one.height + 96
    for empty in ([], [[]]):
        with pytest.raises(InputError, match="at least one"):
            show.grid(empty)
    with pytest.raises(InputError, match="at least one"):
        show.side_by_side([])


@pytest.mark.parametrize("shape", [(28,), (28, 1), (1, 28, 1), (3, 28), (1,), (5000,)])
def test_series_of_every_shape(shape):
    values = RNG.normal(size=shape)
    assert show.series(values, values, "heading", ["name"], "day").width == 900
    assert show.series(values * 0 + 1e9, values * 0).width == 900, "constant lines and zero relevance"


def test_long_series_keep_their_relevance():
    heat = RNG.normal(size=(2, 5003))
    columns = charts._columns(heat, 700)
    assert columns.shape == (2, 700)
    np.testing.assert_allclose(columns.sum(1), heat.sum(1))


def test_series_refuses_what_is_none():
    for values, relevance in (
        (np.zeros(4), np.zeros(5)),
        (np.zeros((2, 3, 4)),) * 2,
        (np.array([np.nan]), np.zeros(1)),
    ):
        with pytest.raises(InputError):
            show.series(values, relevance)


def test_ticks_are_round_and_inside():
    assert charts.round_ticks(0, 27, 8) == [0, 5, 10, 15, 20, 25]
    assert charts.round_ticks(3, 3, 4) == [3]
    for low, high in ((-1.3, 0.7), (1.7e9, 1.7e9 + 100), (1e-9, 3e-9)):
        ticks = charts.round_ticks(low, high, 4)
        assert 2 <= len(ticks) <= 5
        assert low <= min(ticks) < max(ticks) <= high * (1 + 1e-12)


@pytest.mark.parametrize("colormap", TWO_SIDED)
def test_bars_put_the_largest_first_and_sum_the_rest(monkeypatch, colormap):
    written = []
    monkeypatch.setattr(canvas, "write", lambda draw, x, y, text, *rest, **more: written.append(text))
    show.bars(["a", "b", "c", "d"], [0.1, -5, 2, 0.25], [1, 2.5, "x", 4], colormap=colormap, top=2)
    assert written[1:5] == ["b = 2.5", "-5", "c = x", "+2"]
    assert written[5:7] == ["2 others", "+0.35"]


def test_bars_stay_on_their_side_of_zero():
    sheet = pixels(show.bars(["a", "b"], [1.0, -1.0]))
    red = np.argwhere((sheet[..., 0] - sheet[..., 2]) > 80)
    blue = np.argwhere((sheet[..., 2] - sheet[..., 0]) > 80)
    assert red[:, 1].min() > blue[:, 1].max()
    assert red[:, 0].max() < blue[:, 0].min()
    assert show.bars(["a"], [0.0]).width == 720
    for relevance, colormap in (([1.0], "diverging"), ([1.0, np.nan], "diverging"), ([1.0, 2.0], "reds")):
        with pytest.raises(InputError):
            show.bars(["a", "b"], relevance, colormap=colormap)


def test_text_is_cut_and_never_breaks():
    assert canvas.fit("short", 14, 500) == "short"
    cut = canvas.fit("a very long heading indeed", 14, 80)
    assert cut.endswith("...")
    assert canvas.text_width(cut, 14) <= 80
    assert canvas.fit("word", 14, 1) == ""
    assert show.triptych(None, np.ones((4, 4)), "chêne \u2212 \u732b\nline").width > 0


def test_save_writes_whole_files(tmp_path):
    image = show.render(RNG.normal(size=(9, 7)))
    for name in ("heat.png", "heat.jpg", "heat.webp"):
        path = show.save(image, tmp_path / name)
        with Image.open(path) as back:
            assert back.size == (7, 9)
    assert show.save(np.zeros((4, 4, 3), np.uint8), str(tmp_path / "heat.png")) == tmp_path / "heat.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heat.jpg", "heat.png", "heat.webp"]


def test_save_says_what_is_wrong(tmp_path):
    image = show.render(np.ones((4, 4)))
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.png").mkdir()
    for path in (
        tmp_path / "missing" / "a.png",
        tmp_path / "file" / "a.png",
        tmp_path / "taken.png",
        tmp_path / "a.xyz",
    ):
        with pytest.raises(InputError) as caught:
            show.save(image, path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="uint8"):
        show.save(np.zeros((4, 4)), tmp_path / "a.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.png"]


def test_masked_by_relevance():
    """A pixel keeps the share that its positive relevance has of the clip, at the picture's size."""
    picture = np.full((4, 4, 3), 200, np.uint8)
    relevance = np.zeros((3, 2, 2))
    relevance[0] = [[1.0, 0.25], [-1.0, 0.5]]
    relevance[1] = [[1.0, 0.25], [-1.0, 0.5]]
    found = np.asarray(show.masked(picture, relevance, percentile=None))
    expected = np.repeat(np.repeat([[200, 50], [0, 100]], 2, 0), 2, 1)
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, -1))
    heat = np.arange(1.0, 101.0).reshape(10, 10)
    clipped = np.asarray(show.masked(np.full((10, 10, 3), 255, np.uint8), heat, percentile=50))
    np.testing.assert_array_equal(clipped[..., 0], np.rint(255 * np.minimum(heat / 50.5, 1)))
    plain, other = (show.triptych(picture, relevance, mask=mask) for mask in (False, True))
    assert plain.size == other.size
    assert (np.asarray(plain) != np.asarray(other)).any()


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, failure, raised):
    path = tmp_path / "heat.png"
    path.write_bytes(b"old")

    def half(self, file, **options):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(raised):
        show.save(show.render(np.ones((4, 4))), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
