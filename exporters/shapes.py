"""Train and export the small picture classifier that ships in ``examples/shapes``.

Every picture holds exactly one object of a class, say a red circle, among distractors. The classes are six of the nine
pairs of three colours and three shapes; distractors are the three other pairs, and anything green or square. One
distractor has the object's colour and one its shape, and two more do the same for another class, so neither colour nor
shape alone decides, and what is around does not give it away: a good explanation has to point at the object.

    python -m exporters.shapes --out examples/shapes/shapes.onnx --pictures examples/shapes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # drawing needs neither: whoever only wants pictures pays for no framework
    import onnx
    import torch

Array = npt.NDArray[np.float64]
Picture = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

SIZE = 64
COLOURS = {"red": (229, 62, 68), "blue": (52, 120, 246), "yellow": (250, 204, 46), "green": (56, 180, 110)}
SHAPES = ("circle", "triangle", "star", "square")
CLASSES = ("red circle", "red star", "blue circle", "blue triangle", "yellow triangle", "yellow star")
DISTRACTORS = tuple(name for c in COLOURS for s in SHAPES if (name := f"{c} {s}") not in CLASSES)
GROUNDS = ((22, 28, 44), (44, 34, 58), (24, 52, 58), (58, 44, 40), (206, 210, 216), (222, 211, 192), (196, 208, 200))
REACH = {"circle": 1.0, "triangle": 1.45, "star": 1.4, "square": 1.25}  # circumradius per size: equal areas to the eye
SHIPPED = (("red star", 26), ("blue circle", 56), ("yellow triangle", 46), ("blue triangle", 28))  # class and seed
# Channels in and out of each convolution. A pair "a", "b" is a residual block; any other is followed by a pooling.
CONVS = {"block1": (3, 16), "block2": (16, 32), "block3a": (32, 32), "block3b": (32, 32)}
CONVS |= {"block4": (32, 40), "block5a": (40, 40), "block5b": (40, 40)}
PICTURES, EPOCHS, BATCH = 9000, 12, 50


class Thing(NamedTuple):
    """One object to paint; its reach is the radius of the circle around it."""

    shape: str
    colour: Array
    x: float
    y: float
    reach: float
    turn: float


# Arrays meet only + - * / and sqrt, which IEEE 754 rounds alike everywhere, so pixels hardly depend on the machine.
YS, XS = (grid + 0.5 for grid in np.mgrid[0:SIZE, 0:SIZE].astype(np.float64))


def segment(ax: float, ay: float, bx: float, by: float) -> Array:
    """Distance of every pixel to the segment from a to b."""
    dx, dy = bx - ax, by - ay
    along = np.clip(((XS - ax) * dx + (YS - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.asarray(np.sqrt((XS - ax - along * dx) ** 2 + (YS - ay - along * dy) ** 2))


def outline(thing: Thing) -> Array:
    """Distance of every pixel to the object's edge, negative inside."""
    if thing.shape == "circle":
        return np.asarray(np.sqrt((XS - thing.x) ** 2 + (YS - thing.y) ** 2) - thing.reach)
    count = {"triangle": 3, "square": 4, "star": 10}[thing.shape]
    radii = [thing.reach * (0.48 if thing.shape == "star" and i % 2 else 1.0) for i in range(count)]
    turns = [thing.turn + 2 * math.pi * i / count for i in range(count)]
    corners = [(thing.x + r * math.sin(t), thing.y - r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]
    distance, inside = np.full((SIZE, SIZE), np.inf), np.zeros((SIZE, SIZE), bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        distance = np.minimum(distance, segment(ax, ay, bx, by))
        if ay != by:  # even-odd rule: a ray to the right crosses this edge or not
            inside ^= ((ay > YS) != (by > YS)) & (XS - ax < (YS - ay) * (bx - ax) / (by - ay))
    return np.where(inside, -distance, distance)


def blend(canvas: Array, cover: Array, colour: Array) -> Array:
    """Lay a colour (one, or one per pixel) over the canvas, as far as each pixel is covered."""
    return canvas + cover[..., None] * (colour - canvas)


def paint(canvas: Array, thing: Thing) -> tuple[Array, Array]:
    """Paint an object with a soft shadow, and light falling from above; returns canvas and coverage."""
    shadow = np.clip(0.7 - outline(thing._replace(x=thing.x + 0.7, y=thing.y + 1.2)) / 2.5, 0, 1)
    cover = np.clip(0.5 - outline(thing), 0, 1)
    light = np.clip(1 - 0.16 * (YS - thing.y) / thing.reach, 0.8, 1.2)
    canvas = blend(canvas, 0.35 * shadow, np.zeros(3))
    return blend(canvas, cover, np.clip(thing.colour * light[..., None], 0, 255)), cover


def background(rng: np.random.Generator) -> Array:
    """Draw a muted, textured ground with thin lines and bright sprinkles."""
    ground = np.array(GROUNDS[rng.integers(len(GROUNDS))], np.float64) + rng.uniform(-10, 10, 3)
    ramp = ((XS - SIZE / 2) * rng.uniform(-1, 1) + (YS - SIZE / 2) * rng.uniform(-1, 1)) / SIZE
    hats = np.clip(1 - np.abs(YS[:, :1] / 8 - np.arange(9)), 0, 1)  # bilinear: 9 x 9 grey levels over the picture
    texture = hats @ rng.uniform(-1, 1, (9, 9)) @ hats.T
    canvas: Array = ground + (24 * ramp + 9 * texture)[..., None] + rng.uniform(-5, 5, (SIZE, SIZE, 3))
    for _ in range(rng.integers(2, 6)):
        ends, tone = rng.uniform(0, SIZE, 4), rng.uniform(-1, 1)
        cover = np.clip(rng.uniform(0.4, 0.9) + 0.5 - segment(*ends), 0, 1)
        canvas = blend(canvas, 0.6 * cover, ground + 70 * tone)
    for _ in range(rng.integers(3, 9)):
        (x, y), turn, colour = rng.uniform(2, SIZE - 2, 2), rng.uniform(0, 2 * math.pi), rng.integers(len(COLOURS))
        dx, dy = 1.6 * math.cos(turn), 1.6 * math.sin(turn)
        cover = np.clip(1.1 - segment(x - dx, y - dy, x + dx, y + dy), 0, 1)
        canvas = blend(canvas, 0.85 * cover, np.array(list(COLOURS.values())[colour], np.float64))
    return canvas


def place(rng: np.random.Generator, name: str, others: list[Thing]) -> Thing | None:
    """Find a free place for an object, or None where there is no room."""
    hue, shape = name.split()
    colour = np.clip(np.array(COLOURS[hue]) + rng.uniform(-16, 16, 3), 0, 255)
    for _ in range(60):
        reach, turn = REACH[shape] * rng.uniform(6, 9.5), rng.uniform(0, 2 * math.pi)
        x, y = map(float, rng.uniform(reach + 0.5, SIZE - reach - 0.5, 2))
        if all((x - o.x) ** 2 + (y - o.y) ** 2 > (reach + o.reach + 0.5) ** 2 for o in others):
            return Thing(shape, colour, x, y, reach, turn)
    return None


def draw(rng: np.random.Generator, label: int, *, hidden: bool = False) -> tuple[Picture, int, Box]:
    """Draw one picture.

    Args:
        rng: where all randomness comes from; the same state gives the same picture.
        label: index into ``CLASSES`` of the object that decides.
        hidden: leave that one object out and change nothing else, to see what a model does without it.

    Returns:
        The picture (height, width, RGB), its label, and the box of the object: left, top, right, bottom in pixels,
        right and bottom exclusive.
    """
    decoy = int(rng.choice([other for other in range(len(CLASSES)) if other != label]))
    words = (*CLASSES[label].split(), *CLASSES[decoy].split())
    names = [CLASSES[label], *(str(rng.choice([d for d in DISTRACTORS if word in d.split()])) for word in words)]
    things: list[Thing] = []
    while len(things) < len(names):  # start over until everything finds its place
        thing = place(rng, names[len(things)], things)
        things = [*things, thing] if thing else []
    canvas, box = background(rng), (0, 0, 0, 0)
    for index in rng.permutation(len(things)):
        painted, cover = paint(canvas, things[index])
        if index == 0:
            ys, xs = np.nonzero(cover)
            box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        if index > 0 or not hidden:
            canvas = painted
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8), label, box


def dataset(count: int, seed: int, *, hidden: bool = False) -> tuple[Picture, npt.NDArray[np.int64]]:
    """Draw pictures of all classes in turn: uint8 (count, 3, height, width), and labels."""
    rng = np.random.default_rng(seed)
    drawn = [draw(rng, i % len(CLASSES), hidden=hidden) for i in range(count)]
    pictures = np.stack([picture for picture, _, _ in drawn]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pictures), np.array([label for _, label, _ in drawn])


def network() -> torch.nn.Module:
    """Build the untrained network; its state is named after ``CONVS``, as are the nodes of the exported file."""
    import torch
    from torch.nn import BatchNorm2d, Conv2d, Linear, ModuleDict, Sequential

    class Shapes(ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shortcut = x
            for name in CONVS:
                y = self[name](x)
                if name.endswith("b"):
                    y = y + shortcut
                shortcut, x = x, torch.relu(y)
                if not name.endswith(("a", "b")):
                    x = torch.nn.functional.max_pool2d(x, 2)
            return torch.as_tensor(self["classifier"](x.mean((2, 3))))

    layers = {}
    for name, (i, o) in CONVS.items():
        layers[name] = Sequential(OrderedDict(conv=Conv2d(i, o, 3, padding=1, bias=False), norm=BatchNorm2d(o)))
    return Shapes({**layers, "classifier": Linear(o, len(CLASSES))})


def train(pictures: Picture, labels: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float32]]:
    """Train the network and return its state: the same arrays whenever it runs again on one machine."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums would otherwise be split, and rounded, by the number of cores
    torch.use_deterministic_algorithms(True)
    rng, model = np.random.default_rng(0), network()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, EPOCHS * (len(labels) // BATCH))
    for epoch in range(EPOCHS):
        losses = []
        for chosen in rng.permutation(len(labels)).reshape(-1, BATCH):
            turned = np.rot90(pictures[chosen], int(rng.integers(4)), (2, 3))  # turned or mirrored, it keeps its name
            image = turned[..., :: int(rng.choice([-1, 1]))].astype(np.float32) / 255
            x = torch.from_numpy(image).contiguous(memory_format=torch.channels_last)  # half the time on a CPU
            loss = cross_entropy(model(x), torch.from_numpy(labels[chosen]), label_smoothing=0.02)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {np.mean(losses):.4f}", flush=True)
    # Weights that float16 holds exactly: a half-precision copy of the model is then the same model.
    return {k: v.detach().numpy().astype(np.float16).astype(np.float32) for k, v in model.state_dict().items()}


def export(state: dict[str, npt.NDArray[np.float32]]) -> onnx.ModelProto:
    """Write the network down as ONNX, node by node, so that the bytes depend on nothing but the weights."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes: list[onnx.NodeProto] = []
    weights = [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in state.items() if v.ndim]

    def node(kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    x = shortcut = "image"
    for name in CONVS:
        y = node("Conv", f"{name}/conv", x, f"{name}.conv.weight", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        statistics = [f"{name}.norm.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
        y = node("BatchNormalization", f"{name}/norm", y, *statistics, epsilon=1e-5)
        if name.endswith("b"):
            y = node("Add", f"{name}/add", y, shortcut)
        shortcut, x = x, node("Relu", f"{name}/relu", y)
        if not name.endswith(("a", "b")):
            x = node("MaxPool", f"{name}/pool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = node("Flatten", "head/flatten", node("GlobalAveragePool", "head/pool", x), axis=1)
    node("Gemm", "head/classifier", x, "classifier.weight", "classifier.bias", transB=1)
    nodes[-1].output[0] = "logits"
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(CLASSES)])
    doc = "Which coloured shape is in the picture? RGB pictures, 64 by 64, from 0 to 1; a logit per class."
    graph = helper.make_graph(nodes, "shapes", [image], [logits], weights, doc)
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="onnx_lrp exporters.shapes")
    model.doc_string = "A small residual network for coloured shapes among distractors, made by exporters/shapes.py."
    preprocess = {"size": SIZE, "scale": 255}
    helper.set_model_props(model, {"classes": json.dumps(CLASSES), "preprocess": json.dumps(preprocess)})
    checker.check_model(model, full_check=True)
    return model


def accuracy(path: Path, pictures: Picture, labels: npt.NDArray[np.int64]) -> float:
    """Share of the pictures that the exported file, run by ONNX Runtime, gives the right label."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    right = 0
    for chosen in np.array_split(np.arange(len(labels)), 20):
        logits = np.asarray(session.run(["logits"], {"image": pictures[chosen].astype(np.float32) / 255})[0])
        right += int((logits.argmax(1) == labels[chosen]).sum())
    return right / len(labels)


def main() -> None:
    """Train, export and measure; or only draw the shipped pictures."""
    parser = argparse.ArgumentParser(prog="python -m exporters.shapes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the ONNX file to write; labels.txt goes beside it")
    parser.add_argument("--pictures", type=Path, help="the folder for the shipped pictures")
    options = parser.parse_args()
    if options.pictures:
        from PIL import Image

        (options.pictures / "gallery").mkdir(parents=True, exist_ok=True)
        for index, (name, seed) in enumerate(SHIPPED):
            file = options.pictures / (f"gallery/{name.replace(' ', '-')}.png" if index else "picture.png")
            picture, _, box = draw(np.random.default_rng(seed), CLASSES.index(name))
            Image.fromarray(picture).save(file, optimize=True)
            print(f"{file}: {name} at {box}")
    if options.out:
        import onnx

        start = time.perf_counter()
        model = export(train(*dataset(PICTURES, seed=1)))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, options.out)
        (options.out.parent / "labels.txt").write_text("\n".join(CLASSES) + "\n")
        data, seconds = options.out.read_bytes(), time.perf_counter() - start
        print(f"made in {seconds:.0f} s: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
        print(f"accuracy on 3000 fresh pictures: {accuracy(options.out, *dataset(3000, seed=2)):.2%}")
        hidden = accuracy(options.out, *dataset(1200, seed=3, hidden=True))
        print(f"the same with the object left out: {hidden:.2%} (chance is {1 / len(CLASSES):.2%})")


if __name__ == "__main__":
    main()
