"""Which positions of a text are explained: the last one, one by number, several or all of one text in one run."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.tokens import TokenRows

Position = Literal["auto", "last", "mask", "all"] | int | Sequence[int]

_KINDS = "'auto', 'last', 'mask', 'all', a number or a list of numbers"


def find_positions(position: Position, rows: TokenRows) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """The sample and the position of each explanation asked for.

    Args:
        position: "last": the last one that is no padding, whose output tells the next token; "mask": where the
            mask token stands; "auto": the first mask token, in texts without one the last position; "all": every one
            that is no padding. A number counts from the beginning of the axis, or,
            below 0, from the end of the text: -1 is the last one. A list: one per sample, or several of one sample.
        rows: the texts.

    Returns:
        Samples (P,), positions (P,).

    Raises:
        InputError: no such position, or not one per sample.
    """
    count = len(rows.ids)
    if isinstance(position, str):
        if position not in ("auto", "last", "mask", "all"):
            raise InputError(
                f"position is 'auto', 'last', 'mask', 'all', a number or a list of numbers, not {position!r}"
            )
        if position == "last":
            places = [rows.real(i)[-1:] for i in range(count)]
        elif position == "auto":
            places = [rows.hidden(i)[:1] if len(rows.hidden(i)) else rows.real(i)[-1:] for i in range(count)]
        elif position == "all":
            places = [rows.real(i) for i in range(count)]
        else:
            places = [rows.hidden(i) for i in range(count)]
            if not all(len(found) for found in places):
                why = "a text has no mask token" if rows.mask is not None else "a tokenizer with a mask token is needed"
                raise InputError(f"position='mask': {why}")
        if position in ("mask", "all") and count > 1 and any(len(p) != 1 for p in places):
            raise InputError(f"position={position!r} gives several positions of a text; explain one text at a time")
    else:
        given: Any = [position] if isinstance(position, Integral) else position
        numbers = list(given) if isinstance(given, list | tuple | range | np.ndarray) else []
        if not numbers or not all(isinstance(p, Integral) and not isinstance(p, bool) for p in numbers):
            raise InputError(
                f"position is 'auto', 'last', 'mask', 'all', a number or a list of numbers, not {position!r}"
            )
        numbers = [int(p) for p in numbers]
        if count > 1 and len(numbers) not in (1, count):
            raise InputError(f"{len(numbers)} positions for {count} samples; give one, one each, or a single sample")
        if count == 1:
            places = [np.concatenate([rows.at(0, p) for p in numbers])]
        else:
            places = [rows.at(i, p) for i, p in enumerate(numbers * (count if len(numbers) == 1 else 1))]
    samples = np.repeat(np.arange(count), [len(p) for p in places])
    return samples, np.concatenate(places).astype(np.int64)
