"""Where ``explain`` writes: one figure or page, a folder of them, or one file of arrays."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.cli.sources import Entry, is_picture
from onnx_lrp.errors import InputError
from onnx_lrp.explanation import Explanation, save_arrays, save_text
from onnx_lrp.preprocess import require_pillow
from onnx_lrp.show import CHANNELS, COLORMAPS, comparison_figure, explanation_figure, save
from onnx_lrp.show.figure import MOST_ROWS
from onnx_lrp.show.html import page
from onnx_lrp.show.text import TextRow
from onnx_lrp.tokens import token_tensors

_GRID = 16  # inputs that go into one picture where nothing is asked for; more become a folder


@dataclass(frozen=True)
class Result:
    """One input and its explanations, by one method or class after another."""

    entry: Entry
    picture: NDArray[np.uint8] | None
    explanations: list[Explanation]


@dataclass
class Output:
    """Takes results in and writes them.

    Attributes:
        path: file or folder.
        kind: "figure", "page", "folder" or "arrays".
        files: the file of each input, by its number.
        colormap: colours of figures.
        titles: of the explanations of each input.
        labels: names of the classes.
        mask: show the relevance of one picture as a mask over it.
    """

    path: Path
    kind: str
    files: list[Path]
    colormap: str
    titles: list[str] = field(default_factory=list)
    labels: Sequence[str] | None = None
    mask: bool = False
    _kept: list[Result] = field(default_factory=list)
    _rows: list[TextRow] = field(default_factory=list)
    _count: int = 0
    _made: bool = False

    def add(self, result: Result, rows: Sequence[TextRow]) -> Path | None:
        """Take a result in, and its texts as rows of a page; the file written, if it got one of its own.

        Raises:
            InputError: a page is asked for, and this is no text.
        """
        file, self._count = self.files[self._count], self._count + 1
        if self.kind == "page":
            self._rows += _on_page(result, rows, file)
            return None
        if self.kind != "folder":
            self._kept.append(result)
            return None
        if not self.path.is_dir():
            self.path.mkdir()
            self._made = True
        if file.suffix == ".html":
            return self._page(_on_page(result, rows, file), file)
        return self._draw([result], file)

    def finish(self) -> Path | None:
        """Write what belongs together."""
        if self.kind == "page":
            return self._page(self._rows, self.path)
        if self.kind == "figure":
            return self._draw(self._kept, self.path)
        return save_arrays(self.path, self._arrays()) if self.kind == "arrays" else None

    def interrupted(self, done: int, total: int) -> str:
        """What there is after an interruption."""
        kept = f"in {self.path}" if self.kind == "folder" and done else "nothing written"
        return f"{done} of {total} inputs done, {kept}"

    def tidy(self) -> None:
        """Take away a folder that was made for nothing."""
        if self._made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _page(self, rows: Sequence[TextRow], path: Path) -> Path:
        one = len(self.titles) == 1
        heading = f"Relevance of words by {self.titles[0]}" if one else "Relevance of words"
        return save_text(path, page(rows, () if one else self.titles, heading))

    def _draw(self, results: Sequence[Result], path: Path) -> Path:
        if len(results) == 1 and len(results[0].explanations) == 1:
            (result,) = results
            pictures = None if result.picture is None else [result.picture]
            (explanation,) = result.explanations
            options: dict[str, Any] = {"colormap": self.colormap, "labels": self.labels, "mask": self.mask}
            return save(explanation_figure(explanation, pictures, **options), path)
        rows: list[list[Explanation]] = []
        shown: list[NDArray[np.uint8] | None] = []
        names: list[str] = []
        for result in results:
            count = len(result.explanations[0])
            for index in range(count):
                rows.append([e[index] for e in result.explanations])
                shown.append(result.picture)
                names.append(result.entry.stem + (f"[{index}]" if count > 1 else ""))
        figure = comparison_figure(rows, self.titles, shown, names=names, colormap=self.colormap, labels=self.labels)
        return save(figure, path)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """All results as named arrays; several explanations of an input each under its title."""
        arrays: dict[str, NDArray[Any]] = {}
        texts = all(r.entry.text is not None for r in self._kept)
        for index, title in enumerate(self.titles):
            prefix = f"{title}/" if len(self.titles) > 1 else ""
            parts = [r.explanations[index].arrays() for r in self._kept]
            for key in parts[0]:
                arrays[prefix + key] = self._joined(key, [p[key] for p in parts], texts)
        for name in token_tensors(self._kept[0].explanations[0]) if texts else ():
            ids = [r.explanations[0].inputs[name].astype(np.int64) for r in self._kept]
            arrays[f"input/{name}"] = self._joined(name, ids, texts)
        counts = [len(r.explanations[0]) for r in self._kept]
        arrays["path"] = np.repeat([str(r.entry.path or r.entry.name) for r in self._kept], counts)
        return arrays

    def _joined(self, key: str, parts: Sequence[NDArray[Any]], texts: bool) -> NDArray[Any]:
        """Arrays one after the other; those of shorter texts end in zeros, outputs in NaN, and ids in -1."""
        if texts and parts[0].ndim > 1 and len({p.shape[1:] for p in parts}) > 1:
            most = np.max([p.shape[1:] for p in parts], axis=0)
            kind = parts[0].dtype.kind
            fill = 0 if key.startswith("relevance/") else np.nan if kind == "f" else -1
            gaps = [[(0, 0), *((0, m - d) for m, d in zip(most, p.shape[1:], strict=True))] for p in parts]
            parts = [np.pad(p, gap, constant_values=fill) for p, gap in zip(parts, gaps, strict=True)]
        try:
            return np.concatenate(parts)
        except ValueError:
            what = "inputs of different shapes do not fit in one file"
            raise InputError(f"{self.path}: {what}; give them one by one, or --size for pictures") from None


def _on_page(result: Result, rows: Sequence[TextRow], file: Path) -> Sequence[TextRow]:
    if not rows:
        raise InputError(f"{file}: {result.entry.name} has no tokens for a page of text; write .png or .npz")
    return rows


def plan(
    out: str | None, model: Path, entries: Sequence[Entry], methods: Sequence[str], colormap: str, *, texts: bool
) -> Output:
    """Decide where output goes, and refuse at once what would fail at the end.

    Args:
        out: what was asked for.
        model: the model's file.
        entries: the inputs.
        methods: names of the methods, for the names of files.
        colormap: colours of figures.
        texts: whether there is a tokenizer, so that what is no picture is text.

    Raises:
        InputError: an unknown suffix or colour map, a folder that is missing, an output that is an input.
    """
    if colormap not in (names := (*COLORMAPS, *CHANNELS)):
        raise InputError(f"--colormap {colormap} is unknown; give one of {', '.join(names)}")
    tag = "+".join(re.sub(r"[^\w.-]+", "_", Path(m).name.removesuffix(".toml")) for m in methods)
    suffixes = [".html" if texts and not is_picture(entry) else ".png" for entry in entries]
    is_page = ".png" not in suffixes
    stems = {e.path.stem if e.text is not None and e.path else e.stem for e in entries}
    if out is not None:
        path = Path(out)
        folder = path.is_dir() or out.endswith(("/", "\\")) or not path.suffix
        kinds = {".png": "figure", ".npz": "arrays", ".html": "page", ".htm": "page"}
        kind = "folder" if folder else kinds.get(path.suffix.lower(), "")
    elif is_page:
        path, kind = Path(f"{stems.pop() if len(stems) == 1 else model.stem}.{tag}.html"), "page"
    elif len(entries) == 1:
        path, kind = Path(f"{entries[0].stem}.{tag}.png"), "figure"
    else:
        kind = "figure" if len(entries) <= _GRID else "folder"
        path = Path(f"{model.stem}.{tag}" + (".png" if kind == "figure" else ""))
    if not kind:
        known = ".png, .html, .npz or into a folder/"
        raise InputError(f"{path}: explanations are written as {known}; choose one of these")
    if kind == "figure" and len(entries) > MOST_ROWS:
        raise InputError(f"{path}: {len(entries)} inputs are too many for one picture; give a folder: -o {path.stem}/")
    if kind == "figure" or (kind == "folder" and not is_page):
        require_pillow()
    files = _files(path, entries, suffixes, tag) if kind == "folder" else [path] * len(entries)
    check_writing(path, files, [*(e.path for e in entries if e.path is not None), model])
    return Output(path, kind, files, colormap)


def plans(
    outs: Sequence[str] | None,
    model: Path,
    entries: Sequence[Entry],
    methods: Sequence[str],
    colormap: str,
    *,
    texts: bool,
) -> list[Output]:
    """The same for several outputs; where nothing is asked for, one."""
    asked: Sequence[str | None] = outs or [None]
    return [plan(out, model, entries, methods, colormap, texts=texts) for out in asked]


def check_writing(path: Path, files: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuse at once what could not be written at the end.

    Args:
        path: a file or a folder, in a folder that should be there.
        files: what will be written.
        inputs: files that stay as they are.

    Raises:
        InputError: says which, and why.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} is missing; make it first")
    _try_writing(path if path.is_dir() else path.parent)
    sources = {p.resolve() for p in inputs}
    clash = next((f for f in files if f.resolve() in sources), None)
    if clash is not None:
        raise InputError(f"{clash}: this is an input, which stays as it is; write elsewhere with -o")


def _try_writing(folder: Path) -> None:
    """Fail before the work rather than after it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written to ({error.strerror or error}); write elsewhere with -o"
        ) from None


def _files(folder: Path, entries: Sequence[Entry], suffixes: Sequence[str], tag: str) -> list[Path]:
    """A name of its own for each input's figure, though stems may be the same."""
    used: set[str] = set()
    names = []
    for entry, suffix in zip(entries, suffixes, strict=True):
        stem, number = entry.stem, 2
        while stem.lower() in used:
            stem, number = f"{entry.stem}-{number}", number + 1
        used.add(stem.lower())
        names.append(folder / f"{stem}.{tag}{suffix}")
    return names
