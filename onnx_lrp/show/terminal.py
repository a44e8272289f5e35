"""Texts with coloured words in a terminal; with numbers instead where there are no colours."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.show.text import Segment, TextCell, colours, number, segments

Depth = Literal["none", "256", "full"]

_QUIET = 0.04  # words that say less keep the terminal's own colours: white boxes would be loud on a dark one


def depth_of(stream: IO[Any]) -> Depth:
    """How many colours a stream shows: none where it is no terminal or NO_COLOR is set (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return "none"
    return "full" if os.environ.get("COLORTERM") in ("truecolor", "24bit") else "256"


def text_lines(cell: TextCell, depth: Depth = "none", width: int | None = None, indent: int = 2) -> list[str]:
    """The words of a text, as many on a line as fit.

    Args:
        cell: the text.
        depth: "full" and "256" colour the words; "none" writes the relevance behind each.
        width: of a line; default: the terminal's, at most 100.
        indent: spaces before each line.
    """
    room = (width or min(shutil.get_terminal_size((100, 24)).columns, 100)) - indent
    lines: list[str] = []
    for k, passage in enumerate(cell.passages):
        drawn = list(segments(passage, cell.scale, cell.marked if k == 0 else None))
        lines += _wrapped(_plain(drawn) if depth == "none" else _coloured(drawn, depth), room)
    return [" " * indent + line for line in lines]


def _plain(passage: Sequence[Segment]) -> Iterator[tuple[str, int, bool]]:
    """Words as (what is written, its width, whether it goes on with the one before)."""
    for s in passage:
        text = f"{s.text}({number(s.value)})" if s.kind == "content" else f"{s.text}"
        text = f">{text}<" if s.marked else text
        yield text, _width(text), s.glued


def _coloured(passage: Sequence[Segment], depth: Depth) -> Iterator[tuple[str, int, bool]]:
    back, white = colours(np.array([s.share for s in passage]))
    for s, colour, light in zip(passage, back, white, strict=True):
        codes = ["4"] if s.marked else []
        if s.kind != "content":
            codes.append("2")
        elif abs(s.share) >= _QUIET:
            codes += ["38;5;231" if light else "38;5;16", _background(colour, depth)]
        text = f"\x1b[{';'.join(codes)}m{s.text}\x1b[0m" if codes else s.text
        yield text, _width(s.text), s.glued


def _background(colour: NDArray[np.uint8], depth: Depth) -> str:
    red, green, blue = (int(c) for c in colour)
    if depth == "full":
        return f"48;2;{red};{green};{blue}"
    # The nearest of the 6 x 6 x 6 colours, whose levels are 0, 95, 135, 175, 215, 255.
    levels = np.array([0, 95, 135, 175, 215, 255])
    r, g, b = (int(np.abs(levels - c).argmin()) for c in (red, green, blue))
    return f"48;5;{16 + 36 * r + 6 * g + b}"


def _wrapped(words: Iterator[tuple[str, int, bool]], room: int) -> list[str]:
    lines, used = [""], 0
    for text, width, glued in words:
        gap = 0 if glued or not used else 1
        if used and used + gap + width > room:
            lines, used, gap = [*lines, ""], 0, 0
        lines[-1] += " " * gap + text
        used += gap + width
        if "\u23ce" in text:
            lines, used = [*lines, ""], 0
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


def _width(text: str) -> int:
    """Columns that a text takes: two for wide letters, none for marks above and below others."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )
