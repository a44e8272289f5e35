"""Which pixels and which words made a network answer: integrated gradients along one path for both.

    python examples/vqa/ask.py

writes picture.png and words.html beside this file. The cells (# %%) can be run one by one as a notebook.
"""

# %% The model, the scenes and the questions
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # exporters/ is part of the checkout, not of the package

import onnx_lrp  # noqa: E402
from exporters import scenes, vqa  # noqa: E402
from onnx_lrp import evaluate, show  # noqa: E402

COUNT, STEPS = 40, 30
drawn, asked, inputs = vqa.examples(COUNT, seed=11)
# Shown are things of different shapes, and no crosses: a grey picture says "cross" already, so their score falls.
CROSS = scenes.SHAPES.index("cross")
SHOWN = np.flatnonzero((drawn.shapes[:, 0] != drawn.shapes[:, 1]) & (asked.answers != CROSS))[:4]
BASELINES = {"padding, an embedding of zeros": scenes.PAD, 'the word "pad"': vqa.WORDS.index("pad")}

# %% One path for picture and words: from 0 (a grey picture) and from the embedding of a token
method = onnx_lrp.IntegratedGradients(STEPS, {"image": 0.0, "question": "tokens"})
explainer = onnx_lrp.Explainer(HERE / "vqa.onnx", method, tokenizer=HERE / "tokenizer.json", device="cpu")
found = {name: explainer({**inputs, "baseline": [[token]]}) for name, token in BASELINES.items()}

# %% The numbers
rows = np.arange(COUNT)
regions = [
    evaluate.region_of(drawn.boxes[rows, thing], scenes.SIZE, scenes.SIZE) for thing in (asked.asked, 1 - asked.asked)
]
first = next(iter(found.values()))
print(f"right answers: {(first.target == asked.answers).mean():.0%} of {COUNT}")
for name, explanation in found.items():
    text, image = (explanation.relevance[n].reshape(COUNT, -1).sum(1) for n in ("question", "image"))
    missing = evaluate.completeness(explanation)
    here, there = (evaluate.relevance_mass(explanation.relevance["image"], region).mean() for region in regions)
    top = np.abs(explanation.relevance["question"]).argmax(1) == asked.content
    print(f"\nbaseline of the question: {name}; {STEPS} steps")
    print(
        f"  mean contributions: text {text.mean():+.3f}, image {image.mean():+.3f}, total {(text + image).mean():+.3f}"
    )
    print(
        f"  missing of the rise: median {np.median(missing):.1%}, 95 % of them below {np.quantile(missing, 0.95):.0%}"
    )
    print(f"  mass in the box asked for {here:.2f}, in the other {there:.2f}")
    print(f"  the colour is the strongest word of {top.mean():.0%}")

# %% The table: prediction, truth, attribution score (the sum of R / ||R||), contributions
explanation = found['the word "pad"']
logits = explanation.outputs["logits"].astype(np.float64)
chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
said = [f"{scenes.SHAPES[k]} ({chances[n, k]:.0%})" for n, k in enumerate(explanation.target)]
truths = [scenes.SHAPES[k] for k in asked.answers]
words = explanation.tokens()
print(f"\n{'predicted':<16}{'true':<10}{'score':>7}{'text':>9}{'image':>9}{'total':>9}{'delta':>9}  question")
for n in SHOWN:
    text, image = (float(explanation.relevance[k][n].sum()) for k in ("question", "image"))
    sums = f"{words[n].normalized.sum():7.2f}{text:+9.3f}{image:+9.3f}{text + image:+9.3f}{explanation.delta[n]:+9.3f}"
    print(f"{said[n]:<16}{truths[n]:<10}{sums}  {' '.join(scenes.text(asked.tokens[n]))}")

# %% The words as a page, the pictures as a mask: clipped at the 99th percentile
columns = [e[SHOWN] for e in found.values()]
page = show.text_page(
    columns,
    [f"from {name}" for name in found],
    "What is asked, by integrated gradients",
    labels=list(scenes.SHAPES),
    predictions=[said[n] for n in SHOWN],
    truths=[truths[n] for n in SHOWN],
)
(HERE / "words.html").write_text(page, encoding="utf-8")
pictures = [np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8) for image in drawn.image[SHOWN]]
cells = [
    [picture, relevance.sum(0), show.masked(picture, relevance)]
    for picture, relevance in zip(pictures, explanation.relevance["image"][SHOWN], strict=True)
]
captions = [f"{' '.join(scenes.text(asked.tokens[n]))}  {said[n]}" for n in SHOWN]
heading = "What made it answer"
figure = show.grid(cells, ("scene", "relevance", "as a mask"), captions, heading, cell=168)
print(f"\nwritten: {show.save(figure, HERE / 'picture.png')}, {HERE / 'words.html'}")
