"""Input files: which there are, what they hold, and errors of one line."""

import json

import numpy as np
import pytest

from onnx_lrp.errors import InputError
from onnx_lrp.inputs import find_inputs, fit, read_inputs
from onnx_lrp.preprocess import Preprocess
from tests.support import write_image

pytest.importorskip("PIL.Image")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3))
    return write_image(tmp_path / "photo.png", pixels)


def test_all_kinds_of_inputs(tmp_path, photo):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "._a.jpg"):
        write_image(folder / name, np.zeros((8, 8, 3)), format="PNG")
    (folder / "notes.txt").write_text("no image")
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    np.savez(tmp_path / "x.npz", image=np.zeros((1, 3)), tokens=np.ones((1, 4), np.int64))
    (tmp_path / "flat.json").write_text("[3, 1, 2]")
    (tmp_path / "named.json").write_text(json.dumps({"tokens": [[1, 2], [3, 4]], "image": [0.5, 1]}))
    sources = [photo, folder, *(str(tmp_path / name) for name in ("x.npy", "x.npz", "flat.json", "named.json"))]
    items = read_inputs(sources, Preprocess(size=8))
    names = [item.name.rsplit("/", 1)[-1] for item in items]
    assert names == ["photo.png", "a.JPG", "b.png", "x.npy", "x.npz", "flat.json", "named.json"]
    assert items[0].arrays.shape == (1, 3, 8, 8)
    assert items[0].picture.shape == (8, 8, 3)
    assert items[3].arrays.shape == (2, 3)
    assert items[3].picture is None
    assert set(items[4].arrays) == {"image", "tokens"}
    assert items[5].arrays.tolist() == [[3, 1, 2]]
    assert items[5].arrays.dtype == np.int64
    assert items[6].arrays["tokens"].shape == (2, 2)
    assert items[6].arrays["image"].dtype == np.float32
    assert read_inputs(str(tmp_path / "x.npy"))[0].name == str(tmp_path / "x.npy")


def test_inputs_that_cannot_be_used_are_named(tmp_path, photo):
    (tmp_path / "empty").mkdir()
    content = {
        "notes.txt": "hello",
        "broken.npy": "hello",
        "broken.npz": "hello",
        "broken.json": "{",
        "ragged.json": "[[1], [1, 2]]",
        "words.json": '["a", "b"]',
    }
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    np.save(tmp_path / "objects.npy", np.array([{}, 1], object))
    np.savez_compressed(tmp_path / "damaged.npz", x=np.random.default_rng(0).normal(size=1000))
    damaged = bytearray((tmp_path / "damaged.npz").read_bytes())
    damaged[2000:2400] = bytes(400)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    (tmp_path / "cut.npz").write_bytes(damaged[:3000])
    for name in ("missing.png", "empty", "objects.npy", "damaged.npz", "cut.npz", *content):
        with pytest.raises(InputError) as caught:
            read_inputs([tmp_path / name], Preprocess())
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="takes no image"):
        read_inputs([photo])
    with pytest.raises(InputError, match="missing"):
        find_inputs([photo, tmp_path / "missing.png"])


@pytest.mark.parametrize(
    ("given", "shape", "expected"),
    [
        ((3, 8, 8), ("N", 3, 8, 8), (1, 3, 8, 8)),
        ((3, 8, 8), ("N", 3, None, "w"), (1, 3, 8, 8)),
        ((28,), ("N", 28, 1), (1, 28, 1)),
        ((1, 28), ("N", 28, 1), (1, 28, 1)),
        ((5, 28), ("N", 28, 1), (5, 28, 1)),
        ((5, 28), ("N", 1, 28), (5, 1, 28)),
        ((28, 28), (1, 1, 28, 28), (1, 1, 28, 28)),
        ((4,), ("N", 4), (1, 4)),
        ((8, 8, 3), ("N", 3, 8, 8), (1, 8, 8, 3)),
        ((192,), ("N", 3, 8, 8), (192,)),
        ((2, 3, 8, 8), ("N", 3, 8, 8), (2, 3, 8, 8)),
        ((), ("N",), ()),
    ],
)
def test_axes_that_a_file_left_away(given, shape, expected):
    array = np.arange(np.prod(given, dtype=int)).reshape(given)
    fitted = fit(array, shape)
    assert fitted.shape == expected
    assert (fitted.reshape(-1) == array.reshape(-1)).all()
