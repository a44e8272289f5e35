"""What each input of a text model is for, told by its name and type: token ids, mask, segments, positions, past.

ONNX has no word for it, and the names that exporters keep are those of the frameworks' arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["ids", "mask", "segments", "positions", "past", "branch", ""]

# What is left of a name without these words tells which text it belongs to: "a" of input_ids_a and attention_mask_a.
_COMMON = re.compile(r"input|attention|padding|tokens?|type|segment|position|mask|ids?|[^a-z0-9]")


@dataclass(frozen=True)
class TextInputs:
    """The inputs that one text feeds, by name.

    Attributes:
        ids: token ids.
        mask: 1 where a token counts, 0 for padding; None where the model has no such input.
        segments: 0 for the first text of a pair, 1 for the second.
        positions: of the tokens, from 0.
    """

    ids: str
    mask: str | None = None
    segments: str | None = None
    positions: str | None = None

    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(n for n in (self.ids, self.mask, self.segments, self.positions) if n is not None)


def role_of(name: str, kind: str, rank: int) -> Role:
    """What an input is for.

    Args:
        name: of the input.
        kind: numpy's letter for its kind of numbers: i, u, f, b.
        rank: number of its axes.

    Returns:
        The role, "" for what belongs to no text.
    """
    word = name.lower()
    if re.search(r"past|cache", word):
        return "branch" if kind == "b" else "past"
    if "mask" in word and rank in (1, 2):
        return "mask"
    if kind not in "iu" or rank not in (1, 2):
        return ""
    if re.search(r"token_type|segment|type_ids", word):
        return "segments"
    return "positions" if re.search(r"position|pos_ids", word) else "ids"


def text_inputs(inputs: Mapping[str, tuple[str, int]]) -> list[TextInputs]:
    """The inputs that texts feed, one entry per text, in the order of the inputs.

    Args:
        inputs: by name, kind of numbers and rank, as `role_of` takes them.
    """
    roles = {name: role_of(name, *spec) for name, spec in inputs.items()}
    ids = [name for name, role in roles.items() if role == "ids"]

    def beside(first: str, role: Role) -> str | None:
        found = [n for n, r in roles.items() if r == role]
        if len(ids) > 1:
            found = [n for n in found if _family(n) == _family(first)]
        return found[0] if found else None

    return [TextInputs(n, beside(n, "mask"), beside(n, "segments"), beside(n, "positions")) for n in ids]


def _family(name: str) -> str:
    return _COMMON.sub("", name.lower())
