"""Write ResNet-50 or ResNet-18 with random weights: `python -m exporters.resnet --out resnet50.onnx`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from exporters.torch_nets import export, resnet18, resnet50


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.resnet", description=__doc__)
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--depth", type=int, choices=(18, 50), default=50)
    parser.add_argument("--size", type=int, default=224, help="height and width of the pictures")
    parser.add_argument("--width", type=int, default=64, help="channels of the stem")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folded", action="store_true", help="fold batch norms into the convolutions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    build = resnet18 if args.depth == 18 else resnet50
    module = build(seed=args.seed, width=args.width, classes=args.classes)
    export(module, args.out, (1, 3, args.size, args.size), opset=args.opset, folded=args.folded)


if __name__ == "__main__":
    main()
