"""Networks that describe a picture word by word, after Sun et al. 2022: built, trained small, and exported.

A picture and the words so far go in, the logits of the next word come out, at every place of the caption at once. Two
decoders: `Adaptive` (additive attention to regions and to a sentinel, Lu et al. 2017; with a second LSTM as in the
paper, or with one), and `MultiHead` (eight heads behind a gate). At their published sizes they stand on VGG16, with
random weights; the small ones learn to describe scenes of 24 by 24: "a red disc on left".

    python -m exporters.captioning --out captioner.onnx
    python -m exporters.captioning --out published.onnx --published --decoder multihead
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from exporters.scenes import BOX, COLOURS, GROUND, SHAPES, SIZE, cover
from exporters.torch_nets import VGG, VGG16, randomize
from exporters.training import fit
from exporters.transformers import export

State = tuple[Tensor, Tensor]
Decoding = Literal["adaptive", "single", "multihead"]

SIDES = ("left", "right")
WORDS = ("<pad>", "a", *COLOURS, *SHAPES, "on", *SIDES, "<start>", "<end>", "<unk>")
PAD, START, END = 0, WORDS.index("<start>"), WORDS.index("<end>")
LENGTH = 6  # of a caption: a COLOUR SHAPE on SIDE <end>
VOCABULARY = 9586  # of Flickr30K: words that occur three times
STEPS, BATCH = 1200, 64


# ---- networks --------------------------------------------------------------------------------------------------------


class Steps(nn.Module):
    """An LSTM, step by step or over a whole text; written as torch's cell, or as the operator that ONNX has."""

    def __init__(self, inputs: int, width: int, *, operator: bool = False) -> None:
        super().__init__()
        self.width, self.operator = width, operator
        self.cell = nn.LSTMCell(inputs, width)

    def begin(self, x: Tensor) -> State:
        """Zeros for every sample of x."""
        zero = x.new_zeros(x.shape[0], self.width)
        return zero, zero

    def forward(self, x: Tensor, state: State) -> State:
        """One step: inputs (N, I) and the state before to the state after."""
        if not self.operator:
            return self.cell(x, state)
        _, h, c = self.run(x[:, None], state)
        return h[0], c[0]

    def run(self, x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """The operator on a text (N, T, I): all outputs (N, T, W), last output and cell (1, N, W)."""
        cell = self.cell
        weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
        return torch.lstm(x, [state[0][None], state[1][None]], weights, True, 1, 0.0, False, False, True)

    def all(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and cells after every step of a text (N, T, I), each (N, T, W)."""
        states = [self.begin(x)]
        for t in range(x.shape[1]):
            states.append(self(x[:, t], states[-1]))
        return torch.stack([h for h, _ in states[1:]], 1), torch.stack([c for _, c in states[1:]], 1)


class Decoder(nn.Module):
    """What both decoders have: the logits are a dense layer of the sum of what was seen and what was said.

    Args:
        channels: of the features of the picture.
        width: of embeddings and states.
        vocabulary: number of words.
    """

    def __init__(self, channels: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.width = width
        # A 1x1 convolution, as a dense layer of every region: so it takes the rule of dense layers.
        self.regions = nn.Linear(channels, width)
        self.embedding, self.out = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        """Features (N, C, H, W) and words (N, T) to the logits (N, T, vocabulary) of the word after each of them."""
        seen, said, _ = self.summands(features, words)
        return self.out(seen + said)

    def summands(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `out` adds up, each (N, T, width): what was seen, c, and the state, h; and attention (N, T, regions)."""
        raise NotImplementedError


class Adaptive(Decoder):
    """Additive attention to the regions V, and to a sentinel of what the LSTM knows; a second LSTM, or none.

    Args:
        channels: of the features of the picture.
        width: of embeddings and states.
        vocabulary: number of words.
        second: a second LSTM reads what was seen, and the first reads its state.
        pooled: the mean g of all features goes into the LSTM, too. Without it, only attention sees.
        operator: LSTMs as ONNX's operator, one step each, in place of cells in single operators.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        vocabulary: int,
        *,
        second: bool = True,
        pooled: bool = True,
        operator: bool = False,
    ) -> None:
        super().__init__(channels, width, vocabulary)
        inputs = width * (1 + second + pooled)
        self.pooled = nn.Linear(channels, width) if pooled else None
        self.first = Steps(inputs, width, operator=operator)
        self.second = Steps(2 * width, width, operator=operator) if second else None
        self.gate_x, self.gate_h = nn.Linear(inputs, width, bias=False), nn.Linear(width, width)
        self.key, self.query = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key_s, self.score = nn.Linear(width, width, bias=False), nn.Linear(width, 1, bias=False)

    def summands(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Decoder. With one LSTM, attention is for all places at once; a second one waits for it step by step."""
        places = features.flatten(2).transpose(1, 2)
        v, x = torch.relu(self.regions(places)), self.embedding(words)
        if self.pooled is not None:
            g = torch.relu(self.pooled(places.mean(1)))
            x = torch.cat([g[:, None].expand(-1, words.shape[1], -1), x], 2)
        keys = self.key(v)[:, None]
        if self.second is None:
            h, c = self.first.all(x)
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
            seen, alpha = self.attention(v, keys, x, before, h, c)
            return seen, h, alpha
        one, two, steps = self.first.begin(x), self.second.begin(x), []
        for t in range(words.shape[1]):
            now, before = torch.cat([two[0], x[:, t]], 1), one[0]
            one = self.first(now, one)
            states = (y[:, None] for y in (now, before, *one))
            seen, alpha = self.attention(v, keys, *states)
            two = self.second(torch.cat([seen[:, 0], one[0]], 1), two)
            steps.append((seen, two[0][:, None], alpha))
        seen, said, alpha = (torch.cat(list(parts), 1) for parts in zip(*steps, strict=True))
        return seen, said, alpha

    def attention(
        self, v: Tensor, keys: Tensor, x: Tensor, before: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Regions v (N, R, W) mixed by alpha, and the sentinel by beta, for each of T places; alpha (N, T, R)."""
        sentinel = torch.sigmoid(self.gate_x(x) + self.gate_h(before)) * torch.tanh(c)
        asked = self.query(h)
        scores = self.score(torch.tanh(keys + asked[:, :, None]))[..., 0]
        alone = self.score(torch.tanh(self.key_s(sentinel) + asked))
        alpha = torch.softmax(scores, 2)
        beta = torch.softmax(torch.cat([scores, alone], 2), 2)[..., -1:]
        return beta * sentinel + (1 - beta) * (alpha @ v), alpha


class MultiHead(Decoder):
    """MH-FC: the state of an LSTM asks the regions in several heads; what they answer passes a gate.

    Args:
        channels: of the features of the picture.
        width: of embeddings and states.
        vocabulary: number of words.
        heads: of the attention.
        operator: the LSTM as ONNX's operator over the whole text, whose length then stays open.
    """

    def __init__(self, channels: int, width: int, vocabulary: int, *, heads: int = 8, operator: bool = False) -> None:
        super().__init__(channels, width, vocabulary)
        self.heads = heads
        self.first = Steps(2 * width, width, operator=operator)
        self.key, self.value, self.query = (nn.Linear(width, width) for _ in range(3))
        self.project, self.open = nn.Linear(width, width), nn.Linear(width, width)

    def summands(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Decoder; the attention is the mean over heads."""
        v = torch.relu(self.regions(features.flatten(2).transpose(1, 2)))
        mean = v.mean(1, keepdim=True).expand(-1, words.shape[1], -1)
        x = torch.cat([self.embedding(words), mean], 2)
        h = self.first.run(x, self.first.begin(x))[0] if self.first.operator else self.first.all(x)[0]
        query, key, value = (self.split(y) for y in (self.query(h), self.key(v), self.value(v)))
        weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(self.width // self.heads), 3)
        told = (weights @ value).transpose(1, 2).flatten(2)
        return torch.sigmoid(self.open(h)) * self.project(told), h, weights.mean(1)

    def split(self, x: Tensor) -> Tensor:
        """Heads (N, heads, R, W / heads) of x (N, R, W)."""
        return x.reshape(x.shape[0], -1, self.heads, self.width // self.heads).transpose(1, 2)


class Captioner(nn.Module):
    """Encoder and decoder: a picture, pixels from 0 to 1, and the words so far.

    Args:
        encoder: pictures (N, 3, H, W), normalised, to features (N, C, h, w).
        decoder: what speaks.
        mean: of every colour over the data, which the network subtracts; so grey ground has no relevance.
        std: of every colour over the data, by which it divides.
    """

    def __init__(self, encoder: nn.Module, decoder: Decoder, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) and words (N, T), the first <start>, to logits (N, T, vocabulary) of the next word."""
        return self.decoder(self.features(image), words)

    def features(self, image: Tensor) -> Tensor:
        """What the encoder makes of pictures."""
        return self.encoder((image - self.mean) / self.std)


class Shown(nn.Module):
    """A captioner that says where it looked, too: logits, and attention (N, T, h, w)."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """As the captioner."""
        features, decoder = self.captioner.features(image), self.captioner.decoder
        seen, said, alpha = decoder.summands(features, words)
        return decoder.out(seen + said), alpha.unflatten(2, features.shape[2:])


def published(decoder: Decoding = "adaptive", *, operator: bool = False, seed: int = 0) -> Captioner:
    """VGG16 without its last pooling (14x14x512), width 512, 9586 words; random weights."""
    torch.manual_seed(seed)
    encoder = VGG(VGG16, hidden=1, classes=1).features[:-1]
    net = Captioner(
        encoder,
        _decoder(decoder, 512, 512, VOCABULARY, operator=operator),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    return randomize(net, seed)


def small(
    decoder: Decoding = "single", *, pooled: bool = True, operator: bool = False, width: int = 48, seed: int = 0
) -> Captioner:
    """For scenes of 24x24: three convolutions to 6x6x32 features, width 48, 16 words; before training."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
    )
    speaks = _decoder(decoder, 32, width, len(WORDS), operator=operator, pooled=pooled)
    return Captioner(encoder, speaks, (GROUND,) * 3, (0.25,) * 3).eval()


def _decoder(name: Decoding, *sizes: int, operator: bool, pooled: bool = True) -> Decoder:
    if name == "multihead":
        return MultiHead(*sizes, operator=operator)
    return Adaptive(*sizes, second=name == "adaptive", pooled=pooled, operator=operator)


# ---- scenes and their captions ---------------------------------------------------------------------------------------


class Captions(NamedTuple):
    """Scenes of one thing, and what is to be said of them.

    Attributes:
        image: pixels from 0 to 1, (N, 3, 24, 24).
        boxes: left, top, right, bottom of the thing in pixels, right and bottom exclusive, (N, 4).
        words: <start> a COLOUR SHAPE on SIDE <end>, (N, 7): all but the last is fed, all but the first is expected.
    """

    image: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]


def captions(count: int, seed: int, noise: float = 0.0) -> Captions:
    """Draw scenes of one coloured shape, wholly in the left or the right half.

    Args:
        count: how many.
        seed: of everything random.
        noise: standard deviation of what is added to every pixel in the end, so that words go wrong.
    """
    rng = np.random.default_rng(seed)
    image = np.clip(rng.normal(GROUND, 0.06, (count, 3, SIZE, SIZE)), 0, 1)
    colour, shape, side = (rng.integers(n, size=count) for n in (len(COLOURS), len(SHAPES), 2))
    left = rng.integers(SIZE // 2 - BOX + 1, size=count) + side * SIZE // 2
    top = rng.integers(SIZE - BOX + 1, size=count)
    covers, paints = np.stack([cover(name) for name in SHAPES]), np.array(list(COLOURS.values()))
    for n in range(count):
        tone = np.clip(paints[colour[n]] + rng.normal(0, 0.04, 3), 0, 1)
        part = image[n, :, top[n] : top[n] + BOX, left[n] : left[n] + BOX]
        part[...] = np.where(covers[shape[n]], tone[:, None, None], part)
    if noise:
        image = np.clip(image + rng.normal(0, noise, image.shape), 0, 1)
    words = np.tile([WORDS.index(w) for w in ("<start>", "a", "red", "disc", "on", "left", "<end>")], (count, 1))
    for place, chosen in ((2, colour), (3, shape), (5, side)):
        words[:, place] += chosen
    return Captions(image.astype(np.float32), np.stack([left, top, left + BOX, top + BOX], 1), words)


def train(net: Captioner, *, seed: int = 0, steps: int = STEPS) -> Captioner:
    """Train a small captioner in place: the same weights whenever it runs again on one machine."""
    rng = np.random.default_rng(seed)
    drawn = captions(8192, seed + 1000)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)

    def loss() -> Tensor:
        chosen = rng.integers(len(drawn.image), size=BATCH)
        words = torch.tensor(drawn.words[chosen])
        logits = net(torch.tensor(drawn.image[chosen]), words[:, :-1])
        return cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())

    fit(net, optimizer, 3e-3, steps, loss)
    return net


def accuracy(net: Captioner, count: int = 1000, seed: int = 1) -> npt.NDArray[np.float64]:
    """Share of fresh scenes with the right word at each place, given the right words before, (6,)."""
    drawn = captions(count, seed)
    with torch.no_grad():
        found = net(torch.tensor(drawn.image), torch.tensor(drawn.words[:, :-1])).argmax(-1).numpy()
    return np.asarray((found == drawn.words[:, 1:]).mean(0))


def save_weights(net: Captioner, path: str | Path) -> None:
    """Write the weights in half precision, which says as much as the small ones need."""
    np.savez_compressed(path, **{name: x.numpy().astype(np.float16) for name, x in net.state_dict().items()})


def load_weights(net: Captioner, path: str | Path) -> Captioner:
    """Read weights into a captioner of the same build, and return it."""
    with np.load(path) as file:
        net.load_state_dict({name: torch.tensor(file[name].astype(np.float32)) for name in file.files})
    return net.eval()


def write(
    net: Captioner,
    path: str | Path | None,
    *,
    size: int = SIZE,
    length: int = LENGTH,
    opset: int = 18,
    dynamo: bool = False,
    attention: bool = True,
) -> onnx.ModelProto:
    """Export a captioner: inputs `image` and `words`, outputs `logits` and, if asked, `attention`.

    The number of samples stays open. Cells are written out for `length` words; shorter texts are filled up, since no
    word knows of those after it. A multi-head decoder with the LSTM operator takes texts of any length.
    """
    free: dict[int, str] = {0: "batch"}
    open_length = isinstance(net.decoder, MultiHead) and net.decoder.first.operator
    text = free | ({1: "length"} if open_length else {})
    example = {"image": torch.rand(2, 3, size, size), "words": torch.zeros(2, length, dtype=torch.int64)}
    names = ["logits", "attention"] if attention else ["logits"]
    axes = {"image": free, "words": text} | dict.fromkeys(names, text)
    return export(Shown(net) if attention else net, path, example, names, axes, opset=opset, dynamo=dynamo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.captioning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--decoder", choices=("adaptive", "single", "multihead"))
    parser.add_argument("--published", action="store_true", help="VGG16 and width 512, random weights, 20 words")
    parser.add_argument("--operator", action="store_true", help="LSTMs as ONNX's operator, not in single operators")
    parser.add_argument("--weights", type=Path, help="where to write the trained weights to, too (.npz)")
    parser.add_argument("--unpooled", action="store_true", help="no pooled feature: only attention sees (small ones)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dynamo", action="store_true", help="use torch's newer exporter")
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    options = {"opset": args.opset, "dynamo": args.dynamo}
    if args.published:
        net = published(args.decoder or "adaptive", operator=args.operator, seed=args.seed)
        write(net, args.out, size=224, length=20, **options)
        return
    net = small(args.decoder or "single", pooled=not args.unpooled, operator=args.operator, seed=args.seed)
    train(net, seed=args.seed, steps=args.steps)
    right = zip(("a", "COLOUR", "SHAPE", "on", "SIDE", "<end>"), accuracy(net), strict=True)
    print("right words in fresh scenes:", ", ".join(f"{word} {share:.1%}" for word, share in right))
    if args.weights:
        save_weights(net, args.weights)
    write(net, args.out, **options)


if __name__ == "__main__":
    main()
