"""Where the paths of integrated gradients and DeepLIFT begin: text such as image=0 or question=token:pad."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer
from onnx_lrp.methods import Method
from onnx_lrp.tokenizer import Tokenizer

_FORMS = "a number, token:WORD, token:ID, or input (for arrays called baseline/TENSOR in a .npz)"


def add_baselines(parser: argparse.ArgumentParser) -> None:
    """The option."""
    about = f"where the path of integrated gradients or DeepLIFT begins: {_FORMS}; default 0; once per input"
    parser.add_argument("--baseline", action="append", default=[], metavar="TENSOR=VALUE", help=about)


def with_baselines(methods: Sequence[Method], given: Sequence[str]) -> list[Method]:
    """Methods that begin where they are told to; those without a path stay as they are.

    Raises:
        InputError: text that says nothing, or no method that has a path.
    """
    if not given:
        return list(methods)
    chosen: dict[str, float | str] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        if not equals or not name:
            raise InputError(f"--baseline {text} is not TENSOR=VALUE; VALUE is {_FORMS}")
        chosen[name] = "tokens" if value.startswith("token:") else value if value == "input" else _number(text, value)
    if not any(hasattr(method, "baseline") for method in methods):
        raise InputError("--baseline is for integrated_gradients and deeplift; choose one with -m")
    replace: Any = dataclasses.replace
    return [replace(method, baseline=chosen) if hasattr(method, "baseline") else method for method in methods]


def baseline_feeds(
    given: Sequence[str], explainer: Explainer, tokenizer: Tokenizer | None
) -> Mapping[str, NDArray[np.int64]]:
    """What to feed an explained model for the tokens that its path begins at.

    Raises:
        InputError: a token that there is not, or no tokenizer to tell.
    """
    found, optional = {}, explainer.session.optional
    for text in given:
        name, _, value = text.rpartition("=")
        label = next((label for label in (f"baseline/{name}", "baseline") if label in optional), None)
        if label is None or not value.startswith("token:"):
            continue
        word = value.removeprefix("token:")
        if word.isdigit():
            number = int(word)
        elif tokenizer is None:
            raise InputError(f"--baseline {text}: a word needs --tokenizer FILE; or give the token's number")
        else:
            number = tokenizer.number(word)
        found[label] = np.full([1] * len(optional[label].shape), number)
    return found


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError(f"--baseline {text}: {value!r} is not {_FORMS}") from None
