"""The JAX door: custom calls of XLA with the results and the errors of the direct call."""

import gc
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import fusedmoe
import numpy as np
import pytest
from fusedmoe import _C, Routing
from support import (
    BF16,
    F16,
    F32,
    Layer,
    assert_close,
    have,
    make_layer,
    run_layer,
    same_bits,
)
from test_dlpack_abi import compile_and_run

if not have("jax"):
    pytest.skip("jax is not installed", allow_module_level=True)

import jax
import jax.numpy as jnp
from fusedmoe.frameworks import jax as door

ROOT = Path(__file__).parent.parent
# INVALID_ARGUMENT is a ValueError where the run ends before the call of it returns.
RUN_ERRORS = (ValueError, jax.errors.JaxRuntimeError)


@pytest.fixture(autouse=True)
def on_the_cpu(request):
    """Arrays are made on the CPU, on a machine with a GPU too, unless a test is marked gpu."""
    if request.node.get_closest_marker("gpu"):
        try:
            device = jax.devices("gpu")[0]
        except RuntimeError:
            pytest.skip("JAX sees no GPU")
    else:
        device = jax.devices("cpu")[0]
    with jax.default_device(device):
        yield device


def put(array):
    return jnp.asarray(array)


def arrays_of(layer):
    """(five arrays, keyword arguments), on the default device."""
    options = {
        name: put(value) if name in Layer.TENSOR_OPTIONS else value
        for name, value in layer.options.items()
    }
    return [put(array) for array in layer.tensors().values()], options


def run_jitted(layer):
    """The call inside jit, with every tensor an argument of the program."""
    arrays, options = arrays_of(layer)
    tensors = {name: options.pop(name) for name in Layer.TENSOR_OPTIONS if name in options}
    program = jax.jit(lambda arrays, tensors: door.fused_experts(*arrays, **tensors, **options))
    return np.asarray(program(arrays, tensors))


# -------------------------------------------------------------------------------------------------
# The header
# -------------------------------------------------------------------------------------------------

WHOLE = {  # struct -> fields
    "XLA_FFI_Extension_Base": ["struct_size", "type", "next"],
    "XLA_FFI_Api_Version": ["struct_size", "major_version", "minor_version"],
    "XLA_FFI_Error_Create_Args": ["struct_size", "message", "errc"],
    "XLA_FFI_Buffer": ["struct_size", "extension_start", "dtype", "data", "rank", "dims"],
    "XLA_FFI_ByteSpan": ["ptr", "len"],
    "XLA_FFI_Scalar": ["dtype", "value"],
    "XLA_FFI_Args": ["struct_size", "extension_start", "size", "types", "args"],
    "XLA_FFI_Rets": ["struct_size", "extension_start", "size", "types", "rets"],
    "XLA_FFI_Attrs": ["struct_size", "extension_start", "size", "types", "names", "attrs"],
    "XLA_FFI_Stream_Get_Args": ["struct_size", "extension_start", "ctx", "stream"],
    "XLA_FFI_Metadata_Extension": ["extension_base", "metadata"],
}
PREFIXES = {  # the same; they are longer upstream
    "XLA_FFI_Api": ["struct_size", "api_version", "XLA_FFI_Error_Create", "XLA_FFI_Stream_Get"],
    "XLA_FFI_CallFrame": "struct_size extension_start api ctx stage args rets attrs".split(),
    "XLA_FFI_Metadata": ["struct_size", "api_version", "traits"],
}


def test_header_has_the_layout_of_jaxlib(tmp_path):
    upstream = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")
    ours = ROOT / "csrc" / "xla_ffi.h"
    constants = re.findall(r"\bXLA_FFI_\w+(?= = \d)", ours.read_text())
    assert "XLA_FFI_DataType_BF16" in constants and "XLA_FFI_API_MAJOR" in constants
    structs = {**WHOLE, **PREFIXES}
    (tmp_path / "ours").mkdir()
    mine = compile_and_run(tmp_path / "ours", ours, structs, constants)
    new, old = "XLA_FFI_InternalExtension", "XLA_FFI_Extension_Base"
    if re.search(rf"\b{new}\b", upstream.read_text()):
        structs[new] = structs.pop(old)
    theirs = compile_and_run(tmp_path, upstream, structs, constants)
    theirs = {re.sub(rf"^{new}\b", old, name): number for name, number in theirs.items()}
    assert mine.pop("XLA_FFI_API_MINOR") <= theirs.pop("XLA_FFI_API_MINOR")
    for name in PREFIXES:
        assert mine.pop(name) <= theirs.pop(name)
    assert mine == theirs


