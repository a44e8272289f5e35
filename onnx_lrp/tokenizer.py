"""Text to the integer inputs of a model, and token ids back to words, by a tokenizer.json; extra ``tokenizers``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.pieces import Piece, Style, pieces, shown, style_of
from onnx_lrp.roles import Spec, TextInputs, filled, kinds, lengths, text_inputs

Text = str | tuple[str, str]  # one text, or a pair
TokenizerLike = Any  # a path, a Tokenizer, one of the package tokenizers, or one of transformers that holds such

_LOG = logging.getLogger("onnx_lrp")
_PADS = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<PAD>", "<|endoftext|>", "</s>")
_MASKS = ("[MASK]", "<mask>", "<MASK>", "<|mask|>")


class Tokenizer:
    """What a tokenizer file says of texts and ids.

    Args:
        source: path of a tokenizer.json (or its folder), a ``tokenizers.Tokenizer``, or an object of another package
            that holds one as ``backend_tokenizer``. It is copied, not changed.
        side: where padding goes, "right" or "left"; default: as the file says, else "right".
        limit: the most tokens of a text; default: as the file says.

    Attributes:
        special: ids of the tokens that stand for no text, such as [CLS]; the unknown word and the mask are text.
        pad: id of the padding token; None where the file knows none.
        mask: id of the token that hides a word; None where the file knows none.
        unknown: id of the token for a word that is not in the vocabulary; None where the file knows none.
        limit: the most tokens of a text; None where nothing says.

    Raises:
        InputError: the package is missing, or this is no tokenizer file.
    """

    def __init__(
        self, source: TokenizerLike, *, side: Literal["left", "right"] | None = None, limit: int | None = None
    ):
        self._raw, self.name = _load(source)
        padding, truncation = self._raw.padding or {}, self._raw.truncation or {}
        self._side = side or padding.get("direction", "right")
        self.limit: int | None = limit or truncation.get("max_length")
        self._raw.no_padding()
        self._raw.no_truncation()
        number = self._raw.token_to_id
        self.mask: int | None = next((i for i in map(number, _MASKS) if i is not None), None)
        named = [number(padding["pad_token"])] if "pad_token" in padding else []
        self.pad: int | None = next((i for i in [*named, *map(number, _PADS)] if i is not None), None)
        model = json.loads(self._raw.to_str())["model"]
        word = model.get("unk_token")
        self.unknown: int | None = model.get("unk_id") if word is None else number(word)
        text = {self.mask, self.unknown}
        added = self._raw.get_added_tokens_decoder().items()
        self.special = frozenset(i for i, token in added if token.special and i not in text)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {self.size} tokens)"

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self._raw.get_vocab(with_added_tokens=True)
        return found

    @cached_property
    def size(self) -> int:
        """Number of tokens that it knows, as the highest id has it."""
        return max(self._vocabulary.values(), default=-1) + 1

    @cached_property
    def style(self) -> Style:
        """How its vocabulary marks pieces of words."""
        return style_of(self._vocabulary)

    def names(self, classes: int | None) -> bool:
        """Whether so many classes are its tokens: models round the number up, never down."""
        return classes is not None and self.size <= classes <= 2 * self.size

    # ---- ids to words ------------------------------------------------------------------------------------------------

    def pieces(self, ids: NDArray[Any]) -> list[Piece]:
        """Tokens as a reader sees them; an id that the vocabulary lacks is shown as a number."""
        tokens = [self._raw.id_to_token(int(i)) if 0 <= i < self.size else None for i in ids]
        alone = self.special | {self.mask}
        whole = [token is None or int(i) in alone for i, token in zip(ids, tokens, strict=True)]
        named = [f"#{i}" if token is None else token for i, token in zip(ids, tokens, strict=True)]
        return pieces(named, self.style, whole)

    @cached_property
    def labels(self) -> list[str]:
        """Every token of the vocabulary as a class name: in quotes, with a space where it begins a word."""
        names = [f"#{i}" for i in range(self.size)]
        for token, i in self._vocabulary.items():
            alone = token if i in self.special else pieces([token], self.style)[0].text
            glued = self.style == "wordpiece" and token.startswith("##")
            names[i] = f"\u201c{'##' if glued else ''}{shown(alone)}\u201d"
        return names

    # ---- words to ids ------------------------------------------------------------------------------------------------

    def number(self, text: str) -> int:
        """The id of a token: as the vocabulary writes it, or a text that is one token, first as a word's beginning.

        Raises:
            InputError: there is no such token; says which pieces the text has.
        """
        exact = self._raw.token_to_id(text)
        if exact is not None and self.style in ("words", "wordpiece"):
            return int(exact)
        tries = [self._raw.encode(form, add_special_tokens=False).ids for form in (f" {text.lstrip()}", text)]
        if exact is not None and len(tries[0]) != 1:
            return int(exact)
        for ids in tries:
            if len(ids) == 1 and ids[0] != self.unknown:
                return int(ids[0])
        parts = ", ".join(repr(p.text) for p in self.pieces(np.array(tries[1])))
        raise InputError(f"{text!r} is not one token of {self.name}" + (f", it is cut into {parts}" if parts else ""))

    def encode(self, texts: Sequence[Text], limit: int | None = None) -> list[tuple[list[int], list[int]]]:
        """Ids and segments of every text, with the special tokens that the file puts around them.

        Args:
            texts: each a string, or a pair of strings.
            limit: the most tokens; default: as the file says. Longer texts are cut at the end, pairs at the longer one.

        Raises:
            InputError: a text that is empty, or is no string.
        """
        for text in texts:
            parts = text if isinstance(text, tuple) else (text,)
            if len(parts) > 2 or not all(isinstance(part, str) for part in parts):
                raise InputError(f"a text is a string, or a pair of strings, not {text!r}")
        most = limit or self.limit
        if most is not None:
            self._raw.enable_truncation(most)
        try:
            encoded = self._raw.encode_batch([tuple(t) if isinstance(t, list) else t for t in texts])
        except Exception as error:  # the package raises plain exceptions, as for a limit below the special tokens
            raise InputError(f"{self.name} cannot encode the text ({error})") from None
        finally:
            self._raw.no_truncation()
        for text, one in zip(texts, encoded, strict=True):
            if not one.ids:
                raise InputError(f"the text {text!r} has no tokens in {self.name}")
            if one.overflowing:
                _LOG.warning("%.40r... is cut to %d tokens", text, most)
        return [(list(one.ids), list(one.type_ids)) for one in encoded]

    def feeds(
        self, texts: Sequence[Text], inputs: Mapping[str, Spec], *, length: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """What texts are to a model: ids, attention mask, segments, positions and lengths, and a past of length 0.

        A model with one input of token ids takes texts or pairs; a model with two takes pairs, a text each. Inputs
        that have nothing to do with text are left out.

        Args:
            texts: N of them.
            inputs: those of the model by name.
            length: pad to so many tokens, and cut what is longer; default: the longest text, or the model's own
                length where that is fixed.

        Returns:
            Arrays (N, T), lengths (N,), by name.

        Raises:
            InputError: the model takes no token ids, or other texts; texts of different length for a model without a
                mask and a tokenizer without a padding token.
        """
        groups = text_inputs(kinds(inputs))
        if not groups:
            raise InputError(f"the model takes no token ids, its inputs are {', '.join(inputs)}; so it takes no text")
        if len(groups) > 2:
            raise InputError(f"the model has {len(groups)} inputs of token ids; give them as arrays")
        rows: list[list[Text]] = [list(texts)]
        if len(groups) == 2:
            if not all(isinstance(t, tuple) for t in texts):
                wanted = " and ".join(group.ids for group in groups)
                raise InputError(f"the model takes two texts ({wanted}): give pairs")
            rows = [[t[k] for t in texts] for k in (0, 1)]
        found: dict[str, NDArray[Any]] = {}
        for group, row in zip(groups, rows, strict=True):
            found |= self._arrays(group, row, inputs, length)
        return found | filled(found, inputs)

    def _arrays(
        self, group: TextInputs, texts: Sequence[Text], inputs: Mapping[str, Spec], length: int | None
    ) -> dict[str, NDArray[Any]]:
        shape = inputs[group.ids].shape
        if len(shape) != 2:
            raise InputError(f"input '{group.ids}' has {len(shape)} axes; texts need two, samples and tokens")
        own = shape[1] if isinstance(shape[1], int) else length
        encoded = self.encode(texts, own)
        longest = own or max(len(ids) for ids, _ in encoded)
        if self.pad is None and group.mask is None and any(len(ids) != longest for ids, _ in encoded):
            raise InputError(
                f"{self.name} has no padding token and the model no mask: texts have to be of equal length; "
                "give them one by one"
            )
        full = (len(texts), longest)
        ids, mask, segments = np.full(full, self.pad or 0), np.zeros(full, np.int64), np.zeros(full, np.int64)
        for i, (numbers, types) in enumerate(encoded):
            place = slice(longest - len(numbers), None) if self._side == "left" else slice(len(numbers))
            ids[i, place], mask[i, place], segments[i, place] = numbers, 1, types
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        arrays = {group.ids: ids, group.mask: mask, group.segments: segments, group.positions: positions}
        arrays[group.lengths] = lengths(mask)
        whole = [n for n, array in arrays.items() if n is not None and len(inputs[n].shape) == array.ndim]
        return {name: arrays[name].astype(inputs[name].dtype) for name in whole}


def _load(source: TokenizerLike) -> tuple[Any, str]:
    """A copy of the tokenizer, and what to call it in messages."""
    try:
        import tokenizers
    except ImportError:
        raise InputError("text needs the package tokenizers: pip install onnx-lrp[tokenizers]") from None
    if not isinstance(source, str | os.PathLike):
        held = getattr(source, "backend_tokenizer", source)
        if not isinstance(held, tokenizers.Tokenizer):
            raise InputError(f"tokenizer is the path of a tokenizer.json or a Tokenizer, not {type(source).__name__}")
        return tokenizers.Tokenizer.from_str(held.to_str()), "the tokenizer"
    path = Path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no text file"
        raise InputError(f"{path}: the tokenizer cannot be read ({reason}); give a tokenizer.json") from None
    try:
        return tokenizers.Tokenizer.from_str(text), path.name
    except Exception as error:  # the package raises plain exceptions
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: no tokenizer.json as the package tokenizers writes it ({why})") from None


def as_tokenizer(source: TokenizerLike) -> Tokenizer | None:
    """A tokenizer from whatever stands for one; None stays None."""
    return source if source is None or isinstance(source, Tokenizer) else Tokenizer(source)
