"""JAX: the layer inside jit, vmap, scan and shard_map, on CPUs and NVIDIA GPUs.

    from fusedmoe.frameworks.jax import fused_experts, fused_moe, route
    layer = jax.jit(fused_experts)
    out = layer(hidden_states, w13, w2, topk_weights, topk_ids)

A call becomes a custom call of XLA, whose handlers are C (csrc/xla_ffi.c): no Python and no GIL
when it runs, memory from XLA's own plan, on XLA's stream, and part of its command buffers (CUDA
graphs). Outside of jit the same call runs at once. Arguments are checked when a call is traced,
with the exceptions and the words of `fusedmoe.fused_experts`; what only a run can find is an error
of JAX with the same words.

The functions of the package itself take JAX arrays on the CPU outside of jit, through `allocate`
and `current_stream` at the end of this file.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import sys

import numpy as np

from .. import _C, ops
from ..routing import Routing

TESTED = "jax 0.6.2 to 0.12"


def status():
    """(version found or None, why it is not usable or None). JAX is not imported for it."""
    try:
        version = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return None, "jax is not installed"
    if "jax" in sys.modules:
        try:
            register()
        except RuntimeError as error:
            return version, str(error)
    elif importlib.util.find_spec("jaxlib") is None:
        return version, "jaxlib is not installed"
    return version, None


def register():
    """Registers the handlers with XLA. Every function here does; only a program that comes from a
    file (`jax.export`) needs it before it is called.

    Raises:
        RuntimeError: a sentence, where this JAX does not take them.
    """
    _program()


# -------------------------------------------------------------------------------------------------
# The functions
# -------------------------------------------------------------------------------------------------


def fused_experts(hidden_states, w13, w2, topk_weights, topk_ids, **options):
    """The layer as a JAX function; formula, arguments and exceptions as `fusedmoe.fused_experts`.

    Args:
        hidden_states, w13, w2, topk_weights, topk_ids, and of the options w13_bias, w2_bias,
            shared_output, expert_map: JAX arrays, traced or not, or NumPy arrays. Not written.
        expert_start: None, an int, or an integer array of one element, traced or not; under
            shard_map `jax.lax.axis_index(axis) * num_experts_of_a_device`.
        out: None, or `hidden_states` or `shared_output` itself: the result may take its memory,
            which XLA allows where that array is donated or dead; else it makes a copy first.
        workspace, stream, dtype: None. XLA plans the memory and chooses the stream, and JAX arrays
            say their own dtype.
        The other options: Python values, part of the compiled program.

    Returns:
        out. vmap runs its calls one after the other. Asking for a gradient raises ValueError.

    Oracle: reference.fused_experts.
    """
    arguments = {
        "hidden_states": hidden_states,
        "w13": w13,
        "w2": w2,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
    }
    start = options.get("expert_start")
    if _is_array(start):
        _check_no_map(options.get("expert_map"))
        options["expert_start"] = None
        if _is_array(w13) and w13.ndim and _is_array(topk_ids) and topk_ids.dtype.kind == "i":
            arguments["topk_ids"] = _local_ids(topk_ids, _scalar(start), w13.shape[0])
    return _call("fused_experts", arguments, options)


def fused_moe(hidden_states, w13, w2, router_logits, *, routing, **options):
    """Routing and the layer as a JAX function; as `fusedmoe.fused_moe`.

    Args:
        routing: a `Routing`; its tensors are JAX or NumPy arrays.
        The others: as `fused_experts` of this module.

    Returns:
        out.

    Oracle: reference.fused_moe.
    """
    arguments = {
        "hidden_states": hidden_states,
        "w13": w13,
        "w2": w2,
        "router_logits": router_logits,
        **_routing_arguments(routing),
    }
    start = options.get("expert_start")
    if _is_array(start):
        _check_no_map(options.get("expert_map"), routing.expert_map, routing.replica_map)
        options["expert_start"] = None
        if _is_array(w13) and w13.ndim and _is_array(router_logits) and router_logits.ndim:
            ids = np.arange(
                router_logits.shape[-1] + routing.num_fused_shared_experts, dtype="int32"
            )
            options["expert_map"] = _local_ids(ids, _scalar(start), w13.shape[0])
    return _call("fused_moe", arguments, options)


def route(router_logits, routing=None, **options):
    """Stage 1 as a JAX function; as `fusedmoe.route`.

    Args:
        router_logits: [num_tokens, num_experts] float32, bfloat16 or float16.
        routing: a `Routing`; its tensors are JAX or NumPy arrays. None: made of the options.
        options: the fields of `Routing`, instead of it.

    Returns:
        (topk_weights, topk_ids).

    Oracle: reference.route.
    """
    outputs = {name: options.pop(name, None) for name in _ROUTE_OUTPUTS}
    if routing is None and options:
        routing = Routing(**options)
    elif options:
        raise TypeError(f"routing: expected None where its fields are given ({', '.join(options)})")
    arguments = {"router_logits": router_logits, **_routing_arguments(routing)}
    arguments["ids_dtype"] = routing.ids_dtype
    return _call("route", arguments, outputs)


_ROUTE_OUTPUTS = ("out_weights", "out_ids", "out_packed", "out_counts", "stream")
_SIGNATURES = {
    function.__name__: inspect.signature(getattr(ops, function.__name__))
    for function in (fused_experts, fused_moe, route)
}
for _function in (fused_experts, fused_moe, route):
    _function.__signature__ = _SIGNATURES[_function.__name__]  # for help() and editors


def _routing_arguments(routing):
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a fusedmoe.Routing, got {type(routing).__name__}")
    return {
        "topk": routing.topk,
        "method": routing.kernel_method,
        "routing_scale": routing.routed_scaling_factor,
        "knobs": routing.knobs,
    }


# -------------------------------------------------------------------------------------------------
# expert_start that differs between the devices of one program: no attribute, arithmetic on the ids
# -------------------------------------------------------------------------------------------------


def _scalar(start):
    import jax.numpy as jnp

    if start.size != 1 or start.dtype.kind not in "iu":
        raise ValueError(
            "expert_start: expected an int or an integer array of one element, "
            f"got {start.dtype} {list(start.shape)}"
        )
    return jnp.reshape(start, ())


def _check_no_map(*maps):
    if any(value is not None for value in maps):
        raise ValueError(
            "expert_start: expected None or an int where an expert_map or a replica_map is given, "
            "got an array"
        )


def _local_ids(ids, start, num_experts):
    """Global ids as local ones, -1 where another device has the expert."""
    import jax.numpy as jnp

    local = ids - start.astype(ids.dtype)
    return jnp.where((local >= 0) & (local < num_experts), local, -1)


# -------------------------------------------------------------------------------------------------
# From arguments to the custom call
# -------------------------------------------------------------------------------------------------

_FIRST_TENSOR = 9  # of Routing.knobs
_ROUTING_TENSORS = (
    "correction_bias",
    "expert_scale",
    "num_token_non_padded",
    "expert_map",
    "replica_map",
    "tid2eid",
    "token_ids",
)
_TENSORS = {
    "hidden_states",
    "w13",
    "w2",
    "topk_weights",
    "topk_ids",
    "router_logits",
    "w13_bias",
    "w2_bias",
    "shared_output",
    "expert_map",
    "out",
    "workspace",
    "out_weights",
    "out_ids",
    "out_packed",
    "out_counts",
}


def _is_array(value):
    import jax

    return isinstance(value, (jax.Array, np.ndarray))


def _call(function, arguments, options):
    program = _program()
    _check_options(function, options)
    arguments |= options
    donated = None
    if (out := arguments.get("out")) is not None:
        for name in ("hidden_states", "shared_output"):
            if out is arguments.get(name):
                donated, arguments["out"] = name, None
    arrays, static = _split(arguments)
    static = _Static(function, static, donated, _on_gpu(arrays))
    if static.hash is None:  # something that is no right argument: the extension has the words
        _describe(arrays, static)
        raise TypeError(f"{function}: expected options that can be hashed, got {static.arguments}")
    _C._read_environment()  # a handler runs without the GIL, which that needs
    return program(arrays, static)


def _check_options(function, options):
    for name in options:
        if name not in _SIGNATURES[function].parameters:
            raise TypeError(f"{function}: expected a keyword of its signature, got {name!r}")
    if options.get("stream") is not None:
        raise ValueError(
            "stream: expected None, because XLA runs the call on a stream of its own, "
            f"got {options['stream']!r}"
        )
    if options.get("dtype") is not None:
        raise NotImplementedError(
            "dtype: expected None, because JAX arrays say their own dtype, "
            f"got {options['dtype']!r}; jax.lax.bitcast_convert_type reads integers as numbers"
        )


def _split(arguments):
    """(arrays by name, everything else by name)"""
    arrays, static = {}, {}
    for name, value in arguments.items():
        if name == "knobs" and value is not None:
            static[name], tensors = value[:_FIRST_TENSOR], value[_FIRST_TENSOR:]
            for index, tensor in enumerate(tensors):
                _check_array(_ROUTING_TENSORS[index], tensor)
            arrays[name] = tensors
        elif name in _TENSORS and _check_array(name, value):
            arrays[name] = value
        else:
            static[name] = value
    return arrays, static


def _check_array(name, value):
    """True for an array that JAX takes as it is. What is no tensor at all is left to the extension,
    which refuses it."""
    import jax

    if isinstance(value, jax.Array):
        return True
    array = isinstance(value, np.ndarray)
    if array and not isinstance(value, np.ma.MaskedArray) and value.dtype.kind not in "OSUMm":
        if jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype:
            return True
        raise TypeError(
            f"{name}: expected a dtype that JAX keeps (jax_enable_x64 is off), got {value.dtype}"
        )
    if not array and hasattr(type(value), "__dlpack__"):
        kind = type(value)
        raise TypeError(
            f"{name}: expected a JAX or NumPy array, got {kind.__module__}.{kind.__qualname__}"
        )
    return False


def _on_gpu(arrays):
    """True where the call is known to run on a GPU: not where it is traced."""
    import jax

    first = arrays.get("hidden_states", arrays.get("router_logits"))
    if isinstance(first, jax.core.Tracer):
        return False
    if isinstance(first, jax.Array):
        return next(iter(first.devices())).platform == "gpu"
    return jax.default_backend() == "gpu"


class _Static:
    """What is no array: part of the key of a compiled program. True and 1 are different keys,
    since one of them may be an error."""

    def __init__(self, function, arguments, donated, on_gpu):
        self.function, self.arguments = function, arguments
        self.donated, self.on_gpu = donated, on_gpu
        self.key = (function, donated, on_gpu, *_typed(sorted(arguments.items())))
        try:
            self.hash = hash(self.key)
        except TypeError:
            self.hash = None

    def __hash__(self):
        return self.hash

    def __eq__(self, other):
        return self.key == other.key


def _typed(items):
    for name, value in items:
        if type(value) is tuple:
            value = tuple(_typed(enumerate(value)))
        yield name, type(value), value


def _describe(arrays, static):
    """(operands, [(shape, dtype)], workspace bytes, attributes) of a call; the extension parses,
    checks and plans it as any other, by the shapes of its arrays."""
    device = 0 if static.on_gpu else -1

    def abstract(name, array):
        if not _is_array(array):
            return array
        if not all(isinstance(extent, int) for extent in array.shape):
            raise NotImplementedError(
                f"{name}: expected a shape of numbers, got {list(array.shape)}; "
                "programs with symbolic dimensions are not built yet"
            )
        return _C._Abstract(array, tuple(array.shape), str(array.dtype), device)

    arguments = static.arguments | {
        name: abstract(name, array) for name, array in arrays.items() if name != "knobs"
    }
    if "knobs" in arrays:
        arguments["knobs"] += tuple(map(abstract, _ROUTING_TENSORS, arrays["knobs"]))
    return getattr(_C, static.function)(**arguments)


def _traced(arrays, static):
    import jax

    operands, outputs, workspace, attributes = _describe(arrays, static)
    results = [*outputs, ((workspace,), "uint8")] if workspace else outputs
    operands, varying = _vary_alike(operands)
    aliases = {}
    if static.donated:
        place = next(i for i, x in enumerate(operands) if x is arrays[static.donated])
        aliases[place] = 0
    call = jax.ffi.ffi_call(
        f"fusedmoe_{static.function}",
        [jax.ShapeDtypeStruct(shape, np.dtype(dtype), **varying) for shape, dtype in results],
        vmap_method="sequential",
        input_output_aliases=aliases,
    )
    written = call(*operands, **{name: _attribute(value) for name, value in attributes.items()})
    return written[0] if len(outputs) == 1 else tuple(written[: len(outputs)])


def _attribute(value):
    """XLA takes the width of a number from NumPy's type."""
    kinds = {int: np.int64, float: np.float64}
    return kinds[type(value)](value) if type(value) in kinds else value