def describe(function="fused_experts", layer=None, **options):
    """What the extension says of a call by its shapes."""
    layer = layer or make_layer()
    tensors = {
        name: _C._Abstract(array, array.shape, array.dtype.name, -1)
        for name, array in layer.tensors().items()
    }
    return getattr(_C, function)(**tensors, **options)


def test_every_option_travels():
    text = (ROOT / "csrc" / "moe.h").read_text()
    body = re.search(r"typedef struct moe_options \{(.*?)\} moe_options;", text, re.S)[1]
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    fields = {name for line in body.split(";") for name in re.findall(r"\w+(?=,|$)", line.strip())}
    attributes = describe()[3]
    assert set(attributes) == fields | {"abi", "operands", "results", "workspace_limit"}
    assert list(attributes) == sorted(attributes)


# -------------------------------------------------------------------------------------------------
# Results: those of the direct call, bit for bit
# -------------------------------------------------------------------------------------------------

LAYERS = {
    "plain": {},
    "bias": {"w13_bias": F32, "w2_bias": F32, "shared_output": True, "routed_scaling_factor": 2.5},
    "gpt-oss": {"activation": "swiglu_oai", "w13_order": "interleaved", "activation_limit": 7.0},
    "limit": {"activation_limit": 0.5, "clamp": "before", "apply_router_weight_on_input": True},
    "plain mlp": {"gated": False, "activation": "relu2", "weights_dtype": BF16},
    "rows": {"no_combine": "weighted"},
    "unweighted rows": {"no_combine": "unweighted", "w13_order": "up_gate"},
    "map": {"expert_map": [2, -1, 0, 3, -1, 1], "num_ids": 6},
    "start": {"expert_start": 4, "num_ids": 12},
    "dropped": {"routing": "dropped"},
    "odd sizes": {"hidden_size": 37, "intermediate_size": 19},
    "one token": {"num_tokens": 1},
    "no token": {"num_tokens": 0},
}


@pytest.mark.parametrize(
    "case, dtype", [*((c, d) for c in LAYERS for d in (BF16, F32)), ("plain", F16)]
)
def test_jit_gives_the_bits_of_the_direct_call(cpu, seed, case, dtype):
    layer = make_layer(seed, dtype=dtype, **LAYERS[case])
    got = run_jitted(layer)
    assert got.dtype == dtype
    assert same_bits(got, run_layer(cpu, layer))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_outside_of_jit(seed, dtype):
    layer = make_layer(seed, 9, 48, 32, 4, 2, dtype, shared_output=True)
    arrays, options = arrays_of(layer)
    out = door.fused_experts(*arrays, **options)
    assert isinstance(out, jax.Array)
    assert_close(np.asarray(out), *layer.expected(), seed=seed)
    from_numpy = door.fused_experts(**layer.tensors(), **layer.options)
    assert same_bits(np.asarray(from_numpy), np.asarray(out))


ROUTINGS = {
    "softmax_topk": {"topk": 2},
    "renormalised": {"topk": 2, "renormalize": True, "routed_scaling_factor": 1.5},
    "grouped": {
        "topk": 2,
        "method": "sigmoid_bias_grouped",
        "num_groups": 2,
        "topk_groups": 1,
        "correction_bias": np.linspace(-1, 1, 6, dtype=F32),
    },
    "scaled": {"topk": 3, "expert_scale": np.linspace(0.5, 2, 6, dtype=F32), "softcap": 3.0},
    "table": {
        "topk": 2,
        "method": "hash",
        "tid2eid": np.arange(40, dtype=np.int32).reshape(20, 2) % 6,
        "token_ids": np.arange(5, dtype=np.int32),
    },
}


@pytest.mark.parametrize("case", ROUTINGS)
def test_route_and_fused_moe(rng, seed, case):
    layer = make_layer(seed, 5, 32, 16, 6)
    logits = rng.standard_normal((5, 6), dtype=F32)
    fields = {
        name: put(value) if isinstance(value, np.ndarray) else value
        for name, value in ROUTINGS[case].items()
    }
    tensors = layer.hidden_states, layer.w13, layer.w2
    want = fusedmoe.route(logits, **ROUTINGS[case])
    got = jax.jit(lambda logits: door.route(logits, Routing(**fields)))(logits)
    assert isinstance(got, tuple) and all(map(same_bits, map(np.asarray, got), want))
    want = fusedmoe.fused_moe(*tensors, logits, routing=Routing(**ROUTINGS[case]))
    program = jax.jit(lambda *a: door.fused_moe(*a, routing=Routing(**fields)))
    assert same_bits(np.asarray(program(*tensors, logits)), want)


