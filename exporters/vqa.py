"""A network that looks at a picture, reads a question and answers: "Show, Ask, Attend, and Answer".

Kazemi and Elqursh 2017, in the sizes of its well-known implementation for torch, with random weights; and a small one,
trained on scenes of two coloured shapes and questions about them (exporters.scenes).

    python -m exporters.vqa --out vqa.onnx
    python -m exporters.vqa --out vqa.onnx --published
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence

from exporters import scenes
from exporters.torch_nets import RESNET152, Bottleneck, ResNet, randomize
from exporters.training import fit
from exporters.transformers import export

# "pad" is a word like others, which no question here has; the original's path begins at it, not at padding.
WORDS = (*scenes.WORDS, "pad")
MEAN, STD = 0.3, 0.25  # of the pixels of scenes: what the network sees is (pixel - mean) / std, so 0 is a grey
EXAMPLES, STEPS, BATCH = 16384, 900, 32


class CaffeBottleneck(Bottleneck):
    """A residual block whose stride is at its first 1x1, as in the original ResNet of Caffe, not at its 3x3."""

    def __init__(self, before: int, planes: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, planes, stride, groups)
        self.conv1.stride, self.conv2.stride = (stride, stride), (1, 1)


def caffe_resnet(depths: Sequence[int] = RESNET152, width: int = 64) -> nn.Sequential:
    """A ResNet without its last layer: pictures (N, 3, H, W) to features (N, 32 width, H / 32, W / 32).

    Its pooling is that of Caffe, too: 3x3 windows every two pixels without padding, the last one perhaps cut.
    """
    whole = ResNet(CaffeBottleneck, depths, width=width, classes=1)
    pooling = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    return nn.Sequential(whole.conv1, whole.bn1, whole.relu, pooling, whole.blocks)


def small_cnn(width: int = 24) -> nn.Sequential:
    """Three convolutions for scenes: pictures (N, 3, 24, 24) to features (N, 3 width, 6, 6)."""

    def pooling() -> nn.MaxPool2d:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)

    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), pooling()),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), pooling()),
        *(nn.Conv2d(2 * width, 3 * width, 3, padding=1), nn.ReLU()),
    )


class Question(nn.Module):
    """Words to the final cell state of an LSTM: tokens (N, T) and their number (N,) to (N, hidden)."""

    def __init__(self, tokens: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.words = nn.Embedding(tokens, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)

    def forward(self, question: Tensor, length: Tensor | None = None) -> Tensor:
        """Read so many words of each question; all, padding as well, where no numbers are given."""
        rows = torch.tanh(self.words(question))
        if length is not None:
            rows = pack_padded_sequence(rows, length, batch_first=True, enforce_sorted=False)
        return self.lstm(rows)[1][1].squeeze(0)


class Attention(nn.Module):
    """Where to look: features (N, C, H, W) and a question (N, Q) to glimpses (N, G, H, W), before their softmax."""

    def __init__(self, features: int, question: int, hidden: int, glimpses: int) -> None:
        super().__init__()
        self.looked = nn.Conv2d(features, hidden, 1, bias=False)
        self.asked = nn.Linear(question, hidden)
        self.both = nn.Conv2d(hidden, glimpses, 1)

    def forward(self, v: Tensor, q: Tensor) -> Tensor:
        """Score every place."""
        looked = self.looked(v)
        return self.both(torch.relu(looked + self.asked(q)[:, :, None, None].expand_as(looked)))


class Vqa(nn.Module):
    """Features of a picture, a question, attention, and a classifier of answers.

    Args:
        features: a network from pictures (N, 3, H, W) to features (N, channels, h, w); by default ResNet-152.
        channels: of the features.
        tokens: size of the vocabulary; 0 is padding.
        embedding: of words.
        hidden: of the LSTM.
        attention: channels of the attention.
        glimpses: how many places it looks at.
        classifier: size of the classifier's inner layer.
        answers: how many there are.
    """

    def __init__(
        self,
        features: nn.Module | None = None,
        channels: int = 2048,
        *,
        tokens: int = 15193,
        embedding: int = 300,
        hidden: int = 1024,
        attention: int = 512,
        glimpses: int = 2,
        classifier: int = 1024,
        answers: int = 3000,
    ) -> None:
        super().__init__()
        self.features = caffe_resnet() if features is None else features
        self.question = Question(tokens, embedding, hidden)
        self.attention = Attention(channels, hidden, attention, glimpses)
        self.classifier = nn.Sequential(
            nn.Linear(glimpses * channels + hidden, classifier), nn.ReLU(), nn.Linear(classifier, answers)
        )

    def forward(self, image: Tensor, question: Tensor, length: Tensor | None = None) -> Tensor:
        """Pictures (N, 3, H, W), tokens (N, T) and how many of them count (N,) to logits (N, answers)."""
        v = self.features(image)
        v = v / (v.norm(p=2, dim=1, keepdim=True).expand_as(v) + 1e-8)
        q = self.question(question, length)
        glimpses = torch.softmax(self.attention(v, q).flatten(2), -1)  # (N, G, h w)
        seen = (v.flatten(2)[:, None] * glimpses[:, :, None]).sum(-1)  # (N, G, C)
        return self.classifier(torch.cat([seen.flatten(1), q], 1))


def published(seed: int = 0) -> Vqa:
    """The network in its published sizes, for pictures of 448 by 448, with random weights."""
    torch.manual_seed(seed)
    return randomize(Vqa(), seed)


def small(seed: int = 0) -> Vqa:
    """The network for scenes, not trained."""
    torch.manual_seed(seed)
    sizes = {"embedding": 16, "hidden": 32, "attention": 64, "classifier": 64}
    model = Vqa(small_cnn(), 72, tokens=len(WORDS), answers=len(scenes.SHAPES), **sizes)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)  # as the original; features of length one are small numbers
    return model


def examples(count: int, seed: int) -> tuple[scenes.Scenes, scenes.Questions, dict[str, np.ndarray]]:
    """Scenes, questions about them, and both as inputs of the network.

    Args:
        count: how many.
        seed: of everything random.
    """
    drawn = scenes.scenes(count, seed)
    asked = scenes.questions(drawn, seed)
    length = (asked.tokens != scenes.PAD).sum(1)
    image = ((drawn.image - MEAN) / STD).astype(np.float32)
    return drawn, asked, {"image": image, "question": asked.tokens, "length": length.astype(np.int32)}


def train(seed: int = 0, steps: int = STEPS) -> Vqa:
    """Train the small network: the same weights whenever it runs again on one machine."""
    model, rng = small(seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    _, asked, inputs = examples(EXAMPLES, seed + 1000)

    def loss() -> Tensor:
        chosen = rng.integers(EXAMPLES, size=BATCH)
        logits = model(*(torch.tensor(array[chosen]) for array in inputs.values()))
        return cross_entropy(logits, torch.tensor(asked.answers[chosen]), label_smoothing=0.1)

    fit(model, optimizer, 5e-3, steps, loss)
    with torch.no_grad():  # what no question has would stay as it was drawn; let it be like any word
        rows = model.question.words.weight
        rows[WORDS.index("pad")] = rows[1 : len(scenes.WORDS)].mean(0)
    return model


def accuracy(model: Vqa, count: int = 2000, seed: int = 1) -> float:
    """Share of questions about fresh scenes that get the right answer."""
    _, asked, inputs = examples(count, seed)
    with torch.no_grad():
        found = model(*map(torch.tensor, inputs.values())).argmax(-1).numpy()
    return float((found == asked.answers).mean())


def write(
    model: Vqa,
    path: str | Path | None,
    *,
    size: int = scenes.SIZE,
    words: int = scenes.LENGTH,
    opset: int = 18,
    dynamo: bool = False,
) -> onnx.ModelProto:
    """Export the network; the batch stays open.

    Neither exporter of torch takes a packed sequence whose output is not padded again. So the LSTM is exported without,
    and told of the lengths in the file: that is what the input ``sequence_lens`` of ONNX's LSTM is for.
    """
    example = {"image": torch.zeros(2, 3, size, size), "question": torch.ones(2, words, dtype=torch.int64)}
    named = {name: {0: "batch"} for name in (*example, "logits")}
    # Torch's newer exporter takes away "+ 1e-8", which it deems nothing: then features of zeros are 0 / 0.
    proto = export(model, None, example, "logits", named, opset=opset, dynamo=dynamo, optimize=False)
    tell_lengths(proto)
    if size == scenes.SIZE:
        said = {"preprocess": {"mean": [MEAN] * 3, "std": [STD] * 3}, "classes": scenes.SHAPES}
        onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in said.items()})
    if path is not None:
        onnx.save(proto, path)
    return proto


def tell_lengths(proto: onnx.ModelProto, name: str = "length") -> None:
    """Give a model an input (N,) int32 that says how many steps its LSTM takes of every sample, in place."""
    (lstm,) = (node for node in proto.graph.node if node.op_type == "LSTM")
    lstm.input[:] = [*lstm.input, *[""] * 6][:6]
    lstm.input[4] = name
    proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, ["batch"]))


def tokenizer() -> str:
    """A file for the package tokenizers: words apart by spaces, each with its id, filled up with padding behind."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    padding, unknown = WORDS[scenes.PAD], "thing"
    special = {"id": 0, "content": padding, "special": True} | dict.fromkeys(_FLAGS, False)
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    parts = {"version": "1.0", **empty, "added_tokens": [special], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown}
    return json.dumps(parts | {"model": model}, indent=1) + "\n"


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.vqa", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--tokenizer", type=Path, help="where to write a tokenizer.json of the small one to")
    parser.add_argument("--published", action="store_true", help="the published sizes, with random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dynamo", action="store_true", help="use torch's newer exporter")
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    if args.published:
        write(published(args.seed), args.out, size=448, words=23, opset=args.opset, dynamo=args.dynamo)
        return
    model = train(args.seed, args.steps)
    print(f"accuracy on fresh scenes: {accuracy(model):.2%} (chance is {1 / len(scenes.SHAPES):.0%})")
    if args.tokenizer:
        args.tokenizer.write_text(tokenizer(), encoding="utf-8")
    write(model, args.out, opset=args.opset, dynamo=args.dynamo)


if __name__ == "__main__":
    main()
