"""LRP-inference fine-tuning of a captioning network, after Sun et al. 2022, on scenes that tempt to hallucinate.

A scene shows a disc or a triangle, bright, and mostly a second thing, faint. In the scenes for training, nine of ten
times the second thing is the one that usually goes with the first: a square with a disc, a cross with a triangle. A
captioner learns to say "a red disc and a blue square" without looking twice. In the scenes for testing the second thing
is, with equal chances, the usual one, the other one, or none at all.

The same trained captioner is tuned twice, for as many steps on the same batches: on the cross entropy of its words, and
on L = share * CE(p) + (1 - share) * CE(p^), where p^ are the logits after both summands of the last layer were weighed
by their relevance to the word predicted. The weights, omega, come from the explained ONNX file, into which the
network's weights of that step are fed.

    python -m exporters.captioning_tuning --out tuned.onnx
    python -m exporters.captioning_tuning --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import onnx_lrp
from exporters.captioning import Captioner, Decoder, MultiHead, small, write
from exporters.scenes import BOX, COLOURS, GROUND, SHAPES, SIZE, cover, places
from exporters.transformers import export
from onnx_lrp.evaluate import word_scores
from onnx_lrp.runtime import Session

WORDS = ("<pad>", "a", *COLOURS, *SHAPES, "and", "<start>", "<end>", "<unk>")
PAD, START, END = (WORDS.index(word) for word in ("<pad>", "<start>", "<end>"))
STOPS = tuple(WORDS.index(word) for word in ("<pad>", "a", "and", "<start>", "<end>", "<unk>"))  # omega is 1 for these
LENGTH = 8  # of a caption: a COLOUR SHAPE and a COLOUR SHAPE <end>
USUAL = {"disc": "square", "triangle": "cross"}  # what goes with what
FAINT = 0.4  # how much of the colour of the second thing shows
BATCH, WIDTH = 32, 24
SHARE = 0.0  # lambda of the tuned captioner
SHARES = (1.0, 0.5, 0.0)  # lambdas that are compared; the first is plain training

# What was measured: measure -> "start" or lambda -> one number per start.
Way = float | str
Results = Mapping[str, Mapping[Way, npt.NDArray[np.float64]]]


# ---- scenes and their captions ---------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Scenes of one thing or two, and what is to be said of them.

    Attributes:
        image: pixels from 0 to 1, (N, 3, 24, 24).
        words: <start> a COLOUR SHAPE and a COLOUR SHAPE <end>, or without the second thing, then filled up, (N, 9).
    """

    image: npt.NDArray[np.float32]
    words: npt.NDArray[np.int64]


def pairs(count: int, seed: int, usual: float, alone: float) -> Pairs:
    """Draw scenes.

    Args:
        count: how many.
        seed: of everything random.
        usual: share of scenes in which the second thing is the one that goes with the first.
        alone: share of scenes without a second thing.
    """
    rng = np.random.default_rng(seed)
    image = np.clip(rng.normal(GROUND, 0.06, (count, 3, SIZE, SIZE)), 0, 1)
    colours = np.argsort(rng.random((count, len(COLOURS))), axis=1)[:, :2]
    corners, firsts, which = places(rng, count), rng.integers(2, size=count), rng.random(count)
    covers, paints = {name: cover(name) for name in SHAPES}, np.array(list(COLOURS.values()))
    words = np.full((count, LENGTH + 1), PAD)
    for n in range(count):
        first, other = list(USUAL)[firsts[n]], list(USUAL)[1 - firsts[n]]
        things = [first]
        if which[n] < 1 - alone:
            things.append(USUAL[first] if which[n] < usual else USUAL[other])
        said = []
        for k, shape in enumerate(things):
            left, top = corners[n, k]
            tone = np.clip(paints[colours[n, k]] + rng.normal(0, 0.04, 3), 0, 1)[:, None, None]
            part = image[n, :, top : top + BOX, left : left + BOX]
            part[...] = np.where(covers[shape], part + (FAINT if k else 1.0) * (tone - part), part)
            said.append(f"a {list(COLOURS)[colours[n, k]]} {shape}")
        caption = f"<start> {' and '.join(said)} <end>".split()
        words[n, : len(caption)] = [WORDS.index(word) for word in caption]
    return Pairs(image.astype(np.float32), words)


def for_training(seed: int, count: int = 3000) -> Pairs:
    """Scenes in which nine of ten second things are the usual ones."""
    return pairs(count, 10 * seed + 1000, 0.9, 0.05)


def for_testing(seed: int, count: int = 1000) -> Pairs:
    """Scenes in which the first thing tells nothing about the second."""
    return pairs(count, 10 * seed + 1001, 1 / 3, 1 / 3)


# ---- the network -----------------------------------------------------------------------------------------------------


