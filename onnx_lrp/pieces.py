"""Pieces of words: how tokenizers mark them, and what they look like to a reader."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Style = Literal["words", "wordpiece", "byte_level", "metaspace", "suffix"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE, _BYTE_SPACE, _MORE, _END = "\u2581", "\u0120", "##", "</w>"


@dataclass(frozen=True)
class Piece:
    """A token as a reader sees it.

    Attributes:
        text: without the marks of its tokenizer.
        glued: it goes on with the word before it, without a space between.
    """

    text: str
    glued: bool = False


def style_of(tokens: Iterable[str]) -> Style:
    """How a vocabulary, or where there is none a text's own tokens, marks the pieces of words: its commonest mark."""
    counts: dict[Style, int] = {"wordpiece": 0, "byte_level": 0, "metaspace": 0, "suffix": 0}
    for token in tokens:
        if token.startswith(_MORE) and len(token) > 2:
            counts["wordpiece"] += 1
        elif token.startswith(_BYTE_SPACE):
            counts["byte_level"] += 1
        elif token.startswith(_SPACE):
            counts["metaspace"] += 1
        elif token.endswith(_END):
            counts["suffix"] += 1
    best = max(counts, key=lambda style: counts[style])
    return best if counts[best] else "words"


def pieces(tokens: Sequence[str], style: Style | None = None, whole: Sequence[bool] | None = None) -> list[Piece]:
    """Tokens as a reader sees them.

    Where several tokens make up one letter, as byte-level tokenizers cut emoji and rare scripts, the last one shows it
    and the others show their bytes.

    Args:
        tokens: of one text, as the vocabulary writes them.
        style: how pieces are marked; default: what the tokens themselves look like.
        whole: which of them stand for themselves, such as [CLS].
    """
    style = style or style_of(tokens)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found: list[Piece] = []
    ended = True  # the word before is complete
    for i, token in enumerate(tokens):
        if whole is not None and whole[i]:
            found.append(Piece(token, False))
            decoder.reset()
            ended = True
            continue
        text, glued = token, False
        if style == "wordpiece" and token.startswith(_MORE) and len(token) > 2:
            text, glued = token[2:], True
        elif style == "suffix":
            text, glued, ended = token.removesuffix(_END), not ended, token.endswith(_END)
        elif style in ("byte_level", "metaspace"):
            data = _bytes(token, style)
            text = decoder.decode(data)
            glued = not data.startswith(b" ") and i > 0 and not ended
            # Whatever follows a token that ends a line begins anew.
            ended = text.endswith("\n")
            text = text.removeprefix(" ") if text != " " else text
            if not text.strip(" ") and data.strip(b" "):  # a part of a letter
                text = " ".join(f"{b:02X}" for b in data.lstrip(b" "))
        found.append(Piece(text, glued))
    return found


def shown(text: str) -> str:
    """A piece's text with signs for what else would not be seen: spaces, tabs, ends of lines, control characters."""
    if not text.strip(" "):
        return "\u2423" * max(len(text), 1)
    text = text.replace("\r\n", "\u23ce").replace("\n", "\u23ce").replace("\r", "\u23ce").replace("\t", "\u21e5")
    return "".join(c if c.isprintable() or c == "\u200d" else "\ufffd" for c in text)


def _bytes(token: str, style: Style) -> bytes:
    """The bytes of text that a token stands for."""
    if style == "byte_level":
        table = _byte_letters()
        if all(letter in table for letter in token):
            return bytes(table[letter] for letter in token)
        return token.encode()
    one = _BYTE.fullmatch(token)
    return bytes([int(one[1], 16)]) if one else token.replace(_SPACE, " ").encode()


@cache
def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies (GPT-2): printable bytes for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}
