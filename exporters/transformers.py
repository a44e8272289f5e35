"""Transformers in plain torch: encoders like BERT, causal models like LLaMA, and ViT; and their export to ONNX.

The parts are those of the papers, and every size is a parameter: exporters.minilm loads trained weights into them,
exporters.vit and exporters.causal train small ones, benchmarks.networks takes large ones with random weights.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from exporters.recurrence import whole_recurrence


class Attention(nn.Module):
    """Attention of many heads; with `kv_heads`, groups of heads share keys and values (Ainslie et al. 2023)."""

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, size = heads, kv_heads or heads, dim // heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, self.kv_heads * size, bias=bias)
        self.value = nn.Linear(dim, self.kv_heads * size, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend from every place of x (N, T, dim) where mask (.., T, T) is true, after turning queries and keys."""
        batch, length, dim = x.shape
        query, key, value = (
            layer(x).reshape(batch, length, -1, dim // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if turn is not None:
            query, key = rotated(query, *turn), rotated(key, *turn)
        if self.kv_heads < self.heads:
            key, value = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (key, value))
        return self.out(self.attend(query, key, value, mask).transpose(1, 2).reshape(batch, length, dim))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Mix the values; a method of its own, so that a peer's rules can be put around it."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def angles(size: int, length: int | Tensor, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, size) of rotary embeddings (Su et al. 2021)."""
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    turned = torch.arange(length, dtype=torch.float32)[:, None] * frequencies  # type: ignore[call-overload]
    turned = torch.cat([turned, turned], -1)
    return turned.cos(), turned.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + size / 2) of the last axis."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight (Zhang and Sennrich 2019), written out: torch's older exporter lacks torch's own."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Scale every place of x (N, T, dim)."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Mlp(nn.Module):
    """Two dense layers with GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map every place of x (N, T, dim) for itself."""
        return self.down(self.act(self.up(x)))


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020): a dense layer times the SiLU of another."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((dim, hidden),) * 2 + ((hidden, dim),)
        )
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map every place of x (N, T, dim) for itself."""
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP, each with a residual; the norms before them as in GPT, or after them as in BERT."""

    def __init__(
        self, attention: Attention, mlp: nn.Module, norms: Sequence[nn.Module], *, norm_first: bool = True
    ) -> None:
        super().__init__()
        self.attention, self.mlp, self.norm_first = attention, mlp, norm_first
        self.norm1, self.norm2 = norms

    def forward(self, x: Tensor, mask: Tensor | None = None, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Map x (N, T, dim); mask and turn as in `Attention`."""
        if self.norm_first:
            x = x + self.attention(self.norm1(x), mask, turn)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask, turn))
        return self.norm2(x + self.mlp(x))


class Bert(nn.Module):
    """The encoder of BERT (Devlin et al. 2018): token ids, mask and types (N, T) to states (N, T, dim)."""

    def __init__(
        self,
        *,
        vocabulary: int = 30522,
        dim: int = 768,
        heads: int = 12,
        hidden: int = 3072,
        layers: int = 12,
        positions: int = 512,
        types: int = 2,
    ) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(vocabulary, dim), nn.Embedding(types, dim)
        self.positions = nn.Embedding(positions, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        norm = lambda: nn.LayerNorm(dim, eps=1e-12)  # noqa: E731
        self.blocks = nn.ModuleList(
            Block(Attention(dim, heads), Mlp(dim, hidden), (norm(), norm()), norm_first=False) for _ in range(layers)
        )

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Encode; mask is 1 for tokens and 0 for padding."""
        x = self.words(ids) + self.types(types) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = self.norm(x)
        allowed = mask[:, None, None, :] > 0
        for block in self.blocks:
            x = block(x, allowed)
        return x


class Causal(nn.Module):
    """A causal language model in the manner of LLaMA: RMS norms, rotary embeddings, grouped queries, SwiGLU."""

    def __init__(
        self, *, vocabulary: int, dim: int = 64, heads: int = 4, kv_heads: int = 2, hidden: int = 128, layers: int = 2
    ) -> None:
        super().__init__()
        self.size = dim // heads
        self.words = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(
            Block(
                Attention(dim, heads, kv_heads, bias=False),
                GatedMlp(dim, hidden),
                (RMSNorm(dim), RMSNorm(dim)),
            )
            for _ in range(layers)
        )
        self.norm, self.head = RMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (N, T) to logits (N, T, vocabulary) of the next token at every place."""
        x, length = self.words(input_ids), input_ids.shape[1]
        turn = angles(self.size, length)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, mask, turn)
        return self.head(self.norm(x))


class ViT(nn.Module):
    """The vision transformer (Dosovitskiy et al. 2020): a class token, patches, learned positions."""

    def __init__(
        self,
        *,
        size: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        dim: int = 768,
        heads: int = 12,
        hidden: int = 3072,
        layers: int = 12,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim) * 0.02)
        norm = lambda: nn.LayerNorm(dim, eps=1e-6)  # noqa: E731
        self.blocks = nn.ModuleList(
            Block(Attention(dim, heads), Mlp(dim, hidden), (norm(), norm())) for _ in range(layers)
        )
        self.norm, self.head = norm(), nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Pictures (N, channels, size, size) to logits (N, classes)."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def export(
    module: nn.Module,
    path: str | Path | None,
    example: Mapping[str, Tensor],
    output: str | Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    *,
    opset: int = 18,
    dynamo: bool = False,
    optimize: bool = True,
    fold: bool = True,
) -> onnx.ModelProto:
    """Export `module`, and write it to `path` unless that is None.

    Args:
        module: its forward takes the tensors of `example`, in that order.
        path: the file.
        example: an input by name.
        output: what its output is to be called, or its outputs.
        axes: names of the axes that stay open, by input, and by output for what the old exporter cannot tell.
        opset: of the file.
        dynamo: use torch's newer exporter, not TorchScript's.
        optimize: let the newer exporter simplify what it has written; it takes away sums with tiny constants.
        fold: let TorchScript's exporter compute what depends on weights alone, such as transposed ones. Without,
            every initializer is a parameter of the module, under its name.
    """
    whole = whole_recurrence() if dynamo else nullcontext()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), whole:
        warnings.simplefilter("ignore")  # about the exporter's age, and about what traces take as constant
        file = Path(folder, "model.onnx") if path is None else Path(path)
        if dynamo:
            free = [dict(axes.get(name, {})) for name in example]
            options = {"dynamic_shapes": tuple(free), "external_data": False, "verbose": False, "optimize": optimize}
        else:
            options = {"dynamic_axes": {name: dict(found) for name, found in axes.items()}, "do_constant_folding": fold}
        torch.onnx.export(
            module.eval(),
            tuple(example.values()),
            file,
            dynamo=dynamo,
            opset_version=opset,
            input_names=list(example),
            output_names=[output] if isinstance(output, str) else list(output),
            **options,
        )
        return onnx.load(file)
