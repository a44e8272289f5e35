"""Layer-wise relevance propagation: the steps that a rule book assigns."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar

from onnx_lrp.backward import Step
from onnx_lrp.composite import Composite, read_book
from onnx_lrp.methods.contract import OneWalk
from onnx_lrp.places import Place
from onnx_lrp.target import Start


@dataclass(frozen=True)
class LRP(OneWalk):
    """Layer-wise relevance propagation by a rule book.

    Attributes:
        rules: name of a bundled rule book, path of a .toml file, or a Composite.
    """

    rules: str | os.PathLike[str] | Composite = "epsilon_plus_flat"
    composite: Composite = field(init=False, repr=False)
    start: ClassVar[Start] = "logit"

    def __post_init__(self) -> None:
        """Read the rule book."""
        composite = self.rules if isinstance(self.rules, Composite) else read_book(self.rules)
        object.__setattr__(self, "composite", composite)

    @property
    def name(self) -> str:
        """Name of the rule book."""
        return self.composite.name

    @property
    def fold_batchnorm(self) -> bool:
        """Whether the rule book wants BatchNormalization seen as part of a linear neighbour."""
        return self.composite.fold_batchnorm

    def step_for(self, place: Place) -> tuple[Step, str, str] | None:
        """The step that the rule book assigns."""
        found = self.composite.find(place)
        if found is None:
            return None
        where = ", ".join(f"{k}={'/'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in found.where.items())
        return found.step(), str(found), where or "everything"