def test_route_writes_the_dtypes_it_is_asked_for(rng):
    logits = rng.standard_normal((5, 6), dtype=F32)
    weights, ids = door.route(logits, topk=2, weights_dtype="bfloat16")
    assert weights.dtype == BF16 and ids.dtype == np.int32
    _, wide = door.route(logits, topk=2, ids_dtype="int64")
    assert wide.dtype in (np.int64, np.int32)  # JAX before 0.10 narrows it
    assert (np.asarray(wide) == np.asarray(ids)).all()


# -------------------------------------------------------------------------------------------------
# Transformations
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(seed):
    layer = make_layer(seed, 6, 32, 16, 4, 2, F32)
    want = np.asarray(fusedmoe.fused_experts(**layer.tensors()))
    return arrays_of(layer)[0], want


def test_vmap(small):
    arrays, want = small
    xs = jnp.stack([arrays[0], -arrays[0], arrays[0]])
    got = np.asarray(jax.vmap(lambda x: door.fused_experts(x, *arrays[1:]))(xs))
    assert same_bits(got[0], want) and same_bits(got[2], want) and not same_bits(got[1], want)
    everything = jax.jit(jax.vmap(door.fused_experts))(*(jnp.stack([a, a]) for a in arrays))
    assert same_bits(np.asarray(everything[1]), want)


def test_scan_and_while(small):
    arrays, want = small
    layer = lambda x: door.fused_experts(x, *arrays[1:])  # noqa: E731
    thrice = np.asarray(layer(layer(layer(arrays[0]))))
    scanned, rows = jax.lax.scan(lambda x, _: (layer(x), layer(x)), arrays[0], length=3)
    assert same_bits(np.asarray(scanned), thrice) and same_bits(np.asarray(rows[0]), want)
    _, looped = jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(c[1])), (0, arrays[0])
    )
    assert same_bits(np.asarray(looped), thrice)


@pytest.mark.parametrize("name", ["hidden_states", "shared_output"])
def test_the_result_takes_the_memory_of_a_donated_array(small, name):
    (x, *rest), _ = small
    shared = x * 2

    def layer(x, shared):
        out = x if name == "hidden_states" else shared
        return door.fused_experts(x, *rest, shared_output=shared, out=out)

    want = np.asarray(door.fused_experts(x, *rest, shared_output=shared))
    donated = jnp.array({"hidden_states": x, "shared_output": shared}[name])
    address = donated.unsafe_buffer_pointer()
    place = ["hidden_states", "shared_output"].index(name)
    arguments = [donated if i == place else (x, shared)[i] for i in range(2)]
    out = jax.jit(layer, donate_argnums=place)(*arguments)
    assert donated.is_deleted() and out.unsafe_buffer_pointer() == address
    assert same_bits(np.asarray(out), want)
    kept = np.asarray(x)  # and without a donation nothing is written in place
    assert same_bits(np.asarray(jax.jit(layer)(x, shared)), want)
    assert same_bits(np.asarray(layer(x, shared)), want)
    assert same_bits(np.asarray(x), kept)


def test_a_gradient_is_refused(small):
    arrays, _ = small
    with pytest.raises(ValueError, match="fusedmoe_fused_experts.*cannot be differentiated"):
        jax.grad(lambda x: door.fused_experts(x, *arrays[1:]).sum())(arrays[0])


def test_expert_start_may_be_traced(cpu, seed):
    layer = make_layer(seed, expert_start=4, num_ids=12)
    arrays, _ = arrays_of(layer)
    program = jax.jit(lambda start, *arrays: door.fused_experts(*arrays, expert_start=start))
    assert same_bits(np.asarray(program(4, *arrays)), run_layer(cpu, layer))
    for start, error in ((jnp.zeros(2, jnp.int32), "int32 .2."), (jnp.ones(()), "float32 ..")):
        with pytest.raises(ValueError, match=f"expert_start: expected an int.*{error}"):
            door.fused_experts(*arrays, expert_start=start)
    for options in ({}, {"expert_map": jnp.zeros(4, jnp.int32)}):
        routing = Routing(2, expert_map=None if options else jnp.zeros(4, jnp.int32))
        with pytest.raises(ValueError, match="expert_start: expected None or an int where an exp"):
            door.fused_moe(*arrays[:4], routing=routing, expert_start=jnp.int32(0), **options)


