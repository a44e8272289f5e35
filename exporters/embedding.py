"""Two branches that bring texts and images into one space, after Wang et al. 2018, trained on pictures of concepts.

Each branch is Gemm, BatchNormalization, ReLU, Dropout, Gemm and an L2 norm (Learning Two-Branch Neural Networks for
Image-Text Matching Tasks, sec. 3.1); the output is the similarity S (N, B) of N captions and B images, every caption
with every image. Words are pooled by their mean, or by attention. Data is made here: a picture is a vector of features,
the sum of the prototypes of three things in it, and a caption names one to three of them among words that say nothing.

    python -m exporters.embedding --out embedding.onnx --tokenizer tokenizer.json
    python -m exporters.embedding --out published.onnx --published     # 16000 x 300, 2048, 512; random weights
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from exporters.torch_nets import randomize
from exporters.training import fit
from exporters.transformers import export

Pooling = Literal["mean", "attend"]

PAD, UNKNOWN = "[PAD]", "[UNK]"
CONCEPTS = ("dog", "ball", "beach", "tree", "car", "boat", "child", "horse", "snow", "bike", "kite", "cat")
OPENINGS = ("a photo of", "here is", "we see", "this picture shows", "look at", "there is")
DETERMINERS = ("a", "the", "one", "some")
ADJECTIVES = ("", "", "nice", "big", "small", "certain")
LINKS = ("with", "near", "and", "next to", "beside")
ENDINGS = ("", "", "today", "outside", "in the middle", "as you can see")
# All words that say nothing of what is in a picture.
FILLERS = tuple(dict.fromkeys(" ".join((*OPENINGS, *DETERMINERS, *ADJECTIVES, *LINKS, *ENDINGS)).split()))
WORDS = (PAD, UNKNOWN, *CONCEPTS, *FILLERS)
NUMBERS = {word: number for number, word in enumerate(WORDS)}
IN_PICTURE, LENGTH, FEATURES = 3, 20, 32  # things in a picture, tokens of a caption, features of a picture
STEPS, BATCH, TEMPERATURE = 400, 64, 0.1


class Branch(nn.Sequential):
    """Two dense layers with BatchNormalization, ReLU and Dropout between, and vectors of length one."""

    def __init__(self, inputs: int, hidden: int, joint: int) -> None:
        """Build a branch from `inputs` over `hidden` to `joint` features."""
        dense = nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, joint)
        super().__init__(*dense)

    def forward(self, x: Tensor) -> Tensor:
        """Return rows of length one, (N, joint)."""
        return F.normalize(super().forward(x), dim=1)


class TwoBranches(nn.Module):
    """The similarity (N, B) of N captions and B images: published sizes unless others are given.

    Args:
        words: in the vocabulary; 0 is padding.
        width: of their embeddings.
        features: of an image.
        hidden: in both branches.
        joint: of the space where both meet.
        pooling: "mean" of the words, or "attend": a softmax over them, of what each and the mean say.
        zero_pad: the row of padding is zero, and stays so. Otherwise it is a row like any other, which the mean sums
            in, as the network does that this one is after.
    """

    def __init__(
        self,
        words: int = 16000,
        width: int = 300,
        features: int = 2048,
        hidden: int = 2048,
        joint: int = 512,
        *,
        pooling: Pooling = "mean",
        zero_pad: bool = False,
    ) -> None:
        """Build the network with random weights."""
        super().__init__()
        # Rows of length one at first: longer ones saturate the softmax of attention.
        rows = torch.randn(words, width) * width**-0.5
        rows[0] *= 1 - zero_pad
        self.embedding = nn.Embedding(words, width, padding_idx=0 if zero_pad else None, _weight=rows)
        self.text, self.image = Branch(width, hidden, joint), Branch(features, hidden, joint)
        self.score = nn.Linear(2 * width, 1, bias=False) if pooling == "attend" else None

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Return similarities.

        Args:
            tokens: int64 (N, T), filled up with 0.
            image: (B, features).
        """
        return self.text(self.pool(self.embedding(tokens), tokens)) @ self.image(image).T

    def pool(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """One vector per caption, of the embeddings (N, T, width) of its tokens."""
        mean = rows.sum(1) / ((tokens > 0).to(rows.dtype).sum(1, keepdim=True) + 1e-10)
        if self.score is None:
            return mean
        said = torch.cat([mean.unsqueeze(1).expand_as(rows), rows], -1)
        scores = F.relu(self.score(said).squeeze(-1)).masked_fill(tokens == 0, -1e4)
        return F.normalize((torch.softmax(scores, 1).unsqueeze(-1) * rows).sum(1), dim=1)


@dataclass(frozen=True)
class Scenes:
    """Pictures, and one caption of each.

    Attributes:
        tokens: int64 (N, 20), filled up with 0.
        image: float32 (N, 32).
        concepts: what is in each picture, int64 (N, 3), numbers of `CONCEPTS`.
    """

    tokens: np.ndarray
    image: np.ndarray
    concepts: np.ndarray

    def captions(self) -> list[str]:
        """The captions as texts."""
        return [" ".join(WORDS[t] for t in row if t) for row in self.tokens]


def scenes(count: int, seed: int) -> Scenes:
    """Draw pictures with three things each, and a caption that names one to three of them."""
    rng = np.random.default_rng(seed)
    concepts = np.stack([rng.permutation(len(CONCEPTS))[:IN_PICTURE] for _ in range(count)])
    captions = []
    for things in concepts:
        named = rng.permutation(things)[: rng.integers(1, IN_PICTURE + 1)]
        captions.append(sentence(rng, [CONCEPTS[k] for k in named]))
    return Scenes(encoded(captions), pictures(concepts, rng), concepts)


def pictures(concepts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Features (N, 32) of pictures that show three things each: numbers of `CONCEPTS`, (N, 3)."""
    # Things look the same whoever draws them; what else is in a picture is noise.
    prototypes = np.random.default_rng(0).standard_normal((len(CONCEPTS), FEATURES))
    noise = 0.5 * rng.standard_normal((len(concepts), FEATURES))
    return (prototypes[concepts].sum(1) + noise).astype(np.float32)


def encoded(captions: Sequence[str], length: int = LENGTH) -> np.ndarray:
    """Captions as numbers of `WORDS`, int64 (N, length), filled up with 0."""
    tokens = np.zeros((len(captions), length), np.int64)
    for row, caption in zip(tokens, captions, strict=True):
        numbers = [NUMBERS.get(word, NUMBERS[UNKNOWN]) for word in caption.split()]
        row[: len(numbers)] = numbers
    return tokens


def sentence(rng: np.random.Generator, named: Sequence[str]) -> str:
    """A sentence that names things, among words that say nothing."""
    things = [f"{rng.choice(DETERMINERS)} {rng.choice(ADJECTIVES)} {word}" for word in named]
    parts = [rng.choice(OPENINGS), things[0]]
    for thing in things[1:]:
        parts += [rng.choice(LINKS), thing]
    return " ".join(" ".join((*parts, rng.choice(ENDINGS))).split())


def small(pooling: Pooling = "mean", *, zero_pad: bool = True) -> TwoBranches:
    """The network at the size of the pictures here."""
    return TwoBranches(len(WORDS), 24, FEATURES, 64, 24, pooling=pooling, zero_pad=zero_pad)


def train(pooling: Pooling = "mean", seed: int = 0, steps: int = STEPS, *, zero_pad: bool = True) -> TwoBranches:
    """Train the small network: the same weights whenever it runs again on one machine.

    Captions and images that belong together are told from others by the cross-entropy of their similarities, both ways
    (Radford et al. 2021). The hinge loss on triplets of the original collapses on data as small as this.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = small(pooling, zero_pad=zero_pad).train()
    data = scenes(8192, seed + 1000)
    tokens, image, own = torch.tensor(data.tokens), torch.tensor(data.image), torch.arange(BATCH)

    def loss() -> Tensor:
        chosen = torch.tensor(rng.choice(len(tokens), BATCH, replace=False))
        logits = model(tokens[chosen], image[chosen]) / TEMPERATURE
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 1e-2, steps, loss)
    return model


def published(pooling: Pooling = "mean", seed: int = 0) -> TwoBranches:
    """The network at its published sizes, with random weights and statistics."""
    torch.manual_seed(seed)
    return randomize(TwoBranches(pooling=pooling), seed)


def agreement(model: TwoBranches, count: int = 500, seed: int = 1) -> float:
    """Share of fresh captions whose most similar image, of `count`, shows all that the caption names."""
    data = scenes(count, seed)
    with torch.no_grad():
        best = model(torch.tensor(data.tokens), torch.tensor(data.image)).argmax(1).numpy()
    shown = data.concepts[best] + NUMBERS[CONCEPTS[0]]
    named = [{t for t in row if WORDS[t] in CONCEPTS} for row in data.tokens]
    return float(np.mean([words <= set(things) for words, things in zip(named, shown, strict=True)]))


def tokenizer() -> str:
    """A file for the package tokenizers: words apart by spaces, each with its id; padding is 0."""
    empty = dict.fromkeys(("truncation", "normalizer", "post_processor", "decoder"))
    special = [
        {"id": NUMBERS[word], "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for word in (PAD, UNKNOWN)
    ]
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": PAD}
    parts = {"version": "1.0", **empty, "padding": padding, "added_tokens": special}
    parts["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    parts["model"] = {"type": "WordLevel", "vocab": NUMBERS, "unk_token": UNKNOWN}
    return json.dumps(parts, indent=1) + "\n"


def write(model: TwoBranches, path: str | Path | None, *, opset: int = 18, dynamo: bool = False) -> onnx.ModelProto:
    """Export the network; the numbers of captions, words and images stay open."""
    words, features = model.embedding.num_embeddings, model.image[0].in_features
    example = {
        "tokens": torch.arange(1, 13).reshape(3, 4) % words,
        "image": torch.zeros(2, features, dtype=model.embedding.weight.dtype),
    }
    axes = {"tokens": {0: "captions", 1: "words"}, "image": {0: "images"}}
    axes["similarity"] = {0: "captions", 1: "images"}
    return export(model, path, example, "similarity", axes, opset=opset, dynamo=dynamo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.embedding", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--tokenizer", type=Path, help="where to write a tokenizer.json to")
    parser.add_argument("--pooling", choices=("mean", "attend"), default="mean", help="of words")
    parser.add_argument("--published", action="store_true", help="the published sizes, with random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dynamo", action="store_true", help="use torch's newer exporter")
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    model = published(args.pooling, args.seed) if args.published else train(args.pooling, args.seed, args.steps)
    if not args.published:
        print(f"captions whose most similar image of 500 shows what they name: {agreement(model):.1%}")
    if args.tokenizer:
        args.tokenizer.write_text(tokenizer(), encoding="utf-8")
    write(model, args.out, opset=args.opset, dynamo=args.dynamo)


if __name__ == "__main__":
    main()
