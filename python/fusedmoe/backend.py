"""Where demo, check and bench run: one class per backend, the same five things of each.

They need memory, copies and a clock on a GPU without any framework; the private `_device_*` helpers
of the extension give that. These allocate and synchronise, so no call of the library uses them.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress

import numpy as np

from . import _C
from .generate import dtype_of


class Cpu:
    name = "cpu"
    stream = None
    index = None

    def __init__(self):
        info = _C.info()["cpu"]
        self.text = f"{cpu_model()}, {info['isa']}, {info['threads']} threads"

    def put(self, array):
        """The tensor with the content of a NumPy array."""
        return array

    def empty(self, shape, dtype):
        return np.empty(shape, _numpy_dtype(dtype))

    def get(self, tensor):
        """The NumPy array with the content of a tensor."""
        return tensor

    def rows(self, tensor, begin, end):
        """`get(tensor)[begin:end]`."""
        return tensor[begin:end]

    def prepare(self, calls):
        """A function replays -> microseconds per call, one number for each run over all calls."""
        return lambda replays: self._time(calls, replays)

    def _time(self, calls, replays):
        times = []
        for _ in range(replays):
            begin = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - begin) * 1e6 / len(calls))
        return times

    def read_bandwidth(self):
        """Bytes per second that this machine reads from memory, measured now with all threads."""
        return _C._cpu_read_bandwidth()


class GpuTensor:
    """A compact tensor on a GPU, for the functions of this package and any other DLPack
    consumer."""

    def __init__(self, shape, dtype, index):
        self.shape, self.dtype = tuple(shape), dtype
        self.nbytes = math.prod(shape) * _numpy_dtype(dtype).itemsize
        self.buffer = _C._device_alloc(max(self.nbytes, 1), index)
        self.view = self.buffer.view(self.shape, dtype)

    def __dlpack__(self, **keywords):
        return self.view.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.view.__dlpack_device__()


class Gpu:
    name = "cuda"

    def __init__(self, index=0):
        self.index = index
        _C.load(index)
        self.stream = _C._device_stream(index)
        info = _C.info()["devices"][index]
        self.text = f"{info['name']}, {info['num_sms']} SMs"

    def put(self, array):
        tensor = GpuTensor(array.shape, array.dtype.name, self.index)
        if array.nbytes:
            tensor.buffer.copy_from(np.ascontiguousarray(array))
            # The copy may still be on its way, and the private stream does not wait for it.
            _C._device_synchronize(self.index)
        return tensor

    def empty(self, shape, dtype):
        return GpuTensor(shape, dtype, self.index)

    def get(self, tensor):
        return self.rows(tensor, 0, tensor.shape[0])

    def rows(self, tensor, begin, end):
        array = np.empty((end - begin, *tensor.shape[1:]), _numpy_dtype(tensor.dtype))
        if array.nbytes:
            _C._device_synchronize(self.index)
            tensor.buffer.copy_to(array, begin * array[:1].nbytes)
        return array

    def prepare(self, calls):
        """The calls back to back in one CUDA graph; an event before and one after each replay."""
        calls[0]()  # kernels are loaded and plans made outside of the capture
        _C._device_graph_begin(self.stream, self.index)
        try:
            for call in calls:
                call()
        except BaseException:
            with suppress(RuntimeError):  # the stream leaves the capture; what failed is told below
                _C._device_graph_end(self.stream, self.index)
            raise
        graph = _C._device_graph_end(self.stream, self.index)

        def replay(replays):
            times = _C._device_graph_elapsed(graph, self.stream, replays, self.index)
            return [milliseconds * 1e3 / len(calls) for milliseconds in times]

        return replay

    def read_bandwidth(self, nbytes=2 << 30):
        """Bytes per second of reads, measured now by `combine`: 32 rows read for each one
        written."""
        topk, hidden_size = 32, 4096
        num_tokens = nbytes // (2 * hidden_size * topk)
        num_rows = num_tokens * topk
        rows = self.empty((num_rows, hidden_size), "bfloat16")
        order = np.arange(num_rows, dtype=np.int32).reshape(num_tokens, topk)
        row_of_slot, out = self.put(order), self.empty((num_tokens, hidden_size), "bfloat16")

        def call():
            _C.combine(rows, row_of_slot, None, None, out, self.stream, None)

        best = min(self.prepare([call] * 2)(5))
        return num_rows * hidden_size * 2 / (best * 1e-6)


def backend(name, index=0):
    """The backend named "cpu" or "cuda"; "auto": a GPU where there is one."""
    if name == "auto":
        name = "cuda" if has_gpu() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f'device: expected "cpu", "cuda" or "auto", got {name!r}')
    return Gpu(index) if name == "cuda" else Cpu()


def has_gpu():
    """Whether a GPU can be used: built for it, a driver, a device."""
    try:
        return _C.device_count() > 0
    except RuntimeError:
        return False


def cpu_model():
    """The CPU's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as text:
            for line in text:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


def _numpy_dtype(name):
    return dtype_of(name) if name in ("bfloat16", "float16", "float32") else np.dtype(name)
