"""What is to be explained: files, folders of them, files of texts, and texts themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lrp.errors import InputError
from onnx_lrp.inputs import KNOWN, find_inputs
from onnx_lrp.preprocess import IMAGE_SUFFIXES, reason
from onnx_lrp.tokenizer import Text, Tokenizer


@dataclass(frozen=True)
class Entry:
    """One input before it is read.

    Attributes:
        name: for people.
        stem: for the name of its figure.
        path: the file that it is, or comes from; None for a text of the command line.
        text: what it says, for texts; what is said about it, for pictures of a model that takes both.
    """

    name: str
    stem: str
    path: Path | None = None
    text: Text | None = None

    @property
    def file(self) -> Path:
        """The file that it is."""
        assert self.path is not None
        return self.path


def file_entries(paths: Sequence[Path]) -> list[Entry]:
    """Files, each an input."""
    return [Entry(str(path), path.stem, path) for path in paths]


def find_entries(sources: Sequence[str], *, texts: bool) -> list[Entry]:
    """Files, the images of folders, the lines of .txt files, and texts.

    What is no file, and is not called like one, is a text itself. A tab parts a pair of texts.

    Args:
        sources: as given.
        texts: whether there is a tokenizer to read them with.

    Raises:
        InputError: a file that cannot be read, or a text without a tokenizer.
    """
    found: list[Entry] = []
    count = 0
    for source in sources:
        path, suffix = Path(source), Path(source).suffix.lower()
        if suffix == ".txt" and not path.is_dir():
            lines = [(k, line) for k, line in enumerate(_lines(path), 1) if line.strip()]
            _check(source, "".join(line for _, line in lines), texts)
            found += [Entry(f"{source}:{k}", f"{path.stem}-{k}", path, _pair(line)) for k, line in lines]
        elif is_text(source) and (texts or any(c.isspace() for c in source)):
            _check(source, source, texts)
            count += 1
            found.append(Entry(f"text {count}", f"text-{count}", None, _pair(source)))
        else:
            found += file_entries(find_inputs([source]))
    return found


def with_text(entries: Sequence[Entry], text: str, tokenizer: Tokenizer | None) -> list[Entry]:
    """Pictures with a text about them, for models that take both.

    Raises:
        InputError: an input that is no picture, an empty text, or no tokenizer to read it with.
    """
    _check(text, text, tokenizer is not None)
    other = next((entry for entry in entries if not is_picture(entry)), None)
    if other is not None:
        raise InputError(f"{other.name}: --text goes with pictures, which this is not; arrays hold their own tokens")
    return [replace(entry, text=_pair(text)) for entry in entries]


def is_picture(entry: Entry) -> bool:
    """Whether an input is an image file."""
    return entry.path is not None and entry.path.suffix.lower() in IMAGE_SUFFIXES


def is_text(source: str) -> bool:
    """Whether an argument is a text itself: no file that there is, and not called like one that could be an input."""
    try:
        return not os.path.lexists(source) and Path(source).suffix.lower() not in KNOWN
    except ValueError:  # a zero byte
        return False


def _check(source: str, text: str, texts: bool) -> None:
    if not text.strip():
        raise InputError(f"{source or 'the text'}: there is no text in it")
    if not texts:
        raise InputError(f"{_short(source)}: text needs --tokenizer FILE, the tokenizer.json of the model")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _pair(line: str) -> Text:
    first, tab, second = line.partition("\t")
    return (first.strip(), second.strip()) if tab else line.strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: not a usable .txt file ({reason(problem)}); texts are lines of UTF-8") from None
