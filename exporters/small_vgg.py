"""Train and export a small VGG that says which of four shapes is in a picture: in seconds, on pictures made here.

    python -m exporters.small_vgg --out small_vgg.onnx               # torch, by TorchScript
    python -m exporters.small_vgg --out small_vgg.onnx --form dynamo # torch, by its newer exporter
    python -m exporters.small_vgg --out small_vgg.onnx --form nhwc   # as Keras and TensorFlow converters write it

A picture shows one disc, square, triangle or cross of any colour at any place, on a noisy ground. The network reads
pixels as the published VGG does: blue, green, red, from 0 to 255 less their means ("caffe"), so of either sign.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from exporters.torch_nets import VGG
from exporters.training import fit
from exporters.vgg import FORMS, exported

Pictures = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

SIZE, FINE = 32, 2  # side of a picture in pixels; everything is painted this much finer, and averaged
SHAPES = ("disc", "square", "triangle", "cross")
MEAN = (103.939, 116.779, 123.68)  # of blue, green and red
WIDTH, HIDDEN = 8, 64
STEPS, BATCH, PEAK = 800, 50, 5e-3


def covered(shape: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which points a shape covers that reaches from -1 to 1 along both axes."""
    if shape == "disc":
        return np.asarray(x**2 + y**2 < 1)
    if shape == "square":
        return np.asarray(np.maximum(abs(x), abs(y)) < 0.9)
    if shape == "triangle":
        return np.asarray((y < 0.95) & (2 * abs(x) < y + 1))
    return np.asarray((np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1))  # a cross


def ground(rng: np.random.Generator, height: int, width: int, grain: int) -> npt.NDArray[np.float64]:
    """A dull colour with a slope, and noise in grains of so many pixels, (height, width, 3) from 0 to 1."""
    ys, xs = np.mgrid[0:height, 0:width] / max(height, width) - 0.5
    slope = rng.uniform(-0.25, 0.25, (2, 3))
    tone = rng.uniform(0.15, 0.45) + rng.uniform(-0.06, 0.06, 3)
    noise = rng.normal(0, 0.08, (height // grain, width // grain, 3)).repeat(grain, 0).repeat(grain, 1)
    return np.asarray(tone + ys[..., None] * slope[0] + xs[..., None] * slope[1] + noise)


def paint(canvas: npt.NDArray[np.float64], shape: str, x: float, y: float, reach: float, hue: float) -> None:
    """Paint a shape with its centre at x, y, all in pixels of the canvas."""
    ys, xs = np.mgrid[0 : canvas.shape[0], 0 : canvas.shape[1]] + 0.5
    canvas[covered(shape, (xs - x) / reach, (ys - y) / reach)] = colorsys.hsv_to_rgb(hue, 0.75, 0.95)


def pixels(canvas: npt.NDArray[np.float64]) -> Pictures:
    """Numbers from 0 to 1 as pixels."""
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def dataset(count: int, seed: int) -> tuple[Pictures, Indices, Indices]:
    """Draw pictures of all shapes in turn.

    Returns:
        pictures (N, 32, 32, 3) in RGB, labels (N,), and boxes (N, 1, 4): left, top, right, bottom in pixels, right and
        bottom exclusive.
    """
    rng = np.random.default_rng(seed)
    found, boxes = np.zeros((count, SIZE, SIZE, 3), np.uint8), np.zeros((count, 1, 4), np.int64)
    labels = np.arange(count) % len(SHAPES)
    for n, label in enumerate(labels):
        reach = rng.uniform(4.5, 6)
        x, y = rng.uniform(reach, SIZE - reach, 2)
        canvas = ground(rng, SIZE * FINE, SIZE * FINE, FINE)
        paint(canvas, SHAPES[label], x * FINE, y * FINE, reach * FINE, rng.random())
        found[n] = pixels(canvas.reshape(SIZE, FINE, SIZE, FINE, 3).mean((1, 3)))
        boxes[n, 0] = [int(x - reach), int(y - reach), int(np.ceil(x + reach)), int(np.ceil(y + reach))]
    return found, labels, boxes


def film(count: int, seed: int = 0, every: int = 40) -> list[Pictures]:
    """Frames (128, 160, 3) of a shape that wanders about, and is another one now and then: what a camera might see."""
    rng = np.random.default_rng(seed)
    hues = rng.random(-(-count // every))
    frames = []
    for k in range(count):
        canvas = ground(np.random.default_rng([seed, k // every]), 128, 160, 4)
        canvas += rng.normal(0, 0.02, canvas.shape)
        turn = 2 * np.pi * k / 60
        x, y = 80 + 38 * np.cos(turn), 64 + 38 * np.sin(1.5 * turn)
        paint(canvas, SHAPES[k // every % len(SHAPES)], x, y, 21 + 2 * np.sin(turn / 2), hues[k // every])
        frames.append(pixels(canvas))
    return frames


def prepared(pictures: Pictures) -> npt.NDArray[np.float32]:
    """Pixels (N, H, W, 3) in RGB as the network reads them: (N, 3, H, W), in BGR, less their means."""
    return np.ascontiguousarray((pictures[..., ::-1].astype(np.float32) - np.float32(MEAN)).transpose(0, 3, 1, 2))


def network() -> VGG:
    """The network before training: three stages of one convolution each, and the three dense layers of a VGG."""
    torch.manual_seed(0)
    net = VGG((1, 1, 1), width=WIDTH, size=SIZE, hidden=HIDDEN, classes=len(SHAPES))
    with torch.no_grad():
        net.features[0].weight.mul_(1 / 64)  # for pixels of a hundred, not of one
    return net


def train(*, steps: int = STEPS) -> VGG:
    """Train the network: the same weights whenever it runs again on one machine."""
    torch.set_num_threads(1)  # sums would otherwise be split, and rounded, by the number of cores
    net = network()
    pictures, labels, _ = dataset(4000, seed=1)
    x, y, rng = torch.from_numpy(prepared(pictures)), torch.from_numpy(labels), np.random.default_rng(0)

    def loss_of() -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(x), size=BATCH))
        return torch.nn.functional.cross_entropy(net(x[chosen]), y[chosen], label_smoothing=0.02)

    net.train()
    fit(net, torch.optim.AdamW(net.parameters(), weight_decay=1e-2), PEAK, steps, loss_of)
    return net


def load(path: str | Path) -> VGG:
    """The network of a file that TorchScript exported, in evaluation mode: it keeps the names of the weights."""
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer}
    net = network()
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net.eval()


def export(net: VGG, path: str | Path | None, form: str = "torchscript") -> onnx.ModelProto:
    """Export the network, with its classes and how it reads pixels; write it to `path` unless that is None.

    Args:
        net: the network.
        path: the file.
        form: one of `exporters.vgg.FORMS`.
    """
    model = exported(net, SIZE, form)
    preprocess = {"preset": "caffe", "size": SIZE, "layout": "NHWC" if form == "nhwc" else "NCHW"}
    helper.set_model_props(model, {"classes": json.dumps(SHAPES), "preprocess": json.dumps(preprocess)})
    if path is not None:
        onnx.save(model, path)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.small_vgg", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0])
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    net = train()
    export(net, args.out, args.form)
    seconds = time.perf_counter() - start
    pictures, labels, _ = dataset(2000, seed=2)
    with torch.inference_mode():
        right = (net(torch.from_numpy(prepared(pictures))).argmax(1).numpy() == labels).mean()
    print(f"made in {seconds:.0f} s: {args.out.stat().st_size} bytes; right in {right:.2%} of 2000 fresh pictures")


if __name__ == "__main__":
    main()
