"""How large the networks of the benchmarks are. Apart from them, for who measures memory must not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How large networks and their inputs are.

    Attributes:
        picture: height and width of pictures.
        length: of texts and sequences; None: 128 tokens, or 200 steps.
        shrink: by what all channels, hidden units and widths are divided; classes too.
    """

    picture: int = 224
    length: int | None = None
    shrink: int = 1
