"""The errors a user can meet; each message is one line that says what was wrong and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class OnnxLrpError(Exception):
    """Base of every error that onnx_lrp raises on purpose."""


class ModelError(OnnxLrpError):
    """The model cannot be read, is invalid, misses its weights, or uses a form that cannot be explained."""


class InputError(OnnxLrpError):
    """An input array, option or file does not fit the model: says what was expected and what was given."""


class RuleError(OnnxLrpError):
    """A rule book or a rule is malformed: names the file, the line and the key."""

    def __init__(
        self, message: str, *, file: str | Path | None = None, line: int | None = None, key: str | None = None
    ):
        where = ":".join(str(part) for part in (file, line) if part is not None)
        what = f"key '{key}': " if key else ""
        super().__init__(f"{where}: {what}{message}" if where else f"{what}{message}")
        self.file, self.line, self.key = file, line, key


@dataclass(frozen=True)
class UnsupportedNode:
    """One node that no rule or adjoint covers.

    Attributes:
        name: the node's name (or its first output where it has none).
        op: operator type, with its domain unless it is ai.onnx.
        opset: version of the operator set that the model imports for it.
        reason: what is missing.
        hint: what the user can do about it.
    """

    name: str
    op: str
    opset: int
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"{self.name} ({self.op}, opset {self.opset}): {self.reason}; {self.hint}"


class UnsupportedOps(OnnxLrpError):  # noqa: N818 - the name is part of the published contract
    """Nodes between the explained tensor and the inputs that cannot be explained; ``nodes`` lists all of them."""

    def __init__(self, nodes: Sequence[UnsupportedNode]):
        self.nodes = tuple(nodes)
        super().__init__(f"{len(self.nodes)} node(s) cannot be explained: " + " | ".join(str(n) for n in self.nodes))


def one_line(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return " ".join(str(error).split())[:200]
