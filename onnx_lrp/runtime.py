"""ONNX Runtime sessions: options, providers, and which of them is really in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import external_data_helper

from onnx_lrp.errors import InputError, ModelError
from onnx_lrp.model import save

Device = Literal["auto", "cpu", "cuda"]
Array = np.ndarray[Any, Any]

# What the element types of ONNX Runtime are called in numpy.
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.str_,
}


def onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        InputError: it is not installed, or installed twice over.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise InputError("running a model needs ONNX Runtime: pip install onnx-lrp[cpu] (or onnx-lrp[gpu])") from None
    if not hasattr(ort, "InferenceSession"):
        raise InputError("onnxruntime is broken, as after removing one of onnxruntime and onnxruntime-gpu: uninstall both, then install one")
    return ort


def choose_providers(device: Device = "auto", providers: Sequence[Any] | None = None) -> list[Any]:
    """Execution providers for a device, in order of preference.

    Raises:
        InputError: the device is not to be had with this ONNX Runtime.
    """
    if providers is not None:
        return list(providers)
    available = onnxruntime().get_available_providers()
    if device == "cpu" or (device == "auto" and "CUDAExecutionProvider" not in available):
        return ["CPUExecutionProvider"]
    if device not in ("auto", "cuda"):
        raise InputError(f"device is auto, cpu or cuda, not '{device}'")
    if "CUDAExecutionProvider" not in available:
        raise InputError("this ONNX Runtime has no CUDA provider: pip install onnx-lrp[gpu], after removing onnxruntime")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


class Session:
    """One loaded model.

    Args:
        model: the model.
        device: "auto" (CUDA where it loads, else CPU), "cpu" or "cuda".
        providers: ONNX Runtime's own list, overrides ``device``.
        threads: threads per operator; default: ONNX Runtime's choice.
        folder: where external data of the model lies.

    Raises:
        ModelError: ONNX Runtime refuses the model.
        InputError: the device was asked for by name and does not load.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        *,
        device: Device = "auto",
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        folder: Path | None = None,
    ):
        ort = onnxruntime()
        options = session_options(threads, fixed_batch=_has_fixed_batch(model))
        if folder is not None and any(external_data_helper.uses_external_data(t) for t in model.graph.initializer):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        chosen = choose_providers(device, providers)
        try:
            self.raw = ort.InferenceSession(_payload(model), options, providers=chosen)
        except Exception as error:  # ONNX Runtime raises its own unrelated types
            raise ModelError(f"ONNX Runtime cannot load the model: {' '.join(str(error).split())[:300]}") from None
        self.providers: list[str] = self.raw.get_providers()
        if device == "cuda" and providers is None and "CUDAExecutionProvider" not in self.providers:
            raise InputError("the CUDA provider does not load (driver, CUDA or cuDNN missing): run onnx-lrp doctor, or use device='cpu'")
        self.inputs = {i.name: i for i in self.raw.get_inputs()}
        self.optional = {i.name: i for i in self.raw.get_overridable_initializers()}
        self.outputs: list[str] = [o.name for o in self.raw.get_outputs()]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; outputs by name."""
        names = list(outputs) if outputs is not None else self.outputs
        try:
            results = self.raw.run(names, dict(feeds))
        except Exception as error:
            raise ModelError(f"ONNX Runtime fails: {' '.join(str(error).split())[:300]}") from None
        return dict(zip(names, results, strict=True))

    def dtype(self, name: str) -> Any:
        """Numpy element type of an input."""
        info = self.inputs.get(name) or self.optional[name]
        return _DTYPES.get(info.type, np.float32)


def session_options(threads: int | None = None, *, fixed_batch: bool = False) -> Any:
    """Session options as measured to be best on the CPU.

    All graph optimizations (the blocked layout is worth a fifth); the arena stays; the memory pattern, which costs
    more than half of the memory of a batch and gains next to nothing, only where the batch is fixed.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_mem_pattern = fixed_batch
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _has_fixed_batch(model: onnx.ModelProto) -> bool:
    shapes = [i.type.tensor_type.shape.dim for i in model.graph.input]
    return all(not dims or dims[0].HasField("dim_value") for dims in shapes)


def _payload(model: onnx.ModelProto) -> bytes | str:
    """The model as ONNX Runtime takes it: bytes, or a temporary file above protobuf's limit."""
    try:
        return bytes(model.SerializeToString())
    except ValueError:
        import tempfile

        folder = tempfile.mkdtemp(prefix="onnx_lrp_")
        path = Path(folder) / "model.onnx"
        save(model, path)
        return str(path)
