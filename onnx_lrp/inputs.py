"""Files in, arrays out: images, folders of images, .npy, .npz, and numbers or token lists in .json."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.preprocess import IMAGE_SUFFIXES, Preprocess, load_image, reason

Arrays = dict[str, NDArray[Any]] | NDArray[Any]


@dataclass(frozen=True, eq=False)
class Item:
    """One input file: its path, the array (or arrays by input name), and for images the picture (H, W, 3)."""

    name: str
    arrays: Arrays
    picture: NDArray[np.uint8] | None = None


def find_inputs(sources: Iterable[str | Path] | str | Path) -> list[Path]:
    """Expand folders to their images (sorted, not recursive) and check that every path can be an input.

    Raises:
        InputError: a path is missing or of unknown suffix, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, [sources] if isinstance(sources, str | Path) else sources):
        try:
            path.stat()
            inside = [path] if not path.is_dir() else sorted(p for p in path.iterdir() if _is_image(p))
        except (OSError, ValueError) as problem:
            raise InputError(f"{path}: cannot be read ({reason(problem)}); check the path") from None
        if not inside:
            raise InputError(f"{path}: no images in this folder; it should hold PNG or JPEG files")
        if inside == [path] and path.suffix.lower() not in KNOWN:
            raise InputError(f"{path}: unknown kind of input; give an image, a folder of images, .npy, .npz or .json")
        found += inside
    return found


def read_input(path: Path, pre: Preprocess | None = None) -> Item:
    """Read one file: an image through `pre`, arrays from .npy and .npz as they are, numbers from .json.

    In .json a flat list is one sample and gets a batch axis; integers become int64, others float32.

    Raises:
        InputError: unreadable, or an image where `pre` is None.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        try:
            return Item(str(path), reader(path))
        except (OSError, ValueError, RecursionError) as problem:
            raise InputError(f"{path}: not a usable {path.suffix} file ({reason(problem)})") from None
    if pre is None:
        raise InputError(f"{path}: the model takes no image; give .npy, .npz or .json")
    framed = pre.frame(load_image(path))
    return Item(str(path), pre.normalize(np.asarray(framed)), np.array(framed.convert("RGB")))


def read_inputs(sources: Iterable[str | Path] | str | Path, pre: Preprocess | None = None) -> list[Item]:
    """Find and read all inputs; for constant memory, map `read_input` over `find_inputs` instead."""
    return [read_input(path, pre) for path in find_inputs(sources)]


def fit(array: NDArray[Any], shape: Sequence[int | str | None]) -> NDArray[Any]:
    """Add the axes of length 1 that a file left away, such as the batch of a single sample.

    The order of elements is never touched: where the other axes differ, the array comes back as it is, and whoever
    runs the model says what it expected.
    """
    if array.ndim == len(shape) or not array.ndim:
        return array
    rest = list(shape[1:])
    lengths = [d for d in rest if isinstance(d, int)]
    if len(lengths) == len(rest):
        for count in (1, len(array)):
            if [d for d in (count, *lengths) if d != 1] == [d for d in array.shape if d != 1]:
                return array.reshape(count, *lengths)
    return array[None] if array.ndim == len(rest) else array


def _read_arrays(path: Path) -> Arrays:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    # numpy's own words recommend unpickling; the others are what damaged archives raise
    except (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        raise ValueError("damaged, or no plain numbers") from None


def _read_json(path: Path) -> Arrays:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: _sample(v) for name, v in content.items()} if isinstance(content, dict) else _sample(content)


def _sample(content: object) -> NDArray[Any]:
    try:
        array = np.array(content)
    except ValueError:
        raise ValueError("lists of unequal length; pad them") from None
    if array.dtype.kind not in "if" or not array.size:
        raise ValueError("numbers expected, such as token ids")
    array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
    return array[None] if array.ndim == 1 else array


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


_READERS = {".npy": _read_arrays, ".npz": _read_arrays, ".json": _read_json}
KNOWN = IMAGE_SUFFIXES | _READERS.keys()
