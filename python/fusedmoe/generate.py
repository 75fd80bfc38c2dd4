"""Random weights and activations, quickly: a gigabyte of bfloat16 in about a second.

A number is one table look-up: 16 random bits index the 65536 quantiles of the normal distribution,
rounded to the dtype. No element repeats a block, so nothing a cache or a compressor could use.
"""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 18  # elements: bits, indices and result of a chunk stay in the cache


def dtype_of(name):
    """NumPy dtype of "bfloat16", "float16" or "float32"."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if name not in ("float16", "float32"):
        raise ValueError(f'dtype: expected "bfloat16", "float16" or "float32", got {name!r}')
    return np.dtype(name)


def quantiles(dtype, scale=1.0):
    """[65536] of dtype: scale times the normal quantiles at (i + 1/2) / 65536."""
    from statistics import NormalDist

    # The upper half mirrors the lower one, exactly.
    half = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768)])
    return (scale * np.concatenate([half, -half[::-1]])).astype(dtype)


def fill_normal(out, scale, seed, progress=None):
    """Fills `out` [...] (C-contiguous) with scale * normal numbers; `progress(nbytes)` after each
    chunk. The same seed gives the same numbers on every machine."""
    flat = out.reshape(-1)
    table = quantiles(out.dtype, scale)
    # As integers: np.take on an extension dtype such as bfloat16 goes element by element.
    unsigned = {2: np.uint16, 4: np.uint32}[out.dtype.itemsize]
    flat, table = flat.view(unsigned), table.view(unsigned)
    bits = np.random.SFC64(seed)
    for begin in range(0, flat.size, _CHUNK):
        part = flat[begin : begin + _CHUNK]
        random = bits.random_raw((part.size + 3) // 4).view(np.uint16)[: part.size]
        np.take(table, random, out=part, mode="clip")
        if progress is not None:
            progress(part.nbytes)
    return out


def normal(shape, dtype, scale, seed, progress=None):
    """A new array of `fill_normal`."""
    return fill_normal(np.empty(shape, dtype_of(dtype)), scale, seed, progress)


def layer(sizes, dtype, seed=0, progress=None):
    """(w13, w2) of a layer of `sizes`, a models.Model, scaled so that outputs are like inputs.
    `seed`: an int or a tuple of ints."""
    seed = tuple(seed) if isinstance(seed, tuple) else (seed,)
    e, i, h = sizes.num_experts, sizes.intermediate_size, sizes.hidden_size
    w13 = normal((e, 2 * i, h), dtype, h**-0.5, (*seed, 13), progress)
    w2 = normal((e, h, i), dtype, i**-0.5, (*seed, 2), progress)
    return w13, w2
