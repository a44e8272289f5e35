"""Tokenizers of every kind of vocabulary, small ones made here."""

from __future__ import annotations

from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")

_WORDS = """
[PAD] [UNK] [CLS] [SEP] [MASK] the movie was great bad un ##believ ##able not paris is in france capital of and
. , a <script> film it &amp; " '
"""
WORDS = _WORDS.split()


def wordpiece(**padding: Any) -> Any:
    """Return a tokenizer as BERT's, of the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.add_special_tokens(WORDS[:5])
    if padding:
        made.enable_padding(pad_id=0, pad_token="[PAD]", **padding)
    return made


def byte_level() -> Any:
    """Return a tokenizer as GPT-2's, without any merge but for `the` and `cat`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|endoftext|>", *letters, "\u0120t", "he", "\u0120the", "\u0120c", "at", "\u0120cat"]
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he"), ("\u0120", "c"), ("a", "t"), ("\u0120c", "at")]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def metaspace() -> Any:
    """Return a tokenizer as Llama's: words begin with a sign for their space, unknown letters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"thecats"]
    pieces = [*dict.fromkeys(pieces), "\u2581the", "\u2581cat", "th", "the", "ca", "cat"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("c", "a"), ("ca", "t"), ("\u2581", "cat")]
    made = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made
