"""CuPy: GPU arrays, from its memory pool, on its current stream."""

from __future__ import annotations

import sys
import warnings

from .numpy import result_dtype
from .versions import installed

TESTED = "cupy 14.2"


def status():
    """(version found or None, why the door is closed or None). Does not import cupy."""
    return installed("cupy", alternatives=("cupy-cuda13x", "cupy-cuda12x"))


def allocate(prototype, shape, dtype_name):
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(prototype.device.id):
        return cupy.empty(shape, result_dtype(prototype.dtype, dtype_name)), None


def current_stream(prototype, device_id):
    return sys.modules["cupy"].cuda.get_current_stream(device_id).ptr


def stream_context(device_id, stream):
    with warnings.catch_warnings():
        # Deprecated for Stream.from_external, whose streams destroy the handle when they go.
        warnings.simplefilter("ignore", DeprecationWarning)
        return sys.modules["cupy"].cuda.ExternalStream(stream, device_id)