def encoder(steps: int = 700, seed: int = 7) -> nn.Module:
    """Three convolutions that have learned to name shapes and colours where nothing goes together; then left as is."""
    drawn = pairs(6000, 9999, 1 / 3, 1 / 3)
    named = torch.tensor(np.stack([(drawn.words == WORDS.index(w)).any(1) for w in (*SHAPES, *COLOURS)], 1)).float()
    net = small(seed=seed).encoder
    head = nn.Linear(32, named.shape[1])
    image, rng = torch.tensor(drawn.image), np.random.default_rng(seed)

    def loss() -> Tensor:
        chosen = torch.tensor(rng.integers(len(image), size=64))
        found = head(net((image[chosen] - GROUND) / 0.25).amax((2, 3)))
        return binary_cross_entropy_with_logits(found, named[chosen])

    _descend([*net.parameters(), *head.parameters()], loss, steps, 3e-3)
    return net.eval().requires_grad_(False)


def captioner(encoder: nn.Module, seed: int) -> Captioner:
    """A multi-head decoder of width 24 behind the encoder, not yet trained."""
    torch.manual_seed(seed)
    decoder = MultiHead(32, WIDTH, len(WORDS), heads=4, operator=True)
    return Captioner(encoder, decoder, (GROUND,) * 3, (0.25,) * 3).eval()


class Features(NamedTuple):
    """What decoders are trained on.

    Attributes:
        features: of the pictures, (N, 32, 6, 6).
        words: their captions, (N, 9).
    """

    features: Tensor
    words: Tensor


def seen(net: Captioner, drawn: Pairs) -> Features:
    """Pictures as the encoder sees them, once for all training."""
    with torch.no_grad():
        parts = [net.features(part) for part in torch.tensor(drawn.image).split(500)]
    return Features(torch.cat(parts), torch.tensor(drawn.words))


# ---- training --------------------------------------------------------------------------------------------------------


class Weights:
    """Omega of a decoder, by its explained file, for whatever weights it has at the moment.

    The file is made once. Every initializer in it is an input, by the name of the parameter that it was.

    Args:
        decoder: the decoder; its parameters are read anew in every call.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        model = onnx_lrp.weights_as_inputs(write_decoder(decoder))
        self.reweighted = onnx_lrp.reweigh(model, masked=STOPS)
        self.session = Session(self.reweighted.model, device="cpu", threads=1)

    def __call__(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Omega of what was seen and of what was said, each (N, T, width); constants, as for autograd."""
        fed = {name: p.detach().numpy() for name, p in self.decoder.named_parameters()}
        feeds = {"features": features.numpy(), "words": words.numpy(), **fed}
        names = list(self.reweighted.omegas.values())
        found = self.session.run(feeds, names)
        c, h = (torch.from_numpy(found[name]) for name in names)
        return c, h


def train(net: Captioner, data: Features, seed: int, steps: int = 500) -> None:
    """Train the decoder in place on the cross entropy of its words."""
    rng = np.random.default_rng(seed)

    def loss() -> Tensor:
        chosen = torch.tensor(rng.integers(len(data.words), size=BATCH))
        return surprise(net.decoder(data.features[chosen], data.words[chosen, :-1]), data.words[chosen, 1:])

    _descend(list(net.decoder.parameters()), loss, steps, 5e-3)


def tune(net: Captioner, data: Features, seed: int, steps: int = 400, *, share: float = 1.0) -> None:
    """Tune the last layer in place on share * CE(p) + (1 - share) * CE(p^); c and h stay what they are.

    Args:
        net: the captioner.
        data: what it is tuned on.
        seed: of the batches.
        steps: how many batches.
        share: lambda of the paper; 1 is plain training.
    """
    decoder, rng = net.decoder, np.random.default_rng(seed)
    weights = Weights(decoder) if share < 1 else None
    with torch.no_grad():
        all_c, all_h, _ = decoder.summands(data.features, data.words[:, :-1])

    def loss() -> Tensor:
        chosen = torch.tensor(rng.integers(len(data.words), size=2 * BATCH))
        c, h, wanted = all_c[chosen], all_h[chosen], data.words[chosen, 1:]
        total = share * surprise(decoder.out(c + h), wanted)
        if weights is not None:
            omega_c, omega_h = weights(data.features[chosen], data.words[chosen, :-1])
            total = total + (1 - share) * surprise(decoder.out(omega_c * c + omega_h * h), wanted)
        return total

    _descend(list(decoder.out.parameters()), loss, steps, 1e-2)


