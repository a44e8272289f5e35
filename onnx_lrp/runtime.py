"""ONNX Runtime sessions: options, providers, and which of them is really in use."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import external_data_helper

from onnx_lrp.cuda_graph import CUDA, Replay, with_cuda_graph
from onnx_lrp.errors import InputError, ModelError
from onnx_lrp.model import Source, bytes_of, save, serialized, with_weights, write_apart
from onnx_lrp.roles import Spec, role_of

_LOG = logging.getLogger("onnx_lrp")
CPU = "CPUExecutionProvider"
ON_CUDA = (CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")  # whose tensors are CUDA's
_LARGE = 2**24  # bytes of weights from which it pays to care for memory when a model is loaded

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
        raise InputError(
            "onnxruntime is broken, as after removing one of onnxruntime and onnxruntime-gpu:"
            " uninstall both, then install one"
        )
    return ort


def choose_providers(
    device: Device = "auto", providers: Sequence[Any] | None = None, *, fixed: bool = False
) -> list[Any]:
    """Execution providers for a device, in order of preference.

    Args:
        device: "auto" (CUDA where this ONNX Runtime has it, else CPU), "cpu" or "cuda".
        providers: ONNX Runtime's own list, overrides ``device``.
        fixed: whether every length of the model's inputs is known. cuDNN then tries all its algorithms once; of a
            model with open lengths it would try them anew for every shape that comes, so there it goes by its rules.

    Raises:
        InputError: the device is not to be had with this ONNX Runtime.
    """
    if providers is not None:
        return list(providers)
    available = onnxruntime().get_available_providers()
    if device == "cpu" or (device == "auto" and CUDA not in available):
        return [CPU]
    if device not in ("auto", "cuda"):
        raise InputError(f"device is auto, cpu or cuda, not '{device}'")
    if CUDA not in available:
        raise InputError(
            "this ONNX Runtime has no CUDA provider: pip install onnx-lrp[gpu], after removing onnxruntime"
        )
    return [(CUDA, {"cudnn_conv_algo_search": "EXHAUSTIVE" if fixed else "HEURISTIC"}), CPU]


def provider_name(provider: Any) -> str:
    """The name of a provider that may come with options: "name", or ("name", {...})."""
    return str(provider[0] if isinstance(provider, tuple | list) else provider)


@contextlib.contextmanager
def preloaded(ort: Any) -> Iterator[None]:
    """Let CUDA come from NVIDIA's wheels, and keep ONNX Runtime quiet where it does not come at all.

    ONNX Runtime's own lines about a provider that does not load are long and many; whoever calls says it in one.
    """
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if hasattr(ort, "preload_dlls"):
                with contextlib.suppress(Exception):  # what it misses, loading the provider misses too
                    ort.preload_dlls()
            yield
    finally:
        ort.set_default_logger_severity(2)  # the default; there is no way to ask for what it was


class Session:
    """One loaded model.

    Args:
        model: the model.
        device: "auto" (CUDA where it loads, else CPU), "cpu" or "cuda".
        providers: ONNX Runtime's own list, overrides ``device``.
        threads: threads per operator; default: ONNX Runtime's choice.
        folder: where external data of the model lies.
        source: whose weights the model lacks; they are released, for the session holds what it needs of them.
        cuda_graph: replay one recorded CUDA graph in every run; see :class:`onnx_lrp.cuda_graph.Replay`.
        profile: where ONNX Runtime writes a profile to, the beginning of a file name; None: nowhere.

    Raises:
        ModelError: ONNX Runtime refuses the model.
        InputError: the device, or a provider, was asked for by name and does not load; `cuda_graph` without CUDA, or
            for a model with open lengths.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        *,
        device: Device = "auto",
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        folder: Path | None = None,
        source: Source | None = None,
        cuda_graph: bool = False,
        profile: Path | None = None,
    ):
        options = session_options(threads, fixed_batch=has_fixed_batch(model))
        if folder is not None and _is_external(_constants(model, source)):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        open_inputs = _open_inputs(model)
        chosen = choose_providers(device, providers, fixed=not open_inputs)
        if cuda_graph:
            chosen = with_cuda_graph(chosen, open_inputs)
        names = [provider_name(p) for p in chosen]
        tries_cuda = providers is None and names[0] == CUDA
        self.raw = _load(model, source, options, chosen)
        self.providers: list[str] = self.raw.get_providers()
        # What to ask for where more sessions shall be as this one is.
        self.asked = [p for p in chosen if provider_name(p) in self.providers]
        absent = [name for name in names if name not in self.providers]
        if absent and (providers is not None or cuda_graph):
            raise InputError(f"{absent[0]} was asked for and does not load: run onnx-lrp doctor, or leave it out")
        if device == "auto" and tries_cuda and CUDA not in self.providers:
            _LOG.warning("the CUDA provider does not load, so the CPU runs; onnx-lrp doctor says why")
        if device == "cuda" and providers is None and CUDA not in self.providers:
            raise InputError(
                "the CUDA provider does not load (driver, CUDA or cuDNN missing):"
                " run onnx-lrp doctor, or use device='cpu'"
            )
        # A model that fills in missing values is fed NaN for them.
        self._takes_nan = any(n.op_type == "Imputer" and n.domain == "ai.onnx.ml" for n in model.graph.node)
        self.inputs = {i.name: i for i in self.raw.get_inputs()}
        self.optional = {i.name: i for i in self.raw.get_overridable_initializers()}
        self.shapes: dict[str, list[int | str | None]] = {o.name: list(o.shape) for o in self.raw.get_outputs()}
        self.outputs: list[str] = list(self.shapes)
        self._replay = Replay(onnxruntime(), self.raw) if cuda_graph else None

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; outputs by name."""
        names = list(outputs) if outputs is not None else self.outputs
        try:
            results = (self._replay or self.raw).run(names, dict(feeds))
        except Exception as error:
            raise ModelError(f"ONNX Runtime fails: {reason(error)}") from None
        return dict(zip(names, results, strict=True))

    def checked(self, name: str, array: Any, batch: int | None = None) -> Array:
        """An array as an input wants it, cast where nothing is lost.

        Args:
            name: the input.
            array: anything that numpy takes.
            batch: length of the model's fixed batch, of which any number of samples may be given; they run in turns.

        Raises:
            InputError: another shape, numbers that the input's type cannot hold, NaN; says what was expected.
        """
        dtype = np.dtype(self.dtype(name))
        shape = list((self.inputs.get(name) or self.optional[name]).shape)
        try:
            data = np.asarray(array)
        except Exception as error:  # ragged lists, tensors on a GPU or with gradients: each its own type
            why = " ".join(str(error).split())[:120]
            raise InputError(f"input '{name}' wants {dtype}, got no array ({why})") from None
        if data.dtype.kind not in "fiub" or dtype.kind not in "fiub":
            raise InputError(f"input '{name}' wants {dtype}, got {data.dtype}: give a numeric array")
        expected = "(" + ", ".join(str(d) if d is not None else "?" for d in shape) + ")"
        if data.ndim != len(shape):
            hint = "; add a batch axis: x[None]" if data.ndim == len(shape) - 1 else ""
            raise InputError(f"input '{name}' wants shape {expected}, got {data.shape}{hint}")
        first = 1 if batch is not None and shape[:1] == [batch] else 0
        if any(isinstance(d, int) and d != n for d, n in list(zip(shape, data.shape, strict=True))[first:]):
            raise InputError(f"input '{name}' wants shape {expected}, got {data.shape}")
        # The past of a language model may hold no token, and then has no numbers.
        if not data.size and role_of(name, dtype.kind, len(shape)) != "past":
            raise InputError(f"input '{name}' wants shape {expected}, got {data.shape}, which holds nothing")
        if not self._takes_nan:
            _check_numbers(name, data, required=name in self.inputs)
        return _cast(name, data, dtype, required=name in self.inputs and not self._takes_nan)

    def specs(self) -> dict[str, Spec]:
        """What each input that has to be fed wants."""
        return {name: Spec(np.dtype(self.dtype(name)), tuple(info.shape)) for name, info in self.inputs.items()}

    def dtype(self, name: str) -> Any:
        """Numpy element type of an input."""
        info = self.inputs.get(name) or self.optional[name]
        return _DTYPES.get(info.type, np.float32)


def _check_numbers(name: str, data: Array, *, required: bool) -> None:
    """NaN and infinity are refused, save in parameters, where they may stand for a default."""
    if required and data.dtype.kind == "f" and not np.isfinite(data).all():
        kind = "NaN" if np.isnan(data).any() else "infinite values"
        raise InputError(f"input '{name}' holds {kind}; clean the data first")


def _cast(name: str, data: Array, dtype: np.dtype[Any], *, required: bool) -> Array:
    """The numbers in another type; an error where they would become others."""
    with np.errstate(all="ignore"):
        cast = np.asarray(data, dtype, order="C")  # not ascontiguousarray, which gives scalars an axis
    if dtype.kind in "iub" and not np.array_equal(cast, data):
        fractions = data.dtype.kind == "f" and not np.array_equal(data, np.floor(data))
        what = "with fractions" if fractions else f"values {data.min()} to {data.max()}, outside its range"
        raise InputError(f"input '{name}' wants {dtype}, got {data.dtype} {what}: give whole numbers that fit")
    if required and dtype.kind == "f" and not np.isfinite(cast).all():
        raise InputError(f"input '{name}' wants {dtype}, got values up to {np.abs(data).max():.3g}, too large for it")
    return cast


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


def has_fixed_batch(model: onnx.ModelProto) -> bool:
    """Whether the first axis of every input has one length only."""
    shapes = [i.type.tensor_type.shape.dim for i in model.graph.input]
    return all(not dims or dims[0].HasField("dim_value") for dims in shapes)


def _open_inputs(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Inputs that have to be fed and whose lengths are not all known, with their shapes."""
    defaults = {t.name for t in model.graph.initializer}
    found: dict[str, tuple[int | str, ...]] = {}
    for info in model.graph.input:
        dims = info.type.tensor_type.shape.dim
        if info.name not in defaults and not all(d.HasField("dim_value") for d in dims):
            found[info.name] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
    return found


