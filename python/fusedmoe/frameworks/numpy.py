"""NumPy: CPU arrays; bfloat16 through ml_dtypes, or as 16-bit integers with dtype="bfloat16"."""

from __future__ import annotations

import numpy as np

from .versions import installed

TESTED = "numpy 2.4 to 2.5"

_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def status():
    """(version found or None, why the door is closed or None)."""
    return installed("numpy")


def result_dtype(prototype_dtype, dtype_name):
    """The dtype of a result named `dtype_name` beside an array of `prototype_dtype`.

    Who gives bf16 as 16-bit integers gets 16-bit integers back: such a caller may not have
    ml_dtypes at all."""
    prototype_dtype = np.dtype(prototype_dtype)
    if prototype_dtype.kind in "iu" and prototype_dtype.itemsize == _ITEMSIZE.get(dtype_name):
        return prototype_dtype
    if dtype_name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype_name)


def allocate(prototype, shape, dtype_name):
    return np.empty(shape, result_dtype(prototype.dtype, dtype_name)), None


def current_stream(prototype, device_id):
    return 0
