"""Tune captioners on what supports their words, and see whether they make up fewer things.

    python examples/lrp_inference/tuning.py

Trains, from nothing, five captioners on scenes in which squares go with discs and crosses with triangles; tunes each
one plainly and by LRP-inference (Sun et al. 2022); prints what they say of scenes in which nothing goes together;
writes the picture and the tuned captioner, whose file has p^ and omega among its outputs. Run it as a whole, or cell by
cell.
"""

# %% Settings
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import torch
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import onnx_lrp
from exporters.captioning import write
from exporters.captioning_tuning import (
    LENGTH,
    PAD,
    SHARE,
    SHARES,
    STOPS,
    WORDS,
    caption,
    encoder,
    for_testing,
    measured,
    runs,
    table,
)
from exporters.scenes import SHAPES

HERE = Path(__file__).parent
NAMES = {"start": "before", 1.0: "plain", 0.5: "λ = ½", 0.0: "p̂ alone"}

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
parser.add_argument("-o", "--out", type=Path, default=HERE / "tuning.png")
parser.add_argument("--model", type=Path, default=HERE / "tuned.onnx", help="where the tuned captioner goes")
args = parser.parse_args() if "__file__" in globals() else parser.parse_args([])
torch.set_num_threads(1)

# %% Five starts, each tuned in three ways; of the first one, the captions and the tuned captioner are kept
look = encoder()
found: dict[str, dict[float | str, list[float]]] = {}
said: dict[float | str, np.ndarray] = {}
for seed in args.seeds:
    for way, net, fresh in runs(seed, look, SHARES):
        for name, value in measured(net, fresh).items():
            found.setdefault(name, {}).setdefault(way, []).append(value)
        if seed == args.seeds[0]:
            said[way] = caption(net, fresh.features)
            if way == SHARE:
                model = write(net, None, length=LENGTH, attention=False)
                onnx_lrp.reweigh(model, masked=STOPS).save(args.model)
    print(f"start {seed}: hallucinated", {NAMES[w]: f"{100 * v[-1]:.1f} %" for w, v in found["hallucinated"].items()})
results = {name: {way: np.array(v) for way, v in ways.items()} for name, ways in found.items()}
print(table(results))

# %% The file: weights of every word that is predicted, and the logits of what they weigh
drawn = for_testing(args.seeds[0])
session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
logits, weighed, *omegas = session.run(None, {"image": drawn.image[:200], "words": drawn.words[:200, :-1]})
content = ~np.isin(logits.argmax(-1), STOPS)
print(f"omega from {min(o.min() for o in omegas):.2f} to {max(o.max() for o in omegas):.2f}")
highest, told = (x.max(-1)[content].mean() for x in (logits, weighed))
print(f"logit of the word predicted, where it is no stop word: {highest:.1f}, re-weighted {told:.1f}")


# %% The picture
def paired(ax: Axes, values: dict[float | str, np.ndarray], title: str) -> None:
    """One line per start, and the mean."""
    ways = list(values)
    rows = 100 * np.stack([values[w] for w in ways])
    ax.plot(rows, color="#9db4c8", lw=1.2, marker="o", ms=3.5, zorder=2)
    ax.plot(rows.mean(1), color="#b2182b", lw=2.2, marker="o", ms=6, zorder=3)
    for x, y in enumerate(rows.mean(1)):
        ax.annotate(f"{y:.1f}", (x, rows[x].max()), (0, 6), textcoords="offset points", ha="center", color="#b2182b")
    ax.set_xticks(range(len(ways)), [NAMES[w] for w in ways])
    ax.set_title(title, fontsize=10)
    ax.margins(0.12, 0.2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#eeeeee")


def objects(row: np.ndarray) -> set[str]:
    """The things of a caption."""
    return {WORDS[i] for i in row} & set(SHAPES)


def text(row: np.ndarray) -> str:
    """A caption as text."""
    return " ".join(WORDS[i] for i in row[1:] if i != PAD and WORDS[i] != "<end>")


truth = drawn.words
made_up = {w: np.array([len(objects(a) - objects(b)) > 0 for a, b in zip(said[w], truth, strict=True)]) for w in said}
right = {w: (said[w] == truth).all(1) for w in said}
better, worse = (np.flatnonzero(made_up[a] & right[b]) for a, b in ((1.0, SHARE), (SHARE, 1.0)))
blank = [int((made_up[a] & ~made_up[b] & ~right[b]).sum()) for a, b in ((1.0, SHARE), (SHARE, 1.0))]
print(f"start {args.seeds[0]}, {len(truth)} scenes, captions with a thing that is not there:")
print(f"  of plain tuning that are right with p^: {len(better)}; that are neither with p^: {blank[0]}")
print(f"  with p^ that are right by plain tuning: {len(worse)}; that are neither by plain tuning: {blank[1]}")

figure = plt.figure(figsize=(11, 6.2), dpi=110)
grid = figure.add_gridspec(2, 12, height_ratios=(1.15, 1), hspace=0.25, wspace=1.2)
titles = {"hallucinated": "captions with a thing not there, %", "exact": "captions right as a whole, %"}
titles["f1"] = "F1 of the four things, %"
for k, (name, title) in enumerate(titles.items()):
    paired(figure.add_subplot(grid[0, 4 * k : 4 * k + 4]), results[name], title)
for k, n in enumerate([*better[:3], *worse[:1]]):
    ax = figure.add_subplot(grid[1, 3 * k : 3 * k + 3])
    ax.imshow(drawn.image[n].transpose(1, 2, 0))
    ax.set_axis_off()
    for line, way in enumerate((1.0, SHARE)):
        colour = "#b2182b" if made_up[way][n] else "#1a7837" if right[way][n] else "#666666"
        words = f"{NAMES[way]}: {text(said[way][n])}"
        ax.text(
            0.5, -0.09 - 0.1 * line, words, transform=ax.transAxes, ha="center", fontsize=7, color=colour,
        )  # fmt: skip
figure.savefig(args.out, bbox_inches="tight")
print(f"wrote {args.out} and {args.model}")
