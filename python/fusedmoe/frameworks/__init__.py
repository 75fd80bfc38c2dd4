"""What the extension asks of the caller's framework where the exchange table does not answer.

The extension calls three functions, with a tensor of the user's as `prototype`:

    allocate(prototype, shape, dtype_name) -> (buffer, wrap)   a new tensor beside it
    current_stream(prototype, device_id) -> int                the CUstream it is queued on
    stream_context(prototype, device_id, stream)               allocate for that CUstream inside

One module per framework defines them; it is imported when a tensor of that framework is first
seen, which means that the framework itself is imported already. No module here is imported with
the package.
"""

from __future__ import annotations

from importlib import import_module, metadata

# Root package of a tensor's type -> module here.
_MODULES = {"numpy": "numpy", "torch": "torch", "cupy": "cupy", "jax": "jax", "jaxlib": "jax"}
CUPY = ("cupy", "cupy-cuda13x", "cupy-cuda12x")
_found: dict[type, object] = {}


# The doors, in the order of docs/integrations.md: files here.
DOORS = (
    "numpy",
    "torch",
    "jax",
    "cupy",
    "transformers",
    "checkpoints",
    "hpc_ops",
    "sglang",
    "vllm",
)
# What has to be installed before a door's file can be imported, where that imports it at once.
_IMPORTS = {"torch": ("torch",), "jax": ("jax",), "cupy": CUPY}


def installed(*distributions):
    """The version of the first of these distributions that is installed, else None. Imports
    nothing."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def doors():
    """Every door as (name, version, usable, why): the version of its package that was found or
    None, whether it can be used here, and if not, why, in a sentence.

    A door says this itself, in `status()` of its file. Files of tensor frameworks import their
    framework, so this takes seconds where many are installed.
    """
    rows = []
    for name in DOORS:
        needs = _IMPORTS.get(name)
        version = installed(*needs) if needs else None
        if needs and version is None:
            rows.append((name, None, False, f"{needs[0]} is not installed"))
            continue
        try:
            module = import_module(f"{__name__}.{name}")
            if hasattr(module, "status"):
                version, why = module.status()
            else:
                why = None
        except Exception as error:  # a broken framework is a finding, not the end of a report
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
