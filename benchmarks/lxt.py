"""LXT's efficient form (Achtibat et al. 2024) around the transformers of exporters.transformers.

LXT puts its rules on classes of other packages, whose names change from release to release; its rules themselves need
torch alone. So they are put on our modules here, in the places in which LXT's own maps put them.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from exporters.transformers import Attention, GatedMlp, RMSNorm


def _lxt(part: str) -> ModuleType:
    """Import a module of `lxt.efficient` without the package's own imports, which are of other packages."""
    if "lxt.efficient" not in sys.modules:
        spec = importlib.util.find_spec("lxt")
        if spec is None or spec.origin is None:
            raise ImportError("pip install --no-deps lxt==2.1")
        package = ModuleType("lxt.efficient")
        package.__path__ = [str(Path(spec.origin).parent / "efficient")]
        sys.modules["lxt.efficient"] = package
    return importlib.import_module(f"lxt.efficient.{part}")


def patched(module: nn.Module, *, cp: bool = False) -> nn.Module:
    """Put LXT's rules on the parts of a module, in place: a gradient of it times its input is then AttnLRP.

    Args:
        module: of exporters.transformers, or holding such.
        cp: CP-LRP, which holds attention and gates constant.
    """
    rules, patches = _lxt("rules"), _lxt("patches")
    wrap = patches.cp_wrap_attention_forward if cp else patches.wrap_attention_forward
    for part in module.modules():
        if isinstance(part, Attention):
            attend = wrap(lambda module, query, key, value, *rest: Attention.attend(module, query, key, value, *rest))
            part.attend = functools.partial(attend, part)  # type: ignore[method-assign]
        elif isinstance(part, GatedMlp):
            part.forward = functools.partial(_gated, part, rules, cp)  # type: ignore[method-assign]
        elif isinstance(part, nn.GELU):
            part.forward = functools.partial(rules.identity_rule_implicit, nn.functional.gelu)  # type: ignore[method-assign]
        elif isinstance(part, nn.LayerNorm):
            part.forward = functools.partial(patches.layer_norm_forward, part)  # type: ignore[method-assign]
        elif isinstance(part, RMSNorm):
            part.forward = functools.partial(_rms_norm, part)  # type: ignore[method-assign]
    return module.requires_grad_(False)


def _gated(self: GatedMlp, rules: Any, cp: bool, x: Tensor) -> Tensor:
    gate = self.gate(x)
    gate = self.act(rules.stop_gradient(gate)) if cp else rules.identity_rule_implicit(self.act, gate)
    product = gate * self.up(x)
    return self.down(product if cp else rules.divide_gradient(product, 2))


def _rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach() * self.weight
