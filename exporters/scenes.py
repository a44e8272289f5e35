"""Small scenes of two coloured shapes, and questions about them: data for networks that look, read and answer.

A scene is 24 by 24. It holds two shapes of different colours, each in a box of 8 by 8 (a ninth of the picture) that
does not touch the other's, on a dark and noisy ground. A question asks for the shape of a colour; what else it says
differs from question to question, so neither its length nor the place of the colour tells anything.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

SIZE, BOX = 24, 8  # sides of a scene and of a shape's box, in pixels
GROUND = 0.25  # mean of the ground, of pixels from 0 to 1
COLOURS = {"red": (0.95, 0.2, 0.2), "green": (0.2, 0.85, 0.3), "blue": (0.25, 0.4, 1.0), "yellow": (0.95, 0.85, 0.2)}
SHAPES = ("disc", "square", "triangle", "cross")

PAD = 0  # the token that fills a question up
WORDS = ("<pad>", *COLOURS, "what", "which", "shape", "is", "has", "the", "a", "thing", "object", "there", "?")
TEMPLATES = (
    "what is the {} thing ?",
    "what shape is the {} object ?",
    "which shape has the {} thing ?",
    "the {} object is what ?",
    "what is {} ?",
    "there is a {} thing which has which shape ?",
)
LENGTH = max(len(template.split()) for template in TEMPLATES)  # 10 tokens


class Scenes(NamedTuple):
    """Pictures, and what is where in them.

    Attributes:
        image: pixels from 0 to 1, (N, 3, 24, 24).
        boxes: left, top, right, bottom of both things, in pixels, right and bottom exclusive, (N, 2, 4).
        colours: indices into COLOURS, never twice one in a scene, (N, 2).
        shapes: indices into SHAPES, (N, 2).
    """

    image: Array
    boxes: Indices
    colours: Indices
    shapes: Indices


class Questions(NamedTuple):
    """One question per scene.

    Attributes:
        tokens: indices into WORDS, filled up behind with PAD, (N, 10).
        asked: which of the scene's things the question is about, 0 or 1, (N,).
        answers: the asked thing's shape, index into SHAPES, (N,).
        content: where in the tokens the colour stands, (N,).
    """

    tokens: Indices
    asked: Indices
    answers: Indices
    content: Indices


def cover(shape: str) -> npt.NDArray[np.bool_]:
    """Which pixels of its box a shape covers, (8, 8)."""
    y, x = (np.mgrid[0:BOX, 0:BOX] + 0.5) - BOX / 2
    if shape == "disc":
        return np.asarray(np.hypot(x, y) < 4)
    if shape == "square":
        return np.asarray(np.maximum(abs(x), abs(y)) < 3.2)
    if shape == "triangle":
        return np.asarray((y < 3.6) & (abs(x) < (y + 4.2) / 2))
    return np.asarray(np.minimum(abs(x), abs(y)) < 1.2)  # a cross


def scenes(count: int, seed: int) -> Scenes:
    """Draw scenes.

    Args:
        count: how many.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    image = np.clip(rng.normal(GROUND, 0.06, (count, 3, SIZE, SIZE)), 0, 1)
    colours = np.argsort(rng.random((count, len(COLOURS))), axis=1)[:, :2]
    shapes = rng.integers(len(SHAPES), size=(count, 2))
    corners = places(rng, count)
    covers, paints = np.stack([cover(shape) for shape in SHAPES]), np.array(list(COLOURS.values()))
    for n in range(count):
        for (left, top), colour, shape in zip(corners[n], colours[n], shapes[n], strict=True):
            tone = np.clip(paints[colour] + rng.normal(0, 0.04, 3), 0, 1)
            part = image[n, :, top : top + BOX, left : left + BOX]
            part[...] = np.where(covers[shape], tone[:, None, None], part)
    return Scenes(image.astype(np.float32), np.concatenate([corners, corners + BOX], 2), colours, shapes)


def places(rng: np.random.Generator, count: int) -> Indices:
    """Left and top of two boxes that do not touch, (N, 2, 2); a pair that does is drawn anew."""
    corners = rng.integers(SIZE - BOX + 1, size=(count, 2, 2))
    while (close := (abs(corners[:, 0] - corners[:, 1]) <= BOX).all(1)).any():
        corners[close] = rng.integers(SIZE - BOX + 1, size=(int(close.sum()), 2, 2))
    return corners


def questions(about: Scenes, seed: int) -> Questions:
    """Ask for the shape of one thing in every scene.

    Args:
        about: the scenes.
        seed: of which thing and which words.
    """
    rng = np.random.default_rng(seed)
    count = len(about.image)
    asked, form = rng.integers(2, size=count), rng.integers(len(TEMPLATES), size=count)
    tokens = np.full((count, LENGTH), PAD)
    content = np.zeros(count, np.int64)
    for n in range(count):
        colour = list(COLOURS)[about.colours[n, asked[n]]]
        words = TEMPLATES[form[n]].format(colour).split()
        tokens[n, : len(words)] = [WORDS.index(word) for word in words]
        content[n] = words.index(colour)
    rows = np.arange(count)
    return Questions(tokens, asked, about.shapes[rows, asked], content)


def text(tokens: Indices) -> list[str]:
    """The words of one question (T,), without padding."""
    return [WORDS[token] for token in tokens if token != PAD]
