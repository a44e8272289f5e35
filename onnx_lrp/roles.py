"""What each input of a text model is for, by its name and type: token ids, mask, lengths, segments, positions, past.

ONNX has no word for it, and the names that exporters keep are those of the frameworks' arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError

Role = Literal["ids", "mask", "lengths", "segments", "positions", "past", "branch", ""]

# What is left of a name without these words tells which text it belongs to: "a" of input_ids_a and attention_mask_a.
_COMMON = re.compile(r"input|attention|padding|tokens?|type|segment|position|mask|ids?|[^a-z0-9]")


@dataclass(frozen=True)
class Spec:
    """What a model wants for an input: its type, and its shape with None or a name for a length that is open."""

    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class TextInputs:
    """The inputs that one text feeds, by name.

    Attributes:
        ids: token ids.
        mask: 1 where a token counts, 0 for padding; None where the model has no such input.
        segments: 0 for the first text of a pair, 1 for the second.
        positions: of the tokens, from 0.
        lengths: how many tokens of each text count, (N,).
    """

    ids: str
    mask: str | None = None
    segments: str | None = None
    positions: str | None = None
    lengths: str | None = None

    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(n for n in (self.ids, self.mask, self.segments, self.positions, self.lengths) if n is not None)


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
    if re.search(r"past|cache", word) and "position" not in word:
        return "branch" if kind == "b" else "past"
    if "mask" in word and rank in (1, 2):
        return "mask"
    if kind not in "iu" or rank not in (1, 2):
        return ""
    if rank == 1 and re.search(r"length|lens?$|len_", word):
        return "lengths"
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

    return [
        TextInputs(n, beside(n, "mask"), beside(n, "segments"), beside(n, "positions"), beside(n, "lengths"))
        for n in ids
    ]


def kinds(inputs: Mapping[str, Spec]) -> dict[str, tuple[str, int]]:
    """Kind of numbers and rank of each input, as `text_inputs` takes them."""
    return {name: (spec.dtype.kind, len(spec.shape)) for name, spec in inputs.items()}


def outside(ids: NDArray[Any], pad: int | None) -> NDArray[np.bool_]:
    """(N, T): where a padding token stands before or behind all others."""
    if pad is None:
        return np.zeros(np.shape(ids), bool)
    others = np.asarray(ids) != pad
    return np.asarray((others.cumsum(1) == 0) | (others[:, ::-1].cumsum(1)[:, ::-1] == 0))


def lengths(mask: NDArray[Any]) -> NDArray[np.int64]:
    """How many tokens up to the last one that counts, (N,), from which do, (N, T); at least one."""
    counts = np.asarray(mask) != 0
    places = np.arange(1, counts.shape[1] + 1)
    return np.asarray(np.where(counts, places, 1).max(1, initial=1), np.int64)


def filled(
    given: Mapping[str, NDArray[Any]], inputs: Mapping[str, Spec], pad: int | None = None
) -> dict[str, NDArray[Any]]:
    """What goes without saying where token ids (N, T) are given: the other inputs that a text feeds.

    Every token but padding counts, all are of the first segment, positions run from 0, a text is as long as its last
    token that counts, and there is no past.

    Args:
        given: some of the inputs; what is not given of others stays away.
        inputs: those of the model.
        pad: id of the padding token.

    Raises:
        InputError: a past whose shape does not say on which axis its length lies.
    """
    found: dict[str, NDArray[Any]] = {}
    roles = {name: role_of(name, *kind) for name, kind in kinds(inputs).items()}
    # How long a past is that was given, and so what the mask and positions are, its owner says.
    whole = not any(role == "past" and name in given for name, role in roles.items())
    groups = [g for g in text_inputs(kinds(inputs)) if g.ids in given and _is_table(given[g.ids])]
    for group in groups:
        mask = ~outside(given[group.ids], pad)
        places = np.maximum(mask.cumsum(1) - 1, 0)
        if group.lengths is not None and group.lengths not in given:
            found[group.lengths] = lengths(mask).astype(inputs[group.lengths].dtype)
        for name, values in ((group.mask, mask), (group.segments, 0 * mask), (group.positions, places)):
            if name is not None and name not in given and (whole or name == group.segments):
                # One row for all, as of the input cache_position.
                row = values[0] if len(inputs[name].shape) == 1 else values
                found[name] = row.astype(inputs[name].dtype)
    for name, spec in inputs.items() if groups else ():
        role = roles[name]
        if role == "past" and name not in given:
            found[name] = _no_past(name, spec, len(given[groups[0].ids]))
        elif role == "branch" and name not in given:
            found[name] = np.zeros([1] * len(spec.shape), bool)
    return found


def noise(inputs: Mapping[str, Spec], batch: int = 1) -> dict[str, NDArray[Any]]:
    """Seeded noise for every input: floats in [0, 1), and integers 0 and 1, which are ids of every table.

    What a text feeds beside its ids is filled in as by `filled`, unless its shape forbids.

    Args:
        inputs: of the model.
        batch: length of a first axis that is open.

    Raises:
        InputError: an open length beyond the first axis.
    """
    rng = np.random.default_rng(0)

    def made(name: str, spec: Spec) -> NDArray[Any]:
        if any(not isinstance(d, int) for d in spec.shape[1:]):
            axes = ", ".join("?" if d is None else str(d) for d in spec.shape)
            raise InputError(f"input '{name}' has open lengths ({axes}): say them with shapes=, or give an input")
        shape = [d if isinstance(d, int) else batch for d in spec.shape]
        values = rng.random(shape) if spec.dtype.kind == "f" else rng.integers(0, 2, shape)
        return np.asarray(values, spec.dtype)

    def is_filled(name: str, spec: Spec) -> bool:
        fixed = all(isinstance(d, int) for d in spec.shape[1:])
        return role_of(name, *kinds({name: spec})[name]) not in (("", "ids", "past") if fixed else ("", "ids"))

    found = {name: made(name, spec) for name, spec in inputs.items() if not is_filled(name, spec)}
    for name, array in filled(found, inputs).items():
        shape = inputs[name].shape
        if array.ndim == len(shape) and all(n == d for n, d in zip(array.shape, shape, strict=True) if type(d) is int):
            found[name] = array
    return {name: found[name] if name in found else made(name, spec) for name, spec in inputs.items()}


def _is_table(ids: Any) -> bool:
    """Whether ids are (N, T), and not a ragged list or anything else that will be refused."""
    try:
        return np.ndim(ids) == 2
    except ValueError:
        return False


def _no_past(name: str, spec: Spec, count: int) -> NDArray[Any]:
    """A past of no tokens, for a model that was exported with one."""
    shape = [d if isinstance(d, int) else count if axis == 0 else 0 for axis, d in enumerate(spec.shape)]
    if shape.count(0) != 1 or not shape[0]:
        axes = ", ".join(str(d) for d in spec.shape)
        raise InputError(f"input '{name}' ({axes}) is missing: its shape does not say which axis is the past's length")
    return np.zeros(shape, spec.dtype)


def _family(name: str) -> str:
    return _COMMON.sub("", name.lower())