def export(function, *arguments):
    from jax import export

    check = export.DisabledSafetyCheck.custom_call("fusedmoe_fused_experts")
    return export.export(jax.jit(function), platforms=["cpu", "cuda"], disabled_checks=[check])(
        *arguments
    )


def test_a_program_can_be_exported(small):
    arrays, want = small
    exported = export(door.fused_experts, *arrays)
    door.register()
    if have("flatbuffers"):
        exported = jax.export.deserialize(exported.serialize())
    assert same_bits(np.asarray(exported.call(*arrays)), want)


def test_symbolic_shapes_are_refused(small):
    from jax import export as jax_export

    x, *rest = small[0]
    (tokens,) = jax_export.symbolic_shape("tokens")
    shapes = [jax.ShapeDtypeStruct((tokens, *a.shape[1:]), a.dtype) for a in (x, *rest[2:])]
    with pytest.raises(NotImplementedError, match=r"hidden_states: .*\[tokens, 32\].*symbolic"):
        export(lambda x, w, i: door.fused_experts(x, *rest[:2], w, i), *shapes)


def test_64_bit_ids(cpu, seed):
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    layer = make_layer(seed, ids_dtype=np.int64, expert_start=4, num_ids=12)
    layer.topk_ids[0] = 2**32 + 4, -(2**63)  # dropped, in 64 bits only
    with enable_x64(True):
        assert same_bits(run_jitted(layer), run_layer(cpu, layer))


# Four devices are four threads of a CPU, and have to be asked for before JAX starts.
EXPERT_PARALLEL = """
    import json, sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    sys.path.insert(0, {tests!r})
    from fusedmoe import Routing, fused_experts
    from fusedmoe.frameworks import jax as door
    from support import BF16, F32, Layer, make_layer, same_bits

    def parts_of(layer, parts):
        n = layer.w2.shape[0] // parts
        for i in range(parts):
            here = slice(i * n, (i + 1) * n)
            tensors = layer.tensors() | {{"w13": layer.w13[here], "w2": layer.w2[here]}}
            yield fused_experts(**tensors, expert_start=i * n).astype(np.float64)

    def check(got, layer, parts):
        # psum in float32 of the four results, in an order that is not ours to know
        parts = list(parts_of(layer, parts))
        bound = len(parts) * 2.0**-24 * sum(map(np.abs, parts))
        return bool((np.abs(np.asarray(got, np.float64) - sum(parts)) <= bound).all())

    def place(mesh, arrays, specs):
        return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]

    assert len(jax.devices()) == 4
    E, T, A = P("expert"), P("data"), P()
    ok = {{}}
    for dtype in (BF16, F32):
        layer = make_layer(3, 12, 64, 32, 8, 2, dtype)
        arrays = list(layer.tensors().values())

        def body(x, w13, w2, weights, ids):
            start = jax.lax.axis_index("expert") * w13.shape[0]
            part = door.fused_experts(x, w13, w2, weights, ids, expert_start=start)
            return jax.lax.psum(part.astype(jnp.float32), "expert")

        for kind in (AxisType.Auto, AxisType.Explicit):
            for vma in (True, False):
                mesh = jax.make_mesh((4,), ("expert",), axis_types=(kind,))
                specs = (A, E, E, A, A)
                f = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=A, check_vma=vma)
                got = jax.jit(f)(*place(mesh, arrays, specs))
                ok[f"experts {{dtype}} {{kind}} {{vma}}"] = check(got, layer, 4)
        mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
        specs = (T, E, E, T, T)
        f = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=T)
        ok[f"tokens and experts {{dtype}}"] = check(
            jax.jit(f)(*place(mesh, arrays, specs)), layer, 2
        )
        if dtype == F32:  # routed inside; and arrays that are sharded without a shard_map
            logits = np.random.default_rng(4).standard_normal((12, 8)).astype(F32)
            routing = Routing(2, num_fused_shared_experts=0)
            weights, ids = door.route(logits, routing)
            routed = make_layer(3, 12, 64, 32, 8, 2, dtype)
            routed.topk_weights, routed.topk_ids = np.asarray(weights), np.asarray(ids)

            def moe(x, w13, w2, logits):
                start = jax.lax.axis_index("expert") * w13.shape[0]
                part = door.fused_moe(x, w13, w2, logits, routing=routing, expert_start=start)
                return jax.lax.psum(part, "expert")

            mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
            specs = (A, E, E, A)
            f = jax.shard_map(moe, mesh=mesh, in_specs=specs, out_specs=A)
            got = jax.jit(f)(*place(mesh, [*arrays[:3], logits], specs))
            ok["fused_moe"] = check(got, routed, 4)
            got = jax.jit(door.fused_experts)(*place(mesh, arrays, (A, E, E, A, A)))
            want = fused_experts(**layer.tensors())
            ok["gathered by XLA"] = same_bits(np.asarray(got), want)
    print(json.dumps(ok))
"""


