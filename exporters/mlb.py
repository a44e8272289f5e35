"""MLB (Kim et al. 2017): answers questions about pictures by products of what is seen and what is asked.

A GRU reads the question. What it makes of it steers where two glimpses look in the maps of a ResNet, by a softmax over
their places; and its product with what the glimpses see is the joint representation, on which the answer is linear. It
is the Hadamard product of the name: low-rank bilinear pooling.

    python -m exporters.mlb --out examples/mlb/mlb.onnx --sample examples/mlb/question.npz
    python -m exporters.mlb --out mlb.onnx --published

The small network is trained on exporters.scenes; the one of the published sizes has random weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from exporters import scenes
from exporters.torch_nets import RESNET152, BasicBlock, Bottleneck, ResNet, randomize
from exporters.training import fit
from exporters.transformers import export

PICTURES, STEPS, BATCH = 8192, 1200, 64
RATE, SWAPPED = 1e-2, 0.5  # the highest rate; share of the words beside the colour that are any other


class MLB(nn.Module):
    """Multimodal low-rank bilinear attention, and low-rank bilinear pooling of question and glimpses.

    The defaults are the published sizes. The equations of the paper have one projection of both glimpses together;
    the authors' program has one for each, of `joint` entries, and a question of as many as both: that is what is
    built, unless `separate` is false.
    """

    def __init__(
        self,
        image: nn.Module,
        *,
        features: int = 2048,
        vocabulary: int = 15000,
        embedding: int = 620,
        hidden: int = 2400,
        joint: int = 1200,
        glimpses: int = 2,
        answers: int = 2000,
        separate: bool = True,
        dropout: float = 0.5,
        word_dropout: float = 0.25,
    ) -> None:
        """Build the network around `image`, which makes maps of `features` channels of a picture."""
        super().__init__()
        self.image = image
        self.words = nn.Embedding(vocabulary, embedding, padding_idx=scenes.PAD)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True)
        self.dropout, self.word_dropout = nn.Dropout(dropout), nn.Dropout(word_dropout)
        self.attend_question, self.attend_image = nn.Linear(hidden, joint), nn.Conv2d(features, joint, 1)
        self.glimpse = nn.Conv2d(joint, glimpses, 1)
        inputs = [features] * glimpses if separate else [features * glimpses]
        self.project_glimpses = nn.ModuleList(nn.Linear(size, joint) for size in inputs)
        self.project_question = nn.Linear(hidden, joint * len(inputs))
        self.answer = nn.Linear(joint * len(inputs), answers)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) and questions (N, T), padding behind, to logits (N, answers)."""
        seen, asked = self.factors(image, tokens)
        return self.answer(self.dropout(seen * asked))

    def factors(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """V and Q, whose product is the joint representation."""
        maps, question = self.image(image), self.ask(self.words(tokens), tokens)
        alpha = self.attention(maps, question)
        looked = alpha @ maps.flatten(2).transpose(1, 2)  # (N, glimpses, features)
        parts = looked.unbind(1) if len(self.project_glimpses) > 1 else [looked.flatten(1)]
        projected = [layer(self.dropout(part)) for layer, part in zip(self.project_glimpses, parts, strict=True)]
        return torch.tanh(torch.cat(projected, 1)), torch.tanh(self.project_question(self.dropout(question)))

    def ask(self, words: Tensor, tokens: Tensor) -> Tensor:
        """The encoder's state after the last word of each question, (N, hidden)."""
        states, _ = self.encoder(self.word_dropout(words))
        last = (tokens != scenes.PAD).sum(1, keepdim=True) - 1
        return states.gather(1, last[:, :, None].expand(-1, -1, states.shape[2])).flatten(1)

    def attention(self, maps: Tensor, question: Tensor) -> Tensor:
        """Where each glimpse looks, (N, glimpses, places)."""
        asked = torch.tanh(self.attend_question(self.dropout(question)))[:, :, None, None]
        joint = asked * torch.tanh(self.attend_image(self.dropout(maps)))
        return self.glimpse(joint).flatten(2).softmax(-1)


class Maps(nn.Module):
    """The maps of a ResNet, with signs: its last ReLU is left out, as in MLB."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        resnet.fc = nn.Identity()
        last = resnet.blocks[-1]
        setattr(last, "relu2" if isinstance(last, BasicBlock) else "relu3", nn.Identity())
        self.resnet = resnet

    def forward(self, image: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) to maps."""
        return self.resnet.features(image)


def published(seed: int = 0, **options: object) -> MLB:
    """MLB at its published sizes, for pictures of 448 by 448 and 26 words, with random weights.

    Args:
        seed: of the weights.
        options: other sizes, as in `MLB`.
    """
    torch.manual_seed(seed)
    model = MLB(Maps(ResNet(Bottleneck, RESNET152)), **options)  # type: ignore[arg-type]
    randomize(model.image, seed)
    return model.eval()


def small(seed: int = 0, **options: object) -> MLB:
    """A small MLB with random weights, for scenes: maps of 6 by 6.

    Args:
        seed: of the weights.
        options: other sizes, as in `MLB`.
    """
    torch.manual_seed(seed)
    image = Maps(ResNet(BasicBlock, (2,), width=32))
    sizes = {"features": 32, "vocabulary": len(scenes.WORDS), "embedding": 16, "hidden": 32, "joint": 32}
    sizes |= {"answers": len(scenes.SHAPES)}
    return MLB(image, **(sizes | {"dropout": 0.1} | options)).eval()  # type: ignore[arg-type]


def train(seed: int = 0, steps: int = STEPS) -> MLB:
    """Train the small network: the same weights whenever it runs again on one machine."""
    model, rng = small(seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    drawn = scenes.scenes(PICTURES, seed + 1000)
    asked = [scenes.questions(drawn, seed + k) for k in range(8)]

    def loss() -> Tensor:
        chosen, about = rng.integers(PICTURES, size=BATCH), asked[rng.integers(len(asked))]
        tokens = swapped(about.tokens[chosen], rng)
        logits = model(torch.tensor(drawn.image[chosen]), torch.tensor(tokens))
        return cross_entropy(logits, torch.tensor(about.answers[chosen]))

    model.train()
    fit(model, optimizer, RATE, steps, loss)
    return model


def swapped(tokens: scenes.Indices, rng: np.random.Generator) -> scenes.Indices:
    """Questions with some of their words, but no colour, as any other: nothing else is to be relied on."""
    fillers = scenes.WORDS.index("what")
    some = (tokens >= fillers) & (rng.random(tokens.shape) < SWAPPED)
    return np.where(some, rng.integers(fillers, len(scenes.WORDS), tokens.shape), tokens)


def accuracy(model: MLB, count: int = 2000, seed: int = 1) -> float:
    """Share of fresh questions that are answered rightly."""
    drawn = scenes.scenes(count, seed)
    asked = scenes.questions(drawn, seed)
    with torch.no_grad():
        found = model(torch.tensor(drawn.image), torch.tensor(asked.tokens)).argmax(-1).numpy()
    return float((found == asked.answers).mean())


def write(
    model: MLB, path: str | Path | None, *, size: int = scenes.SIZE, opset: int = 18, dynamo: bool = False
) -> onnx.ModelProto:
    """Export the network for pictures of `size`; batch and length of the questions stay open."""
    tokens = torch.tensor([[5, 1, 0], [5, 2, 6]])
    pixels = torch.rand(2, 3, size, size, dtype=model.answer.weight.dtype)
    example = {"image": pixels, "tokens": tokens}
    axes = {"image": {0: "batch"}, "tokens": {0: "batch", 1: "length"}, "logits": {0: "batch"}}
    return export(model, path, example, "logits", axes, opset=opset, dynamo=dynamo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.mlb", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--sample", type=Path, help="an .npz to write a scene and a question to")
    parser.add_argument("--published", action="store_true", help="published sizes, random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dynamo", action="store_true", help="use torch's newer exporter")
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    if args.sample:
        drawn = scenes.scenes(1, seed=1)
        np.savez_compressed(args.sample, image=drawn.image, tokens=scenes.questions(drawn, seed=1).tokens)
    if args.published:
        write(published(args.seed), args.out, size=448, opset=args.opset, dynamo=args.dynamo)
        return
    began = time.monotonic()
    model = train(args.seed, args.steps)
    print(f"trained in {time.monotonic() - began:.0f} s")
    print(f"accuracy on fresh questions: {accuracy(model):.2%} (chance is {1 / len(scenes.SHAPES):.2%})")
    write(model, args.out, opset=args.opset, dynamo=args.dynamo)


if __name__ == "__main__":
    main()
