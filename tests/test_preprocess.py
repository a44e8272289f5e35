"""Files to model inputs: geometry, numbers, inference from the model's shape, and errors of one line."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from onnx_lrp.errors import InputError
from onnx_lrp.preprocess import (
    PRESETS,
    Preprocess,
    from_options,
    load_image,
    picture,
    to_array,
)
from tests.support import write_image

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 451, 3))
    return write_image(tmp_path / "photo.png", pixels)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("unit", lambda rgb: rgb / 255),
        ("raw", lambda rgb: rgb),
        ("tf", lambda rgb: rgb / 127.5 - 1),
        ("caffe", lambda rgb: rgb[..., ::-1] - [103.939, 116.779, 123.68]),
        ("imagenet", lambda rgb: (rgb / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
    ],
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_presets_by_their_formula(photo, preset, expected, layout):
    pre = replace(PRESETS[preset], layout=layout)
    array = to_array(photo, pre)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.shape == ((1, 3, 224, 224) if layout == "NCHW" else (1, 224, 224, 3))
    last = array[0] if layout == "NHWC" else array[0].transpose(1, 2, 0)
    np.testing.assert_allclose(last, expected(picture(photo, pre).astype(np.float64)), atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_bounds_are_the_values_of_black_and_white_pictures(tmp_path, preset, layout):
    pre = replace(PRESETS[preset], layout=layout, size=8)
    low, high = pre.bounds()
    for bound, pixel in ((low, 0), (high, 255)):
        path = write_image(tmp_path / f"{pixel}.png", np.full((8, 8, 3), pixel))
        array = to_array(path, pre)
        assert bound.ndim == array.ndim
        assert (array == np.broadcast_to(bound, array.shape)).all()


def test_crop_takes_the_centre_with_a_margin(photo):
    with Image.open(photo) as image:
        wide = image.resize((round(451 * 256 / 300), 256), Image.Resampling.BILINEAR)
    left = (wide.width - 224) // 2
    assert (picture(photo, Preprocess()) == np.asarray(wide.crop((left, 16, left + 224, 240)))).all()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 48), (240, 320), (320, 240)])
@pytest.mark.parametrize("shape", [(300, 451), (451, 300), (28, 28), (17, 500)])
@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_every_way_to_resize_gives_the_size(tmp_path, height, width, shape, resize):
    path = write_image(tmp_path / "flat.png", np.full((*shape, 3), 200))
    seen = picture(path, Preprocess(size=(height, width), resize=resize))
    assert seen.shape == (height, width, 3)
    if resize != "pad":
        assert (seen == 200).all(), "no foreign pixels at the edges"


def test_small_sizes_and_exact_sizes_stay_whole(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (128, 128, 3))
    path = write_image(tmp_path / "leaf.png", pixels)
    assert (picture(path, Preprocess(size=128)) == pixels).all()
    assert (picture(path, Preprocess(size=None)) == pixels).all()
    framed = np.zeros((56, 56, 3), np.uint8)
    framed[:2] = framed[-2:] = 255
    seen = picture(write_image(tmp_path / "framed.png", framed), Preprocess(size=28))
    assert seen[0].min() > 200, "the border is still there: nothing was cropped away"
    assert seen[-1].min() > 200


def test_padding_is_neutral_to_the_model(tmp_path):
    path = write_image(tmp_path / "wide.png", np.full((10, 40, 3), 255))
    for preset in PRESETS.values():
        array = to_array(path, replace(preset, size=40, resize="pad"))
        assert np.abs(array[..., 0, :]).max() <= 0.51 / preset.scale / min(preset.std)


def test_gray_transparent_rotated_and_deep_pictures(tmp_path):
    gray = Preprocess(size=None, mean=(0.0,), std=(1.0,), color="GRAY")
    shape = np.zeros((8, 8, 4), np.uint8)
    shape[:4, :, 3] = 255  # black ink above, transparent black below: a viewer shows white there
    array = to_array(write_image(tmp_path / "clear.png", shape), gray)
    assert array.shape == (1, 1, 8, 8)
    assert (array[0, 0, :4] == 0).all()
    assert (array[0, 0, 4:] == 1).all()
    deep = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 32768], [40000, 65535]], np.uint16)).save(deep)
    np.testing.assert_allclose(to_array(deep, gray)[0, 0] * 255, [[0, 127], [155, 255]], atol=1e-4)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    tall = tmp_path / "tall.jpg"
    Image.fromarray(np.zeros((10, 30), np.uint8)).save(tall, exif=exif)
    assert to_array(tall, gray).shape == (1, 1, 30, 10)


@pytest.mark.parametrize(
    ("shape", "layout", "color", "size"),
    [
        ((1, 3, 224, 224), "NCHW", "RGB", (224, 224)),
        (("N", 299, 299, 3), "NHWC", "RGB", (299, 299)),
        ((None, 1, 28, 28), "NCHW", "GRAY", (28, 28)),
        ((None, 28, 28, 1), "NHWC", "GRAY", (28, 28)),
        ((1, 3, 240, 320), "NCHW", "RGB", (240, 320)),
        (("batch", 3, "h", "w"), "NCHW", "RGB", (224, 224)),
        ((None, None, None, 3), "NHWC", "RGB", (224, 224)),
        ((None, 3, 96, None), "NCHW", "RGB", (96, 96)),
        (None, "NCHW", "RGB", (224, 224)),
    ],
)
def test_the_models_input_shape_fills_in_what_is_missing(shape, layout, color, size):
    pre = from_options(input_shape=shape)
    assert (pre.layout, pre.color, pre.shape) == (layout, color, size)
    assert pre.mean == (PRESETS["imagenet"].mean if color == "RGB" else (0.0,))


def test_options_as_text_and_as_numbers():
    pre = from_options(size="240x320", mean="127", std=128, scale="1", layout="nhwc", color="bgr")
    assert pre == Preprocess((240, 320), (127.0,) * 3, (128.0,) * 3, 1.0, "NHWC", "BGR")
    assert from_options(mean=[0.5, 0.4, 0.3]) == Preprocess((224, 224), mean=(0.5, 0.4, 0.3))
    assert from_options(size=96, preset="tf").shape == (96, 96)


def test_a_presets_mean_follows_the_channel_order():
    assert from_options("imagenet", color="BGR").mean == PRESETS["imagenet"].mean[::-1]
    assert from_options("caffe", color="RGB").mean == PRESETS["caffe"].mean[::-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "keras"}, "imagenet, tf, caffe"),
        ({"size": 224, "input_shape": (1, 3, 299, 299)}, "leave size away"),
        ({"size": "big"}, "240x320"),
        ({"size": "0"}, "not positive"),
        ({"layout": "NHWC", "input_shape": (1, 3, 224, 224)}, "give NCHW"),
        ({"layout": "CHWN"}, "NCHW, NHWC"),
        ({"color": "GRAY", "input_shape": (1, 3, 224, 224)}, "3 channel"),
        ({"color": "CMYK"}, "RGB, BGR, GRAY"),
        ({"input_shape": (1, 784)}, "4 axes"),
        ({"input_shape": (1, 64, 14, 14)}, "no axis of 1 or 3"),
        ({"mean": "1,2"}, "give 1 or 3"),
        ({"mean": "a"}, "give 1 or 3"),
        ({"mean": 127}, "fitting scale"),
        ({"std": 0}, "above zero"),
        ({"preset": "imagenet", "input_shape": (1, 1, 28, 28)}, "give mean and std"),
    ],
)
def test_options_that_cannot_be_meant(options, words):
    with pytest.raises(InputError, match=words) as caught:
        from_options(**options)
    assert "\n" not in str(caught.value)


def test_what_is_no_image_is_named(tmp_path, photo):
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:2000])
    for path in (text, cut, tmp_path):
        with pytest.raises(InputError, match="not an image that Pillow can read") as caught:
            load_image(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match="floating-point"):
        load_image(tmp_path / "float.tif")
    with pytest.raises(InputError, match="no such file"):
        load_image(tmp_path / "missing.png")


def test_without_pillow_the_extra_is_named(monkeypatch, photo):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"pip install onnx-lrp\[image\]"):
        load_image(photo)
