"""Why a network says what it says of a picture: every word of a caption, explained; and how good that is.

    python -m examples.captioning.captions            # with the shipped weights: a picture, and the numbers
    python -m examples.captioning.captions --train    # trains the network first, a minute or two

Cell by cell it runs in a notebook as well.
"""

# %% A captioner in ONNX: picture and words so far in, logits of the next word (and its attention) out
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from exporters.captioning import WORDS, captions, load_weights, small, train, write
from onnx_lrp import evaluate, show
from onnx_lrp.captions import CaptionExplainer

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path("examples/captioning")
OUT = Path("out")
OUT.mkdir(exist_ok=True)
nets = {}
for name, pooled in (("captioner", True), ("attentive", False)):  # the second sees by attention alone
    net = small("single", pooled=pooled)
    nets[name] = train(net) if "--train" in sys.argv else load_weights(net, HERE / f"{name}.npz")
    write(nets[name], OUT / f"{name}.onnx")

# %% One picture: the model writes a caption, and every word of it is explained in one run
METHODS = ("captioning", "gradient", "guided_backprop", "grad_cam", "guided_grad_cam")


def explainer_of(name: str, method: str) -> CaptionExplainer:
    """LRP with the account of biases, gradients and their like for the picture alone."""
    options = {"ledger": True} if method == "captioning" else {"inputs": ["image"]}
    return CaptionExplainer(OUT / f"{name}.onnx", WORDS, method, device="cpu", **options)


explainers = {method: explainer_of("captioner", method) for method in METHODS}
image = captions(3, seed=7).image[2]
captioner = explainers["captioning"].captioner
greedy, wide = (captioner.describe(image, beams=beams) for beams in (1, 3))
print("greedy:", captioner.vocabulary.text(greedy), "  beam of 3:", captioner.vocabulary.text(wide))
found = [explainer(image, greedy) for explainer in explainers.values()]
print(show.save(show.caption_figure(found), OUT / "captions.png", optimize=True))

# %% The picture's words in numbers: what each owes to the picture and to the words before it
for t, word in enumerate(found[0].words):
    before = [f"{read} {r:.2f}" for read, r in zip(found[0].before[: t + 1], found[0].texts[t], strict=False)]
    print(f"{word:>8}: picture {found[0].images[t].sum():6.2f}, {', '.join(before)}")

# %% Many pictures: is the relevance on the thing, and does the word need what is relevant?
PLACES = {"COLOUR": 1, "SHAPE": 2, "on": 3, "SIDE": 4}
scenes = captions(60, seed=21)


def patch_drop(explanations: list, maps: np.ndarray, order: str = "most") -> np.ndarray:
    """Mean fall of each word's probability when four patches of 4x4, as large as the thing's box, are painted over."""
    rows = [
        evaluate.image_ablation(
            captioner_of[name].next, e.image, e.caption, m, size=4, count=4, fill=0.25, order=order, seed=i
        )
        for i, (e, m) in enumerate(zip(explanations, maps, strict=True))
    ]
    return np.mean(rows, 0)


def row(title: str, correct: np.ndarray, fallen: np.ndarray) -> None:
    """A line of the table."""
    numbers = [f"{correct[t]:4.2f} / {fallen[t]:5.2f}" for t in PLACES.values()]
    print(f"{title:>18} " + "   ".join(numbers))


captioner_of = {name: explainer_of(name, "captioning").captioner for name in nets}
for name in nets:
    print(f"\n{name}: relevance in the box (its area: {64 / 576:.2f}) / fall of the probability, by word")
    print(" " * 18, "   ".join(f"{word:>12}" for word in PLACES))
    for method in METHODS:
        explainer = explainer_of(name, method)
        seen = [explainer(x, words) for x, words in zip(scenes.image, scenes.words, strict=True)]
        maps = np.stack([e.images for e in seen])
        correct = np.array([evaluate.box_correctness(maps[:, t], scenes.boxes)[:, 0].mean() for t in range(6)])
        row(method, correct, patch_drop(seen, maps))
        if method != "captioning":
            continue
        attention = np.stack([e.attention for e in seen]).repeat(4, 2).repeat(4, 3)
        looked = np.array([evaluate.box_correctness(attention[:, t], scenes.boxes)[:, 0].mean() for t in range(6)])
        row("attention", looked, patch_drop(seen, attention))
        row("at random", np.full(6, 64 / 576), patch_drop(seen, maps, "random"))
        sums = [np.abs([e.images.sum((1, 2, 3)) for e in seen]).mean(0), np.abs([e.texts.sum(1) for e in seen]).mean(0)]
        ratio = ", ".join(f"{word} {sums[0][t] / sums[1][t]:.2f}" for word, t in PLACES.items())
        print(f"{'':>18} picture over words: {ratio}")
        for order in ("most", "random"):
            fallen = [
                evaluate.word_ablation(
                    captioner_of[name].next, e.image, e.caption, e.texts, count=1, first=2, order=order, seed=i
                )
                for i, e in enumerate(seen)
            ]
            means = np.mean(fallen, 0)
            print(f"{'':>18} without one word before ({order}): " +
                  ", ".join(f"{word} {means[t]:.2f}" for word, t in PLACES.items() if t > 1))  # fmt: skip

# %% Right and wrong words: noise makes the network mistake shapes; do the maps of wrong words look different?
noisy = captions(200, seed=5, noise=0.15)
explainer = explainers["captioning"]
said = [explainer.captioner.describe(x) for x in noisy.image]
kept = [i for i, words in enumerate(said) if len(words) == 7]
seen = [explainer(noisy.image[i], said[i]) for i in kept]
for word, t in (("COLOUR", 1), ("SHAPE", 2)):
    right = np.array([said[i][t + 1] == noisy.words[i, t + 1] for i in kept])
    if right.all():
        print(f"{word}: no wrong ones")
        continue
    maps = np.stack([e.images[t] for e in seen])
    rivals = {"max attention": np.array([e.attention[t].max() for e in seen])}
    rivals["probability"] = np.array([e.probability[t] for e in seen])
    aucs = evaluate.aucs(evaluate.map_statistics(maps) | rivals, right)
    print(f"{word}: {right.sum()} right, {(~right).sum()} wrong; AUC of right against wrong:")
    print("   " + ", ".join(f"{statistic} {value:.2f}" for statistic, value in aucs.items()))
