"""What z⁺ relevance costs beside the bare forward pass, and how many frames a second `onnx-lrp live` makes of it.

    python -m benchmarks.live --threads 2

VGG16 or VGG19 at 224 pixels with random weights, in one process; all calls take turns, and numbers are medians.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

import onnx_lrp
from benchmarks.measure import Call, medians, processor
from exporters import torch_nets
from onnx_lrp.live import Live
from onnx_lrp.preprocess import PRESETS
from onnx_lrp.runtime import Session

METHODS = ("zplus_wplus", "zplus_wplus_average")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--depth", type=int, choices=(16, 19), default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    build = torch_nets.vgg16 if args.depth == 16 else torch_nets.vgg19
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
    pre, frame = PRESETS["caffe"], Image.fromarray(pixels)
    x = pre.normalize(pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vgg.onnx"
        torch_nets.export(build(), path, (1, 3, 224, 224))
        forward = Session(onnx.load(path), device="cpu", threads=args.threads)
        calls: dict[str, Call] = {"forward": lambda: forward.run({"input": x})}
        for method in METHODS:
            explainer = onnx_lrp.Explainer(path, method, start="softmax", device="cpu", threads=args.threads)
            calls[method] = lambda explainer=explainer: explainer(x)
            if method == METHODS[0]:
                live = Live(explainer, pre)
                calls["live, zplus_wplus"] = lambda live=live: live(frame)
        times = medians(calls, args.rounds)
    print(
        f"VGG{args.depth}, one picture of 224 x 224, {processor()}, {args.threads} threads, medians of {args.rounds}\n"
    )
    print("\n| | ms | per forward | a second |\n| --- | ---: | ---: | ---: |")
    for name, ms in times.items():
        print(f"| {name} | {ms:.1f} | {ms / times['forward']:.2f} | {1000 / ms:.1f} |")


if __name__ == "__main__":
    main()
