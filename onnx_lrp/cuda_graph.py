"""CUDA graphs: the kernels of a run recorded once and replayed, without the cost of launching each.

https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, section "Using CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from onnx_lrp.errors import InputError

CUDA = "CUDAExecutionProvider"


def with_cuda_graph(providers: Sequence[Any], open_inputs: Mapping[str, tuple[int | str, ...]]) -> list[Any]:
    """The providers with CUDA graphs switched on.

    Args:
        providers: CUDA first, with or without options.
        open_inputs: inputs with open lengths, and their shapes.

    Raises:
        InputError: another provider comes first, or there are open lengths: a recorded graph has one shape.
    """
    first, *others = providers
    name, options = first if isinstance(first, tuple | list) else (first, {})
    if name != CUDA:
        raise InputError(f"cuda_graph=True is for CUDA, and this would run on {name}: give device='cuda'")
    for tensor, shape in open_inputs.items():
        text = ", ".join(map(str, shape))
        raise InputError(
            f"cuda_graph=True wants fixed lengths, and input '{tensor}' has ({text}): say them with shapes="
        )
    return [(name, {**options, "enable_cuda_graph": "1"}), *others]


class Replay:
    """Runs of a session with CUDA graphs: inputs and outputs stay at the places that were recorded.

    Each set of inputs that are fed (the class to explain may be or not) and outputs that are wanted has a graph and
    places of its own.

    Args:
        ort: the onnxruntime module.
        session: its InferenceSession, made with the options of :func:`with_cuda_graph`.
    """

    def __init__(self, ort: Any, session: Any):
        self._ort, self._session = ort, session
        self._recorded: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[dict[str, Any], Any, Any]] = {}

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run once; outputs in the order of their names."""
        key = (tuple(sorted(feeds)), tuple(names))
        if key in self._recorded:
            places, binding, options = self._recorded[key]
            for name, array in feeds.items():
                places[name].update_inplace(array)
        else:
            places = {name: self._ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in feeds.items()}
            binding, options = self._session.io_binding(), self._ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(len(self._recorded) + 1))
            for name, value in places.items():
                binding.bind_ortvalue_input(name, value)
            for name in names:  # the first run chooses their places, and later ones write there
                binding.bind_output(name, "cuda")
            self._recorded[key] = places, binding, options
        self._session.run_with_iobinding(binding, options)
        return list(binding.copy_outputs_to_cpu())
