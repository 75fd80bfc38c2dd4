"""Plain arrays: NumPy and CuPy arrays, views of cuda.core. No layers, no compilers."""

import sys
import warnings

import fusedmoe
import numpy as np
import pytest
from fusedmoe import Experts, Routing, fused_experts, fused_moe
from fusedmoe.frameworks import cuda_core, versions
from fusedmoe.frameworks import cupy as cupy_door
from fusedmoe.frameworks import numpy as numpy_door
from support import BF16, F16, F32, Layer, assert_close, have, make_layer, run_layer, same_bits


def need(module):
    """The module, or skip. What importing it warns about is not ours to fix."""
    if not have(module.partition(".")[0]):
        pytest.skip(f"{module} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            __import__(module)
        except ImportError as error:
            pytest.skip(f"{module} cannot be imported: {error}")
    return sys.modules[module]


@pytest.fixture
def layer(seed):
    return make_layer(seed, 9, 48, 32, 4, 2, F16, w13_bias=F32, w2_bias=F16, shared_output=True)


def failure(call):
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        call()
    return caught.type, str(caught.value)


# Wrong arguments of a layer [9, 48, 32, 4, 2] in float16, for any library that calls itself xp.
BAD = {
    "dtype of the ids": lambda xp, a: {"topk_ids": a["topk_ids"].astype(xp.float32)},
    "dtype of the weights": lambda xp, a: {"topk_weights": a["topk_weights"].astype(xp.float64)},
    "dtypes that differ": lambda xp, a: {"w13": a["w13"].astype(xp.float32)},
    "one dimension": lambda xp, a: {"hidden_states": a["hidden_states"][0]},
    "three dimensions": lambda xp, a: {"hidden_states": a["hidden_states"][None]},
    "tokens that differ": lambda xp, a: {"topk_ids": a["topk_ids"][:-1]},
    "hidden_size that differs": lambda xp, a: {"w13": a["w13"][..., :-1]},
    "experts that differ": lambda xp, a: {"w2": a["w2"][:-1]},
    "columns": lambda xp, a: {"hidden_states": xp.asfortranarray(a["hidden_states"])},
    "negative strides": lambda xp, a: {"w2": a["w2"][::-1]},
    "every second": lambda xp, a: {"hidden_states": xp.repeat(a["hidden_states"], 2, 1)[:, ::2]},
    "bias": lambda xp, a: {"w13_bias": a["w13_bias"][:, :-1]},
    "out of another shape": lambda xp, a: {"out": xp.zeros((9, 47), xp.float16)},
    "out of another dtype": lambda xp, a: {"out": xp.zeros((9, 48), xp.float32)},
    "short workspace": lambda xp, a: {"workspace": xp.zeros(256, xp.uint8)},
    "workspace of int8": lambda xp, a: {"workspace": xp.zeros(1 << 18, xp.int8)},
    "activation": lambda xp, a: {"activation": "relu"},
    "reserved": lambda xp, a: {"quant": "int8"},
}


# -------------------------------------------------------------------------------------------------
# NumPy
# -------------------------------------------------------------------------------------------------


def test_numpy_every_function(layer, rng):
    logits = rng.standard_normal((9, 4)).astype(F32)
    x, w13, w2 = layer.hidden_states, layer.w13, layer.w2
    weights, ids = fusedmoe.route(logits, Routing(2))
    offsets, sorted_token_ids, row_of_slot = fusedmoe.align(ids, 4)
    intermediate = fusedmoe.gate_up(x, w13, offsets, sorted_token_ids, 2)
    rows = fusedmoe.down(intermediate, w2, offsets, sorted_token_ids, 2, topk_weights=weights)
    out = fusedmoe.combine(rows, row_of_slot)
    whole = fused_moe(x, w13, w2, logits, routing=Routing(2))
    assert all(type(a) is np.ndarray for a in (weights, ids, offsets, rows, out, whole))
    assert same_bits(out, whole)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_numpy_bfloat16_as_integers(cpu, seed, kind):
    layer = make_layer(seed, 9, 48, 32, 4, 2, BF16)
    arrays = {
        name: array.view(kind) if array.dtype == BF16 else array
        for name, array in layer.tensors().items()
    }
    out = fused_experts(**arrays, dtype="bfloat16")
    assert out.dtype == kind and same_bits(out.view(BF16), run_layer(cpu, layer))


def test_numpy_experts(cpu, layer):
    bias = {name: layer.options[name] for name in ("w13_bias", "w2_bias")}
    experts = Experts(layer.w13, layer.w2, **bias, max_tokens=9)
    arguments = layer.hidden_states, layer.topk_weights, layer.topk_ids
    out = np.full((9, 48), np.nan, F16)
    shared = layer.options["shared_output"]
    assert experts(*arguments, out=out, shared_output=shared) is out
    assert same_bits(out, run_layer(cpu, layer))


# -------------------------------------------------------------------------------------------------
# CuPy
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def cupy(gpu):
    return need("cupy")


def on_gpu(cupy, layer):
    arrays = {name: cupy.asarray(array) for name, array in layer.tensors().items()}
    return {**arrays, **{name: cupy.asarray(array) for name, array in layer.options.items()}}


@pytest.mark.gpu
@pytest.mark.parametrize("given", ["nothing", "out", "out and workspace"])
def test_cupy_layer(cupy, layer, given):
    arrays = on_gpu(cupy, layer)
    if "out" in given:
        arrays["out"] = cupy.full((9, 48), np.nan, F16)
    if "workspace" in given:
        arrays["workspace"] = cupy.full(1 << 20, 255, np.uint8)
    out = fused_experts(**arrays)
    assert isinstance(out, cupy.ndarray) and out.dtype == F16
    assert "out" not in given or out is arrays["out"]
    want, error = layer.expected()
    assert_close(cupy.asnumpy(out), want, error)


@pytest.mark.gpu
def test_cupy_every_function(cupy, layer, rng):
    logits = cupy.asarray(rng.standard_normal((9, 4)).astype(F32))
    x, w13, w2 = (cupy.asarray(a) for a in (layer.hidden_states, layer.w13, layer.w2))
    weights, ids = fusedmoe.route(logits, Routing(2))
    offsets, sorted_token_ids, row_of_slot = fusedmoe.align(ids, 4)
    intermediate = fusedmoe.gate_up(x, w13, offsets, sorted_token_ids, 2)
    rows = fusedmoe.down(intermediate, w2, offsets, sorted_token_ids, 2, topk_weights=weights)
    out = fusedmoe.combine(rows, row_of_slot)
    whole = fused_moe(x, w13, w2, logits, routing=Routing(2))
    assert all(isinstance(a, cupy.ndarray) for a in (weights, ids, offsets, rows, out, whole))
    experts = Experts(w13, w2, max_tokens=9)(x, weights, ids)
    # The layer may run by kernels with a rounding less than the stages alone.
    assert same_bits(cupy.asnumpy(whole), cupy.asnumpy(experts))
    given = [cupy.asnumpy(a) for a in (weights, ids)]
    tensors = [layer.hidden_states, layer.w13, layer.w2, *given]
    want, error = Layer(layer.seed, *tensors).expected()
    for array in (out, whole):
        assert_close(cupy.asnumpy(array), want, error)


@pytest.mark.gpu
def test_cupy_bfloat16_as_integers(cupy, seed):
    """CuPy has no bfloat16 of its own: 16-bit integers stand for it."""
    layer = make_layer(seed, 9, 48, 32, 4, 2, BF16)
    arrays = {
        name: cupy.asarray(array.view(np.uint16) if array.dtype == BF16 else array)
        for name, array in layer.tensors().items()
    }
    out = fused_experts(**arrays, dtype="bfloat16")
    assert out.dtype == np.uint16
    want, error = layer.expected()
    assert_close(cupy.asnumpy(out).view(BF16), want, error)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["current", "int", "object"])