def _constants(model: onnx.ModelProto, source: Source | None) -> list[onnx.TensorProto]:
    return [*model.graph.initializer, *(source.weights.values() if source else ())]


def _is_external(tensors: Iterable[onnx.TensorProto]) -> bool:
    return any(external_data_helper.uses_external_data(t) for t in tensors)


def _load(model: onnx.ModelProto, source: Source | None, options: Any, providers: Sequence[Any]) -> Any:
    """The session, made while nothing else here holds the weights."""
    constants = _constants(model, source)
    large = bytes_of(constants) > _LARGE
    try:
        with contextlib.ExitStack() as stack:
            given = _loadable(model, source, constants if large and not _is_external(constants) else [], stack)
            constants.clear()
            if source is not None:
                source.release()
            if large:
                gc.collect()  # what rewriting leaves is in cycles, and holds weights
                _give_back()
            return opened(given, options, providers)
    finally:
        if large:
            _give_back()


def _loadable(
    model: onnx.ModelProto, source: Source | None, apart: Sequence[onnx.TensorProto], stack: contextlib.ExitStack
) -> bytes | str:
    """What ONNX Runtime reads: bytes; or the path of a temporary file, from which the weights ``apart`` are mapped."""
    if apart:
        try:
            return str(write_apart(model, apart, _folder(stack)))
        except OSError as error:
            _LOG.info("no temporary file (%s), so loading takes more memory", error.strerror or error)
    whole = with_weights(model, source)
    if (data := serialized(whole)) is not None:
        return data
    path = _folder(stack) / "model.onnx"
    save(whole, path)
    return str(path)


def _folder(stack: contextlib.ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnx_lrp_", ignore_cleanup_errors=True)))


def _give_back() -> None:
    """Let the C library return memory that is free: glibc keeps half of what loading took."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def opened(file: str | bytes, options: Any, providers: Sequence[Any]) -> Any:
    """ONNX Runtime's own session of a file, or of its bytes.

    Raises:
        ModelError: ONNX Runtime refuses it.
    """
    ort = onnxruntime()
    on_cuda = any(provider_name(p) in ON_CUDA for p in providers)
    try:
        with preloaded(ort) if on_cuda else contextlib.nullcontext():
            return ort.InferenceSession(file, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises its own unrelated types
        raise ModelError(f"ONNX Runtime cannot load the model: {reason(error)}") from None


def reason(error: Exception) -> str:
    """ONNX Runtime's words in one line, without its own source lines and signatures."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return re.sub(r"\S*\.(?:cc|h):\d+ \S+ .*?\) (?=[A-Z])", "", text)[:300]