def test_expert_parallelism_over_four_devices():
    script = textwrap.dedent(EXPERT_PARALLEL).format(tests=str(Path(__file__).parent))
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    ok = json.loads(run.stdout)
    assert len(ok) == 12 and all(ok.values()), ok


# -------------------------------------------------------------------------------------------------
# Wrong calls
# -------------------------------------------------------------------------------------------------

WRONG = {
    "no tensor": lambda a: {"hidden_states": [[1.0]]},
    "dtype of hidden_states": lambda a: {"hidden_states": a["hidden_states"].astype(jnp.int32)},
    "rank of hidden_states": lambda a: {"hidden_states": a["hidden_states"][0]},
    "dtype of w13": lambda a: {"w13": a["w13"].astype(jnp.float16)},
    "columns of w13": lambda a: {"w13": a["w13"][:, :, :-1]},
    "odd rows of w13": lambda a: {"w13": a["w13"][:, 1:]},
    "experts of w2": lambda a: {"w2": a["w2"][1:]},
    "w2 is None": lambda a: {"w2": None},
    "dtype of topk_weights": lambda a: {"topk_weights": a["topk_ids"]},
    "rows of topk_weights": lambda a: {"topk_weights": a["topk_weights"][1:]},
    "dtype of topk_ids": lambda a: {"topk_ids": a["topk_weights"]},
    "too many slots": lambda a: {"topk_ids": jnp.zeros((7, 33), jnp.int32)},
    "w13_bias": lambda a: {"w13_bias": a["topk_weights"]},
    "shared_output with rows": lambda a: {
        "shared_output": a["hidden_states"],
        "no_combine": "weighted",
    },
    "dtype of expert_map": lambda a: {"expert_map": jnp.zeros(4, jnp.float32)},
    "expert_map and expert_start": lambda a: {
        "expert_map": jnp.zeros(4, jnp.int32),
        "expert_start": 2,
    },
    "activation": lambda a: {"activation": "swish"},
    "kind of activation": lambda a: {"activation": ["silu"]},
    "activation_alpha": lambda a: {"activation_alpha": 2.0},
    "gated": lambda a: {"gated": 1},
    "routed_scaling_factor": lambda a: {"routed_scaling_factor": float("nan")},
    "no_combine": lambda a: {"no_combine": True},
    "expert_start": lambda a: {"expert_start": -1},
    "quant": lambda a: {"quant": "fp8_block"},
    "w13_scale": lambda a: {"w13_scale": a["hidden_states"]},
    "batch_invariant": lambda a: {"batch_invariant": True},
    "out": lambda a: {"out": a["hidden_states"] + 1},
    "workspace": lambda a: {"workspace": jnp.zeros(1 << 20, jnp.uint8)},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_fails_as_the_direct_call_does(case, seed):
    layer = make_layer(seed)
    arrays = dict(zip(Layer.TENSORS, arrays_of(layer)[0], strict=True))
    wrong = {**arrays, **WRONG[case](arrays)}
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as direct:
        fusedmoe.fused_experts(**wrong)
    with pytest.raises(direct.type) as eager:
        door.fused_experts(**wrong)
    assert str(eager.value) == str(direct.value)
    traced = {name: wrong.pop(name) for name in list(wrong) if isinstance(wrong[name], jax.Array)}
    if case == "w13_scale":  # its text names the kind of array, which is a tracer here
        wrong["w13_scale"] = traced.pop("w13_scale")
    with pytest.raises(direct.type) as jitted:
        jax.jit(lambda traced: door.fused_experts(**traced, **wrong))(traced)
    assert str(jitted.value) == str(direct.value)


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"topk": 7}, "topk: expected a number of experts in 1 .. 6, got 7"),
        ({"topk": 2, "expert_scale": np.ones(5, F32)}, r"expert_scale: expected shape \[6\]"),
        ({"topk": 2, "softcap": -1.0}, "softcap"),
    ],
)
def test_a_wrong_routing_fails_as_the_direct_call_does(rng, fields, error):
    logits = rng.standard_normal((5, 6), dtype=F32)
    with pytest.raises(ValueError, match=error) as direct:
        fusedmoe.route(logits, **fields)
    with pytest.raises(ValueError) as traced:
        jax.jit(lambda logits: door.route(logits, **fields))(logits)
    assert str(traced.value) == str(direct.value)