def test_cupy_stream(cupy, gpu, layer, how):
    """The call waits for what its stream holds, and for nothing else."""
    arrays = on_gpu(cupy, layer)
    x, late = arrays.pop("hidden_states"), cupy.zeros((9, 48), F16)
    out = cupy.full((9, 48), np.nan, F16)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    torch = gpu.torch
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(50_000_000)
    with stream:
        cupy.copyto(late, x)
        if how == "current":
            fused_experts(late, **arrays, out=out)
    if how != "current":
        given = stream.ptr if how == "int" else stream
        fused_experts(late, **arrays, out=out, stream=given)
    assert not stream.done
    stream.synchronize()
    want, error = layer.expected()
    assert_close(cupy.asnumpy(out), want, error)


@pytest.mark.gpu
def test_cupy_strided(cupy, layer):
    arrays = on_gpu(cupy, layer)
    for name in ("hidden_states", "w13", "w2"):
        wide = cupy.full((*arrays[name].shape[:-1], arrays[name].shape[-1] + 5), np.nan, F16)
        wide[..., :-5] = arrays[name]
        arrays[name] = wide[..., :-5]
    want, error = layer.expected()
    assert_close(cupy.asnumpy(fused_experts(**arrays)), want, error)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BAD)
def test_cupy_bad_input(cupy, gpu, layer, name):
    """The exception and the words of the same call with torch tensors."""
    arrays = on_gpu(cupy, layer)
    arguments = {**arrays, **BAD[name](cupy, arrays)}
    torch = gpu.torch
    tensors = {
        k: torch.from_dlpack(v) if isinstance(v, cupy.ndarray) and min(v.strides) >= 0 else v
        for k, v in arguments.items()
    }
    assert failure(lambda: fused_experts(**arguments)) == failure(lambda: fused_experts(**tensors))


