"""Small scikit-learn pipelines, trained and exported: `python -m exporters.sklearn_nets --out FOLDER`.

scikit-learn and skl2onnx are wanted by this recipe alone: pip install scikit-learn skl2onnx.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from skl2onnx import to_onnx
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import LinearSVR
from sklearn.tree import DecisionTreeClassifier


@dataclass(frozen=True)
class Exported:
    """A trained pipeline.

    Attributes:
        pipeline: the scikit-learn object.
        model: its export; classifiers with probabilities as a tensor.
        samples: some rows of its data, float32 (30, features).
    """

    pipeline: Any
    model: onnx.ModelProto
    samples: np.ndarray


# name -> (the pipeline, the data it is trained on)
RECIPES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "logistic_regression": (lambda: make_pipeline(StandardScaler(), LogisticRegression()), load_iris),
    "logistic_regression_of_two": (
        lambda: make_pipeline(StandardScaler(), LogisticRegression()),
        load_breast_cancer,
    ),
    "linear_regression": (lambda: make_pipeline(StandardScaler(), LinearRegression()), load_diabetes),
    "linear_svr": (lambda: make_pipeline(MinMaxScaler(), Normalizer("l2"), LinearSVR()), load_diabetes),
    "normalized": (lambda: make_pipeline(MinMaxScaler(), Normalizer("max"), LogisticRegression()), load_iris),
    "imputed": (lambda: make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()), load_iris),
    "columns": (
        lambda: make_pipeline(
            make_column_transformer((StandardScaler(), [0, 2]), (MinMaxScaler(), [1, 3])), LogisticRegression()
        ),
        load_iris,
    ),
    "network": (
        lambda: make_pipeline(StandardScaler(), MLPClassifier((16,), max_iter=300, random_state=0)),
        load_iris,
    ),
    "network_of_two": (
        lambda: make_pipeline(StandardScaler(), MLPClassifier((16,), max_iter=300, random_state=0)),
        load_breast_cancer,
    ),
    "network_regression": (
        lambda: make_pipeline(StandardScaler(), MLPRegressor(hidden_layer_sizes=(16,), max_iter=300, random_state=0)),
        load_diabetes,
    ),
    "tree": (lambda: DecisionTreeClassifier(max_depth=3), load_iris),
}


def build(name: str, *, zipmap: bool = False) -> Exported:
    """Train and export one of RECIPES; with `zipmap`, a classifier's probabilities are a list of dictionaries."""
    make, load = RECIPES[name]
    x, y = load(return_X_y=True)
    x = x.astype(np.float32)
    pipeline = make().fit(x, y)
    options = {"zipmap": zipmap} if hasattr(pipeline, "predict_proba") else None
    return Exported(pipeline, to_onnx(pipeline, x[:1], options=options), x[:: max(len(x) // 30, 1)][:30])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m exporters.sklearn_nets", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="the folder to write to")
    folder: Path = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        onnx.save(build(name).model, folder / f"{name}.onnx")


if __name__ == "__main__":
    main()