def test_what_jax_itself_decides_is_refused(small):
    arrays, _ = small
    names = dict(zip(Layer.TENSORS, arrays, strict=True))
    with pytest.raises(ValueError, match="stream: expected None"):
        door.fused_experts(*arrays, stream=0)
    with pytest.raises(NotImplementedError, match="dtype: expected None.*'bfloat16'"):
        door.fused_experts(*arrays, dtype="bfloat16")
    with pytest.raises(TypeError, match="fused_experts: expected a keyword of its signature"):
        door.fused_experts(*arrays, topk=2)
    with pytest.raises(TypeError, match="routing: expected a fusedmoe.Routing, got int"):
        door.fused_moe(*arrays[:3], arrays[3], routing=2)
    # JAX would halve these without a word
    for name, dtype in (("hidden_states", np.float64), ("topk_ids", np.int64)):
        wide = np.asarray(names[name]).astype(dtype)
        with pytest.raises(TypeError, match=f"{name}: expected a dtype that JAX keeps"):
            door.fused_experts(**{**names, name: wide})
    masked = np.ma.masked_array(np.asarray(arrays[0]))
    with pytest.raises(TypeError, match="hidden_states: expected a tensor without a mask"):
        door.fused_experts(masked, *arrays[1:])
    for odd in (np.array([[None]]), np.array([["x"]])):
        with pytest.raises(TypeError, match="hidden_states: "):
            door.fused_experts(odd, *arrays[1:])
    with pytest.raises(TypeError, match="routed_scaling_factor: expected a number.*Tracer"):
        jax.jit(lambda s: door.fused_experts(*arrays, routed_scaling_factor=s))(2.0)


def test_another_frameworks_tensor_is_refused(small):
    class Tensor:
        def __dlpack__(self):
            raise AssertionError("asked for its memory")

    arrays, _ = small
    with pytest.raises(TypeError, match="w13: expected a JAX or NumPy array, got .*Tensor"):
        door.fused_experts(arrays[0], Tensor(), *arrays[2:])


def test_the_direct_call_names_this_door(small):
    arrays, _ = small
    with pytest.raises(TypeError, match="tracer.*fusedmoe.frameworks.jax"):
        jax.jit(fusedmoe.fused_experts)(*arrays)


def test_an_error_of_the_run_keeps_its_words(small, monkeypatch):
    arrays, want = small
    wrong = [*arrays[:4], arrays[4].at[1, 1].set(9)]
    program = jax.jit(door.fused_experts)
    monkeypatch.setenv("FUSEDMOE_CHECK", "1")
    for function in (door.fused_experts, program):
        with pytest.raises(RUN_ERRORS) as error:
            jax.block_until_ready(function(*wrong))
        assert "topk_ids: expected -1 or 0 <= id < 4, got 9 at [1, 1]" in str(error.value)
    assert same_bits(np.asarray(program(*arrays)), want)
    monkeypatch.delenv("FUSEDMOE_CHECK")
    jax.block_until_ready(door.fused_experts(*wrong))


# -------------------------------------------------------------------------------------------------
# The handler alone: programs that this door did not write end in an error, not in a crash
# -------------------------------------------------------------------------------------------------


OUT, WORKSPACE = ((7, 64), "bfloat16"), ((1 << 20,), "uint8")


def custom_call(layer, attributes, results=(OUT, WORKSPACE)):
    """The custom call of `layer` with other attributes (None: left out) and results."""
    door._program()
    operands, _, _, right = describe(layer=layer)
    attributes = {
        name: door._attribute(value)
        for name, value in {**right, **attributes}.items()
        if value is not None
    }
    shapes = [jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for shape, dtype in results]
    call = jax.ffi.ffi_call("fusedmoe_fused_experts", shapes, vmap_method="sequential")
    return jax.block_until_ready(call(*operands, **attributes))