@pytest.mark.gpu
def test_cupy_memory_is_flat(cupy, layer):
    arrays = on_gpu(cupy, layer)
    pool = cupy.get_default_memory_pool()
    for _ in range(50):
        fused_experts(**arrays)
    cupy.cuda.Device().synchronize()
    before = pool.used_bytes(), pool.total_bytes()
    for _ in range(10_000):
        fused_experts(**arrays)
    cupy.cuda.Device().synchronize()
    assert (pool.used_bytes(), pool.total_bytes()) == before


# -------------------------------------------------------------------------------------------------
# cuda.core
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def view_of():
    need("cuda.core")
    memory_view = need("cuda.core.utils").StridedMemoryView
    if not hasattr(memory_view, "__dlpack__"):
        pytest.skip("the views of this cuda.core can be read, but not handed on")
    if hasattr(memory_view, "from_dlpack"):
        return lambda array: memory_view.from_dlpack(array, stream_ptr=-1)
    return lambda array: memory_view(array, stream_ptr=-1)


def test_cuda_core_views_on_the_host(cpu, view_of, layer):
    want = run_layer(cpu, layer)
    views = {name: view_of(array) for name, array in (layer.tensors() | layer.options).items()}
    out = np.full((9, 48), np.nan, F16)
    given, workspace = view_of(out), view_of(np.full(1 << 18, 255, np.uint8))
    assert fused_experts(**views, out=given, workspace=workspace) is given
    assert same_bits(out, want)


def test_cuda_core_bfloat16_as_integers(cpu, view_of, seed):
    layer = make_layer(seed, 9, 48, 32, 4, 2, BF16)
    views = {
        name: view_of(array.view(np.int16) if array.dtype == BF16 else array)
        for name, array in layer.tensors().items()
    }
    out = np.zeros((9, 48), np.int16)
    workspace = view_of(np.full(1 << 18, 255, np.uint8))
    fused_experts(**views, out=view_of(out), workspace=workspace, dtype="bfloat16")
    assert same_bits(out.view(BF16), run_layer(cpu, layer))


def test_cuda_core_allocates_nothing(view_of, layer):
    """Was a MemoryError: its exchange table has an allocator that says it is not implemented."""
    views = {name: view_of(array) for name, array in layer.tensors().items()}
    with pytest.raises(TypeError, match="^out: expected a tensor.*StridedMemoryView$"):
        fused_experts(**views)
    with pytest.raises(TypeError, match="^workspace: expected a tensor.*StridedMemoryView$"):
        fused_experts(**views, out=np.zeros((9, 48), F16))


@pytest.mark.parametrize("name", [name for name in BAD if name != "negative strides"])
def test_cuda_core_bad_input(view_of, layer, name):
    """The exception and the words of the same call with NumPy arrays."""
    arrays = {**layer.tensors(), **layer.options, "out": np.full((9, 48), 7, F16)}
    arrays["workspace"] = np.zeros(1 << 18, np.uint8)
    arguments = {**arrays, **BAD[name](np, arrays)}
    want = failure(lambda: fused_experts(**arguments))
    views = {k: view_of(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    assert failure(lambda: fused_experts(**views)) == want
    assert (arrays["out"] == 7).all()


@pytest.mark.gpu
def test_cuda_core_views_on_a_gpu(gpu, view_of, layer):
    """On a stream of cuda.core, given as it is."""
    tensors = {name: gpu.put(array) for name, array in (layer.tensors() | layer.options).items()}
    out = gpu.empty((9, 48), F16)
    workspace = gpu.empty((1 << 20,), np.uint8)
    core = sys.modules["cuda.core"]
    device_type = getattr(core, "Device", None) or need("cuda.core.experimental").Device
    device = device_type(0)
    device.set_current()
    stream = device.create_stream()
    gpu.synchronize()
    views = {name: view_of(tensor) for name, tensor in tensors.items()}
    fused_experts(**views, out=view_of(out), workspace=view_of(workspace), stream=stream)
    stream.sync()
    want, error = layer.expected()
    assert_close(gpu.get(out), want, error)


# -------------------------------------------------------------------------------------------------
# What is said about the doors
# -------------------------------------------------------------------------------------------------


def test_status():
    version, why = numpy_door.status()
    assert version == np.__version__ and why is None
    for module, name in ((cupy_door, "cupy"), (cuda_core, "cuda-core")):
        version, why = module.status()
        assert version or why == f"{name} is not installed"
        assert module.TESTED.startswith(name)


def test_versions():
    assert versions.release("2.11.0+cu130") == (2, 11, 0)
    assert versions.release("2.13.0a0+git123") == (2, 13, 0)
    assert versions.release("14.2rc1") == (14, 2)
    assert versions.installed("no-such-package") == (None, "no-such-package is not installed")
    version, why = versions.installed("numpy", (99, 1))
    assert version == np.__version__ and why == "99.1 or newer is needed"
    assert versions.installed("no-such-package", alternatives=("numpy",)) == (np.__version__, None)
