"""Is an explanation any good: perturbation curves, and baselines to compare with."""

from onnx_lrp.evaluate.perturbation import (
    Curve,
    Scorer,
    curve,
    deletion,
    faithfulness,
    hidden_tokens,
    insertion,
    patches,
    pooled,
    replaced_tokens,
)
from onnx_lrp.evaluate.rollout import AttentionRollout, attention_model, rollout

__all__ = [
    "AttentionRollout",
    "Curve",
    "Scorer",
    "attention_model",
    "curve",
    "deletion",
    "faithfulness",
    "hidden_tokens",
    "insertion",
    "patches",
    "pooled",
    "replaced_tokens",
    "rollout",
]