def test_the_custom_call_as_it_is(cpu):
    layer = make_layer(5)
    assert same_bits(np.asarray(custom_call(layer, {})[0]), run_layer(cpu, layer))


FOREIGN = {
    "version": ({"abi": "0.0.1"}, "traced with version.*got one of version 0.0.1"),
    "no version": ({"abi": None}, "got one of version unknown"),
    "one attribute less": ({"topk": None}, "trace and compile it again"),
    "one attribute more": ({"zeal": 1}, "trace and compile it again"),
    "another attribute": ({"topk": None, "topl": 1}, "topk: expected a number"),
    "enumeration": ({"activation": 99}, "activation: expected 0 to 5, got 99"),
    "method": ({"method": 1 << 40}, "method: expected 0 to"),
    "kind of number": ({"activation": 1.0}, "activation: expected an int64"),
    "kind of text": ({"softcap": "3"}, "softcap: expected a number"),
    "tensor without an array": ({"operands": 0b111111}, "expected an array for router_logits"),
    "array without a tensor": ({"operands": 0b1111}, "operands: expected 4 arrays, got 5"),
    "no such tensor": ({"operands": 0b11111 | 1 << 50}, "operands: expected 5 arrays"),
    "no results": ({"results": 0}, "results: expected those of fused_experts"),
    "an operand as a result": ({"results": 1 | 1 << 25}, "results: expected those of"),
}
FOREIGN_RESULTS = {
    "no workspace": ([OUT], "results: expected an array for workspace"),
    "a small workspace": ([OUT, ((256,), "uint8")], "workspace: expected at least"),
    "shape of out": ([((7, 63), "bfloat16"), WORKSPACE], r"out: expected shape \[7"),
    "dtype of out": ([((7, 64), "float32"), WORKSPACE], "out: expected dtype"),
    "one more": ([OUT, WORKSPACE, WORKSPACE], "results: expected 2 arrays, got 3"),
}


@pytest.mark.parametrize("case", [*FOREIGN, *FOREIGN_RESULTS])
def test_a_foreign_program_is_an_error(case):
    attributes, error = FOREIGN.get(case, ({}, None))
    results, error = FOREIGN_RESULTS.get(case, ((OUT, WORKSPACE), error))
    with pytest.raises(RUN_ERRORS, match=error):
        custom_call(make_layer(5), attributes, results)


def test_the_workspace_may_be_left_out_of_nothing():
    """A workspace that is not in the list of results is missed before anything is written."""
    with pytest.raises(RUN_ERRORS, match="workspace: expected at least"):
        custom_call(make_layer(5), {"results": 1 << 25}, [OUT])


# -------------------------------------------------------------------------------------------------
# Lifetime, threads, versions
# -------------------------------------------------------------------------------------------------


def test_nothing_is_kept_alive(small):
    arrays, _ = small
    x = jnp.array(arrays[0])
    jax.block_until_ready(door.fused_experts(x, *arrays[1:]))
    with pytest.raises(ValueError):
        door.fused_experts(x, arrays[1][:, 1:], *arrays[2:])
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None


def test_calls_from_many_threads(small):
    arrays, want = small
    program, results = jax.jit(door.fused_experts), []

    def calls():
        for _ in range(25):
            results.append(np.asarray(program(*arrays)))

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 100 and all(same_bits(got, want) for got in results)


def test_status():
    version, why = door.status()
    assert version == jax.__version__ and why is None


def test_a_jax_that_refuses_the_handlers_is_one_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no such platform")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    with pytest.raises(RuntimeError, match="jax: expected jax.ffi.*ValueError: no such platform"):
        door._program.__wrapped__()


# -------------------------------------------------------------------------------------------------
# On a GPU
# -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_gpu_jit(gpu, seed, case, dtype):
    layer = make_layer(seed, dtype=dtype, **LAYERS[case])
    got = run_jitted(layer)
    assert_close(got, *layer.expected(), seed=seed)
    assert same_bits(got, run_layer(gpu, layer))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
