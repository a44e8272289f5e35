"""What every figure is made of: text, panels on white paper, colour bars, and a save that never leaves half a file."""

from __future__ import annotations

import contextlib
import os
import unicodedata
import uuid
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.preprocess import require_pillow
from onnx_lrp.show import colormaps

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Panel = Image.Image | NDArray[np.uint8]

PAPER, INK, SOFT, FAINT = "#ffffff", "#1f2328", "#59636e", "#d4d9df"
_WIDE_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf")
_PLAIN = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "x", "\u2019": "'"})


def to_image(panel: Panel) -> Image.Image:
    """A PIL image in mode RGB, from a PIL image or uint8 (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        InputError: an array of another type or shape.
    """
    require_pillow()
    from PIL import Image

    if isinstance(panel, Image.Image):
        return panel.convert("RGB")
    array = np.asarray(panel)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size:
        raise InputError(f"a picture must be uint8 (H, W, 3) or (H, W), this is {array.dtype} {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def enlarge(panel: Panel, at_least: int = 256) -> Image.Image:
    """Repeat pixels a whole number of times until the short side has `at_least` pixels: small inputs stay readable."""
    image = to_image(panel)
    from PIL import Image

    factor = max(1, -(-at_least // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def font(size: float, plain: bool = True) -> ImageFont.FreeTypeFont:
    """Pillow's own font; for letters that it lacks (not `plain`), a system font where there is one."""
    return _font(max(8, round(size)), plain)


@cache
def _font(size: int, plain: bool) -> ImageFont.FreeTypeFont:
    require_pillow()
    from PIL import ImageFont

    for name in () if plain else _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    face = ImageFont.load_default(size)
    if not isinstance(face, ImageFont.FreeTypeFont):
        raise InputError("figures need a Pillow with FreeType for their text: pip install --force-reinstall pillow")
    return face


def _readable(text: str, size: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a font that has its letters; without one, accents are dropped rather than shown as boxes."""
    text = " ".join(text.translate(_PLAIN).split())
    if text.isascii():
        return text, font(size)
    wide = font(size, plain=False)
    if wide.getname() != font(size).getname():
        return text, wide
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return letters, font(size)


def text_width(text: str, size: float) -> int:
    """Pixels that the text takes in one line."""
    text, face = _readable(text, size)
    return int(np.ceil(face.getlength(text)))


def fit(text: str, size: float, width: float) -> str:
    """The text, cut with "..." where it is wider than `width` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "...", size) > width:
        text = text[:-1]
    return text.rstrip() + "..." if text else ""


def write(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: float, fill: str = INK, anchor: str = "ls"
) -> None:
    """Write one line; `anchor` as in Pillow: l, m, r across and s (baseline), m (middle), a (top) along."""
    text, face = _readable(text, size)
    draw.text((round(x), round(y)), text, fill=fill, font=face, anchor=anchor)


def color_bar(
    sheet: Image.Image, box: tuple[int, int, int, int], colormap: str, size: float, reach: float = 1.0
) -> None:
    """Draw a slim bar in `box` (left, top, right, bottom) with "against 0 for" below it; colours go up to `reach`."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = box
    sequential = colormaps.is_sequential(colormap)
    colors = colormaps.apply(np.linspace(0 if sequential else -reach, reach, right - left), colormap)
    sheet.paste(Image.fromarray(np.repeat(colors[None], bottom - top, axis=0)), (left, top))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=FAINT)
    below = bottom + round(size * 1.3)
    if sequential:
        write(draw, left, below, "0", size, SOFT)
    else:
        write(draw, left, below, "against", size, SOFT)
        write(draw, (left + right) / 2, below, "0", size, SOFT, "ms")
    write(draw, right, below, "for", size, SOFT, "rs")


def paper(width: float, height: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white sheet and its pen."""
    require_pillow()
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (round(width), round(height)), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def place(sheet: Image.Image, image: Image.Image, x: int, y: int) -> None:
    """Put a panel on the sheet with a hairline around it: a heat map's zero may be as white as the paper."""
    from PIL import ImageDraw

    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=FAINT)
    sheet.paste(image, (x, y))


def save(image: Panel, path: str | Path, **options: Any) -> Path:
    """Write a picture under a temporary name in the same folder, then rename it: there is never half a file.

    Args:
        image: PIL image or uint8 array.
        path: where to; the suffix names the format (.png, .jpg, .webp, .pdf ...).
        options: passed on to Pillow's writer.

    Returns:
        The path.

    Raises:
        InputError: an unknown suffix, a missing or read-only folder, a full disk.
    """
    pixels, path = to_image(image), Path(path)
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"{path}: no picture format has the suffix {path.suffix!r}; give .png")
    if kind == "JPEG":  # Pillow's default halves the colours' resolution, which smears red into blue
        options = {"quality": 95, "subsampling": 0} | options
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            pixels.save(file, format=kind, **options)
        os.replace(temporary, path)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise InputError(f"{path}: cannot be written ({reason}); give a folder that exists, with room") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def heading_height(heading: str, size: float) -> int:
    """Pixels that a heading needs above the panels; 0 without one."""
    return round(size * 1.9) if heading else 0


def at(items: Sequence[str], index: int) -> str:
    """The item, or "" past the end: titles may be fewer than panels."""
    return items[index] if index < len(items) else ""
