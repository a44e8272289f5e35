"""What explanations of recurrent networks cost, beside the bare forward pass.

`python -m benchmarks.recurrent --steps 200 --hidden 512 --threads 2`. A classifier with two LSTM layers, exported with
a free batch and length. Medians of runs that take turns.
"""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

import onnx_lrp
from benchmarks.measure import medians
from onnx_lrp.runtime import Session

METHODS = ("epsilon_plus_flat", "epsilon", "gradient", "integrated_gradients")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrent", description=__doc__)
    parser.add_argument("--cell", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--methods", nargs="+", default=METHODS[:3])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    print(f"{args.layers} x {args.hidden} {args.cell}, {args.steps} steps, {args.threads} threads")
    print(f"{'':36}{'ms':>9}{'x forward':>11}")
    model = network(args.cell, args.hidden, args.layers)
    forward = Session(model, device="cpu", threads=args.threads)
    sessions = {
        method: Session(onnx_lrp.rewrite(model, method, target=1).model, device="cpu", threads=args.threads)
        for method in args.methods
    }
    for batch in args.batches:
        x = np.random.default_rng(0).standard_normal((batch, args.steps, args.hidden)).astype(np.float32)
        runs: dict[str, Callable[[], Any]] = {"forward": functools.partial(forward.run, {"x": x})}
        runs |= {method: functools.partial(session.run, {"x": x}) for method, session in sessions.items()}
        times = medians(runs, args.repeats)
        for name, ms in times.items():
            print(f"{f'batch {batch}, {name}':36}{ms:9.1f}{ms / times['forward']:11.2f}")


def network(cell: str, hidden: int, layers: int) -> onnx.ModelProto:
    """A classifier of sequences (N, T, hidden), its weights made up."""
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(torch.nn, cell)(hidden, hidden, num_layers=layers, batch_first=True)
            self.head = torch.nn.Linear(hidden, 10)

        def forward(self, x: Any) -> Any:
            return self.head(self.layer(x)[0].mean(1))

    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.onnx.export(
        Classifier().eval(),
        (torch.zeros(2, 3, hidden),),
        buffer,
        input_names=["x"],
        output_names=["logits"],
        dynamic_axes={"x": {0: "N", 1: "T"}, "logits": {0: "N"}},
        opset_version=18,
        dynamo=False,
    )
    return onnx.load_from_string(buffer.getvalue())


if __name__ == "__main__":
    main()
