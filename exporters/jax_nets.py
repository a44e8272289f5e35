"""Write small JAX networks (flax.nnx) with random weights, by jax2onnx.

`python -m exporters.jax_nets --out DIR`, with jax, flax and jax2onnx installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def networks(seed: int = 0) -> dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]]:
    """The networks by name, with the shapes of their inputs."""
    import jax
    from flax import nnx

    rngs = nnx.Rngs(seed)

    class Cnn(nnx.Module):
        """Pictures with channels last: convolutions, pool, dense layer."""

        def __init__(self) -> None:
            self.first = nnx.Conv(3, 8, kernel_size=(3, 3), rngs=rngs)
            self.second = nnx.Conv(8, 12, kernel_size=(3, 3), strides=(2, 2), rngs=rngs)
            self.head = nnx.Linear(12, 5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.max_pool(nnx.relu(self.first(x)), window_shape=(2, 2), strides=(2, 2))
            return self.head(nnx.relu(self.second(x)).mean(axis=(1, 2)))

    class Mlp(nnx.Module):
        """Dense layers with a layer norm, GELU and a softmax."""

        def __init__(self) -> None:
            self.first = nnx.Linear(20, 16, rngs=rngs)
            self.norm = nnx.LayerNorm(16, rngs=rngs)
            self.second = nnx.Linear(16, 16, rngs=rngs)
            self.head = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.gelu(self.norm(self.first(x)))
            return jax.nn.softmax(self.head(nnx.gelu(self.second(x), approximate=False)))

    return {"cnn": (Cnn(), [("B", 16, 16, 3)]), "mlp": (Mlp(), [("B", 20)])}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.jax_nets", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    import onnx
    from jax2onnx import to_onnx

    args.out.mkdir(parents=True, exist_ok=True)
    for name, (network, shapes) in networks(args.seed).items():
        onnx.save(to_onnx(network, shapes, model_name=name), args.out / f"jax_{name}.onnx")


if __name__ == "__main__":
    main()
