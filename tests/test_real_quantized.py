"""MobileNetV2 quantised and in 16 bits: its maps are those of the float32 model, photograph by photograph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import onnx_lrp
from onnx_lrp.errors import UnsupportedOps
from onnx_lrp.runtime import Session
from tests.test_real_models import SHARED

quantization = pytest.importorskip("onnxruntime.quantization")
MOBILENET = SHARED / "mobilenet_v2_1.0_224_coral_fp32.onnx"
PHOTOGRAPHS = sorted(p for p in (SHARED.parent / "images").glob("*.jpg") if "leaf" not in p.name)
pytestmark = pytest.mark.skipif(
    not (MOBILENET.is_file() and PHOTOGRAPHS), reason="the trained models do not lie beside the checkout"
)
# Weights of 8 bits with a sign are no choice here: CPUs without VNNI saturate their products.
UINT8 = quantization.QuantType.QUInt8


def pixels(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    image = Image.open(path).convert("RGB")
    image = ImageOps.fit(image, (256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    return (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


class Reader(quantization.CalibrationDataReader):
    """The photographs, for calibration."""

    def __init__(self) -> None:
        self.photographs: Iterator[Path] = iter(PHOTOGRAPHS)

    def get_next(self) -> dict[str, np.ndarray] | None:
        path = next(self.photographs, None)
        return None if path is None else {"input": pixels(path)}


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all floats in 16 bits."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for info in (*half.graph.input, *half.graph.output, *half.graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.FLOAT16
    return half


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mobilenet")
    paths = {name: folder / f"{name}.onnx" for name in ("qdq", "operators", "dynamic", "half")}
    for name in ("qdq", "operators"):
        form = quantization.QuantFormat.QDQ if name == "qdq" else quantization.QuantFormat.QOperator
        quantization.quantize_static(
            MOBILENET, paths[name], Reader(), quant_format=form, activation_type=UINT8, weight_type=UINT8
        )
    quantization.quantize_dynamic(MOBILENET, paths["dynamic"], weight_type=UINT8)
    onnx.save(halved(onnx.load(MOBILENET)), paths["half"])
    return paths


def maps(model: Path, method: str, classes: list[int] | None = None) -> tuple[list[np.ndarray], list[int]]:
    """A map per photograph, and the classes explained; the model's outputs are what they were."""
    explained = Session(onnx_lrp.rewrite(model, method).model, device="cpu", threads=2)
    plain = Session(onnx.load(model), device="cpu", threads=2)
    found = []
    for i, path in enumerate(PHOTOGRAPHS):
        x = pixels(path).astype(explained.dtype("input"))
        feeds = {"input": x} if classes is None else {"input": x, "target": np.array([classes[i]])}
        found.append(explained.run(feeds))
        for name, y in plain.run({"input": x}).items():
            # In 16 bits the runtime places its casts differently.
            allowed = 2e-3 if y.dtype == np.float16 else 0 if classes is not None else 1e-6
            assert np.abs(y.astype(np.float64) - found[-1][name]).max() <= allowed
    return [f["relevance/input"].sum(1) for f in found], [int(f["target_used"][0]) for f in found]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of maps whose numbers are all but all different."""
    ranks = [x.reshape(-1).argsort().argsort() for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("method", ["epsilon_plus_flat", "epsilon_gamma_box"])
@pytest.mark.parametrize(("version", "least"), [("qdq", 0.95), ("dynamic", 0.95), ("half", 0.99)])
def test_maps_are_those_of_the_float_model(versions: dict[str, Path], version: str, least: float, method: str) -> None:
    expected, classes = maps(MOBILENET, method)
    found, _ = maps(versions[version], method, classes)
    correlations = [rank_correlation(a, b) for a, b in zip(found, expected, strict=True)]
    named = {path.stem: round(c, 4) for path, c in zip(PHOTOGRAPHS, correlations, strict=True)}
    print(f"\n{version} {method}: {named}")
    assert min(correlations) >= least


def test_operators_of_the_runtime_are_refused(versions: dict[str, Path]) -> None:
    """Its own format of quantised models has QLinearAdd and more, which are its own."""
    with pytest.raises(UnsupportedOps, match="quantise to QDQ format") as caught:
        onnx_lrp.rewrite(versions["operators"])
    assert {node.op.split(".")[0] for node in caught.value.nodes} == {"com"}