def test_gpu_inside_of_scan_while_and_vmap(gpu, seed, num_tokens):
    layer = make_layer(seed, num_tokens, 256, 128, 16, 4)
    arrays, _ = arrays_of(layer)
    want = run_layer(gpu, layer)
    run = lambda x: door.fused_experts(x, *arrays[1:])  # noqa: E731
    _, rows = jax.lax.scan(lambda x, _: (x, run(x)), arrays[0], length=3)
    assert all(same_bits(np.asarray(row), want) for row in rows)
    _, last = jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, run(arrays[0] + 0 * c[1])), (0, arrays[0])
    )
    assert same_bits(np.asarray(last), want)
    assert same_bits(np.asarray(jax.vmap(run)(jnp.stack([arrays[0]] * 2))[1]), want)


@pytest.mark.gpu
def test_gpu_runs_again_with_other_numbers(gpu):
    """A program that XLA may have recorded as a graph reads its arrays anew."""
    program = jax.jit(lambda *a: door.fused_experts(*a, out=a[0]), donate_argnums=0)
    for seed in range(8):
        layer = make_layer(
            seed, 33, 128, 64, 8, 2, routing=["uniform", "same", "dropped"][seed % 3]
        )
        got = np.asarray(program(*arrays_of(layer)[0]))
        assert same_bits(got, run_layer(gpu, layer))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ROUTINGS)
def test_gpu_route_and_fused_moe(gpu, rng, seed, case):
    layer = make_layer(seed, 5, 32, 16, 6)
    logits = put(rng.standard_normal((5, 6), dtype=F32))
    routing = Routing(
        **{
            name: put(value) if isinstance(value, np.ndarray) else value
            for name, value in ROUTINGS[case].items()
        }
    )
    weights, ids = jax.jit(lambda logits: door.route(logits, routing))(logits)
    tensors = [put(t) for t in (layer.hidden_states, layer.w13, layer.w2)]
    whole = jax.jit(lambda *a: door.fused_moe(*a, routing=routing))(*tensors, logits)
    parts = door.fused_experts(*tensors, weights, ids)
    assert same_bits(np.asarray(whole), np.asarray(parts))


@pytest.mark.gpu
def test_gpu_float32_says_what_to_do(seed):
    arrays, _ = arrays_of(make_layer(seed, dtype=F32))
    with pytest.raises(NotImplementedError, match="hidden_states: float32 is computed by the CPU"):
        door.fused_experts(*arrays)
    with pytest.raises(
        (NotImplementedError, jax.errors.JaxRuntimeError),
        match="UNIMPLEMENTED: hidden_states: float32",
    ):
        jax.block_until_ready(jax.jit(door.fused_experts)(*arrays))


@pytest.mark.gpu
def test_gpu_direct_call_names_this_door(seed):
    arrays, _ = arrays_of(make_layer(seed))
    with pytest.raises(NotImplementedError, match="fusedmoe.frameworks.jax"):
        fusedmoe.fused_experts(*arrays)


# XLA records what it may into a CUDA graph, and then does not call the handler any more.
COMMAND_BUFFER = """
    import ctypes, sys
    sys.path.insert(0, {tests!r})
    from fusedmoe import _C
    handlers, calls = _C._xla_handlers(), []
    KIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    import jax, numpy as np
    handler = KIND(address(handlers[1][2], None))
    counted = KIND(lambda frame: (calls.append(1), handler(frame))[1])
    assert handlers[1][:2] == ("fused_experts", "CUDA")
    handlers[1] = (*handlers[1][:2], jax.ffi.pycapsule(counted))
    _C._xla_handlers = lambda: handlers
    from fusedmoe.frameworks import jax as door
    from support import make_layer, same_bits
    layers = [make_layer(seed, 8, 256, 128, 8, 2) for seed in range(2)]
    arrays = [[jax.numpy.asarray(a) for a in l.tensors().values()] for l in layers]
    program = jax.jit(lambda *a: door.fused_experts(door.fused_experts(*a), *a[1:]))
    want = [np.asarray(program(*a)) for a in arrays]
    before = len(calls)
    for i in range(20):
        assert same_bits(np.asarray(program(*arrays[i % 2])), want[i % 2])
    print(before, len(calls) - before)
"""


@pytest.mark.gpu
def test_gpu_command_buffers():
    script = textwrap.dedent(COMMAND_BUFFER).format(tests=str(Path(__file__).parent))
    environment = os.environ | {
        "XLA_FLAGS": "--xla_gpu_graph_min_graph_size=1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-4000:]
    before, after = map(int, run.stdout.split())
    assert before > 0 and after < 40, (before, after)  # 2 calls in each of 20 runs
