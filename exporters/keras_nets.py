"""Write small Keras networks with random weights, by Keras's own export and by tf2onnx.

`python -m exporters.keras_nets --out DIR`, with tensorflow-cpu, keras and tf2onnx installed. Pictures have their
channels last.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def networks(seed: int = 0) -> dict[str, Any]:
    """The networks by name."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)
    cnn = keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(8, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPool2D(),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(max_value=6.0),
            layers.Conv2D(12, 3, strides=2, padding="same", activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, activation="softmax"),
        ],
        name="cnn",
    )
    mlp = keras.Sequential(
        [
            layers.Input((20,)),
            layers.Dense(16, activation="silu"),
            layers.LayerNormalization(),
            layers.Dense(16, activation="tanh"),
            layers.Dense(3),
        ],
        name="mlp",
    )
    for network in (cnn, mlp):
        for layer in network.layers:
            if isinstance(layer, layers.BatchNormalization):  # as after training, not the identity
                rng = keras.random.SeedGenerator(seed)
                shape = layer.gamma.shape
                for weight, low, high in zip(layer.weights, (0.5, -0.3, -0.3, 0.5), (1.5, 0.3, 0.3, 1.5), strict=True):
                    weight.assign(keras.random.uniform(shape, low, high, seed=rng))
    return {"cnn": cnn, "mlp": mlp}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.keras_nets", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opset", type=int, default=18, help="of what tf2onnx writes; Keras chooses its own")
    args = parser.parse_args(arguments)
    import numpy as np
    import tensorflow as tf
    import tf2onnx

    args.out.mkdir(parents=True, exist_ok=True)
    for name, network in networks(args.seed).items():
        shape = network.input_shape[1:]
        network(np.zeros((1, *shape), np.float32))  # Keras exports what has been called
        network.export(str(args.out / f"keras_{name}.onnx"), format="onnx", verbose=False)
        spec = [tf.TensorSpec((None, *shape), tf.float32, name="x")]
        call = tf.function(lambda x, network=network: network(x, training=False))
        tf2onnx.convert.from_function(call, spec, opset=args.opset, output_path=str(args.out / f"tf2onnx_{name}.onnx"))


if __name__ == "__main__":
    main()
