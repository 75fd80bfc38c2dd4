"""The doors, a file for each; and what the extension asks of the caller's framework where the
exchange table does not answer.

The extension calls three functions, with a tensor of the user's as `prototype`:

    allocate(prototype, shape, dtype_name) -> (buffer, wrap)   a new tensor beside it
    current_stream(prototype, device_id) -> int                the CUstream it is queued on
    stream_context(prototype, device_id, stream)               allocate for that CUstream inside

One module per framework defines them; it is imported when a tensor of that framework is first
seen, which means that the framework itself is imported already. No module here is imported with
the package.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

# Root package of a tensor's type -> module here.
_MODULES = {"numpy": "numpy", "torch": "torch", "cupy": "cupy", "jax": "jax", "jaxlib": "jax"}
_found: dict[type, object] = {}


# The doors, in the order of docs/integrations.md: files here.
DOORS = (
    "numpy",
    "cupy",
    "cuda_core",
    "torch",
    "jax",
    "transformers",
    "checkpoints",
    "sglang",
    "vllm",
    "hpc_ops",
)


def doors():
    """Every door as (name, version, usable, why): the version of its package that was found or
    None, whether it can be used here, and if not, why.

    A door says this itself, by `status()` in its file: (version or None, why not or None).
    """
    rows = []
    for name in DOORS:
        if find_spec(f"{__name__}.{name}") is None:
            continue
        version = why = None
        try:
            module = import_module(f"{__name__}.{name}")
            if hasattr(module, "status"):
                version, why = module.status()
        except Exception as error:  # a broken package is a finding, not the end of a report
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        rows.append((name, version, why is None, why))
    return rows


def framework_of(prototype):
    """The module for the framework of `prototype`, None where there is none. Subclasses count as
    their base."""
    kind = type(prototype)
    try:
        return _found[kind]
    except KeyError:
        pass
    module = None
    for base in kind.__mro__:
        name = _MODULES.get(base.__module__.partition(".")[0])
        if name is not None:
            module = import_module(f"{__name__}.{name}")
            break
    _found[kind] = module
    return module


def allocate(prototype, shape, dtype_name):
    """A new uninitialised C-contiguous tensor on the device of `prototype`, by its framework.

    Args:
        prototype: a tensor of the caller's, usually hidden_states. Not written.
        shape: tuple of ints.
        dtype_name: "bfloat16", "float16", "float32", "int32", "int64" or "uint8".

    Returns:
        (buffer, wrap): `buffer` can be imported and written; `wrap(buffer)` makes of it what the
            user gets, None: it is that already.

    Raises:
        TypeError: no framework known for this type. MemoryError and the framework's own errors
            pass through.
    """
    module = framework_of(prototype)
    if module is None:
        what = "workspace" if dtype_name == "uint8" else "out"
        raise TypeError(
            f"{what}: expected a tensor to write, because nothing can be allocated beside "
            f"{type(prototype).__module__}.{type(prototype).__qualname__}, got None"
        )
    return module.allocate(prototype, shape, dtype_name)


def current_stream(prototype, device_id):
    """The CUstream that the framework of `prototype` is queueing on, as an int; 0, the legacy
    default stream, for a framework that has no such notion."""
    module = framework_of(prototype)
    return 0 if module is None else module.current_stream(prototype, device_id)


def stream_context(prototype, device_id, stream):
    """A context manager in which the framework of `prototype` allocates for `stream`, a CUstream as
    an int. Memory of a caching allocator belongs to the stream that was current; without this, what
    a call with `stream=` frees could be handed out while its kernels still run. None for a
    framework without streams."""
    module = framework_of(prototype)
    make = getattr(module, "stream_context", None)
    return None if make is None else make(device_id, stream)
