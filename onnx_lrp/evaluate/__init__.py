"""Is an explanation any good?

Faithfulness (perturbation), localisation, dependence on the weights (randomisation), completeness, and which words a
captioning model gets right; attention rollout as a baseline to compare with.
"""

from onnx_lrp.evaluate.captions import (
    auc,
    aucs,
    box_correctness,
    image_ablation,
    map_statistics,
    without_patches,
    word_ablation,
)
from onnx_lrp.evaluate.comparison import CHANCE, Features, Verdict, compare, singles, squares
from onnx_lrp.evaluate.completeness import completeness
from onnx_lrp.evaluate.localisation import entropy, pointing, region_of, relevance_mass, relevance_rank
from onnx_lrp.evaluate.perturbation import (
    Curve,
    Scorer,
    curve,
    deletion,
    elements,
    faithfulness,
    hidden_tokens,
    insertion,
    patches,
    pooled,
    replaced_tokens,
)
from onnx_lrp.evaluate.randomisation import (
    cascading,
    gaussian,
    randomisation,
    randomised,
    rank_similarity,
    shuffled,
    ssim,
)
from onnx_lrp.evaluate.rollout import AttentionRollout, attention_model, rollout
from onnx_lrp.evaluate.words import WordScore, frequent_words, word_scores

__all__ = [
    "CHANCE",
    "AttentionRollout",
    "Curve",
    "Features",
    "Scorer",
    "Verdict",
    "WordScore",
    "attention_model",
    "auc",
    "aucs",
    "box_correctness",
    "cascading",
    "compare",
    "completeness",
    "curve",
    "deletion",
    "elements",
    "entropy",
    "faithfulness",
    "frequent_words",
    "gaussian",
    "hidden_tokens",
    "image_ablation",
    "insertion",
    "map_statistics",
    "patches",
    "pointing",
    "pooled",
    "randomisation",
    "randomised",
    "rank_similarity",
    "region_of",
    "relevance_mass",
    "relevance_rank",
    "replaced_tokens",
    "rollout",
    "shuffled",
    "singles",
    "squares",
    "ssim",
    "without_patches",
    "word_ablation",
    "word_scores",
]
