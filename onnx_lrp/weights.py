"""Weights as inputs of a graph: so that a model in training is explained by one file, fed with its weights of today."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from onnx_lrp.errors import InputError
from onnx_lrp.model import ModelLike, load


def weights_as_inputs(model: ModelLike, names: Collection[str] | None = None) -> onnx.ModelProto:
    """Let weights be fed: they become graph inputs of the same names, with what they were as default.

    Whatever is made of the result by :func:`onnx_lrp.rewrite` or :func:`onnx_lrp.reweigh` is right for the weights that
    are fed: for rules they are constants as before, but nothing is folded from their values. A runtime cannot fold
    either, so what is derived from weights is computed in every run.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph; it is not modified.
        names: which initializers; default: all of floating point.

    Returns:
        The model with these initializers listed among its inputs, behind its own.

    Raises:
        ModelError: the model cannot be read or is invalid.
        InputError: a name is that of no initializer of floating point.
    """
    proto = load(model).original
    floats = {
        t.name: t for t in proto.graph.initializer if onnx.helper.tensor_dtype_to_np_dtype(t.data_type).kind == "f"
    }
    if unknown := sorted(set(names or ()) - floats.keys()):
        raise InputError(
            f"the model has no weights named {', '.join(unknown)}; there are {', '.join(floats) or 'none at all'}"
        )
    if proto.ir_version < 4:  # which lists every initializer among the inputs, and yet none can be fed
        given = {t.name for t in proto.graph.initializer}
        own = [i for i in proto.graph.input if i.name not in given]
        del proto.graph.input[:]
        proto.graph.input.extend(own)
        proto.ir_version = 4
    listed = {i.name for i in proto.graph.input}
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        for name, tensor in floats.items()
        if name not in listed and (names is None or name in names)
    )
    return proto
