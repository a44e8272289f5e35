"""z⁺ relevance on a VGG, as pictures and as numbers; and live, on a film. The cells run one by one, too.

python -m examples.vgg.vgg           # writes out/vgg.png and out/live.png, prints the tables of the README
"""

# %% A small VGG that tells four shapes apart: as shipped, or trained afresh in half a minute.
import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

import onnx_lrp
from exporters import small_vgg
from onnx_lrp import evaluate, show
from onnx_lrp.live import Live
from onnx_lrp.preprocess import from_options

parser = argparse.ArgumentParser(description="z⁺ relevance on a small VGG, in pictures and numbers.")
parser.add_argument("--train", action="store_true", help="train the network instead of taking the shipped one")
parser.add_argument("-o", "--out", type=Path, default=Path("out"), help="folder for the pictures; default out")
args, _ = parser.parse_known_args()
args.out.mkdir(parents=True, exist_ok=True)

net = (
    small_vgg.train()
    if args.train
    else small_vgg.load(Path(small_vgg.__file__).parents[1] / "examples/vgg/small_vgg.onnx")
)
model = small_vgg.export(net, None)
pictures, labels, boxes = small_vgg.dataset(200, seed=5)
x, region = small_vgg.prepared(pictures), evaluate.region_of(boxes, small_vgg.SIZE, small_vgg.SIZE)

# %% The whole softmax as start, x := 1 at the first layer; maxima by their winner, or as averages.
BOOKS = {"winner": "zplus_wplus", "average": "zplus_wplus_average"}


def explain(model: onnx.ModelProto, book: str, **options: Any) -> onnx_lrp.Explanation:
    """All pictures, from the whole softmax."""
    return onnx_lrp.Explainer(model, book, start="softmax", **options)(x)


inner = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "MaxPool", "Flatten", "Gemm")][:-1]
maps = {pool: explain(model, book, layers=inner) for pool, book in BOOKS.items()}

# %% It is conserved: the softmax sums to one, and so does the relevance at every layer.
print("largest difference of the sum to 1, over 200 pictures")
for name in [*inner[::-1], "input"]:
    off = [np.abs(e.relevance[name].reshape(len(x), -1).sum(1, dtype=np.float64) - 1).max() for e in maps.values()]
    print(f"  {name:42}" + "".join(f"{pool:>9} {value:.0e}" for pool, value in zip(maps, off, strict=True)))

# %% It lies on the shape; with random weights it does not.
controls = {
    "trained": model,
    "before training": small_vgg.export(small_vgg.network().eval(), None),
    "redrawn weights": evaluate.randomised(model, draw=evaluate.gaussian),
    "shuffled weights": evaluate.randomised(model),
}
print(f"\n{'':18}{'rule':>10}{'mass in box':>13}{'of its area':>13}{'entropy':>9}{'pointing':>10}")
random = {}
for name, control in controls.items():
    for pool, book in BOOKS.items():
        heat = maps[pool].relevance["input"] if control is model else explain(control, book).relevance["input"]
        random[name, pool] = heat
        mass, bits = evaluate.relevance_mass(heat, region).mean(), evaluate.entropy(heat).mean()
        hits = evaluate.pointing(heat, region).mean()
        print(f"{name:18}{pool:>10}{mass:13.2f}{mass / region.mean():12.1f}x{bits:9.3f}{hits:10.2f}")

# %% What it does not say: which class. Maps of two classes are the same; those of other rules are not.
print("\ncosine of the maps of two classes")
for book in (*BOOKS.values(), "zplus", "epsilon_plus_flat", "epsilon"):
    explainer = onnx_lrp.Explainer(model, book, start="one")
    first, second = (explainer(x, target=k).relevance["input"].reshape(len(x), -1) for k in (0, 1))
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    print(f"  {book:22}{cosine.mean():8.4f}")

# %% The picture: a row per shape.
rows, names = [], []
for n in (20, 9, 6, 19):
    winner, average = (maps[pool].relevance["input"][n] for pool in BOOKS)
    colours = np.asarray(show.render(average, "bgr"))
    rows.append([pictures[n], winner, average, colours, random["before training", "average"][n]])
    names.append(small_vgg.SHAPES[labels[n]])
columns = ["input", "maxima by their winner", "as averages", "as averages, by channel", "before training"]
show.save(show.grid(rows, columns, names, "z-plus from the whole softmax", "hot", cell=160), args.out / "vgg.png")

# %% Live: the same on a film, as `onnx-lrp live` does it.
pre = from_options("caffe", size=small_vgg.SIZE, input_shape=(None, 3, small_vgg.SIZE, small_vgg.SIZE))
live = Live(onnx_lrp.Explainer(model, "zplus_wplus_average", start="softmax"), pre, labels=small_vgg.SHAPES)
film = small_vgg.film(160)
views = [live(Image.fromarray(frame)) for frame in film]
print(f"\n{len(film)} frames, {views[-1].rate:.0f} frames/s at the end")
chosen = [views[k].image.resize((322, 176)) for k in (10, 50, 90)]
sheet = Image.new("RGB", (sum(image.width + 6 for image in chosen) - 6, 176), "white")
for k, image in enumerate(chosen):
    sheet.paste(image, (k * (image.width + 6), 0))
show.save(sheet, args.out / "live.png", optimize=True)
print(f"written {args.out / 'vgg.png'} and {args.out / 'live.png'}")
