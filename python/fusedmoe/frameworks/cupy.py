"""CuPy: GPU arrays, from its memory pool, on its current stream."""

from __future__ import annotations

import cupy

from .numpy import result_dtype


def allocate(prototype, shape, dtype_name):
    with cupy.cuda.Device(prototype.device.id):
        return cupy.empty(shape, result_dtype(prototype.dtype, dtype_name)), None


def current_stream(prototype, device_id):
    return cupy.cuda.get_current_stream(device_id).ptr


def stream_context(device_id, stream):
    return cupy.cuda.ExternalStream(stream, device_id)
