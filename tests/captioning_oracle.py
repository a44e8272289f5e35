"""The networks of exporters.captioning once more, against the operations of :mod:`tests.surrogate`.

Nothing of their forward passes is used, only their weights: run with :class:`tests.surrogate.Plain` they must say what
the exported files say, run with a surrogate they give relevance by autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from exporters.captioning import Adaptive, Captioner, MultiHead, Steps
from tests.surrogate import Plain, State


class Found(NamedTuple):
    """Relevance of pixels (3, H, W), of features and of words (T,), and the logit."""

    image: np.ndarray
    features: np.ndarray
    words: np.ndarray
    logit: float


def relevance(net: Captioner, image: np.ndarray, words: np.ndarray, place: int, word: int, how: Plain) -> Found:
    """Explain a word at a place; `net` in float64."""
    x = ((torch.tensor(image[None]).double() - net.mean) / net.std).requires_grad_()
    rows = net.decoder.embedding(torch.tensor(words[None])).detach().requires_grad_()
    features = encode(net, x, how)
    features.retain_grad()
    logit = decode(net, features, rows, how)[0, place, word]
    logit.backward()
    parts = ((t * t.grad).detach()[0].numpy() for t in (x, features, rows))
    pixels, border, read = parts
    return Found(pixels, border, read.sum(-1), float(logit))


def encode(net: Captioner, x: Tensor, how: Plain) -> Tensor:
    """Normalised pixels to features."""
    for layer in net.encoder:
        if isinstance(layer, nn.Conv2d):
            x = how.conv(layer, x)
        elif isinstance(layer, nn.MaxPool2d):
            x = how.max_pool(x, 2)
        else:
            x = how.apply(torch.relu, x)
    return x


def decode(net: Captioner, features: Tensor, rows: Tensor, how: Plain) -> Tensor:
    """Features and embedded words (1, T, W) to logits (1, T, V), word after word."""
    decoder = net.decoder
    places = features.flatten(2).transpose(1, 2)
    v = how.apply(torch.relu, how.linear(decoder.regions, places))
    if isinstance(decoder, MultiHead):
        return _multihead(decoder, v, rows, how)
    assert isinstance(decoder, Adaptive)
    return _adaptive(decoder, places, v, rows, how)


def _adaptive(net: Adaptive, places: Tensor, v: Tensor, rows: Tensor, how: Plain) -> Tensor:
    g = [] if net.pooled is None else [how.apply(torch.relu, how.linear(net.pooled, how.mean(places, 1)))]
    one, two, logits = _zeros(net.first, rows), _zeros(net.first, rows), []
    for t in range(rows.shape[1]):
        before = one
        x = torch.cat([*([two[0]] if net.second else []), *g, rows[:, t]], 1)
        one = how.cell(net.first.cell, x, before)
        gate = torch.sigmoid(net.gate_x(x) + net.gate_h(before[0]))
        sentinel = how.gate(gate, how.apply(torch.tanh, one[1]))
        asked = net.query(one[0])
        scores = net.score(torch.tanh(net.key(v) + asked[:, None]))[..., 0]
        alone = net.score(torch.tanh(net.key_s(sentinel) + asked))
        beta = torch.softmax(torch.cat([scores, alone], 1), 1)[:, -1:]
        context = how.attend(torch.softmax(scores, 1)[:, None], v)[:, 0]
        seen = how.add(how.gate(beta, sentinel), how.gate(1 - beta, context))
        if net.second:
            two = how.cell(net.second.cell, torch.cat([seen, one[0]], 1), two)
        logits.append(how.linear(net.out, how.add(seen, two[0] if net.second else one[0])))
    return torch.stack(logits, 1)


def _multihead(net: MultiHead, v: Tensor, rows: Tensor, how: Plain) -> Tensor:
    told, now, logits = how.mean(v, 1), _zeros(net.first, rows), []
    wide = net.width // net.heads
    for t in range(rows.shape[1]):
        now = how.cell(net.first.cell, torch.cat([rows[:, t], told], 1), now)
        heard = []
        for h in range(net.heads):
            part = slice(h * wide, (h + 1) * wide)
            q, k = net.query(now[0])[:, None, part], net.key(v)[..., part]
            weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(wide), -1)
            heard.append(how.attend(weights, how.linear(net.value, v)[..., part])[:, 0])
        seen = how.gate(torch.sigmoid(net.open(now[0])), how.linear(net.project, torch.cat(heard, 1)))
        logits.append(how.linear(net.out, how.add(seen, now[0])))
    return torch.stack(logits, 1)


def _zeros(steps: Steps, rows: Tensor) -> State:
    zero = rows.new_zeros(len(rows), steps.width)
    return zero, zero
