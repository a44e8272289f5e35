"""Small networks that describe a picture, after Sun et al. 2022: encoder, words so far, logits of the next word.

Written against the operations of :mod:`tests.surrogate`, so that one net is the model and its oracle. Sizes are tiny,
weights random: what is tested is how relevance flows.
"""

from __future__ import annotations

import io
import math

import onnx
import torch
from torch import Tensor, nn

from tests.surrogate import Plain, State

WORDS, WIDTH, REGIONS = 11, 6, 9  # words known, width of embeddings and states, regions of the picture
CHANNELS, SIZE = 4, 12  # of the picture's features, and of the picture itself
PLAIN = Plain()


class Net(nn.Module):
    """A module whose forward is what is exported, and whose run takes other operations too."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(*inputs, how=PLAIN)

    def run(self, *inputs: Tensor, how: Plain) -> Tensor:
        raise NotImplementedError


class Encoder(Net):
    """A picture (N, 3, 12, 12) to features (N, 4, 3, 3): two convolutions, a shortcut, both kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        # Both stand behind something that is no layer, so that no exporter folds them.
        self.norm1, self.norm2 = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)

    def run(self, *inputs: Tensor, how: Plain) -> Tensor:
        (image,) = inputs
        x = how.max_pool(how.apply(torch.relu, how.conv(self.conv1, image)), 2)
        x = how.batchnorm(self.norm1, x)
        x = how.batchnorm(self.norm2, how.shortcut(how.conv(self.conv2, x), x))
        return how.average_pool(how.apply(torch.relu, x), 2)


class Decoder(Net):
    """What all decoders have: regions V, their mean g, embedded words."""

    def __init__(self) -> None:
        super().__init__()
        self.regions, self.pooled = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.embedding, self.out = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.state = nn.Parameter(torch.zeros(4, WIDTH))  # h and c of two LSTMs, to begin with

    def seen(self, features: Tensor, how: Plain) -> tuple[Tensor, Tensor]:
        """V (N, R, W) and g (N, W)."""
        places = features.flatten(2).transpose(1, 2)
        v = how.apply(torch.relu, how.linear(self.regions, places))
        return v, how.apply(torch.relu, how.linear(self.pooled, how.mean(places, 1)))

    def begin(self, count: Tensor, which: int) -> State:
        """A state for every sample."""
        h, c = (self.state[2 * which + k].expand(count.shape[0], WIDTH) for k in (0, 1))
        return h, c

    def run(self, *inputs: Tensor, how: Plain) -> Tensor:
        features, words = inputs
        return self.decode(features, self.embedding(words), how)

    def decode(self, features: Tensor, words: Tensor, how: Plain) -> Tensor:
        """Logits of the word after the given ones (N, T, W)."""
        raise NotImplementedError


class Adaptive(Decoder):
    """Ada-LSTM: additive attention to regions, and to a sentinel of what the LSTM knows; a second LSTM, or none."""

    def __init__(self, second: bool = True) -> None:
        super().__init__()
        self.first = nn.LSTMCell(3 * WIDTH if second else 2 * WIDTH, WIDTH)
        self.second = nn.LSTMCell(2 * WIDTH, WIDTH) if second else None
        inputs = 3 * WIDTH if second else 2 * WIDTH
        self.gate_x, self.gate_h = nn.Linear(inputs, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.key, self.query = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.key_s, self.score = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 1, bias=False)

    def decode(self, features: Tensor, words: Tensor, how: Plain) -> Tensor:
        v, g = self.seen(features, how)
        one, two = self.begin(words, 0), self.begin(words, 1)
        mixed = g
        for t in range(words.shape[1]):
            before = one
            x = torch.cat([two[0], g, words[:, t]] if self.second else [g, words[:, t]], 1)
            one = how.cell(self.first, x, before)
            mixed = self.attention(v, x, before, one, how)
            if self.second:
                two = how.cell(self.second, torch.cat([mixed, one[0]], 1), two)
        return how.linear(self.out, how.add(mixed, two[0] if self.second else one[0]))

    def attention(self, v: Tensor, x: Tensor, before: State, now: State, how: Plain) -> Tensor:
        """Regions weighted by alpha, and the sentinel by beta."""
        gate = torch.sigmoid(self.gate_x(x) + self.gate_h(before[0]))
        sentinel = how.gate(gate, how.apply(torch.tanh, now[1]))
        asked = self.query(now[0])
        scores = self.score(torch.tanh(self.key(v) + asked[:, None]))[..., 0]
        alone = self.score(torch.tanh(self.key_s(sentinel) + asked))
        beta = torch.softmax(torch.cat([scores, alone], 1), 1)[:, -1:]
        context = self.context(torch.softmax(scores, 1), v, how)
        return how.add(how.gate(beta, sentinel), how.gate(1 - beta, context))

    def context(self, alpha: Tensor, v: Tensor, how: Plain) -> Tensor:
        """The weighted regions, as a matrix product."""
        return how.attend(alpha[:, None], v)[:, 0]


