"""What works here: versions, the opsets that ONNX Runtime loads, providers that really load, conflicting wheels."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any

import numpy as np
import onnx

from onnx_lrp.errors import InputError
from onnx_lrp.rewrite import VERSION
from onnx_lrp.runtime import onnxruntime

# Each of these wheels brings the same package onnxruntime, and the one installed last overwrites the others.
_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
)
# What the extras of this package bring, by the module that tells.
_EXTRAS = {"image": "PIL", "plot": "matplotlib", "torch": "torch", "tokenizers": "tokenizers"}
_USED = ("CUDAExecutionProvider", "CPUExecutionProvider")
_TINY = ("x", "y")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at.
        found: what was found, and where it is not as it should be, what to do.
        broken: whether it keeps models from being explained as asked.
    """

    topic: str
    found: str
    broken: bool = False

    def __str__(self) -> str:
        return f"{'!' if self.broken else ' '} {self.topic:<28}{self.found}"


def examine() -> list[Finding]:
    """Look at everything; nothing is changed."""
    return [*_versions(), *_runtime(), *_extras()]


def _versions() -> Iterator[Finding]:
    yield Finding("onnx-lrp", VERSION)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("numpy", "onnx", "onnx-graphsurgeon", "pillow"):
        version = _version(name)
        if version is not None:
            yield Finding(name, version)
        elif name != "pillow":
            yield Finding(name, f"missing: {sys.executable} -m pip install {name}", broken=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _runtime() -> Iterator[Finding]:
    wheels = [f"{name} {version}" for name in _RUNTIMES if (version := _version(name)) is not None]
    if len(wheels) > 1:
        names = " ".join(w.split()[0] for w in wheels)
        yield Finding(
            "onnxruntime",
            f"{' and '.join(wheels)} overwrite each other: pip uninstall {names}, then install one",
            broken=True,
        )
    try:
        ort = onnxruntime()
    except InputError as error:
        yield Finding("onnxruntime", str(error), broken=True)
        return
    yield Finding("onnxruntime", f"{ort.__version__} ({', '.join(wheels) or 'installed without a wheel'})")
    opset = _newest(ort, lambda n: _tiny(opset=n), onnx.defs.onnx_opset_version())
    ir = _newest(ort, lambda n: _tiny(ir=n), int(onnx.IR_VERSION))
    yield Finding(
        "opset",
        f"onnx writes up to {onnx.defs.onnx_opset_version()}, onnxruntime loads up to {opset or 'none'}",
        not opset,
    )
    yield Finding(
        "IR version", f"onnx writes up to {int(onnx.IR_VERSION)}, onnxruntime loads up to {ir or 'none'}", not ir
    )
    for provider in ort.get_available_providers():
        reason = _load(ort, provider)
        # The others are there because the wheel was built with them; nothing here asks for them.
        yield Finding(provider, reason or "loads", broken=bool(reason) and provider in _USED)


def _tiny(opset: int = 18, ir: int = 8) -> bytes:
    """A model of one node."""
    types = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in _TINY]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "tiny", types[:1], types[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir)
    return bytes(model.SerializeToString())


def _session(ort: Any, model: bytes, provider: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=[provider])


def _newest(ort: Any, model: Callable[[int], bytes], newest: int) -> int:
    """The highest version up to `newest` with which a model loads; 0 for none."""
    for version in range(newest, 6, -1):
        try:
            _session(ort, model(version), "CPUExecutionProvider")
        except Exception:  # ONNX Runtime raises its own unrelated types
            continue
        return version
    return 0


def _load(ort: Any, provider: str) -> str:
    """Why a provider does not run a model; "" if it does."""
    with _printed() as said:
        try:
            with contextlib.suppress(Exception):
                if provider == _USED[0] and hasattr(ort, "preload_dlls"):
                    ort.preload_dlls()
            session = _session(ort, _tiny(), provider)
            session.run(None, {"x": np.zeros(1, np.float32)})
            # One whose libraries are missing is left away; why, stands in the log only.
            failed = provider not in session.get_providers()
        except Exception as error:  # ONNX Runtime raises its own unrelated types
            said.append(str(error))
            failed = True
    text = " ".join(" ".join(said).split())
    known = re.findall(
        r"with error: (\S+: [\w ]+)|(Require [^.]*\S+ and CUDA \S+)|(Please install \w+ libraries)", text
    )
    why = "; ".join(dict.fromkeys(part.rstrip(". ") for match in known for part in match if part))
    hint = "; a driver must be there, and pip install onnxruntime-gpu[cuda,cudnn] brings the libraries"
    why = (why or text[:160] or "ONNX Runtime leaves it away") + (hint if provider == _USED[0] else "")
    return f"does not load: {why}" if failed else ""


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
    """Collect what is printed meanwhile, also by libraries that write to the file descriptor."""
    said: list[str] = []
    python, out, err = io.StringIO(), os.dup(1), os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as sink:
        sys.stdout.flush()
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            with contextlib.redirect_stdout(python):
                yield said
        finally:
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
            sink.seek(0)
            said += [sink.read(), python.getvalue()]


def _extras() -> Iterator[Finding]:
    for extra, module in _EXTRAS.items():
        if util.find_spec(module) is None:
            yield Finding(f"extra '{extra}'", f"not installed: pip install onnx-lrp[{extra}]")
