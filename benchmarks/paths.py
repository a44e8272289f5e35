"""What methods of many versions cost: integrated gradients by chunk, beside the bare forward pass and captum.

`python -m benchmarks.paths --steps 50 --threads 2`. Medians of runs that take turns; memory is the peak of a process of
its own above what it held with the session loaded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnx_lrp
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
        net = _write(path)
        forward = Session(onnx.load(path), device="cpu", threads=args.threads)
        x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
        runs: dict[str, Callable[[], Any]] = {"forward": lambda: forward.run({"input": x})}
        for chunk in CHUNKS:
            explainer = _explainer(path, args.steps, chunk, args.threads)
            runs[f"chunk {chunk}"] = lambda explainer=explainer: explainer(x)
        runs["captum, 4 steps a batch"] = _captum(net, x, args.steps, args.threads)
        times = medians(runs, args.repeats)
        for name, seconds in times.items():
            chunk = int(name.split()[1]) if name.startswith("chunk") else 0
            peak = f"{_peak(path, args.steps, chunk, args.threads):9.0f}" if chunk else ""
            print(f"{name:28}{1e3 * seconds:9.0f}{seconds / times['forward']:11.1f}{peak}")


def _write(path: Path) -> Any:
    from exporters.torch_nets import export, resnet50

    net = resnet50(seed=0)
    export(net, path, (1, 3, 224, 224), opset=18)
    return net.eval()


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


def medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each, all taking turns after one run that does not count; short ones are run several times a turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < 0.3:
                run()
                count += 1
            found[name].append((time.perf_counter() - begin) / count)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _peak(path: Path, steps: int, chunk: int, threads: int) -> float:
    """Peak of one run in a process of its own, above the loaded session, in MB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (path, steps, chunk, threads))


def _measured(path: Path, steps: int, chunk: int, threads: int) -> float:
    explainer = _explainer(path, steps, chunk, threads)
    x = np.zeros((1, 3, 224, 224), np.float32)
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak of loading
    before = _resident("VmRSS")
    explainer(x)
    return _resident("VmHWM") - before


def _resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    main()
