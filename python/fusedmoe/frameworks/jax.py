"""JAX arrays on the CPU: the result is computed into a NumPy array and handed to JAX.

JAX arrays are immutable and owned by XLA, so they cannot be written in place (`out=` of a JAX
array is refused). On a GPU the arrays are refused until a custom call exists: JAX has no notion of
a current stream."""

from __future__ import annotations

import jax
import numpy as np

from .numpy import result_dtype


def allocate(prototype, shape, dtype_name):
    buffer = np.empty(shape, result_dtype(prototype.dtype, dtype_name))
    device = next(iter(prototype.devices()))
    return buffer, lambda written: jax.device_put(written, device)


def current_stream(prototype, device_id):
    raise NotImplementedError(
        "hidden_states: expected a JAX array on the CPU, got one on a GPU: "
        "the custom call for JAX is not built yet"
    )
