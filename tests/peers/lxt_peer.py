"""LXT as an oracle: the operations of our small transformers with LXT's backward passes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from tests.transformer_nets import AttnLRP, Plain, Tensor, mask_of


def lxt(part: str) -> ModuleType:
    """Import a part of LXT, whose efficient half asks for Hugging Face's models, without these."""
    pytest.importorskip("lxt", reason="pip install --no-deps lxt==2.1")
    if part.startswith("lxt.efficient") and "lxt.efficient.models" not in sys.modules:
        models = ModuleType("lxt.efficient.models")
        models.get_default_map = dict  # type: ignore[attr-defined]
        sys.modules[models.__name__] = models
    return pytest.importorskip(part)


class Efficient(AttnLRP):
    """Its rules in the form of input times gradient, with the modifications where its patches have them."""

    def __init__(self, cp: bool) -> None:
        self.rules, self.patches, self.cp = lxt("lxt.efficient.rules"), lxt("lxt.efficient.patches"), cp

    def act(self, f: Any, x: Tensor) -> Tensor:
        return self.rules.identity_rule_implicit(f, x)

    def norm(self, layer: Any, x: Tensor) -> Tensor:
        if hasattr(layer, "bias"):
            return self.patches.layer_norm_forward(layer, x)
        weight = layer.weight
        off = x * self.rules.stop_gradient((x.pow(2).mean(-1, keepdim=True) + layer.eps).rsqrt())
        return weight * off

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        if self.cp:
            return self.rules.stop_gradient(gate) * x
        return self.rules.divide_gradient(gate * x, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        wrap = self.patches.cp_wrap_attention_forward if self.cp else self.patches.wrap_attention_forward

        def forward(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask_of(q, mask, causal)
            return scores.softmax(-1) @ v

        return wrap(forward)(None, q, k, v)


class Explicit(Plain):
    """Its rules for relevance itself: the gradient of the result is the relevance of the input."""

    def __init__(self) -> None:
        self.f, self.rules = lxt("lxt.explicit.functional"), lxt("lxt.explicit.rules")

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        return self.f.linear_epsilon(x, layer.weight, layer.bias, 1e-12)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self.f.add2(a, b, False, 1e-12)

    def act(self, f: Any, x: Tensor) -> Tensor:
        return self.rules.identity(f, x)

    def norm(self, layer: Any, x: Tensor) -> Tensor:
        if hasattr(layer, "bias"):
            return self.f.layer_norm(x, layer.weight, layer.bias, layer.eps)
        return self.f.rms_norm_identity(x, layer.weight, layer.eps)

    def scale(self, x: Tensor, by: Any) -> Tensor:
        return self.f.mul2(x, by if isinstance(by, float) else by.expand_as(x))

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.f.mul2(gate, x)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        scores = self.scale(self.f.matmul(q, k.transpose(-1, -2), False, 1e-12), q.shape[-1] ** -0.5)
        scores = self.add(scores, mask_of(q, mask, causal).expand_as(scores))
        return self.f.matmul(self.f.softmax(scores, -1), v, False, 1e-12)
