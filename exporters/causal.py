"""Train and export a small causal transformer that looks up values: ``d 4 . a 7 k 1 ? a`` goes on with ``7``.

Letters are keys and digits their values; pairs stand in any order with blanks between them, and the question is the
last key. So it is known which token is the evidence: the value behind the key that is asked for (and the key before it,
which says that it is the one). Two layers do that by copying (Olsson et al. 2022): the first looks back by one token,
the second finds the key.

    python -m exporters.causal --out examples/lookup/lookup.onnx --tokenizer examples/lookup/tokenizer.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch.nn.functional import cross_entropy

from exporters.training import fit
from exporters.transformers import Causal, export

KEYS, VALUES = "abcdefghijklmnop", "0123456789"
WORDS = (".", "?", *KEYS, *VALUES)
BLANK, ASK, FIRST_KEY, FIRST_VALUE = 0, 1, 2, 2 + len(KEYS)
PAIRS, BLANKS, QUESTIONS = 6, 4, 6
STEPS, BATCH = 1500, 64


def draw(rng: np.random.Generator, questions: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draw a text.

    Args:
        rng: where all randomness comes from.
        questions: how many keys are asked for after the question mark; all but the last with their answers.

    Returns:
        Token ids (17 + 2 (questions - 1) + 1,), and the positions of the values that answer (questions,).
    """
    keys = FIRST_KEY + rng.permutation(len(KEYS))[:PAIRS]
    values = FIRST_VALUE + rng.integers(len(VALUES), size=PAIRS)
    order = rng.permutation([1] * PAIRS + [0] * BLANKS)  # a pair or a blank
    ids: list[int] = []
    where: list[int] = []
    for kind in order:
        if kind:
            ids += [keys[len(where)], values[len(where)]]
            where.append(len(ids) - 1)
        else:
            ids.append(BLANK)
    asked = rng.permutation(PAIRS)[:questions]
    tail = [token for pair in asked for token in (keys[pair], values[pair])]
    return np.array([*ids, ASK, *tail[:-1]], np.int64), np.array(where)[asked]


def texts(count: int, seed: int, questions: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draw texts: token ids (count, length), and where the answers stand (count, questions)."""
    rng = np.random.default_rng(seed)
    drawn = [draw(rng, questions) for _ in range(count)]
    return np.stack([ids for ids, _ in drawn]), np.stack([where for _, where in drawn])


def train(seed: int = 0, steps: int = STEPS) -> Causal:
    """Train the network: the same weights whenever it runs again on one machine."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Causal(vocabulary=len(WORDS), dim=48, heads=4, kv_heads=2, hidden=96, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2, betas=(0.9, 0.95))

    def loss() -> torch.Tensor:
        ids, where = texts(BATCH, int(rng.integers(2**32)), QUESTIONS)
        answers = torch.tensor(np.take_along_axis(ids, where, 1))
        # Some tokens are left blank, so that deleting one is nothing new; where the answer went, any digit is as good.
        body = ids[:, : 2 * PAIRS + BLANKS]
        body[rng.random(body.shape) < rng.choice([0.0, 0.15])] = BLANK
        logits = model(torch.tensor(ids))[:, -(2 * QUESTIONS - 1) :: 2]
        return cross_entropy(logits.flatten(0, 1), answers.flatten())

    fit(model, optimizer, 1e-2, steps, loss)
    return model


def accuracy(model: Causal, count: int = 2000, seed: int = 1) -> float:
    """Share of fresh texts with one question that are answered rightly."""
    ids, where = texts(count, seed)
    with torch.no_grad():
        found = model(torch.tensor(ids))[:, -1].argmax(-1).numpy()
    return float((found == np.take_along_axis(ids, where, 1)[:, 0]).mean())


def write(model: Causal, path: str | Path | None, *, opset: int = 18, dynamo: bool = False) -> onnx.ModelProto:
    """Export the network; batch and length stay open."""
    axes = {0: "batch", 1: "length"}
    example = {"input_ids": torch.tensor(texts(2, 0)[0])}
    named = {"input_ids": axes, "logits": axes}
    return export(model, path, example, "logits", named, opset=opset, dynamo=dynamo)


def tokenizer() -> str:
    """A file for the package tokenizers: words apart by spaces, each with its id."""
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": WORDS[BLANK]}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    parts = {"version": "1.0", **empty, "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    return json.dumps(parts | {"model": model}, indent=1) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.causal", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--tokenizer", type=Path, help="where to write a tokenizer.json to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dynamo", action="store_true", help="use torch's newer exporter")
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    model = train(args.seed, args.steps)
    print(f"accuracy on fresh texts: {accuracy(model):.2%} (chance is {1 / len(VALUES):.2%})")
    if args.tokenizer:
        args.tokenizer.write_text(tokenizer(), encoding="utf-8")
    write(model, args.out, opset=args.opset, dynamo=args.dynamo)


if __name__ == "__main__":
    main()
