"""Pictures to model inputs: size, mean, deviation, layout, channel order.

Pillow is an optional extra, so it is imported only where a picture is really opened.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Layout = Literal["NCHW", "NHWC"]
Color = Literal["RGB", "BGR", "GRAY"]
Resize = Literal["crop", "stretch", "pad"]
Size = tuple[int, int] | int

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
SMALL = 64  # pictures up to this size are taken whole: a margin would cost them too many pixels


def require_pillow() -> None:
    """Raise InputError, saying what to install, when Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise InputError("images need Pillow: pip install onnx-lrp[image]") from None


def _one_of(name: str, value: str, known: Any) -> Any:
    if value not in get_args(known):
        raise InputError(f"{name} {value!r} is unknown; give one of {', '.join(get_args(known))}")
    return value


@dataclass(frozen=True)
class Preprocess:
    """How pixels 0..255 become the values that a model expects: (pixel / scale - mean) / std.

    Attributes:
        size: (height, width), or one number for a square; None keeps each picture's own size.
        mean: subtracted per channel, in the model's channel order, after the division by `scale`.
        std: divisor per channel, in the model's channel order.
        scale: 255 gives values 0..1 before mean and std, 1 keeps 0..255.
        layout: order of the model's axes.
        color: order of the model's channels; "GRAY" is a single channel.
        resize: "crop" (short side to 256/224 of the size, then the centre; up to 64 pixels without that margin;
            a picture that has the size already stays whole), "stretch" (straight to the size), or "pad" (fit
            inside, fill with the mean colour).

    Raises:
        InputError: a field has no meaning, or `mean` and `std` do not fit the number of channels.
    """

    size: Size | None = 224
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 255.0
    layout: Layout = "NCHW"
    color: Color = "RGB"
    resize: Resize = "crop"

    def __post_init__(self) -> None:
        """Check every field, so that a wrong one is named where it is given."""
        for name, known in (("layout", Layout), ("color", Color), ("resize", Resize)):
            _one_of(name, getattr(self, name), known)
        if self.shape is not None and min(self.shape) < 1:
            raise InputError(f"size {self.size} is not positive; give pixels, such as 224 or 240x320")
        if {len(self.mean), len(self.std)} != {self.channels}:
            raise InputError(f"mean {self.mean} and std {self.std} need {self.channels} numbers each for {self.color}")
        if not np.all(np.isfinite([*self.mean, *self.std, self.scale])) or min(*self.std, self.scale) <= 0:
            raise InputError("mean, std and scale must be finite, std and scale also above zero")

    @property
    def channels(self) -> int:
        """1 for gray, else 3."""
        return 1 if self.color == "GRAY" else 3

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None where pictures keep their own size."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def __str__(self) -> str:
        """One line for people: what is done to a picture; what changes nothing is left away."""
        size = "own size" if self.shape is None else f"{self.shape[0]}x{self.shape[1]} ({self.resize})"
        mean, std = (
            ", ".join(f"{v:g}" for v in (values if len({*values}) > 1 else values[:1]))
            for values in (self.mean, self.std)
        )
        steps = [f"/ {self.scale:g}" if self.scale != 1 else "", f"- ({mean})", f"/ ({std})"]
        kept = [s for s in steps if s not in ("", "- (0)", "/ (1)")] or ["values 0..255"]
        return ", ".join([f"{self.color} {size}", *kept, self.layout])

    def bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The values of black (0) and of white (255) pixels, as the z-box rule needs them.

        Returns:
            low and high, (1, C, 1, 1) or (1, 1, 1, C) by the layout: both broadcast over the model's input.
        """
        low, high = (self.normalize(np.full((1, 1, self.channels), pixel, np.uint8)) for pixel in (0, 255))
        return low, high

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn pixels (H, W, C) in RGB order, or gray (H, W), into a float32 batch of one in the model's layout."""
        values = pixels.reshape(*pixels.shape[:2], self.channels).astype(np.float32)
        if self.color == "BGR":
            values = values[..., ::-1]
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        values = (values / np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(values[None] if self.layout == "NHWC" else values.transpose(2, 0, 1)[None])

    def frame(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the model sees, at its size, in mode RGB (or L for gray)."""
        from PIL import Image, ImageOps

        image = _opaque(image).convert("L" if self.color == "GRAY" else "RGB")
        if self.shape is None:
            return image
        (height, width), bilinear = self.shape, Image.Resampling.BILINEAR
        if self.resize == "stretch":
            return image.resize((width, height), bilinear)
        if self.resize == "pad":
            fill = [min(255, max(0, round(m * self.scale))) for m in self.mean][:: -1 if self.color == "BGR" else 1]
            return ImageOps.pad(image, (width, height), bilinear, color=tuple(fill) if len(fill) > 1 else fill[0])
        if image.size == (width, height):
            return image
        small = min(height, width) <= SMALL
        tall, wide = (height, width) if small else (height * 256 // 224, width * 256 // 224)
        factor = max(tall / image.height, wide / image.width)
        tall, wide = max(tall, round(image.height * factor)), max(wide, round(image.width * factor))
        left, top = (wide - width) // 2, (tall - height) // 2
        return image.resize((wide, tall), bilinear).crop((left, top, left + width, top + height))


PRESETS: dict[str, Preprocess] = {
    "imagenet": Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "tf": Preprocess(mean=(1.0, 1.0, 1.0), scale=127.5),
    "caffe": Preprocess(mean=(103.939, 116.779, 123.68), scale=1.0, color="BGR"),
    "unit": Preprocess(),
    "raw": Preprocess(scale=1.0),
}
"""imagenet: torch-like, 0..1 less the ImageNet mean over its deviation. tf: -1..1. caffe: BGR, 0..255 less the mean.
unit: 0..1. raw: 0..255. All 224 pixels; the model's own input shape comes first in `from_options`."""


def from_options(
    preset: str | None = None,
    size: Size | str | None = None,
    mean: str | float | Sequence[float] | None = None,
    std: str | float | Sequence[float] | None = None,
    scale: str | float | None = None,
    layout: str | None = None,
    color: str | None = None,
    input_shape: Sequence[int | str | None] | None = None,
    resize: Resize | None = None,
) -> Preprocess:
    """Fill in what the options leave open from the preset and from the model's input shape.

    `preset` is a name in PRESETS; `input_shape` has 4 axes, None or a name for dynamic ones (None: nothing is known).
    The others are Preprocess's fields and may be text: size "224" or "240x320" (height first), mean "0.5,0.5,0.5".
    Without preset, mean, std and scale, three channels are taken as "imagenet" and one as "unit"; where one of
    mean, std, scale is given, the others are neutral (0, 1, 255). A preset's mean follows the order of `color`.

    Raises:
        InputError: an unknown name, or options that the model's input rules out.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preprocessing {preset!r} is unknown; give one of {', '.join(PRESETS)}")
    order, dims, text = _axes(input_shape, layout)
    tint: Color | None = None if color is None else _one_of("color", color.upper(), Color)
    count = dims["C"] or (1 if tint == "GRAY" else 3)
    if tint is not None and (tint == "GRAY") != (count == 1):
        raise InputError(f"color {tint} does not fit the model's input {text} with {count} channel(s)")
    plain = mean is None and std is None and scale is None
    base = PRESETS[preset or ("imagenet" if plain and count == 3 else "unit")]
    if count == 1:
        if len({*base.mean}) > 1 and (mean is None or std is None):
            raise InputError(f"preprocessing {preset} is for three channels, the model has one; give mean and std")
        base = replace(base, mean=base.mean[:1], std=base.std[:1], color="GRAY")
    elif tint is not None and tint != base.color:
        base = replace(base, mean=base.mean[::-1], std=base.std[::-1], color=tint)
    base = replace(
        base,
        size=_size(size, dims["H"], dims["W"], text),
        mean=base.mean if mean is None else _numbers("mean", mean, count),
        std=base.std if std is None else _numbers("std", std, count),
        scale=base.scale if scale is None else _numbers("scale", scale, 1)[0],
        layout=order,
        resize=resize or base.resize,
    )
    if not all(0 <= m <= 255 / base.scale for m in base.mean):
        raise InputError(f"mean {base.mean} is outside the pixels' range 0..{255 / base.scale:g}; give a fitting scale")
    return base


def _axes(shape: Sequence[int | str | None] | None, layout: str | None) -> tuple[Layout, dict[str, int | None], str]:
    """The layout, the length of each axis by its letter, and the shape as text.

    A layout fits where its channel axis is 1 or 3 or dynamic; a known length counts more than a dynamic one.
    """
    dims = [d if isinstance(d, int) and d > 0 else None for d in shape or (None,) * 4]
    text = "(" + ", ".join("?" if d is None else str(d) for d in dims) + ")"
    if len(dims) != 4:
        raise InputError(f"an image needs a model input of 4 axes (N,C,H,W), this one is {text}; give .npy")
    fits: list[Layout] = [name for name in get_args(Layout) if dims[name.index("C")] in (1, 3, None)]
    if not fits:
        raise InputError(f"the model's input {text} has no axis of 1 or 3 channels, so takes no image; give .npy")
    order: Layout = next((name for name in fits if dims[name.index("C")]), fits[0])
    if layout is not None:
        order = _one_of("layout", layout.upper(), Layout)
    if order not in fits:
        raise InputError(f"layout {order} does not fit the model's input {text}; give {fits[0]}")
    return order, dict(zip(order, dims, strict=True)), text


def _size(size: Size | str | None, height: int | None, width: int | None, text: str) -> Size:
    """The wanted size, checked against the model's; what is open comes from the model, else it is 224."""
    if size is None:
        square = height or width or 224
        return (height or square, width or square)
    written = size if isinstance(size, str) else "x".join(str(v) for v in np.atleast_1d(size))
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", written)
    if match is None:
        raise InputError(f"size {size!r} is not a size; give pixels, such as 224 or 240x320 (height x width)")
    wanted = (int(match[1]), int(match[2] or match[1]))
    if height not in (None, wanted[0]) or width not in (None, wanted[1]):
        raise InputError(f"size {wanted[0]}x{wanted[1]} does not fit the model's input {text}; leave size away")
    return wanted


def _numbers(name: str, value: str | float | Sequence[float], count: int) -> tuple[float, ...]:
    """One number, repeated, or `count` numbers."""
    try:
        numbers = [float(v) for v in (value.split(",") if isinstance(value, str) else np.atleast_1d(value))]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, count):
        raise InputError(f"{name} {value!r} does not fit {count} channel(s); give 1 or {count} numbers, such as 0.5")
    return tuple(numbers * (count // len(numbers)))


def reason(problem: Exception) -> str:
    """What went wrong, in one line without the path."""
    return getattr(problem, "strerror", None) or " ".join(str(problem).split()) or type(problem).__name__


def load_image(path: str | Path) -> Image.Image:
    """Open a picture completely, turned upright by its EXIF orientation.

    Raises:
        InputError: missing, unreadable, truncated, or no picture at all.
    """
    require_pillow()
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as problem:  # decoders raise whatever their format's parser trips over
        why = "unknown format" if isinstance(problem, UnidentifiedImageError) else reason(problem)
        raise InputError(f"{path}: not an image that Pillow can read ({why}); give PNG, JPEG or .npy") from None
    if image.mode == "F":  # their range is anyone's guess, and Pillow would clip it
        raise InputError(f"{path}: its pixels are floating-point numbers; give PNG, JPEG or .npy")
    return image


def _opaque(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: transparent parts on white, 16-bit gray brought down to 8 bits."""
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        return Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page


def picture(path: str | Path, pre: Preprocess) -> NDArray[np.uint8]:
    """The framed picture before normalisation, (H, W, 3) in RGB, to be shown beside its heat map."""
    return np.array(pre.frame(load_image(path)).convert("RGB"))


def to_array(path: str | Path, pre: Preprocess) -> NDArray[np.float32]:
    """The model's input for one image file: (1, C, H, W) or (1, H, W, C)."""
    return pre.normalize(np.asarray(pre.frame(load_image(path))))