def _vary_alike(operands):
    """Under shard_map an array varies over some axes of the mesh or is the same everywhere. The
    results of a custom call vary as its operands do, which therefore have to agree."""
    import jax

    def axes(array):
        kind = jax.typeof(array)
        kind = getattr(kind, "manual_axis_type", kind)
        return getattr(kind, "varying", getattr(kind, "vma", frozenset()))

    every = frozenset().union(*(axes(array) for array in operands))
    if not every:
        return operands, {}
    if hasattr(jax.lax, "pcast"):
        vary = functools.partial(jax.lax.pcast, to="varying")
    else:  # before JAX 0.8
        vary = jax.lax.pvary
    operands = [vary(x, tuple(every - axes(x))) if every - axes(x) else x for x in operands]
    kind = jax.typeof(operands[0])
    name = "manual_axis_type" if hasattr(kind, "manual_axis_type") else "vma"
    sharding = jax.sharding.NamedSharding(kind.sharding.mesh, jax.sharding.PartitionSpec())
    return operands, {"sharding": sharding, name: getattr(kind, name)}


@functools.cache
def _program():
    """The jitted function of every call; registers the handlers. RuntimeError with a sentence
    where this JAX has no such door."""
    try:
        import jax
        import jax.ffi

        for function, platform, handler in _C._xla_handlers():
            jax.ffi.register_ffi_target(f"fusedmoe_{function}", handler, platform=platform)
    except Exception as error:
        raise RuntimeError(
            f"jax: expected jax.ffi to take a custom call ({TESTED} are tested), "
            f"got {type(error).__name__}: {error}"
        ) from error
    return jax.jit(_traced, static_argnums=1, inline=True)


# -------------------------------------------------------------------------------------------------
# For the functions of the package itself: JAX arrays on the CPU, outside of jit
# -------------------------------------------------------------------------------------------------


def allocate(prototype, shape, dtype_name):
    """JAX arrays are immutable: the result is computed into a NumPy array and handed to JAX."""
    import jax

    from .numpy import result_dtype

    buffer = np.empty(shape, result_dtype(prototype.dtype, dtype_name))
    device = next(iter(prototype.devices()))
    return buffer, lambda written: jax.device_put(written, device)


def current_stream(prototype, device_id):
    raise NotImplementedError(
        "hidden_states: expected a JAX array on the CPU, got one on a GPU: call the function of "
        "this name in fusedmoe.frameworks.jax, which runs on XLA's stream"
    )
