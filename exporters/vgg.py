"""Write VGG16 or VGG19 with random weights: `python -m exporters.vgg --out vgg16.onnx`.

By torch's TorchScript exporter; with `--form dynamo` by its newer one, with `--form nhwc` as converters of Keras and
TensorFlow write it. A small one that is trained: `exporters.small_vgg`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import onnx
import torch

from exporters.channels_last import channels_last
from exporters.torch_nets import VGG, export, vgg16, vgg19
from exporters.transformers import export as torch_export

FORMS = ("torchscript", "dynamo", "nhwc")


def exported(net: VGG, size: int, form: str, *, opset: int = 18) -> onnx.ModelProto:
    """Export a VGG for pictures of `size` by `size`.

    Args:
        net: the network.
        size: height and width of its pictures.
        form: "torchscript" or "dynamo", torch's two exporters: from "input", channels first, to "logits". "nhwc", as of
            Keras and TensorFlow: from "image", channels last, to "probabilities".
        opset: of the model.
    """
    if form == "nhwc":
        return channels_last(net, size, opset=opset)
    example = {"input": torch.zeros(2, 3, size, size)}
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    return torch_export(net, None, example, "logits", axes, opset=opset, dynamo=form == "dynamo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.vgg", description=__doc__)
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--depth", type=int, choices=(16, 19), default=16)
    parser.add_argument("--size", type=int, default=224, help="height and width of the pictures")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--hidden", type=int, default=4096, help="width of the dense layers")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="which exporter, or whose; default %(default)s")
    parser.add_argument("--batchnorm", action="store_true", help="a batch norm after every convolution")
    parser.add_argument("--folded", action="store_true", help="fold batch norms into the convolutions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    build = vgg16 if args.depth == 16 else vgg19
    module = build(
        seed=args.seed,
        width=args.width,
        size=args.size,
        hidden=args.hidden,
        classes=args.classes,
        batchnorm=args.batchnorm,
    )
    if args.form != "torchscript":
        onnx.save(exported(module, args.size, args.form, opset=args.opset), args.out)
    else:
        export(module, args.out, (1, 3, args.size, args.size), opset=args.opset, folded=args.folded)


if __name__ == "__main__":
    main()
