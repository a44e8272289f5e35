"""Which pixels and which words matter to the product of picture and question? MLB, as Kim and Zhang (2017) explain it.

    python -m examples.mlb.explain --out mlb.png
    python -m examples.mlb.explain --train --model mlb.onnx --out mlb.png

MLB answers from the product F = V * Q of what its glimpses see and what is asked. The gradient of 1/2 |V - F|^2 by the
picture, with F held constant, tells which pixels bear on what the question changes in V; that of 1/2 |Q - F|^2 which
words bear on what the picture changes in Q. No answer is needed. Both are shown as standard scores, beside the maps of
attention.
"""

# %% What is needed
from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from PIL import Image

import onnx_lrp
from exporters import scenes
from onnx_lrp import evaluate, show

MODEL = Path(__file__).with_name("mlb.onnx")


class Explained(NamedTuple):
    """N questions, and what was found.

    Attributes:
        drawn: the scenes.
        asked: the questions.
        answers: the model's, (N,).
        pixels: standard scores of the gradient, (N, 3, 24, 24).
        words: likewise, (N, 10); 0 at padding.
        glimpses: attention, (N, 2, 24, 24).
    """

    drawn: scenes.Scenes
    asked: scenes.Questions
    answers: np.ndarray
    pixels: np.ndarray
    words: np.ndarray
    glimpses: np.ndarray


# %% Explain
def explain(model: onnx.ModelProto, drawn: scenes.Scenes, asked: scenes.Questions) -> Explained:
    """One run of one graph gives answers, both gradients and the attention."""
    attention = next(n.output[0] for n in model.graph.node if n.op_type == "Softmax")  # by its name, from Netron
    # The product is found by itself, for there is one. Where several qualify, it is named: Hadamard("/Mul_2").
    explainer = onnx_lrp.Explainer(model, onnx_lrp.Hadamard(magnitude=True), values=[attention])
    explanation = explainer({"image": drawn.image, "tokens": asked.tokens})
    pixels = show.z_pixels(explanation.relevance["image"])
    text = show.z_tokens(explanation.relevance["tokens"], asked.tokens != scenes.PAD)
    alpha = explanation.values[attention]  # (N, glimpses, places)
    side = round(alpha.shape[-1] ** 0.5)
    maps = alpha.reshape(*alpha.shape[:2], side, side).repeat(scenes.SIZE // side, 2).repeat(scenes.SIZE // side, 3)
    return Explained(drawn, asked, explanation.outputs["logits"].argmax(1), pixels, text, maps)


# %% Measure
def measure(found: Explained) -> dict[str, float]:
    """How much lies on the thing that is asked for, and on the other; how often its colour is the strongest word."""
    asked, boxes, rows = found.asked, found.drawn.boxes, np.arange(len(found.answers))
    things = {"asked": boxes[rows, asked.asked], "other": boxes[rows, 1 - asked.asked]}
    maps = {"|z| of the picture": abs(found.pixels)}
    maps |= {f"glimpse {g + 1}": found.glimpses[:, g] for g in range(found.glimpses.shape[1])}
    numbers = {"answered rightly": float((found.answers == asked.answers).mean())}
    for name, heat in maps.items():
        for which, box in things.items():
            mass = evaluate.relevance_mass(heat, evaluate.region_of(box, scenes.SIZE, scenes.SIZE))
            numbers[f"{name}, on the {which} thing"] = float(mass.mean())
    numbers["the colour is the strongest word"] = float((found.words.argmax(1) == asked.content).mean())
    numbers["any one word is it by chance"] = float((1 / (asked.tokens != scenes.PAD).sum(1)).mean())
    return numbers


# %% Draw
def pairs(count: int, seed: int = 0) -> tuple[scenes.Scenes, scenes.Questions]:
    """The first scenes of two shapes, each with a question about the one and then about the other."""
    drawn = scenes.scenes(100, seed)
    both = [scenes.questions(drawn, seed + k) for k in range(2)]
    good = (both[0].asked != both[1].asked) & (drawn.shapes[:, 0] != drawn.shapes[:, 1])
    rows = np.flatnonzero(good)[:count].repeat(2)
    turns = np.arange(2 * count) % 2
    asked = (np.stack(parts)[turns, rows] for parts in zip(*both, strict=True))
    return scenes.Scenes(*(part[rows] for part in drawn)), scenes.Questions(*asked)


def figure(found: Explained) -> Image.Image:
    """Each question, and below it scene, gradient and both glimpses in a row."""
    titles = ("scene", "|z| of the gradient", "glimpse 1", "glimpse 2")
    parts = []
    for n, answer in enumerate(found.answers):
        scene = np.rint(found.drawn.image[n].transpose(1, 2, 0) * 255).astype(np.uint8)
        heat = [abs(found.pixels[n]).sum(0), *found.glimpses[n]]
        panels = [scene, *(show.render(h, "hot", percentile=None) for h in heat)]
        row = show.side_by_side(panels, titles, at_least=168)
        words = scenes.text(found.asked.tokens[n])
        heading = f"The model answers: {scenes.SHAPES[answer]}"
        parts += [show.words_picture(words, found.words[n, : len(words)], heading, width=row.width), row]
    return show.stack(parts)


# %% Run
def main() -> None:
    """Explain, print the numbers, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="default: the one that lies here")
    parser.add_argument("--train", action="store_true", help="train the network anew, and write it to --model")
    parser.add_argument("--count", type=int, default=1000, help="questions that are measured")
    parser.add_argument("-o", "--out", type=Path, default=Path("mlb.png"), help="the picture")
    options = parser.parse_args()
    if options.train:
        from exporters import mlb

        mlb.main(["--out", str(options.model)])
    model, drawn = onnx.load(options.model), scenes.scenes(options.count, seed=1)
    for name, value in measure(explain(model, drawn, scenes.questions(drawn, seed=1))).items():
        print(f"{name:42s}{value:.3f}")
    print(show.save(figure(explain(model, *pairs(2))), options.out))


if __name__ == "__main__":
    main()
