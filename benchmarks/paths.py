"""What methods of many versions cost: integrated gradients by chunk, beside the bare forward pass and captum.

`python -m benchmarks.paths --steps 50 --threads 2`. Medians of runs that take turns; memory is the peak of a process of
its own above what it held with the session loaded.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnx_lrp
from benchmarks.measure import Call, medians, peak
from benchmarks.networks import network
from onnx_lrp.runtime import Session

CHUNKS = (1, 4, 16)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paths", description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    print(f"ResNet-50, one picture of 224 x 224, {args.steps} steps, {args.threads} threads")
    print(f"{'':28}{'ms':>9}{'x forward':>11}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"
        net = network("resnet50")
        net.write(path)
        forward = Session(onnx.load(path), device="cpu", threads=args.threads)
        x = net.feeds["input"].numpy()
        runs: dict[str, Call] = {"forward": lambda: forward.run({"input": x})}
        for chunk in CHUNKS:
            explainer = _explainer(path, args.steps, chunk, args.threads)
            runs[f"chunk {chunk}"] = lambda explainer=explainer: explainer(x)
        runs["captum, 4 steps a batch"] = _captum(net.module, x, args.steps, args.threads)
        times = medians(runs, args.repeats)
        for name, ms in times.items():
            chunk = int(name.split()[1]) if name.startswith("chunk") else 0
            make = functools.partial(_one, path, args.steps, chunk, args.threads)
            megabytes = peak(make, beyond="loaded", runs=1) if chunk else None
            shown = "" if megabytes is None else f"{megabytes:9.0f}"
            print(f"{name:28}{ms:9.0f}{ms / times['forward']:11.1f}{shown}")


def _explainer(path: Path, steps: int, chunk: int, threads: int) -> onnx_lrp.Explainer:
    method = onnx_lrp.IntegratedGradients(steps, chunk=chunk)
    return onnx_lrp.Explainer(path, method, device="cpu", threads=threads)


def _captum(net: Any, x: np.ndarray, steps: int, threads: int) -> Callable[[], Any]:
    import torch
    from captum.attr import IntegratedGradients

    torch.set_num_threads(threads)
    inputs, target = torch.as_tensor(x), int(net(torch.as_tensor(x)).argmax())
    method = IntegratedGradients(net)
    return lambda: method.attribute(inputs, target=target, n_steps=steps, internal_batch_size=4)


def _one(path: Path, steps: int, chunk: int, threads: int) -> Call:
    explainer = _explainer(path, steps, chunk, threads)
    return functools.partial(explainer, np.zeros((1, 3, 224, 224), np.float32))


if __name__ == "__main__":
    main()
