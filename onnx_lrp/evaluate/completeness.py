"""Does an explanation account for the whole score? Sums that should be equal, and how far they are apart."""

from __future__ import annotations

import numpy as np

from onnx_lrp.explanation import Explanation
from onnx_lrp.runtime import Array


def completeness(explanation: Explanation) -> Array:
    """What an explanation leaves unexplained, as a share of what there is to explain, (N,); 0 is complete.

    For methods with a baseline the axiom of completeness (Sundararajan, Taly and Yan 2017, sec. 3): relevance sums to
    the rise of the score above the baseline's. For relevance propagation conservation (Bach et al. 2015, eq. 2):
    relevance sums to the score, together with what biases and stabilizers took where the explanation was made with
    ledger=True. Gradients are no contributions, so for them the number says nothing. Where there is nothing to explain
    it is 0, or infinite if something is explained all the same.

    Args:
        explanation: of N samples.
    """
    total = explanation.total()
    if explanation.delta is not None:
        gap = np.asarray(explanation.delta, np.float64)
        whole = total - gap
    else:
        whole = np.asarray(explanation.score, np.float64)
        gap = total + (0.0 if explanation.absorbed is None else explanation.absorbed) - whole
    found = np.abs(gap) / np.where(whole == 0, 1, np.abs(whole))
    return np.asarray(np.where(whole == 0, np.where(gap == 0, 0.0, np.inf), found))