class Summed(Adaptive):
    """The same with weighting and sum as two operators."""

    def context(self, alpha: Tensor, v: Tensor, how: Plain) -> Tensor:
        if how is PLAIN:
            return (alpha[..., None] * v).sum(1)
        return super().context(alpha, v, how)


class Fused(Decoder):
    """One LSTM over all words as the fused operator, and additive attention once, at the end."""

    def __init__(self, stated: bool = True) -> None:
        super().__init__()
        self.stated = stated
        self.lstm = nn.LSTM(2 * WIDTH, WIDTH, batch_first=True)
        self.key, self.query = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.score = nn.Linear(WIDTH, 1, bias=False)

    def decode(self, features: Tensor, words: Tensor, how: Plain) -> Tensor:
        v, g = self.seen(features, how)
        x = torch.cat([g[:, None].expand(-1, words.shape[1], -1), words], 2)
        h, c = self.begin(words, 0)
        state = (h[None].contiguous(), c[None].contiguous()) if self.stated else None
        last = how.lstm(self.lstm, x, state)[:, -1]
        alpha = torch.softmax(self.score(torch.tanh(self.key(v) + self.query(last)[:, None]))[..., 0], 1)
        return how.linear(self.out, how.add(how.attend(alpha[:, None], v)[:, 0], last))


class Heads(Decoder):
    """MH-FC: an LSTM whose state asks the regions in two heads; what it is told passes a gate."""

    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(2 * WIDTH, WIDTH)
        self.key, self.value, self.query = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.project, self.open = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def decode(self, features: Tensor, words: Tensor, how: Plain) -> Tensor:
        v, _ = self.seen(features, how)
        told, now = how.mean(v, 1), self.begin(words, 0)
        for t in range(words.shape[1]):
            now = how.cell(self.first, torch.cat([words[:, t], told], 1), now)
        told = how.linear(self.project, self.ask(v, now[0], how))
        return how.linear(self.out, how.add(how.gate(torch.sigmoid(self.open(now[0])), told), now[0]))

    def ask(self, v: Tensor, h: Tensor, how: Plain) -> Tensor:
        """What the heads are told, side by side (N, W)."""
        k, u = (self.split(x) for x in (self.key(v), how.linear(self.value, v)))
        q = self.split(self.query(h)[:, None])
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // self.heads), -1)
        return how.attend(weights, u).transpose(1, 2).reshape(-1, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        """Heads (N, H, R, W / H)."""
        return x.reshape(x.shape[0], -1, self.heads, WIDTH // self.heads).transpose(1, 2)


class Captioner(Net):
    """Encoder and decoder in one file."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), decoder

    def run(self, *inputs: Tensor, how: Plain) -> Tensor:
        image, words = inputs
        return self.decoder.run(self.encoder.run(image, how=how), words, how=how)


DECODERS = {
    "two LSTMs": lambda: Adaptive(),
    "one LSTM": lambda: Adaptive(second=False),
    "weighted sum": lambda: Summed(),
    "LSTM operator": lambda: Fused(),
    "LSTM operator without a first state": lambda: Fused(stated=False),
    "two heads": lambda: Heads(),
}


def decoder(name: str) -> Decoder:
    """A decoder with random weights, biases and first states."""
    torch.manual_seed(3)
    return randomized(DECODERS[name]())


def captioner(name: str) -> Captioner:
    """A whole model with random weights."""
    torch.manual_seed(5)
    return randomized(Captioner(DECODERS[name]()))


def randomized(net: nn.Module) -> nn.Module:
    """Random where torch has zeros and ones."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.7, 1.3)
                layer.bias.uniform_(-0.3, 0.3)
                layer.running_mean.uniform_(-0.3, 0.3)
                layer.running_var.uniform_(0.5, 1.5)
            elif isinstance(layer, Decoder):
                layer.state.normal_(0, 0.5)
    return net.eval()


def exported(net: Net, first: Tensor, words: Tensor, dynamo: bool) -> onnx.ModelProto:
    """The net as torch's exporters write it; the number of samples is free."""
    names = ["image" if isinstance(net, Captioner) else "features", "words"]
    buffer = io.BytesIO()
    if dynamo:
        free = {0: torch.export.Dim("N")}
        program = torch.onnx.export(
            net,
            (first, words),
            input_names=names,
            output_names=["logits"],
            dynamo=True,
            opset_version=18,
            dynamic_shapes={"inputs": (free, free)},
            verbose=False,
        )
        assert program is not None
        program.save(buffer)
    else:
        torch.onnx.export(
            net,
            (first, words),
            buffer,
            input_names=names,
            output_names=["logits"],
            dynamo=False,
            opset_version=18,
            dynamic_axes={name: {0: "N"} for name in (*names, "logits")},
        )
    return onnx.load_from_string(buffer.getvalue())
