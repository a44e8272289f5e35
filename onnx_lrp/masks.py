"""Relevance conditional on channels: masks at named tensors (concept relevance propagation, Achtibat et al. 2023).

At a masked tensor relevance is multiplied, channel by channel, by the graph input ``mask/<tensor>``. From there the
walk goes on as ever, so that what is found behind the tensor is the share of the chosen channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lrp.adjoints.shapes import expand_like, ints
from onnx_lrp.backward import Conditions, Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.facts import Facts
from onnx_lrp.target import Fed
from onnx_lrp.view import View

Masks = Sequence[str] | Mapping[str, int]
Array = np.ndarray[Any, Any]

_CHANNELS = 1  # the axis of channels where nothing else is said
_NOWHERE: frozenset[Value] = frozenset()


def mask_axes(masks: Masks) -> dict[str, int]:
    """The axis of channels of every masked tensor, by name."""
    if isinstance(masks, str):
        raise InputError(f"masks is a list of tensors, not one name; give masks=[{masks!r}]")
    return dict(masks) if isinstance(masks, Mapping) else dict.fromkeys(masks, _CHANNELS)


def mask_inputs(v: View, masks: Masks, fed: Fed) -> dict[Value, Value]:
    """A graph input ``mask/<tensor>`` (n, C), ones by default, for every masked tensor; n is 1 or the batch.

    Args:
        v: the model.
        masks: the masked tensors.
        fed: what is seen here of a graph input that has a row for every row of relevance.

    Returns:
        Masked tensor -> its mask, with the axes that it needs to be multiplied.

    Raises:
        InputError: no such tensor, no float tensor, no such axis.
    """
    e, found = v.e, {}
    for name, axis in mask_axes(masks).items():
        x = v.value(name)
        if x.dtype.kind != "f":
            raise InputError(f"masks: '{name}' is {x.dtype}, which has no relevance; name a float tensor")
        if not -x.rank <= axis < x.rank or axis % x.rank == 0:
            raise InputError(
                f"masks: '{name}' has shape {x.facts.shape}, and no channels on axis {axis}; "
                f"name another tensor, or its axis as masks={{'{name}': axis}}"
            )
        length = x.shape[axis]
        default = np.ones((1, length if isinstance(length, int) else 1), x.dtype)
        facts = Facts(x.dtype, (f"mask/{name}.0", length if isinstance(length, int) else f"mask/{name}.1"))
        others = [i for i in range(1, x.rank) if i != axis % x.rank]
        with e.scope(name, "mask", f"which channels of {name} count"):
            mask = fed(e.parameter(f"mask/{name}", default, facts))
            found[x] = e.op("Unsqueeze", mask, ints(e, others)) if others else mask
    return found


@dataclass(frozen=True)
class Masked(Conditions):
    """The conditions of one walk.

    Attributes:
        masks: what the relevance of a tensor is multiplied by.
        ahead: with paths around the masks excluded: the masked tensors that a tensor feeds before any other; None:
            every path counts.
        behind: the masked tensors, and what depends on any.
    """

    masks: Mapping[Value, Value]
    ahead: Mapping[Value, frozenset[Value]] | None
    behind: frozenset[Value]

    def settled(self, e: Emitter, x: Value, relevance: Relevance) -> Relevance:
        """Relevance of a tensor, masked if it is to be."""
        if x not in self.masks:
            return relevance
        with e.scope(x.name, "mask", f"relevance of {x.name} in the chosen channels"):
            factor = expand_like(e, relevance.factor, x)
            return Relevance(e.op("Mul", factor, self.masks[x], shape=x.shape, label="masked"), relevance.of)

    def passes(self, output: Value, x: Value) -> bool:
        """Whether relevance may go from an output of a call to an input: not around a mask that lies ahead of that."""
        if self.ahead is None:
            return True
        ahead = self.ahead.get(x, _NOWHERE)
        if not ahead:
            return x in self.behind
        here = frozenset([output]) if output in self.masks else self.ahead.get(output, _NOWHERE)
        return not ahead.isdisjoint(here)


def conditions(
    masks: Mapping[Value, Value], model: Sequence[Call], calls: Sequence[Call], exclude_parallel: bool
) -> Conditions:
    """The conditions of a walk over these calls.

    Args:
        masks: what the relevance of a tensor is multiplied by.
        model: all calls in topological order: a walk may end before it comes to a mask.
        calls: those of the walk.
        exclude_parallel: let no relevance pass around the masked tensors: of several in a row it passes all, of
            several side by side any.
    """
    if not masks:
        return Conditions()
    if not exclude_parallel:
        return Masked(masks, None, _NOWHERE)
    behind = set(masks)
    for call in model:
        if any(x in behind for x in call.inputs):
            behind.update(o for o in call.outputs if o is not None)
    fed: dict[Value, frozenset[Value]] = {}
    for call in reversed(calls):
        outputs = [o for o in call.outputs if o is not None]
        reached = _NOWHERE.union(*(fed.get(o, _NOWHERE) for o in outputs), (o for o in outputs if o in masks))
        for i in call.active:
            fed[call.given(i)] = fed.get(call.given(i), _NOWHERE) | reached
    ahead = {x: found - _NOWHERE.union(*(fed.get(t, _NOWHERE) for t in found)) for x, found in fed.items()}
    return Masked(masks, ahead, frozenset(behind))


# ---- what a caller gives ---------------------------------------------------------------------------------------------


def mask_array(name: str, given: Any, channels: int | None) -> Array:
    """Masks (M, C) of M conditions.

    Args:
        name: the masked tensor, for messages.
        given: a channel; a list of channels, one per condition; a list of lists, each the channels of one condition;
            or an array (M, C) or (C,) of floats: the masks themselves.
        channels: C, None where the model leaves it open.

    Raises:
        InputError: another form, or a channel that the tensor does not have.
    """
    if isinstance(given, np.ndarray) and (given.dtype.kind in "fb" or given.ndim == 2):
        rows = np.atleast_2d(given)
        if rows.dtype.kind not in "fiub" or rows.ndim != 2 or rows.shape[1] != (channels or rows.shape[1]):
            wanted = f"(conditions, {channels or 'channels'})"
            raise InputError(f"the masks of '{name}' want shape {wanted}, got {given.dtype} {given.shape}")
        if not np.isfinite(rows).all():
            raise InputError(f"the masks of '{name}' hold NaN or infinite values")
        return rows
    sets = [np.atleast_1d(np.asarray(c)) for c in (given if isinstance(given, list | tuple | np.ndarray) else [given])]
    if not sets or any(s.ndim != 1 or s.dtype.kind not in "iu" for s in sets):
        raise InputError(
            f"the masks of '{name}' are channel numbers, one or a list per condition, or an array of floats"
        )
    if channels is None:
        raise InputError(f"the model leaves open how many channels '{name}' has; give an array (conditions, channels)")
    masks = np.zeros((len(sets), channels), np.float32)
    for row, chosen in zip(masks, sets, strict=True):
        wrong = [int(c) for c in chosen if not 0 <= c < channels]
        if wrong:
            raise InputError(
                f"channel {wrong[0]} is out of range: '{name}' has {channels} channels, 0 to {channels - 1}"
            )
        row[chosen] = 1
    return masks
