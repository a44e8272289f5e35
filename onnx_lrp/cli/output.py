"""Where ``explain`` writes: one figure, a folder of figures, or one file of arrays."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.explanation import Explanation, save_arrays
from onnx_lrp.preprocess import require_pillow
from onnx_lrp.show import COLORMAPS, comparison_figure, explanation_figure, save
from onnx_lrp.show.figure import MOST_ROWS

_GRID = 16  # inputs that go into one picture where nothing is asked for; more become a folder


@dataclass(frozen=True)
class Result:
    """One input file and its explanations, by one method or class after another."""

    path: Path
    picture: NDArray[np.uint8] | None
    explanations: list[Explanation]


@dataclass
class Output:
    """Takes results in and writes them.

    Attributes:
        path: file or folder.
        kind: "figure", "folder" or "arrays".
        files: the file of each input.
        colormap: colours of figures.
        titles: of the explanations of each input.
        labels: names of the classes.
    """

    path: Path
    kind: str
    files: dict[Path, Path]
    colormap: str
    titles: list[str] = field(default_factory=list)
    labels: list[str] | None = None
    _kept: list[Result] = field(default_factory=list)
    _made: bool = False

    def add(self, result: Result) -> Path | None:
        """Take a result in; the file written, if it got one of its own."""
        if self.kind != "folder":
            self._kept.append(result)
            return None
        if not self.path.is_dir():
            self.path.mkdir()
            self._made = True
        return self._draw([result], self.files[result.path])

    def finish(self) -> Path | None:
        """Write what belongs together."""
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

    def _draw(self, results: Sequence[Result], path: Path) -> Path:
        if len(results) == 1 and len(results[0].explanations) == 1:
            (result,) = results
            pictures = None if result.picture is None else [result.picture]
            (explanation,) = result.explanations
            return save(explanation_figure(explanation, pictures, colormap=self.colormap, labels=self.labels), path)
        rows: list[list[Explanation]] = []
        shown: list[NDArray[np.uint8] | None] = []
        names: list[str] = []
        for result in results:
            count = len(result.explanations[0])
            for index in range(count):
                rows.append([e[index] for e in result.explanations])
                shown.append(result.picture)
                names.append(result.path.stem + (f"[{index}]" if count > 1 else ""))
        figure = comparison_figure(rows, self.titles, shown, names=names, colormap=self.colormap, labels=self.labels)
        return save(figure, path)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """All results as named arrays; several explanations of an input each under its title."""
        arrays: dict[str, NDArray[Any]] = {}
        for index, title in enumerate(self.titles):
            prefix = f"{title}/" if len(self.titles) > 1 else ""
            parts = [r.explanations[index].arrays() for r in self._kept]
            for key in parts[0]:
                try:
                    arrays[prefix + key] = np.concatenate([p[key] for p in parts])
                except ValueError:
                    what = "inputs of different shapes do not fit in one file"
                    raise InputError(f"{self.path}: {what}; give them one by one, or --size for pictures") from None
        counts = [len(r.explanations[0]) for r in self._kept]
        arrays["path"] = np.repeat([str(r.path) for r in self._kept], counts)
        return arrays


def plan(out: str | None, model: Path, paths: Sequence[Path], methods: Sequence[str], colormap: str) -> Output:
    """Decide where output goes, and refuse at once what would fail at the end.

    Args:
        out: what was asked for.
        model: the model's file.
        paths: the input files.
        methods: names of the methods, for the names of files.
        colormap: colours of figures.

    Raises:
        InputError: an unknown suffix or colour map, a folder that is missing, an output that is an input.
    """
    if colormap not in COLORMAPS:
        raise InputError(f"--colormap {colormap} is unknown; give one of {', '.join(COLORMAPS)}")
    tag = "+".join(re.sub(r"[^\w.-]+", "_", Path(m).name.removesuffix(".toml")) for m in methods)
    if out is not None:
        path = Path(out)
        folder = path.is_dir() or out.endswith(("/", "\\")) or not path.suffix
        kind = "folder" if folder else {".png": "figure", ".npz": "arrays"}.get(path.suffix.lower(), "")
    elif len(paths) == 1:
        path, kind = Path(f"{paths[0].stem}.{tag}.png"), "figure"
    else:
        kind = "figure" if len(paths) <= _GRID else "folder"
        path = Path(f"{model.stem}.{tag}" + (".png" if kind == "figure" else ""))
    if not kind:
        raise InputError(f"{path}: explanations are written as .png, .npz or into a folder/; choose one of these")
    if kind == "figure" and len(paths) > MOST_ROWS:
        raise InputError(f"{path}: {len(paths)} inputs are too many for one picture; give a folder: -o {path.stem}/")
    if kind != "arrays":
        require_pillow()
    files = _files(path, paths, tag) if kind == "folder" else dict.fromkeys(paths, path)
    check_writing(path, list(files.values()), [*paths, model])
    return Output(path, kind, files, colormap)


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


def _files(folder: Path, paths: Sequence[Path], tag: str) -> dict[Path, Path]:
    """A name of its own for each input's figure, though stems may be the same."""
    used: set[str] = set()
    names = {}
    for path in paths:
        stem, number = path.stem, 2
        while stem.lower() in used:
            stem, number = f"{path.stem}-{number}", number + 1
        used.add(stem.lower())
        names[path] = folder / f"{stem}.{tag}.png"
    return names
