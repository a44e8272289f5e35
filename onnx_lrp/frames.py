"""Frames in and out: from a camera, a video, or a folder of pictures; into a folder, or a video.

Folders need Pillow alone. Cameras and videos are left to OpenCV, an extra: `pip install onnx-lrp[live]`.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.inputs import find_inputs
from onnx_lrp.preprocess import load_image, require_pillow
from onnx_lrp.show.canvas import save

if TYPE_CHECKING:
    from PIL import Image

_CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
_MEASURED = 16  # frames after which the rate of what comes without one is known
_SUFFIX = ".jpg"  # of frames in a folder: written ten times as fast as .png


class Frames(Protocol):
    """Frames one after the other, to be closed at the end.

    Attributes:
        rate: frames per second of a recording; None where they come as fast as they can be taken.
    """

    rate: float | None

    def __iter__(self) -> Iterator[Image.Image]: ...

    def close(self) -> None:
        """Let go of the camera or the file."""


class Folder:
    """The pictures of a folder, by name; numbers in names count as numbers, so that frame10 follows frame9."""

    rate: float | None = None

    def __init__(self, path: Path):
        self._paths = sorted(find_inputs([path]), key=lambda p: _natural(p.name))

    def __iter__(self) -> Iterator[Image.Image]:
        for path in self._paths:
            yield load_image(path)

    def close(self) -> None:
        """Nothing is open."""


class Captured:
    """A camera, a video file or a stream, read by OpenCV.

    Args:
        source: number of the camera, else a path or an address.
        name: for messages.

    Raises:
        InputError: it cannot be opened, or gives no frame.
    """

    def __init__(self, source: int | str, name: str):
        self._cv = opencv()
        self._capture = self._cv.VideoCapture(source)
        live = isinstance(source, int) or "://" in source
        self._first: Any
        read, self._first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not read:
            self.close()
            raise InputError(
                f"{name} gives no picture; check that it is there, and that nothing else uses it"
                if live
                else f"{name}: not a video that OpenCV can read; give .mp4 or .avi"
            )
        if live:
            self._capture.set(self._cv.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, not one that has waited
        rate = float(self._capture.get(self._cv.CAP_PROP_FPS))
        self.rate: float | None = rate if not live and np.isfinite(rate) and rate > 0 else None

    def __iter__(self) -> Iterator[Image.Image]:
        from PIL import Image

        pixels = self._first
        while pixels is not None:
            yield Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
            read, pixels = self._capture.read()
            pixels = pixels if read else None

    def close(self) -> None:
        """Let go of the camera or the file."""
        self._capture.release()


def open_frames(source: str) -> Frames:
    """Frames of what a text names: a folder, a video file, the address of a stream, or a camera by its number.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    require_pillow()
    path = Path(source)
    if path.is_dir():
        return Folder(path)
    if path.exists():
        return Captured(str(path), source)
    if re.fullmatch(r"\d{1,3}", source):
        return Captured(int(source), f"camera {source}")
    if re.match(r"\w+://", source):
        return Captured(source, source)
    raise InputError(
        f"{source}: no such file or folder; give a video, a folder of frames, or a camera's number such as 0"
    )


class Sink(Protocol):
    """Takes pictures in, and writes them."""

    def add(self, image: Image.Image) -> None:
        """Write one picture."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


class Nowhere:
    """Writes nothing."""

    def add(self, image: Image.Image) -> None:
        """Let it go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None: ...


class FolderSink(Nowhere):
    """Every picture as a file, numbered from one; each is complete, or not there."""

    def __init__(self, path: Path):
        self._path, self._count = path, 0
        path.mkdir(exist_ok=True)

    def add(self, image: Image.Image) -> None:
        """Write one picture."""
        self._count += 1
        save(image, self._path / f"{self._count:06d}{_SUFFIX}", quality=90)


class VideoSink:
    """A video under a temporary name, which takes its own when it is complete: also after an interruption.

    Args:
        path: the file, .mp4 or .avi.
        rate: frames per second; None: as fast as the first ones come in.
    """

    def __init__(self, path: Path, rate: float | None):
        self._cv, self._path, self._rate = opencv(), path, rate
        self._temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
        self._waiting: deque[Image.Image] = deque()
        self._begun = time.perf_counter()
        self._writer: Any = None
        self._size: tuple[int, int] | None = None

    def add(self, image: Image.Image) -> None:
        """Write one picture.

        Raises:
            InputError: it has another size than those before, or the file cannot be written.
        """
        self._size = self._size or image.size
        if image.size != self._size:
            raise InputError(
                f"{self._path}: frames of {image.width}x{image.height} and {self._size[0]}x{self._size[1]} pixels do "
                "not fit in one video; give --size, or a folder/ to write to"
            )
        self._waiting.append(image)
        if self._writer or self._rate or len(self._waiting) == _MEASURED:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            assert self._size is not None
            rate = self._rate or len(self._waiting) / max(time.perf_counter() - self._begun, 1e-3)
            code = self._cv.VideoWriter.fourcc(*_CODECS[self._path.suffix.lower()])
            self._writer = self._cv.VideoWriter(str(self._temporary), code, min(rate, 120.0), self._size)
            if not self._writer.isOpened():
                raise InputError(f"{self._path}: OpenCV cannot write this video; check the folder, or give a folder/")
        while self._waiting:
            pixels = np.asarray(self._waiting.popleft().convert("RGB"))
            self._writer.write(np.ascontiguousarray(pixels[..., ::-1]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._waiting:
                self._flush()
            if self._writer is not None:
                self._writer.release()
                os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def open_sink(out: str | None, rate: float | None, inputs: Sequence[Path] = ()) -> Sink:
    """Where pictures go: into a folder or a video, by the path's suffix; nowhere for None.

    Args:
        out: the path.
        rate: of a video; see `VideoSink`.
        inputs: what must not be written over.

    Raises:
        InputError: another suffix, a folder that is missing, or a path that is an input.
    """
    if out is None:
        return Nowhere()
    path = Path(out)
    if any(path.exists() and p.exists() and path.samefile(p) for p in inputs):
        raise InputError(f"{out}: this is an input, which stays as it is; write elsewhere with -o")
    if not path.parent.is_dir():
        raise InputError(f"{out}: the folder {path.parent} is missing; make it first")
    if path.is_dir() or out.endswith(("/", "\\")) or not path.suffix:
        return FolderSink(path)
    if path.suffix.lower() not in _CODECS:
        raise InputError(f"{out}: frames are written as .mp4, .avi, or into a folder/; choose one of these")
    return VideoSink(path, rate)


def opencv() -> Any:
    """OpenCV, without its own lines about cameras that are not there and files that are no videos.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise InputError("cameras and videos need OpenCV: pip install onnx-lrp[live]") from None
    return cv2


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]