def surprise(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy of words; what only fills captions up does not count."""
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)


def _descend(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], steps: int, peak: float) -> None:
    optimizer = torch.optim.Adam(parameters, lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


# ---- measures --------------------------------------------------------------------------------------------------------


def caption(net: Captioner, features: Tensor) -> npt.NDArray[np.int64]:
    """The likeliest word after word, (N, 9), as the captions of the data: PAD after <end>."""
    words = torch.full((len(features), 1), START)
    with torch.no_grad():
        for _ in range(LENGTH):
            best = net.decoder(features, words)[:, -1].argmax(-1, keepdim=True)
            over = (words == END).any(1, keepdim=True)
            words = torch.cat([words, torch.where(over, PAD, best)], 1)
    return words.numpy()


def measured(net: Captioner, data: Features) -> dict[str, float]:
    """How good captions are: hallucinations, captions that are right as a whole, and object words.

    Returns:
        hallucinated: share of captions with an object word that is not in the picture; exact: share of captions that
        are right word for word; precision, recall and f1 of object words, each the mean over the four of them.
    """
    said = caption(net, data.features)
    wanted = data.words.numpy()
    spoken, true = ([[WORDS[i] for i in row] for row in rows] for rows in (said, wanted))
    scores = word_scores(spoken, [[row] for row in true], SHAPES)
    objects = [({*a} & {*SHAPES}) - {*b} for a, b in zip(spoken, true, strict=True)]
    return {
        "hallucinated": float(np.mean([len(o) > 0 for o in objects])),
        "exact": float((said == wanted).all(1).mean()),
        "precision": float(np.mean([s.precision for s in scores])),
        "recall": float(np.mean([s.recall for s in scores])),
        "f1": float(np.mean([s.f1 for s in scores])),
    }


def runs(seed: int, look: nn.Module, shares: Sequence[float] = SHARES) -> Iterator[tuple[Way, Captioner, Features]]:
    """One start: the trained captioner, then as it is tuned in several ways, each with fresh scenes as it sees them.

    Args:
        seed: of the weights of the decoder, the scenes and the batches.
        look: the encoder.
        shares: lambdas; 1 is plain training.
    """
    net = captioner(look, seed)
    data, fresh = seen(net, for_training(seed)), seen(net, for_testing(seed))
    train(net, data, seed)
    yield "start", net, fresh
    start = {name: value.clone() for name, value in net.state_dict().items()}
    for share in shares:
        net.load_state_dict(start)
        tune(net, data, seed + 500, share=share)
        yield share, net, fresh


def experiment(seeds: Sequence[int], *, shares: Sequence[float] = SHARES, look: nn.Module | None = None) -> Results:
    """What captioners that were tuned in several ways say where nothing goes together.

    Args:
        seeds: the starts.
        shares: lambdas; 1 is plain training.
        look: the encoder, where one was trained already.

    Returns:
        Measure -> "start" and every share -> (seeds,).
    """
    look = encoder() if look is None else look
    found: dict[str, dict[Way, list[float]]] = {}
    for seed in seeds:
        for way, net, fresh in runs(seed, look, shares):
            for name, value in measured(net, fresh).items():
                found.setdefault(name, {}).setdefault(way, []).append(value)
        print(f"seed {seed}: " + ", ".join(f"{k} {v[-1]:.3f}" for k, v in found["hallucinated"].items()), flush=True)
    return {name: {way: np.array(values) for way, values in ways.items()} for name, ways in found.items()}


def table(results: Results) -> str:
    """Means and standard deviations over starts, and paired differences to plain training, in per cent."""

    def told(values: npt.NDArray[np.float64], sign: str = "") -> str:
        return f"{100 * values.mean():{sign}.1f} ± {100 * values.std(ddof=1):.1f}"

    ways = list(next(iter(results.values())))
    lines = [["", *(w if isinstance(w, str) else f"lambda {w:g}" for w in ways)]]
    lines[0] += [f"lambda {w:g} minus plain" for w in ways if w not in ("start", 1.0)]
    for name, found in results.items():
        paired = [told(found[w] - found[1.0], "+") for w in ways if w not in ("start", 1.0)]
        lines.append([name, *(told(found[w]) for w in ways), *paired])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


# ---- files -----------------------------------------------------------------------------------------------------------


def write_decoder(decoder: Decoder, path: str | Path | None = None, *, length: int = LENGTH) -> onnx.ModelProto:
    """Export a decoder: inputs `features` and `words`, output `logits`; every initializer has its parameter's name."""
    channels = decoder.regions.in_features
    example = {"features": torch.rand(2, channels, 6, 6), "words": torch.zeros(2, length, dtype=torch.int64)}
    text = {0: "batch", 1: "length"} if isinstance(decoder, MultiHead) and decoder.first.operator else {0: "batch"}
    axes: Mapping[str, Mapping[int, str]] = {"features": {0: "batch"}, "words": text, "logits": text}
    return export(decoder, path, example, "logits", axes, fold=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m exporters.captioning_tuning", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="run the experiment with these starts")
    parser.add_argument("--out", type=Path, help="write a tuned captioner, re-weighted logits included")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    look = encoder()
    if args.seeds:
        print(table(experiment(args.seeds, look=look)))
    if args.out:
        *_, (_, net, _) = runs(0, look, [SHARE])
        onnx_lrp.reweigh(write(net, None, length=LENGTH, attention=False), masked=STOPS).save(args.out)


if __name__ == "__main__":
    main()
