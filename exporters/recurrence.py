"""LSTM, GRU and RNN stay whole in torch's newer exporter, however often it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._decomp  # what is taken away is registered by it: taken away before that, it would come back
from torch._C import DispatchKey

_LAYERS = ("gru", "lstm", "rnn_tanh", "rnn_relu")


@contextmanager
def whole_recurrence() -> Iterator[None]:
    """Take torch's Python versions of recurrent layers away while a network is exported.

    They are loaded by the first export of a process (or by whatever else asks for torch's decompositions), run step by
    step, and so fix the length of the sequence: a second export with a free length fails, or unrolls the layer.
    """
    taken = []
    for name in _LAYERS:
        for kind in ("input", "data"):
            operator = getattr(getattr(torch.ops.aten, name), kind)
            kernels, operator.py_kernels = operator.py_kernels, dict(operator.py_kernels)
            for key in (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd):
                operator.py_kernels.pop(key, None)
            operator._dispatch_cache.clear()
            taken.append((operator, kernels))
    try:
        with torch.backends.mkldnn.flags(enabled=False):  # its LSTM wants to know how long everything is
            yield
    finally:
        for operator, kernels in taken:
            operator.py_kernels = kernels
            operator._dispatch_cache.clear()
